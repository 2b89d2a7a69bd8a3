"""The registry of kinds of layers: its entries, and a kind that a test adds in one place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn
from torch.nn import functional as F

import dsconv
from dsconv.io.checkpoint import describe
from dsconv.layers import DSConv1d, DSConv2d
from dsconv.layers.kinds import KINDS, kind_of, register
from dsconv.onnx import OnnxNetwork


class Pointwise(tnn.Module):
    """A layer of a new kind: the same linear map at each position of ``x (N, C, L)``."""

    def __init__(self, inputs: int, outputs: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = tnn.Parameter(torch.randn(outputs, inputs, device=device, dtype=dtype))
        self.bias = tnn.Parameter(torch.zeros(outputs, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight.unsqueeze(2), self.bias)


@pytest.fixture
def pointwise() -> Iterator[None]:
    """Register a kind of layers for :class:`Pointwise`."""

    @register
    class DSPointwise(DSConv1d):
        float_type = Pointwise

        @classmethod
        def float_geometry(cls, layer: Any) -> tuple[Any, ...]:
            return layer.inputs, layer.outputs, 1

        @classmethod
        def float_input_shape(cls, layer: Any, extra: int) -> tuple[int, ...]:
            return 2, layer.inputs, 1 + extra

        @classmethod
        def float_is_depthwise(cls, layer: Any) -> bool:
            return False

        def conv_layout(self, weight: Tensor) -> Tensor:
            return weight.unsqueeze(2)

    yield
    del KINDS["DSPointwise"]


def test_every_public_layer_is_registered_with_the_layer_that_it_replaces() -> None:
    assert {name for name in dsconv.nn.__all__ if name.startswith("DS")} == {*KINDS, "DSLayer"}
    for name, kind in KINDS.items():
        layer = kind.float_type(*[1] * (3 if kind.dims else 2))
        assert kind.float_type.__name__ == name.removeprefix("DS")
        assert kind_of(layer) is kind is type(kind.from_float(layer))
        assert layer(torch.zeros(kind.float_input_shape(layer, 3))).dim() == kind.dims + 2


def test_the_most_specific_kind_is_found_and_none_for_other_modules() -> None:
    class Own(tnn.Conv2d):
        pass

    assert kind_of(Own(1, 1, 1)) is DSConv2d
    assert kind_of(DSConv2d(8, 8, 1)) is kind_of(tnn.ReLU()) is kind_of(None) is None


@pytest.mark.usefixtures("pointwise")
def test_a_new_kind_is_quantized_saved_loaded_and_summarized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = tnn.Sequential(Pointwise(16, 32), tnn.BatchNorm1d(32), tnn.ReLU(), Pointwise(32, 8)).eval()
    qnet = dsconv.fold_batchnorm(dsconv.quantize(net, dsconv.QuantConfig(weight_bits=8, activation_bits=8)))
    again = dsconv.load(dsconv.save(qnet, tmp_path / "net.safetensors"), net)
    x = torch.randn(2, 16, 5)
    with torch.inference_mode():
        assert torch.equal(again(x), qnet(x))
        torch.testing.assert_close(qnet(x), net(x), rtol=0, atol=1)
    rows = dsconv.summary(again).layers
    assert [(row.name, row.kind, row.shape) for row in rows] == [
        ("0", "DSPointwise", (32, 16, 1)),
        ("3", "DSPointwise", (8, 32, 1)),
    ]
    assert describe(tmp_path / "net.safetensors")[1].layers == rows


class Mixer(tnn.Module):
    """A layer of a new kind, with its own attributes and arguments: a linear map at each pixel, without a bias."""

    bias = None

    def __init__(self, names: dict[str, int]):
        super().__init__()
        self.names = names
        self.weight = tnn.Parameter(torch.randn(names["outputs"], names["inputs"]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[..., None, None])


@pytest.fixture
def mixer() -> Iterator[None]:
    """Register a kind of layers for :class:`Mixer`."""

    @register
    class DSMixer(DSConv2d):
        float_type = Mixer

        @classmethod
        def float_geometry(cls, layer: Any) -> tuple[Any, ...]:
            return layer.names["inputs"], layer.names["outputs"], 1, 1, 0, 1, 1, False

        @classmethod
        def float_input_shape(cls, layer: Any, extra: int) -> tuple[int, ...]:
            return 2, layer.names["inputs"], extra, extra

        @classmethod
        def float_is_depthwise(cls, layer: Any) -> bool:
            return False

        def conv_layout(self, weight: Tensor) -> Tensor:
            return weight[..., None, None]

        def dequantized_weight(self) -> Tensor:
            return self.conv_weight().flatten(1)

    yield
    del KINDS["DSMixer"]


def mixers() -> tnn.Sequential:
    torch.manual_seed(0)
    sizes = {"inputs": 3, "outputs": 32}
    return tnn.Sequential(Mixer(sizes), tnn.BatchNorm2d(32), tnn.ReLU(), Mixer({"inputs": 32, "outputs": 8})).eval()


@pytest.mark.usefixtures("mixer")
def test_a_kind_needs_no_attribute_of_pytorchs_layers() -> None:
    net = mixers()
    net[0].place = 7
    tnn.init.uniform_(net[1].weight, 0.1, 10)
    qnet = dsconv.quantize(net, "default")  # whose rule needs the statistics of each input
    assert qnet[3].config.weight_rule == "balanced" and qnet[0].place == 7
    blind = dsconv.quantize(net, dsconv.QuantConfig.preset("default", batchnorm_statistics=False))
    assert not torch.equal(qnet[3].vqk, blind[3].vqk)


@pytest.mark.usefixtures("mixer")
def test_hooks_of_a_container_are_tried_on_an_input_of_its_first_layer() -> None:
    def halve(module: Any, inputs: Any) -> None:
        module[3].weight.data = module[3].weight.data / 2

    net = mixers()
    net.register_forward_pre_hook(halve)
    rows = {row.name: row for row in dsconv.summary(dsconv.quantize(net)).layers}
    assert rows["0"].quantized and "is written by a hook of the model" in str(rows["3"].reason)


@pytest.mark.usefixtures("mixer")
@pytest.mark.parametrize("style", ["qdq", "int8", "float"])
def test_a_kind_with_an_operator_of_onnx_is_exported(tmp_path: Path, style: Any) -> None:
    pytest.importorskip("onnxruntime")
    qnet, x = dsconv.quantize(mixers()), torch.randn(2, 3, 8, 8)
    path = dsconv.export_onnx(qnet, x, tmp_path / "net.onnx", style, images=x if style == "int8" else None)
    with torch.inference_mode():
        expected = qnet(x)
    torch.testing.assert_close(OnnxNetwork(path)(x), expected, rtol=0, atol=expected.abs().max().item() / 20)
