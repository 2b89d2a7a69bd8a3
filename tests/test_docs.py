"""Documentation is valid: Python blocks run in the order of their page, commands exist, links have targets."""

import importlib.util
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import dsconv
from dsconv import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
TERMINAL = ("", "console", "sh", "bash")
# A comment above a block states its requirements: <!-- needs: MODULE, MODULE -->
BLOCK = re.compile(r"^(?:<!-- needs: (?P<needs>.+?) -->\n+)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.M | re.S)


def terminal(page: Path) -> str:
    """Return the terminal blocks of a page."""
    return "".join(b["text"] for b in BLOCK.finditer(page.read_text("utf-8")) if b["language"] in TERMINAL)


def commands(text: str) -> list[list[str]]:
    """Return the words of each line, from the name of a known program on."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if start := [i for i, word in enumerate(words) if word in ("dsconv", "make", "python")]:
            found.append(words[start[0] :])
    return found


def parse(words: list[str]) -> None:
    """Raise the command line's errors for unknown commands, unknown options and values out of range."""
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("dsconv", words[1:])
    if not words[1].startswith("-"):
        name, command, rest = group.resolve_command(context, words[1:])
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    left_out = []
    for block in BLOCK.finditer(page.read_text("utf-8")):
        if block["language"] == "python":
            missing = [name for name in re.split(r",\s*", block["needs"] or "") if name and not is_there(name)]
            if missing:
                left_out.append(f"a block needs {', '.join(missing)}")
            else:
                line = page.read_text("utf-8")[: block.start("text")].count("\n")
                exec(compile("\n" * line + block["text"], str(page), "exec"), names)
    if left_out:
        pytest.skip("; ".join(left_out))


def is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_pages_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for words in commands(terminal(page)):
        match words:
            case ["dsconv", *_]:
                parse(words)
            case ["make", *targets_and_variables]:
                assert {word for word in targets_and_variables if "=" not in word} <= set(targets), words
            case ["python", script, *_]:
                assert (ROOT / script).is_file(), words


@pytest.mark.parametrize("command", cli._EXAMPLES, ids=lambda command: command.__name__)
def test_commands_in_the_help_exist(command: Callable[..., None]) -> None:
    examples = commands(cli._EXAMPLES[command])
    assert examples
    for words in examples:
        assert words[1] == command.__name__
        parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dsconv quantise x", "quantise"),
        ("dsconv quantize x -o y --bits 4", "--bits"),
        ("dsconv bench x --turns 1", "greater than or equal to 2|range"),
    ],
)
def test_commands_that_do_not_exist_are_found(words: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse(words.split())


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_and_reference_follow_the_code() -> None:
    pages = runpy.run_path(str(ROOT / "scripts" / "docs" / "pages.py"))
    reference = pages["on_page_markdown"]((ROOT / "docs" / "reference.md").read_text("utf-8"))
    public = [name for name in dsconv.__all__ if callable(getattr(dsconv, name))]
    assert {f"heading: dsconv.{name}\n" in reference for name in [*public, "nn.DSConv2d", "data.Preprocess"]} == {True}
    text = pages["on_page_markdown"]((ROOT / "docs" / "commands.md").read_text("utf-8"))
    for command in cli._EXAMPLES:
        assert f"## `dsconv {command.__name__}`" in text
    assert "`dsconv compare`" not in text, "a hidden command"
    assert "--weight-bits" in text and "<!--" not in text + reference


def test_figures_are_made_by_the_script_and_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, ROOT / "scripts" / "make_figures.py", "--out", tmp_path], check=True)
    made, kept = ({file.name for file in folder.iterdir()} for folder in (tmp_path, ROOT / "docs" / "figures"))
    assert made == kept
    assert set(re.findall(r"\(figures/(\S+)\)", (ROOT / "docs" / "method.md").read_text("utf-8"))) == kept


def test_names_of_dsconv_in_docstrings_and_pages_exist() -> None:
    texts = [*(ROOT / "src").rglob("*.py"), ROOT / "CHANGELOG.md"]
    named = re.compile(r":\w+:`~?(dsconv(?:\.\w+)+)`|`(dsconv\.ops(?:\.\w+)+)`")
    wrong = []
    for path in texts:
        for match in named.finditer(path.read_text(encoding="utf-8")):
            try:
                pkgutil.resolve_name(name := match[1] or match[2])
            except (AttributeError, ImportError):
                # Annotations show the fields of a dataclass and the attributes of an instance.
                of, _, attribute = name.rpartition(".")
                try:
                    known = attribute in getattr(pkgutil.resolve_name(of), "__annotations__", {})
                except (AttributeError, ImportError):
                    known = False
                if not known:
                    wrong.append(f"{path.name}: {name}")
    assert not wrong
