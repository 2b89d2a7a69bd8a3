"""Models that return dataclasses: every function accepts them, or states in one sentence what to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv.errors import ModelError
from dsconv.evaluation.outputs import named_outputs

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Named:
    """The logits are not the first tensor."""

    features: Any
    logits: Any


@dataclass
class First:
    """The logits are the first tensor, after a field that is not a tensor."""

    loss: Any
    scores: Any


@dataclass
class Registered:
    logits: Any
    features: Any


class Opaque:
    """Class that hides its tensors."""

    def __init__(self, logits: Tensor):
        self.held = logits


class Net(tnn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.conv, self.head, self.kind = tnn.Conv2d(3, 8, 3), tnn.Linear(8, 4), kind

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x)
        logits = self.head(features.mean((2, 3)))
        fields = {"features": features, "logits": logits, "loss": None, "scores": logits}
        if self.kind is Opaque:
            return Opaque(logits)
        if self.kind is Tensor:
            return logits
        return self.kind(**{name: fields[name] for name in self.kind.__dataclass_fields__})


def net(kind: type) -> Net:
    torch.manual_seed(0)
    return Net(kind).eval()


@pytest.mark.parametrize("kind", [Named, First])
def test_dataclasses_of_logits_are_taken_as_the_logits(kind: type) -> None:
    model, plain = net(kind), net(Tensor)
    found = []
    for original in (model, plain):
        quantized = dsconv.quantize(original, "w4a4")
        adapted = dsconv.adapt(quantized, original, X, recipe={"steps": 1, "batch_size": 8})
        made = quantized, dsconv.calibrate(quantized, original, X), adapted
        found.append([dsconv.compare(original, one, X[:8]).kl for one in made])
        assert dsconv.evaluate(original, X[:4]).images == 4
    assert found[0] == found[1]


def test_classes_that_hide_their_tensors_are_named_with_what_to_do(tmp_path: Path) -> None:
    quantized = dsconv.quantize(net(Opaque), "w8a8")
    with pytest.raises(ModelError, match=r"returns Opaque, whose tensors cannot be determined: return tensors"):
        dsconv.compile(quantized, X[:1])
    pytest.importorskip("onnxscript", reason="needs the extra dsconv[onnx]")
    with pytest.raises(ModelError, match=r"returns Opaque, whose tensors cannot be determined: return tensors"):
        dsconv.export_onnx(quantized, X[:1], tmp_path / "net.onnx")


@pytest.mark.parametrize("kind", [Named, Registered])
def test_dataclasses_are_compiled(kind: type) -> None:
    if kind is Registered:
        torch.export.register_dataclass(Registered)
    quantized = dsconv.quantize(net(kind), "w8a8")
    with torch.inference_mode():
        y, expected = dsconv.compile(quantized, X)(X), quantized(X)
    assert type(y) is kind
    assert torch.equal(y.logits, expected.logits) and torch.equal(y.features, expected.features)


def test_an_output_without_tensors_is_named() -> None:
    model = net(Opaque)
    quantized = dsconv.quantize(model, "w8a8")
    expected = "expected a tensor, or a container or dataclass of tensors, as output, got Opaque"
    with pytest.raises(ModelError, match=f"reference: {expected}"):
        dsconv.compare(model, quantized, X)
    with pytest.raises(ModelError, match=f"teacher: {expected}"):
        dsconv.adapt(quantized, model, X, recipe={"steps": 1, "batch_size": 8})


def test_tensors_are_found_in_nested_outputs_and_named() -> None:
    a, b, c = torch.zeros(3, 1).unbind()
    found = named_outputs({"x": [First(None, (a,))], "y": Named(b, {"z": c}), "n": 3})
    assert list(found) == ["x.0.scores.0", "y.features", "y.logits.z"]
    assert [t is u for t, u in zip(found.values(), (a, b, c), strict=True)] == [True] * 3
