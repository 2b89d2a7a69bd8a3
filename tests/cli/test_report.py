"""``dsconv report``: the page that it writes, and its errors."""

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
from PIL import Image

from dsconv.demo import load_digits

Cli = Callable[..., Any]
NET = "dsconv/digits_resnet"


def test_a_page_of_everything(cli: Cli, tmp_path: Path, quantized_file: Path, digits: Path) -> None:
    bench, out = tmp_path / "bench.json", tmp_path / "page.html"
    assert cli("bench", quantized_file, "--against", "torch", "--turns", "2", "--out", bench).code == 0
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(f"digit {i}" for i in range(10)))
    options = ("--reference", NET, "--data", digits, "--bench", bench, "--classes", classes)
    done = cli("report", quantized_file, "--out", out, *options, "--sensitivity-images", "2", "--runs", "2")
    assert done.code == 0, done.stderr
    assert done.stdout == f"Wrote {out}: {out.stat().st_size:,} bytes.\n"
    text = out.read_text()
    assert "Not measured" not in text and "not shown" not in text
    assert "60 images" in text and str(digits) in text and "digit 8" in text and "digits.safetensors" in text
    assert f"The reference is {NET}" in text and "PyTorch float32" in text
    assert sorted(os.listdir(tmp_path)) == ["bench.json", "classes.txt", "page.html"]

    marked = "measured on a network with other settings"
    found = json.loads(bench.read_text())
    found["networks"][0]["config"]["weight_bits"] = 2
    bench.write_text(json.dumps(found))
    assert cli("report", quantized_file, "--out", out, "--force", "--bench", bench, "--runs", "0").code == 0
    assert marked not in text and marked in out.read_text()


def test_the_figures_of_a_page_for_other_programs(cli: Cli, tmp_path: Path, quantized_file: Path, digits: Path) -> None:
    options = ("--reference", NET, "--data", digits, "--sensitivity-images", "2", "--runs", "2", "--json")
    done = cli("report", quantized_file, "--out", tmp_path / "page.html", *options)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["page"] == str(tmp_path / "page.html") and (tmp_path / "page.html").is_file()
    measured = json.loads(cli("evaluate", quantized_file, "--data", digits, "--reference", NET, "--json").stdout)
    assert found["accuracy"]["kl"] == measured["kl"] and found["images"] == str(digits)
    layer = found["layers"][1]  # the first one reads the image in float
    assert layer["name"] == "layer1.conv1" and sum(layer["exponents"].values()) > 0
    assert max(layer["kl"] for layer in found["layers"]) > 0
    assert layer["weights"]["figures"]["maximum"] and found["profile"]["steps"] and "benches" in found["missing"]
    assert found["summary"]["bytes_after"] < found["summary"]["int8_bytes"] < found["summary"]["bytes_before"]
    assert all("jpeg" not in one for one in found["disagreements"])


def test_a_page_of_the_file_alone(cli: Cli, tmp_path: Path, quantized_file: Path) -> None:
    done = cli("report", quantized_file, "--out", tmp_path / "page.html", "--runs", "2")
    assert done.code == 0, done.stderr
    text = (tmp_path / "page.html").read_text()
    assert f"<code>--reference {NET}</code>" in text and "<code>--data DIR</code>" in text
    assert "Each step of the compiled network</h3>\n<p>Batch of 1" in text  # the file states the size of its images


def test_broken_images_are_left_out_and_named(cli: Cli, tmp_path: Path, quantized_file: Path) -> None:
    images = load_digits()[0]
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        Image.fromarray((images[i, 0] * 255).byte().numpy()).save(data / f"{i}.png")
    (data / "2.png").write_text("no image")
    options = ("--data", data, "--reference", NET, "--runs", "0", "--sensitivity-images", "0")
    done = cli("report", quantized_file, "--out", tmp_path / "page.html", *options)
    assert done.code == 0 and "left out: " in done.stderr and "2.png" in done.stderr
    text = (tmp_path / "page.html").read_text()
    assert "On 3 images" in text and "2.png: cannot identify" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--out {here}/there.html", ["there.html", "--force"]),
        ("--out {here}", ["got a folder"]),
        ("--out {here}/no/such/a.html", ["no/such", "does not exist: create it"]),
        ("--out {here}/a.html --reference {factory}:net", ["no such layer", "'conv1'", "that was quantized"]),
        ("--out {here}/a.html --reference torchvision/resnet5", ["did you mean"]),
        ("--out {here}/a.html --data {here}/none", ["does not exist"]),
        ("--out {here}/a.html --data {here}/empty", ["holds no images"]),
        ("--out {here}/a.html --data {here}/broken", ["none of 1 files can be read", "1.png"]),
        ("--out {here}/a.html --bench {here}/there.html", ["there.html", "dsconv bench --out"]),
        ("--out {here}/a.html --bench {here}/none.json", ["none.json", "No such file"]),
        ("--out {here}/a.html --classes {here}/none.txt", ["none.txt", "No such file"]),
    ],
)
def test_mistakes(
    options: str, expected: list[str], cli: Cli, tmp_path: Path, quantized_file: Path, factory: Path
) -> None:
    (tmp_path / "there.html").write_text("there")
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "1.png").write_text("no image")
    before = sorted(os.listdir(tmp_path))
    done = cli("report", quantized_file, *options.format(here=tmp_path, factory=factory).split())
    assert done.code == 1 and not done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    for text in expected:
        assert text in errors[0], (text, errors[0])
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "there.html").read_text() == "there"


def test_a_float_model_is_no_file(cli: Cli, tmp_path: Path) -> None:
    done = cli("report", NET, "--out", tmp_path / "a.html")
    assert done.code == 1 and NET in done.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize("options", ["--weights random", "--runs 1", "--runs -1", "--limit 0", "--size 8x"])
def test_wrong_usage(options: str, cli: Cli, tmp_path: Path, quantized_file: Path) -> None:
    done = cli("report", quantized_file, "--out", tmp_path / "a.html", *options.split())
    assert done.code == 2 and options.split()[0] in done.stderr and not os.listdir(tmp_path)


def test_force_replaces(cli: Cli, tmp_path: Path, quantized_file: Path) -> None:
    file = tmp_path / "a.html"
    file.write_text("there")
    assert cli("report", quantized_file, "--out", file, "--runs", "0", "--force").code == 0
    assert file.read_text().startswith("<!doctype html>") and os.listdir(tmp_path) == ["a.html"]


def test_a_missing_extra_is_named_before_anything_is_measured(
    cli: Cli, tmp_path: Path, quantized_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = cli("report", quantized_file, "--out", tmp_path / "a.html")
    assert done.code == 1 and "pip install 'dsconv[report]'" in done.stderr and "loading" not in done.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_leaves_nothing(tmp_path: Path, quantized_file: Path, factory: Path) -> None:
    arguments = ["report", quantized_file, "--out", tmp_path / "a.html", "--reference", f"{factory}:waits"]
    command = [sys.executable, "-m", "dsconv", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=interrupts.heeded) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("waiting" in line for line in lines)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in rest and not os.listdir(tmp_path)
