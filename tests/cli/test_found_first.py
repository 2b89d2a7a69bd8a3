"""Mistakes are found together, and before PyTorch is imported."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsconv
import dsconv.cli
import dsconv.errors
from dsconv import zoo
from dsconv.cli.mistakes import Mistakes
from dsconv.names import COMPILED_MAGIC

Cli = Callable[..., Any]

# Runs the command line on each list of arguments, and prints the result and whether PyTorch was imported.
RUNNER = """
import contextlib, io, json, sys
for package in {missing}:
    sys.modules[package] = None
from dsconv.cli import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv = ["dsconv", *arguments]
    code, out, err = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    text = code if isinstance(code, str) else ""
    found.append([1 if text else code, out.getvalue(), err.getvalue() + text, "torch" in sys.modules])
print(json.dumps(found))
"""


def run(*commands: list[Any], missing: tuple[str, ...] = ()) -> list[tuple[int, str, str, bool]]:
    """Return exit code, stdout, stderr and whether PyTorch was imported, for each command."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER.format(missing=missing)],
        input=json.dumps([[str(word) for word in words] for words in commands]),
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "1000", "NO_COLOR": "1", "TERM": "dumb"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(found) for found in json.loads(done.stdout)]  # type: ignore[misc]


@pytest.fixture(scope="module")
def unstated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a quantized file that names no float model and states no preprocessing."""
    from torch import nn

    qnet = dsconv.quantize(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3)), "paper")
    return dsconv.save(qnet, tmp_path_factory.mktemp("files") / "unstated.safetensors")


PREPARATION, NO_DATA, NO_FILE, EXISTS = (
    "the preprocessing of its images",
    "does not exist",
    "there is none",
    "add --force",
)
WRONG = {
    "quantize torchvision/resnet18 --weights none.pt --preset best --crop big --out {there}": (
        "torchvision is not installed: pip install 'dsconv[zoo]'",
        "there is no none.pt",
        "preset: expected one of default",
        "crop: ",
        EXISTS,
    ),
    "evaluate none.safetensors --data none --mean 1,2": (NO_FILE, NO_DATA, "mean must hold"),
    "evaluate none.safetensors --data none --mean 1 --task depth --metric none.py:lost": (
        NO_FILE,
        "task: expected one of classification, segmentation, images, other, got 'depth'",
        "there is no file none.py",
        "--metric compares with --reference",
    ),
    "evaluate {unstated} --data none": ("name it with --model", NO_DATA, PREPARATION),
    "tradeoff {unstated} none.safetensors --data none --out {there}": (
        "name it with --model",
        NO_FILE,
        NO_DATA,
        PREPARATION,
        EXISTS,
        "--out: expected a name that ends in .json or .csv",
    ),
    "bench {unstated} --data none --size 8x --threads 0 --out {there}": (
        "name it with --model",
        NO_DATA,
        PREPARATION,
        "--size: expected",
        "--threads: expected",
        EXISTS,
    ),
    "profile {unstated} --size 8x --config none.json": ("name it with --model", "--size: expected", "none.json"),
    "profile {unstated} --model net.py:make": ("there is no file net.py", "give --size"),
    "report {unstated} --data none --classes no.txt --bench no.json --out {there}": (
        "name it with --model",
        NO_DATA,
        PREPARATION,
        "no.txt",
        "no.json",
        EXISTS,
        "jinja2 is not installed: pip install 'dsconv[report]'",
    ),
    "export {unstated} --style int8 --out {there}": (
        "name it with --model",
        PREPARATION,
        "give --size",
        EXISTS,
        "onnxruntime is not installed: pip install 'dsconv[onnx]'",
    ),
    "sensitivity {unstated} --data none --plot {there}": ("name it with --model", NO_DATA, PREPARATION, EXISTS),
    "search nothing --effective-bits 4 --data none --config none.json --out {there}": (
        "expected torchvision/NAME",
        NO_DATA,
        "none.json",
        EXISTS,
        "highspy is not installed: pip install 'dsconv[search]'",
    ),
    "optimize nothing --kl 1 --time-limit x --resume --out {there}": (
        "expected torchvision/NAME",
        "with --data",
        "--time-limit: expected",
        EXISTS,
        "no previous run to resume",
        "highspy is not installed: pip install 'dsconv[search]'",
    ),
    "calibrate {unstated} --data none --preset paper --resume --out {there}": (
        "name it with --model",
        NO_DATA,
        PREPARATION,
        "has its own settings",
        EXISTS,
        "no calibration to resume",
    ),
    "adapt {unstated} --data none --recipe best --log {there} --out {there}": (
        "name it with --model",
        NO_DATA,
        PREPARATION,
        "recipe: expected one of",
        EXISTS,
    ),
    "inspect none.safetensors": (NO_FILE,),
    "demo --out {there}": ("not a folder that can be written to",),
    "evaluate x --data y --limit 0 --batch-size few": ("--limit", "--batch-size"),
    "quantize --weight-bits 9 --block-size 0": ("MODEL", "--out", "--weight-bits", "--block-size"),
}


def test_all_mistakes_of_a_command_are_named_at_once_and_without_pytorch(unstated: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("there")
    places = {"there": tmp_path / "there", "unstated": unstated}
    commands = [words.format(**places).split() for words in WRONG]
    missing = ("torchvision", "jinja2", "highspy", "onnxruntime")
    wrong = []
    for expected, words, (code, stdout, stderr, torch) in zip(
        WRONG.values(), commands, run(*commands, missing=missing), strict=True
    ):
        assert code in (1, 2) and not stdout and not torch and "Traceback" not in stderr, (words, stderr)
        text = " ".join(stderr.replace("│", " ").split())
        counted = re.search(r"(\d+) mistakes: \(1\) ", text)
        if any(part not in text for part in expected) or len(expected) > (int(counted[1]) if counted else 1):
            wrong.append((expected, text))
    assert not wrong
    assert (tmp_path / "there").read_text() == "there" and os.listdir(tmp_path) == ["there"]


def test_help_and_version_do_not_import_pytorch() -> None:
    names = [command.name or command.callback.__name__ for command in dsconv.cli.app.registered_commands]
    commands = [["--help"], ["--version"], *([name, "--help"] for name in names)]
    for words, (code, stdout, stderr, torch) in zip(commands, run(*commands), strict=True):
        assert (code, torch) == (0, False) and stdout and not stderr, words


def modules_after(*arguments: str, **environment: str) -> tuple[str, set[str]]:
    """Return stdout of ``dsconv`` with ``arguments`` in a new process, and the modules that it imported."""
    code = (
        "import json, sys\n"
        "from dsconv.__main__ import main\n"
        "sys.argv[0] = 'dsconv'\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(json.dumps(list(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )
    return done.stdout, set(json.loads(done.stderr.splitlines()[-1]))


HEAVY = {"torch", "numpy", "pydantic", "safetensors", "PIL", "importlib.metadata", "dsconv.config"}


def test_the_help_of_all_commands_imports_nothing_heavy() -> None:
    stdout, imported = modules_after("--help")
    assert "quantize" in stdout and "dsconv.cli.quantize" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("qua", ["quantize"]),
        ("quantize --weight-r", ["--weight-rule"]),
        ("quantize --weight-rule ", ["paper", "refined", "balanced"]),
        ("evaluate net.safetensors --preset ", []),
        ("bench --preset w", ["w4a4", "w8a8"]),
        ("adapt net.safetensors --recipe ", ["default", "paper"]),
        ("evaluate net.safetensors --task i", ["images"]),
    ],
)
def test_shells_complete_without_pytorch(words: str, expected: list[str]) -> None:
    environment = {"COMP_WORDS": f"dsconv {words}", "COMP_CWORD": str(len(f"{words}|".split()))}
    stdout, imported = modules_after(_DSCONV_COMPLETE="complete_bash", **environment)
    assert stdout.split() == expected
    assert not imported & {"torch", "numpy"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_the_completion_of_each_shell_can_be_printed(shell: str) -> None:
    assert "_DSCONV_COMPLETE" in modules_after(_DSCONV_COMPLETE=f"source_{shell}")[0]


def test_a_lone_mistake_is_said_as_it_is() -> None:
    mistakes = Mistakes()
    assert mistakes.check(int, "3") == 3
    mistakes.end()
    mistakes.check(open, "none/such")
    with pytest.raises(FileNotFoundError):
        mistakes.end()


def test_what_is_no_mistake_of_a_user_is_not_collected() -> None:
    with pytest.raises(ZeroDivisionError):
        Mistakes().check(divmod, 1, 0)


def test_the_names_of_the_package_are_imported_at_first_use() -> None:
    code = (
        "import dsconv, sys\n"
        "assert 'torch' not in sys.modules and set(dsconv.__all__) <= set(dir(dsconv))\n"
        "assert dsconv.QuantConfig().weight_bits == 4 and dsconv.data.Preprocess().scale == 1\n"
        "assert 'torch' not in sys.modules and not hasattr(dsconv, 'no_such_name')\n"
        "for name in dsconv.__all__: assert getattr(dsconv, name) is getattr(dsconv, name), name\n"
        "for name in dsconv.data.__all__: getattr(dsconv.data, name)\n"
        "assert callable(dsconv.bench) and callable(dsconv.compile) and 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import dsconv, torch",
        "import torch, dsconv",
        "import dsconv.numerics",
        "import dsconv.ops",
        "import dsconv; dsconv.numerics.packing",
        "import dsconv; dsconv.data.ImageFolder",
        "import dsconv, importlib.util as u; u.find_spec('torch')",
    ],
)
def test_operators_are_there_as_soon_as_pytorch_is(imports: str) -> None:
    code = f"{imports}; import torch, inspect; torch.ops.dsconv.conv2d; inspect.getsource(torch)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_reference_serves_as_the_model(cli: Cli, tmp_path: Path, digits: Path, factory: Path) -> None:
    file, model = tmp_path / "mine.safetensors", f"{factory}:net"
    assert cli("quantize", model, "--out", file, "--resize", "8x8", "--channels", "gray").code == 0
    assert zoo.preprocess_of(dsconv.load(file, zoo.build(model))) is not None
    options = ("--reference", model)
    short = ("--data", digits, "--limit", 16)
    commands = [
        ("evaluate", file, *short),
        ("tradeoff", file, *short),
        ("sensitivity", file, *short),
        ("calibrate", file, *short, "--out", tmp_path / "a"),
        ("adapt", file, *short, "--steps", 1, "--batch-size", 4, "--out", tmp_path / "b"),
        ("bench", file, *short, "--turns", 2, "--against", "torch"),
        ("report", file, *short, "--runs", 0, "--sensitivity-images", 0, "--out", tmp_path / "c"),
        ("profile", file, "--runs", 2),
    ]
    for command in commands:
        done = cli(*command, *options)
        assert done.code == 0, (command, done.stderr)


NO_IMAGES = "reads no folder of images"
# Options that all commands have, except these.
LACKING = {
    "threads": {"inspect": "runs no network"},
    "device": {
        "quantize": "rounds weights, on the CPU",
        "bench": "times the CPU, on which other runtimes run too",
        "profile": "times the steps of the CPU's program",
        "compile": "writes a file for CPUs",
        "report": "looks into layers and times them, on the CPU",
        "export": "compares with ONNX Runtime, on the CPU",
        "inspect": "runs no network",
        "demo": "shows the integer kernels of the CPU",
    },
    "limit": dict.fromkeys(("quantize", "profile", "compile", "inspect", "demo"), NO_IMAGES),
    "json": {},
    "quiet": {"inspect": "prints its table alone"},
}


@pytest.mark.parametrize("option", LACKING)
def test_options_of_one_name_are_alike_in_every_command(option: str) -> None:
    import typer

    group: Any = typer.main.get_command(dsconv.cli.app)
    commands = {name: command for name, command in group.commands.items() if not command.hidden}
    found = {
        name: parameter
        for name, command in commands.items()
        for parameter in command.params
        if f"--{option}" in parameter.opts
    }
    assert set(commands) - set(found) == set(LACKING[option])
    helps = {parameter.help for name, parameter in found.items() if name != "bench" or option != "threads"}
    assert len(helps) == 1 and len({(parameter.name, *parameter.opts) for parameter in found.values()}) == 1


@pytest.mark.parametrize(
    "words",
    [
        "quantize dsconv/digits_resnet --out {out}/a.safetensors",
        "evaluate {file} --data {digits} --limit 4 --reference dsconv/digits_resnet",
        "tradeoff {file} --data {digits} --limit 4",
        "sensitivity {file} --data {digits} --limit 4",
        "calibrate {file} --data {digits} --limit 8 --out {out}/b.safetensors",
        "adapt {file} --data {digits} --limit 16 --steps 1 --batch-size 4 --out {out}/c.safetensors",
        "report {file} --data {digits} --limit 4 --reference dsconv/digits_resnet --runs 0 --out {out}/d.html",
        "bench {file} --turns 2 --against torch",
        "profile {file} --runs 2",
    ],
)
def test_a_quiet_command_prints_its_figures_alone(
    words: str, cli: Cli, tmp_path: Path, quantized_file: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsconv.progress._FIRST_SECONDS", 0.0)  # for progress lines, which replace a terminal's bar
    arguments = words.format(file=quantized_file, digits=digits, out=tmp_path).split()
    done = cli(*arguments, "--quiet")
    assert done.code == 0 and done.stdout
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
    done = cli(*arguments, *["--force"] * ("--out" in arguments))
    assert done.code == 0 and ("loading" in done.stderr or "building" in done.stderr)
    assert len(done.stderr.splitlines()) > 2 or arguments[0] == "profile"


def test_a_quiet_command_still_warns(cli: Cli, tmp_path: Path, factory: Path, digits: Path) -> None:
    done = cli("quantize", f"{factory}:net", "--out", tmp_path / "a.safetensors", "-q")
    assert done.code == 0
    assert (
        done.stderr
        == f"note: {factory}:net does not state the preprocessing of its images: give --resize, --crop, --mean, "
        + ("--std, --scale or --channels as in its training; options left out keep their defaults\n")
    )
    done = cli("evaluate", tmp_path / "none.safetensors", "--data", digits, "--quiet", "--mean", "0")
    assert done.code == 1 and "none.safetensors" in done.stderr


COMPILED = (
    "evaluate {file} --data {digits}",
    "evaluate {quantized} --reference {file} --data {digits}",
    "tradeoff {file}",
    "bench {file}",
    "profile {file}",
    "compile {file} --out {out}",
    "report {file} --out {out}",
    "export {file} --out {out}",
    "inspect {file}",
    "sensitivity {file}",
    "search {file} --bytes 1 --out {out}",
    "calibrate {file} --data {digits} --out {out}",
    "adapt {file} --data {digits} --out {out}",
    "optimize {file} --bytes 1 --out {out}",
    "quantize {file} --out {out}",
    "quantize dsconv/digits_resnet --weights {file} --out {out}",
)


def test_a_compiled_file_is_recognized(tmp_path: Path, digits: Path, quantized_file: Path) -> None:
    file, out = tmp_path / "net.dsconv", tmp_path / "out"
    file.write_bytes(COMPILED_MAGIC + b"\1" * 4096)
    places = {"file": file, "out": out, "digits": digits, "quantized": quantized_file}
    commands = [words.format(**places).split() for words in COMPILED]
    found = run(*commands)
    names = {command.name or command.callback.__name__ for command in dsconv.cli.app.registered_commands}
    assert {words[0] for words in commands} == names - {"compare", "demo"}
    for words, (code, stdout, stderr, torch) in zip(commands, found, strict=True):
        text = " ".join(stderr.split())
        assert code == 1 and not stdout and not torch, (words, text)
        assert f"{file}: is a compiled network of dsconv compile" in text and "dsconv_runtime" in text, words
        assert "libdsconv" in text and text.count("a compiled network") == 1, words
    with pytest.raises(dsconv.errors.FileFormatError, match="is a compiled network of dsconv compile"):
        dsconv.load(file)


def test_every_option_has_a_help_and_those_of_images_say_units_and_order() -> None:
    import typer

    group: Any = typer.main.get_command(dsconv.cli.app)
    for name, command in group.commands.items():
        options = {parameter.opts[0]: parameter for parameter in command.params}
        assert all(parameter.help for parameter in options.values()), name
        if "--mean" in options:
            for option, words in {
                "--resize": "pixels",
                "--crop": "pixels",
                "--mean": "in the order of --channels",
                "--scale": "white",
                "--channels": "order",
            }.items():
                assert words in options[option].help, (name, option)
                assert "Default " in options[option].help, (name, option)
        if "--size" in options:
            assert "Height and width" in options["--size"].help and "pixels" in options["--size"].help


def test_threads_are_those_that_networks_run_on(cli: Cli, quantized_file: Path, digits: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert cli("evaluate", quantized_file, "--data", digits, "--limit", 2, "--threads", 1).code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
