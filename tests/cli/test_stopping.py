"""Ctrl-C and SIGTERM end a command at any time: with their exit code, no traceback, and no partial files."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interrupts
import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send to one process")

# Stops the process once, when it imports the module in the environment, and then fails as C extensions do.
WHILE_IMPORTING = """\
import os, signal, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STOP_AT"]:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), getattr(signal, os.environ["STOP_BY"]))
            except KeyboardInterrupt as error:
                if "FAIL" in os.environ:
                    raise ImportError("initialization failed") from error
                raise
sys.meta_path.insert(0, Stop())
"""
AT_EXIT = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"


def run(folder: Path, customized: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(customized)
    return subprocess.run(
        [sys.executable, "-m", "dsconv", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        preexec_fn=interrupts.heeded,
        timeout=240,
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("module", ["typer", "torch", "safetensors"])
def test_a_command_may_be_stopped_while_it_imports(
    module: str, name: str, code: int, fails: bool, tmp_path: Path, quantized_file: Path
) -> None:
    more = {"FAIL": "1"} if fails else {}
    done = run(tmp_path, WHILE_IMPORTING, "inspect", quantized_file, STOP_AT=module, STOP_BY=name, **more)
    assert done.returncode == code and not done.stdout and "Traceback" not in done.stderr, done.stderr


def test_what_is_done_stays_done_when_it_is_stopped_at_its_exit(tmp_path: Path, quantized_file: Path) -> None:
    done = run(tmp_path, AT_EXIT, "inspect", quantized_file, "--json")
    assert done.returncode == 0 and done.stdout and not done.stderr
    done = run(tmp_path, AT_EXIT, "inspect", tmp_path / "none")
    assert done.returncode == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_training_that_is_ended_leaves_its_state_and_no_partial_file(
    name: str, code: int, tmp_path: Path, quantized_file: Path, digits: Path
) -> None:
    out, log = tmp_path / "out.safetensors", tmp_path / "log.csv"
    options = ["--data", digits, "--out", out, "--log", log, "--steps", "100000", "--batch-size", "8"]
    command = [sys.executable, "-m", "dsconv", "adapt", quantized_file, *options]
    with subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, preexec_fn=interrupts.heeded
    ) as process:
        since = time.monotonic()
        while not log.exists():
            assert process.poll() is None and time.monotonic() - since < 200
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        assert process.stderr is not None
        rest = process.stderr.read()
    assert process.returncode == code and "Traceback" not in rest, rest
    assert f"stopped: progress is saved in {out}.state" in rest
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "out.safetensors.state"]


@pytest.mark.parametrize("command", ["quantize dsconv/digits_resnet --preset paper --out", "demo --out"])
def test_no_command_replaces_what_is_no_file(command: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    pipe = tmp_path / "digits_resnet-w4a8.safetensors"
    os.mkfifo(pipe)
    given = [*command.split(), tmp_path] if "demo" in command else [*command.split(), pipe, "--force"]
    done = cli(*given)
    assert done.code == 1 and "expected the name of a file to write, got a pipe" in done.stderr
    assert pipe.is_fifo() and os.listdir(tmp_path) == [pipe.name]


def test_a_bug_says_that_it_is_one(tmp_path: Path, quantized_file: Path) -> None:
    done = run(tmp_path, "import dsconv.io\ndsconv.io.describe = lambda path: 1 / 0\n", "inspect", quantized_file)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert done.stderr.rstrip().endswith("error: this is a bug in dsconv: please report it with the lines above")


def test_names_that_the_terminal_cannot_show_are_printed_as_escapes(tmp_path: Path, quantized_file: Path) -> None:
    name = tmp_path / "größe.safetensors"
    name.write_bytes(quantized_file.read_bytes())
    done = run(tmp_path, "", "inspect", name, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "gr\\xf6\\xdfe.safetensors" in done.stdout
    name = name.rename(tmp_path / os.fsdecode(b"\xff"))
    done = run(tmp_path, "", "inspect", name)
    assert done.returncode == 1 and "UTF-8" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "where", "what"),
    [
        ("Fails", "mine.py", "no attribute 'missing'"),
        ("fails_in_torchvision", "alexnet.py", "no attribute 'features'"),
    ],
)
def test_an_error_in_the_forward_of_a_network_is_no_bug_of_dsconv(
    name: str, where: str, what: str, cli: Callable[..., Any], factory: Path, digits: Path
) -> None:
    if name != "Fails":
        pytest.importorskip("torchvision", reason="needs the extra 'zoo'")
    prepared = ("--resize", "8x8", "--crop", "none", "--channels", "gray")
    done = cli("evaluate", f"{factory}:{name}", "--data", digits, *prepared)
    last = done.stderr.splitlines()[-1]
    assert done.code == 1 and last.startswith("error: the network itself failed, in ")
    assert f"{where}:" in last and what in last
