"""``dsconv tradeoff``: its output, its files, and its errors."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv import zoo

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, network = tmp_path_factory.mktemp("compared"), zoo.build("dsconv/digits_resnet")
    return [dsconv.save(dsconv.quantize(network, name), folder / f"{name}.safetensors") for name in ("paper", "w8a8")]


def test_sizes_and_settings_from_the_files(cli: Cli, files: list[Path]) -> None:
    done = cli("tradeoff", *files)
    assert done.code == 0
    assert "paper W4A4" in done.stdout and "w8a8 W8A8" in done.stdout and "agreement" not in done.stdout


def test_accuracy_time_table_and_picture(cli: Cli, files: list[Path], digits: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "figures.csv", tmp_path / "pareto.png"
    options = ("--data", digits, "--time", "--seconds", 0.05, "--out", out, "--plot", plot, "--json")
    done = cli("tradeoff", *files, *options)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == 60 and [row["name"] for row in found["networks"]] == ["float32", *map(str, files)]
    assert all(row["top1"] > 90 and row["median_ms"] > 0 for row in found["networks"])
    lines = list(csv.DictReader(out.open()))
    assert [float(line["top1"]) for line in lines] == [row["top1"] for row in found["networks"]]
    assert plot.read_bytes().startswith(b"\x89PNG")
    before = out.read_bytes()
    done = cli("tradeoff", *files, *options)
    assert done.code == 1 and "--force" in done.stderr and out.read_bytes() == before
    assert cli("tradeoff", *files, "--out", out, "--force").code == 0
    assert cli("tradeoff", *files, "--out", tmp_path / "f.json").code == 0
    assert len(json.loads((tmp_path / "f.json").read_text())["networks"]) == 2


def test_the_former_name_does_the_same_and_says_so(cli: Cli, files: list[Path]) -> None:
    now, former = cli("tradeoff", *files), cli("compare", *files)
    assert (former.code, former.stdout) == (0, now.stdout)
    (line,) = former.stderr.splitlines()[: -len(now.stderr.splitlines())]
    assert "use dsconv tradeoff" in line
    assert " compare " not in cli("--help").stdout


def test_a_file_of_a_users_own_model(cli: Cli, factory: Path, tmp_path: Path, digits: Path) -> None:
    file = tmp_path / "mine.safetensors"
    assert cli("quantize", f"{factory}:net", "--out", file).code == 0
    done = cli("tradeoff", file)
    assert done.code == 1 and "--model" in done.stderr
    done = cli("tradeoff", file, "--model", f"{factory}:net", "--data", digits, "--resize", "8x8", "--channels", "gray")
    assert done.code == 0 and "KL" in done.stdout


def test_a_file_without_a_reference(cli: Cli, tmp_path: Path, digits: Path) -> None:
    network = zoo.build("dsconv/digits_resnet")
    del network.dsconv_architecture
    file = dsconv.save(dsconv.quantize(network), tmp_path / "unnamed.safetensors")
    done = cli("tradeoff", file, "--data", digits)
    assert done.code == 1 and "name it with --model" in done.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--plot x.png", "--data"),
        ("--weights random", "--data"),
        ("--reference dsconv/digits_resnet", "--data"),
        ("--crop 8", "--data"),
        ("--size 8", "--time"),
        ("--out figures.txt", ".json or .csv"),
        ("--time --size none", "--size"),
        ("--data DIGITS --plot x.txt", "--plot"),
        ("TWICE", "given twice"),
    ],
)
def test_usage(options: str, expected: str, cli: Cli, files: list[Path], digits: Path) -> None:
    words = [str({"DIGITS": digits, "TWICE": files[0]}.get(word, word)) for word in options.split()]
    done = cli("tradeoff", *files, *words)
    assert done.code == 2 and expected in done.stderr


def test_files_of_different_networks_and_broken_ones(
    cli: Cli, files: list[Path], factory: Path, tmp_path: Path, digits: Path
) -> None:
    reference = f"{factory}:net?width=4"
    done = cli("tradeoff", *files, "--data", digits, "--reference", reference)
    assert done.code == 1 and "of different networks" in done.stderr
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files[0].read_bytes()[:-9])
    done = cli("tradeoff", files[0], broken)
    assert done.code == 1 and str(broken) in done.stderr and not done.stdout
