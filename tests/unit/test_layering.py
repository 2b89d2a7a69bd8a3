"""Imports go down the list in CONTRIBUTING.md: between packages, and without cycles between files."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dsconv"


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, modules: Mapping[str, object]) -> Iterator[str]:
    """Yield the names of modules of dsconv that a file imports, also in functions, or names for a later import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [name if (name := f"{node.module}.{a.name}") in modules else str(node.module) for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if "." in node.value else []
        else:
            continue
        yield from (name for name in names if name in modules)


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    return {name: {*imported(ast.parse(text), sources)} - {name} for name, text in sources.items()}


def room(module: str) -> str:
    """Return the package or file directly under dsconv."""
    return [*module.split("."), "__init__"][1]


def levels() -> dict[str, int]:
    """Return the levels of packages in the list in CONTRIBUTING.md; 0 is the lowest."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("src/dsconv/\n")[2].splitlines()
    found: dict[str, int] = {}
    level = 0
    for line in lines:
        if not line.startswith("  "):
            break
        if line.strip() == "\u2193":
            level -= 1
        else:
            name = line.split()[0].removesuffix("/")
            assert name not in found, f"CONTRIBUTING.md lists {name} twice"
            found[name] = level
    return found


def faults(sources: Mapping[str, str]) -> list[str]:
    """Return imports that go up or stay on a level, and cycles of files."""
    height, arrows = levels(), graph(sources)
    wrong = [
        f"{importer} imports {name}"
        for importer, names in arrows.items()
        for name in names
        if room(importer) != room(name) and height[room(importer)] <= height[room(name)]
    ]
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        wrong.append("circle: " + ", ".join(error.args[1]))
    return wrong


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module_of(path): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def test_the_list_is_complete(sources: dict[str, str]) -> None:
    assert set(levels()) == {room(module) for module in sources}


def test_imports_go_down_the_list_and_in_no_circle(sources: dict[str, str]) -> None:
    assert sum(map(len, graph(sources).values())) > 300
    assert faults(sources) == []


def test_only_backends_know_by_what_layers_are_executed(sources: dict[str, str]) -> None:
    insides = {
        name
        for name in sources
        if name.startswith(("dsconv.backends.cpu", "dsconv.backends.simulate", "dsconv.backends.cuda"))
    }
    insides |= {"dsconv.ops.cpu", "dsconv.ops.native", "dsconv.ops.packing", "dsconv.ops.rounding"}
    known = {importer: names & insides for importer, names in graph(sources).items()}
    assert len(insides) == 14
    assert {room(importer) for importer, names in known.items() if names} == {"backends", "ops"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dsconv.layers.conv", "import dsconv.zoo"),
        ("dsconv.layers.conv", "def f():\n    from dsconv import hub"),
        ("dsconv.layers.conv", "importlib.import_module('dsconv.io.checkpoint')"),
        ("dsconv.calibration.report", "from dsconv.mixed import search"),
        ("dsconv.layers.readonly", "from dsconv.layers.conv import DSConv2d"),
        ("dsconv.numerics.scales", "from dsconv.numerics import dequantize_weight"),
    ],
)
def test_an_import_of_the_wrong_direction_is_found(module: str, line: str, sources: dict[str, str]) -> None:
    assert faults({**sources, module: f"{sources[module]}\n{line}\n"})
