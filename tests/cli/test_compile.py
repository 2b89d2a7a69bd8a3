"""``dsconv compile``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsconv.ops import native

Cli = Callable[..., Any]
pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def test_help_has_an_example(cli: Cli) -> None:
    done = cli("compile", "--help")
    assert done.code == 0 and "dsconv compile" in done.stdout.split("Examples:")[1]


def test_a_file_and_the_steps_in_it(cli: Cli, tmp_path: Path) -> None:
    out, names = tmp_path / "digits.dsconv", tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {i}" for i in range(10)))
    done = cli("compile", "dsconv/digits_resnet", "--out", out, "--classes", names)
    assert done.code == 0, done.stderr
    sizes = "for batches of any size and images of 1x8x8; and of other heights and widths."
    last = f"Wrote {out}: {out.stat().st_size:,} bytes, {sizes}"
    assert done.stdout.splitlines()[-1] == last and "integers (" in done.stdout
    assert done.stderr.splitlines()[-1] == "compiling"


def test_several_sizes_and_a_fast_start(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "digits.dsconv"
    sizes = ("--size", "1x8x8", "--size", "1x12x16")
    done = cli("compile", "dsconv/digits_resnet", "--out", out, *sizes, "--fast-start", "--no-other-sizes", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sizes"] == [[1, 8, 8], [1, 12, 16]] and found["size_step"] == 0
    assert found["file_bytes"] == out.stat().st_size
    assert found["preprocess"]["channels"] == "gray" and found["steps"] > 5


def test_steps_of_pytorch_are_listed_and_nothing_is_written(cli: Cli, quantized_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.dsconv"
    done = cli("compile", quantized_file, "--out", out)
    assert done.code == 1 and "PyTorch computes" in done.stderr and "aten.linear" in done.stderr
    assert not out.exists()


def test_wrong_arguments_are_told_together(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "digits.dsconv"
    out.write_text("of another")
    done = cli(
        "compile", "nothing.safetensors", "--out", out, "--size", "8x", "--size", "9", "--classes", tmp_path / "no"
    )
    assert done.code != 0
    for told in ("--size: expected", "add --force", "nothing.safetensors", "no"):
        assert told in done.stderr
    assert out.read_text() == "of another"
    done = cli("compile", "dsconv/digits_resnet", "--out", tmp_path / "missing" / "digits.dsconv")
    assert done.code == 1 and "does not exist" in done.stderr
