"""``dsconv export``."""

import json
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

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")

Cli = Callable[..., Any]


def test_help_has_an_example(cli: Cli) -> None:
    done = cli("export", "--help")
    assert done.code == 0 and "dsconv export" in done.stdout.split("Examples:")[1]


def test_a_file_in_a_process_of_its_own(dsconv_cli: Cli, quantized_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.onnx"
    done = dsconv_cli("export", quantized_file, "--out", out, "--style", "qdq")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Wrote {out}: {out.stat().st_size:,} bytes, style qdq, opset 21.\n"
    assert done.stderr.splitlines() == [f"loading {quantized_file}", "exporting as qdq"]
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_images_tell_ranges_and_how_close_the_file_is(
    cli: Cli, quantized_file: Path, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "digits.onnx"
    arguments = ("export", quantized_file, "--out", out, "--style", "int8", "--data", digits)
    done = cli(*arguments, "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["style"] == "int8" and found["file_bytes"] == out.stat().st_size
    assert found["comparison"]["images"] == 32 and found["comparison"]["agreement"] >= 80
    assert found["comparison"]["kl"] > 0
    done = cli(*arguments, "--force", "--full-range")
    assert done.code == 0 and "agreement" in done.stdout and "KL" in done.stdout
    assert {entry.key: entry.value for entry in onnx.load(out).metadata_props}["dsconv.full_range"] == "true"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("{file} --out {tmp}/a.onnx --style int4", 2, "int4"),
        ("{file} --out {tmp}/a.onnx --opset 20", 1, "opset: expected 21 to"),
        ("{file} --out {tmp}/a.onnx --full-range", 2, "--full-range applies to --style int8 only"),
        ("{file} --out {tmp}/no/a.onnx", 1, "no does not exist: create it"),
        ("{file} --out {tmp}", 1, "got a folder"),
        ("{file} --out {file}", 1, "add --force"),
        ("{tmp}/none.safetensors --out {tmp}/a.onnx", 1, "there is none"),
        ("{file} --out {tmp}/a.onnx --data {tmp}/none", 1, "does not exist"),
        ("{file} --out {tmp}/a.onnx --size 3x8x8", 1, "cannot be exported for an input of (1, 3, 8, 8)"),
        ("{file} --out {tmp}/a.onnx --size big", 2, "--size"),
    ],
)
def test_mistakes(arguments: str, code: int, expected: str, cli: Cli, quantized_file: Path, tmp_path: Path) -> None:
    before = quantized_file.read_bytes()
    done = cli("export", *arguments.format(file=quantized_file, tmp=tmp_path).split())
    assert done.code == code and not done.stdout
    assert expected in " ".join(done.stderr.replace("│", " ").split())
    assert not os.listdir(tmp_path) and quantized_file.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no POSIX signal here")
def test_ctrl_c_leaves_the_old_file_and_no_part(quantized_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    out.write_text("the old one")
    command = [sys.executable, "-m", "dsconv", "export", str(quantized_file), "--out", str(out), "--force"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=interrupts.heeded) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "exporting" in line:
                break
        time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, rest = running.communicate(timeout=60)
    assert running.returncode == 130, rest
    assert out.read_text() == "the old one" and os.listdir(tmp_path) == ["a.onnx"]
