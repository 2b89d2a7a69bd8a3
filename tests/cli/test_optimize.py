"""``dsconv optimize``: its output, its files, and its errors."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsconv
from dsconv import QuantConfig, zoo
from dsconv.optimization import steps

Cli = Callable[..., Any]
PREPARED = ("--resize", "8x8", "--channels", "gray")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timing of networks."""
    monkeypatch.setattr(steps, "_TIMED_SECONDS", 0.001)


@pytest.fixture
def model(factory: Path, tmp_path: Path) -> tuple[str, ...]:
    """Return the options for a small network of the user, with fixed weights, and for its preprocessing."""
    weights = tmp_path / "weights.pt"
    name = f"{factory}:net"
    if not weights.exists():
        import torch

        torch.manual_seed(0)
        torch.save(zoo.build(name).state_dict(), weights)
    return (name, "--weights", str(weights), *PREPARED)


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"weights.pt"}


def test_file_settings_and_report_are_written(cli: Cli, model: tuple[str, ...], digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    done = cli("optimize", *model, "--data", digits, "--effective-bits", 6, "--out", out, "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["met"] and found["images"] == {"steps": 30, "measured": 30} and found["file"] == str(out)
    assert written(tmp_path) == {"net.safetensors", "net.json", "net.html"}
    best = next(row for row in found["attempts"] if row["name"] == found["best"])
    config = QuantConfig.from_json((tmp_path / "net.json").read_text())
    assert config == QuantConfig(**best["config"])
    qnet = dsconv.load(out, zoo.build(model[0]))
    assert dsconv.summary(qnet).effective_bits == best["effective_bits"] <= 6
    assert zoo.preprocess_of(qnet) is not None and found["reference"]["top1"] is not None
    page = (tmp_path / "net.html").read_text()
    assert "agreement" in page and all(f"<td>{row['name']}</td>" in page for row in found["attempts"])
    assert all(row["name"] in done.stderr for row in found["attempts"])
    # The file exists: it is replaced only with --force.
    done = cli("optimize", *model, "--data", digits, "--effective-bits", 6, "--out", out)
    assert done.code == 1 and done.stderr.count("the file exists") == 3


def test_without_images(cli: Cli, model: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    done = cli("optimize", *model, "--effective-bits", 6, "--out", out)
    assert done.code == 0, done.stderr
    assert "of noise" in done.stdout and "kept" in done.stdout
    command = done.stdout.split("without the search: ")[1].split()
    assert command[:2] == ["dsconv", "quantize"] and str(tmp_path / "net.json") in " ".join(command)
    again = tmp_path / "again.safetensors"
    assert cli("quantize", *model, "--config", tmp_path / "net.json", "--out", again).code == 0
    a, b = (dsconv.load(path, zoo.build(model[0])).state_dict() for path in (out, again))
    assert all(a[name].equal(b[name]) for name in a)


def test_a_target_that_cannot_be_met(cli: Cli, model: tuple[str, ...], digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    done = cli("optimize", *model, "--data", digits, "--kl", 1e-12, "--effective-bits", 5, "--out", out)
    assert done.code == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: budget or target is not met: KL divergence is ") and str(out) in last
    assert "misses target" in done.stdout or "kept" in done.stdout
    assert written(tmp_path) == {"net.safetensors", "net.json", "net.html"}


def test_what_was_stopped_is_resumed(
    cli: Cli, model: tuple[str, ...], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "net.safetensors"
    command = ("optimize", *model, "--data", digits, "--effective-bits", 6, "--out", out)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "calibrate", stop)
        done = cli(*command)
    assert done.code == 130 and f"stopped: progress is saved in {out}.state" in done.stderr
    assert written(tmp_path) == {"net.safetensors.state"}
    done = cli(*command)
    assert done.code == 1 and "add --resume" in done.stderr
    done = cli(*command, "--resume")
    assert done.code == 0, done.stderr
    assert written(tmp_path) == {"net.safetensors", "net.json", "net.html"}
    done = cli(*command, "--resume", "--force")
    assert done.code == 1 and "leave out --resume" in done.stderr


def test_a_broken_image_is_left_out_and_told(cli: Cli, model: tuple[str, ...], digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(digits, folder)
    (folder / "3.png").write_bytes(b"no picture")
    out = tmp_path / "net.safetensors"
    done = cli(
        "optimize", *model, "--data", folder, "--effective-bits", 8, "--time-limit", "1s", "--out", out, "--json"
    )
    assert done.code == 0, done.stderr
    assert "1 files could not be read" in done.stderr and "3.png" in done.stderr
    assert sum(json.loads(done.stdout)["images"].values()) == 59


def test_without_the_extra_there_is_no_report_and_that_is_told(
    cli: Cli, model: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "jinja2" else find_spec(name, *rest)
    )
    done = cli("optimize", *model, "--effective-bits", 8, "--time-limit", "1s", "--out", tmp_path / "net.safetensors")
    assert done.code == 0, done.stderr
    assert "no report: jinja2 is not installed: pip install 'dsconv[report]'" in done.stderr
    assert written(tmp_path) == {"net.safetensors", "net.json"}


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        ("--kl 0.1", 2, "give a folder of them, with --data"),
        ("--classes names.txt", 2, "--classes are those of the images"),
        ("--time-limit soon", 2, "--time-limit: expected a time above 0 as 90s, 10m or 2h, or none, got 'soon'"),
        ("--time-limit 0m", 2, "--time-limit: expected"),
        ("--agreement 101", 2, "--agreement"),
        ("--data none", 1, "the image folder none does not exist"),
        ("--out none/net.safetensors", 1, "the folder none does not exist: create it"),
        ("--out net.json", 2, "--out: expected a name as net.safetensors"),
        ("--resume", 1, "there is no previous run to resume"),
        ("--effective-bits 0", 1, "budget: effective_bits"),
        ("--data UNLABELLED --top1-drop 1", 1, "top1_drop needs labels"),
    ],
)
def test_wrong_arguments(
    options: str, code: int, expected: str, cli: Cli, model: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    unlabelled = tmp_path / "unlabelled"
    shutil.copytree(digits, unlabelled)
    (unlabelled / "labels.csv").unlink()
    before = written(tmp_path)
    words = [str({"UNLABELLED": unlabelled}.get(word, word)) for word in options.split()]
    done = cli("optimize", *model, "--out", tmp_path / "net.safetensors", *words)
    assert done.code == code and expected in " ".join(done.stderr.split())
    assert written(tmp_path) == before and "Traceback" not in done.stderr
