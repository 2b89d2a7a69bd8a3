"""Measures of networks that are not classifiers, and custom metrics, in commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import dsconv
from dsconv import zoo

Cli = Callable[..., NamedTuple]

MODELS = """
import torch
from torch import nn

preprocess = {"channels": "gray"}

def maps():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))

def largest(f, q, labels):
    assert len(labels) == len(f)
    return {"largest": (f - q).flatten(1).abs().amax(1), "images": len(f)}

def fails(f, q, labels):
    raise KeyError("boxes")
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path / "models.py"


def test_sensitivity_by_the_divergence_of_pixels_and_by_a_metric(cli: Cli, models: Path, digits: Path) -> None:
    command = ["sensitivity", f"{models}:maps", "--preset", "w4a4", "--data", digits, "--limit", 4, "--json"]
    plain = json.loads(cli(*command).stdout)
    own = json.loads(cli(*command, "--metric", f"{models}:largest").stdout)
    assert plain["measure"] == "KL divergence" and own["measure"] == "largest"
    assert [trial["kl"] for trial in own["trials"]] == pytest.approx([trial["kl"] for trial in plain["trials"]])
    assert all(trial["metric"] > 0 for trial in own["trials"])
    other = json.loads(cli(*command, "--task", "other").stdout)
    assert other["measure"] == "relative error" and other["trials"][0]["kl"] is None


def test_evaluate_and_tradeoff(cli: Cli, models: Path, digits: Path, tmp_path: Path) -> None:
    file = dsconv.save(dsconv.quantize(zoo.build(f"{models}:maps"), "w4a4"), tmp_path / "maps.safetensors")
    rest = ["--reference", f"{models}:maps", "--data", digits, "--metric", f"{models}:largest"]
    found = cli("evaluate", file, *rest)
    for part in ("task: segmentation", "mIoU", "largest"):
        assert part in found.stdout
    rows = json.loads(cli("tradeoff", file, *rest, "--json").stdout)["networks"]
    assert rows[1]["measure"] == "largest" and rows[1]["distance"] > 0 and rows[1]["agreement"] > 50
    failed = cli("evaluate", file, *rest[:-1], f"{models}:fails")
    named = "metric fails: for the batch of images 0 to 31, it raised KeyError: 'boxes'"
    assert failed.code == 1 and named in failed.stderr
    missing = cli("evaluate", file, *rest[:-1], f"{models}:smallest")
    assert missing.code == 1 and f"{models} has no metric 'smallest'" in missing.stderr
