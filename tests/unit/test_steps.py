"""benchmarks/steps.py: networks that cannot be compiled are rows of its table like others."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from dsconv import zoo
from dsconv.ops import native

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import steps

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise OSError("in two\nlines")


def test_steps_are_counted_by_who_executes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = {
        "alone": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        "not": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanhshrink(), nn.Tanhshrink()),
        "fails": nn.Sequential(nn.Conv2d(3, 8, 3), Fails()),
    }
    monkeypatch.setattr(zoo, "build", lambda name, weights: networks[name].eval())
    alone, other, failed = (steps.count(name, 9) for name in networks)
    assert alone == steps.Counted("alone", 9, 1, Counter(), "")
    assert other.by_pytorch["tanh"] == 2 and other.steps == 1 + other.by_pytorch.total()
    assert failed.steps == 0 and failed.note.startswith("failed: ") and "\n" not in failed.note
    text = steps.summary([alone, other, failed])
    assert text.startswith(f"2 networks of {alone.steps + other.steps} steps") and "1 could not be compiled" in text
    assert "| tanh | 2 | 1 |" in steps.by_operator([alone, other, failed]).splitlines()
    assert len(steps.by_network([alone, other, failed]).splitlines()) == 5
