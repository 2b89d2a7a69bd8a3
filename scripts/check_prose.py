"""Check the prose of the repository: the length of lines of Markdown, and the first words of docstrings.

Tables, lone links and code may be longer. Prints each violation with file and line, and exits with 1 if there is one.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

WIDTH = 120
# A docstring says what something is or does: "Return ...", "Largest error of ...".
NO_BEGINNING = re.compile(r"(Of|What|Where|That|Which|Who|Whose|How|It|As)\b")


def long_lines(path):
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        breakable = " " in line.strip() and not line.lstrip().startswith(("|", "!["))
        if len(line) > WIDTH and breakable and not fenced:
            yield number, f"{len(line)} characters; wrap at {WIDTH}"


def odd_docstrings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            text = ast.get_docstring(node)
            if text and (word := NO_BEGINNING.match(text)):
                yield node.body[0].lineno, f"the docstring begins with {word[0]!r}; begin with a verb or a noun"


def main():
    tracked = subprocess.run(["git", "ls-files", "*.md", "*.py"], capture_output=True, text=True, check=True)
    wrong = 0
    for path in map(Path, tracked.stdout.splitlines()):
        for line, what in (long_lines if path.suffix == ".md" else odd_docstrings)(path):
            print(f"{path}:{line}: {what}")
            wrong += 1
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
