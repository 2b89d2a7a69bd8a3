"""Convolutions that pad their input themselves: quantized with that padding, or left in float."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn
from torch.nn import functional as F

import dsconv
from dsconv import nn
from dsconv.errors import FileFormatError
from dsconv.io import checkpoint
from dsconv.layers.conv import same_upper

CONFIG = dsconv.QuantConfig(weight_bits=8, activation_bits=8, block_size=8, first_layer=None)
SIZES = [(9, 9), (9, 12), (10, 11), (12, 16), (31, 18)]


class Same(tnn.Conv2d):
    """TensorFlow's SAME: the padding depends on the size of the input."""

    def pads(self, x: Tensor) -> list[int]:
        border: list[int] = []
        for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            border = [total // 2, total - total // 2, *border]
        return border

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.pads(x))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Static(tnn.Conv2d):
    """Convolution with a layer that pads, and with padding of its own."""

    def __init__(self, *args: Any, border: tuple[int, ...], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.border = tnn.ZeroPad2d(border)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.border(x))


class StandardizedSame(Same):
    """Convolution that also computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, self.pads(x)), weight=weight, bias=self.bias, stride=self.stride)


def layers() -> dict[str, tuple[Any, Any]]:
    """Return layers of 8 channels, and their total padding; None if it is their attribute."""
    return {
        "dynamic": (Same(8, 8, 3, 2), "same_upper"),
        "dynamic, sides that differ": (Same(8, 8, (3, 5), (2, 3), dilation=(2, 1), bias=False), "same_upper"),
        "dynamic, stride beyond the kernel": (Same(8, 8, 2, 3), "same_upper"),
        "dynamic of nothing": (Same(8, 8, 1, 2), None),
        "dynamic, of stride 1": (Same(8, 8, 3), ((1, 1), (1, 1))),
        "dynamic, of stride 1, even": (Same(8, 8, 4), ((1, 2), (1, 2))),
        "dynamic depthwise": (Same(8, 8, 5, 2, groups=8), "same_upper"),
        "dynamic, weight computed": (StandardizedSame(8, 8, 3, 2), "same_upper"),
        "static": (Static(8, 8, 3, 2, border=(0, 1, 0, 1)), ((0, 1), (0, 1))),
        "static and its own": (Static(8, 8, 3, 2, border=(0, 1, 0, 2), padding=1), ((1, 3), (1, 2))),
        "static of nothing": (Static(8, 8, 3, padding=1, border=(0, 0, 0, 0)), None),
    }


@pytest.mark.parametrize("name", layers())
def test_a_layer_that_pads_is_quantized_as_padding_and_the_plain_layer(name: str) -> None:
    torch.manual_seed(0)
    layer, padding = layers()[name]
    model = tnn.Sequential(layer, tnn.ReLU()).eval()
    quantized = dsconv.quantize(model, CONFIG)
    made = quantized[0]
    assert isinstance(made, nn.DSConv2d) and made.given_padding == padding
    plain = nn.DSConv2d(8, 8, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups, config=made.config)
    plain.load_state_dict({"bias": torch.zeros(8)} | made.state_dict())
    for size in SIZES:
        x = torch.randn(2, 8, *size)
        if padding == "same_upper":
            border = layer.pads(x)
        else:
            border = [p for pair in reversed(padding or [layer.padding[:1] * 2] * 2) for p in pair]
        with torch.inference_mode():
            assert torch.equal(quantized(x), plain(F.pad(x, border)).relu())
            expected = model(x)
            assert (quantized(x) - expected).norm() < 0.03 * expected.norm()
            unbatched = made(x[0])
            assert torch.equal(unbatched, made(x)[0])


def test_padding_follows_tensorflow() -> None:
    """Check ceil(input / stride) outputs, with the odd zero at the end, as documented for tf.nn.conv2d."""
    for n in range(1, 12):
        for k, s, d in ((1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 3, 1), (4, 2, 2), (1, 4, 1)):
            ((before, after),) = same_upper((n,), (k,), (s,), (d,))
            assert 0 <= after - before <= 1
            read = d * (k - 1) + 1
            assert before + after == max(0, (math.ceil(n / s) - 1) * s + read - n)
            assert (n + before + after - read) // s + 1 == math.ceil(n / s)


class Reflecting(Same):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias, self.stride)


class Ones(Same):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), self.weight, self.bias, self.stride)


class Cropping(Same):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, -1, 0, -1)), self.weight, self.bias, self.stride)


class Lower(Same):
    """SAME with the odd zero at the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.pads(x)
        return F.conv2d(F.pad(x, (right, left, bottom, top)), self.weight, self.bias, self.stride)


class Remembering(Same):
    """Convolution that pads all inputs like the first one."""

    kept: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.kept or self.pads(x)
        return F.conv2d(F.pad(x, self.kept), self.weight, self.bias, self.stride)


class Twice(Same):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


class Drifting(Same):
    """Convolution with another weight at each call."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= 1.1
        return super().forward(x)


@pytest.mark.parametrize("kind", [Reflecting, Ones, Cropping])
def test_what_is_no_such_padding_is_done_before_the_convolution(kind: type[Same]) -> None:
    model = tnn.Sequential(kind(8, 8, 3, 2), tnn.Conv2d(8, 8, 1)).eval()
    quantized = dsconv.quantize(model, CONFIG)
    assert isinstance(quantized[0].conv2d_weight, nn.DSConv2d) and isinstance(quantized[0], kind)
    x = torch.randn(2, 8, 9, 10)
    with torch.inference_mode():
        assert torch.allclose(quantized(x), model(x), atol=0.5) and not torch.equal(quantized(x), model(x))


@pytest.mark.parametrize("kind", [Lower, Remembering, Twice, Drifting])
def test_what_is_no_such_padding_stays_in_float_with_the_reason(kind: type[Same]) -> None:
    model = tnn.Sequential(kind(8, 8, 3, 2), tnn.Conv2d(8, 8, 1)).eval()
    before = model[0].weight.clone()
    quantized = dsconv.quantize(model, CONFIG)
    assert type(quantized[0]) is kind and isinstance(quantized[1], nn.DSConv2d)
    reason = dsconv.summary(quantized).layers[0].reason
    assert reason == (
        f"its class {kind.__name__} has a forward of its own, which is not a plain layer of another weight or padding"
    )
    assert torch.equal(model[0].weight, before) and getattr(model[0], "kept", None) is None


class Net(tnn.Module):
    """Three layers that pad, one of which is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Same(3, 8, 3, 2)
        self.norm = tnn.BatchNorm2d(8)
        self.depthwise = Static(8, 8, 3, 2, groups=8, bias=False, border=(0, 1, 0, 1))
        self.last = Same(8, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.depthwise(self.norm(self.stem(x)).relu()).relu()).mean((2, 3))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_files_keep_the_padding(device: str, tmp_path: Path) -> None:
    quantized = dsconv.quantize(net())
    path = dsconv.save(quantized, tmp_path / "net.safetensors")
    header = checkpoint.read_header(path)
    stated = {name: record.padding for name, record in header.layers.items()}
    assert stated == {"stem": "same_upper", "depthwise": [[0, 1], [0, 1]], "last": [[1, 1], [1, 1]]}
    with torch.device(device):
        empty = Net()
    again = dsconv.load(path, empty)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            assert torch.equal(again(x), quantized(x))


def test_files_of_other_networks_are_those_that_older_versions_read(tmp_path: Path) -> None:
    quantized = dsconv.quantize(tnn.Sequential(tnn.Conv2d(8, 8, 3, padding=1)), CONFIG)
    path = dsconv.save(quantized, tmp_path / "net.safetensors")
    entries, _ = checkpoint.read_tensors(path, "dsconv", "file", "")
    assert int(entries["format_version"]) < 4 and "padding" not in entries["layers"]


@pytest.mark.parametrize(
    ("layer", "padding", "reason"),
    [
        (tnn.Linear(8, 8), [[0, 1], [0, 1]], "expected None for a DSLinear"),
        (tnn.ConvTranspose2d(8, 8, 3), [[0, 1], [0, 1]], "expected None for a DSConvTranspose2d"),
        (tnn.Conv2d(8, 8, 3), [[0, 1]], "padding: expected it for 2 dimensions"),
        (tnn.Conv2d(8, 8, 3), [[0, 1], [0, 1, 2]], "its header is not valid"),
        (tnn.Conv2d(8, 8, 3), [[0, -1], [0, 1]], "its header is not valid"),
        (tnn.Conv2d(8, 8, 3), [[0, 1 << 16], [0, 1]], "its header is not valid"),
        (tnn.Conv2d(8, 8, 3), "full", "its header is not valid"),
    ],
)
def test_a_file_with_a_padding_that_cannot_be_is_refused(
    layer: tnn.Module, padding: Any, reason: str, tmp_path: Path
) -> None:
    model = tnn.Sequential(layer)
    path = dsconv.save(dsconv.quantize(model), tmp_path / "net.safetensors")
    entries, tensors = checkpoint.read_tensors(path, "dsconv", "file", "")
    records = json.loads(entries["layers"])
    records["0"]["padding"] = padding
    entries |= {"layers": json.dumps(records), "format_version": "4"}
    checkpoint.write(path, tensors, entries | {"checksum": checkpoint.checksum(entries, tensors)})
    with pytest.raises(FileFormatError, match=reason):
        dsconv.load(path, model)


def test_compiled_networks_pad_alike() -> None:
    quantized, x = dsconv.quantize(net()), torch.randn(2, 3, 22, 31)
    compiled = dsconv.compile(quantized, x)
    with torch.inference_mode():
        for size in ((2, 3, 22, 31), (1, 3, 22, 31)):
            x = torch.randn(*size)
            torch.testing.assert_close(compiled(x), quantized(x), rtol=1e-4, atol=1e-5)


def test_exported_programs_follow_the_size_of_the_input() -> None:
    quantized = dsconv.quantize(tnn.Sequential(Same(8, 8, 3, 2), tnn.ReLU()))
    size = {2: torch.export.Dim("height", min=16, max=256), 3: torch.export.Dim("width", min=16, max=256)}
    program = torch.export.export(quantized.eval(), (torch.randn(2, 8, 32, 33),), dynamic_shapes=(size,)).module()
    for height, width in ((16, 17), (33, 40), (64, 64)):
        x = torch.randn(2, 8, height, width)
        with torch.inference_mode():
            assert torch.equal(program(x), quantized(x))


def test_onnx_files_pad_alike(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra dsconv[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra dsconv[onnx]")
    quantized, x = dsconv.quantize(net(), CONFIG), torch.randn(2, 3, 22, 31)
    path = dsconv.export_onnx(quantized, x, tmp_path / "net.onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        expected = quantized(x)
    assert (torch.from_numpy(y) - expected).norm() < 0.01 * expected.norm()


def test_calibration_sees_the_padding() -> None:
    model, images = net(), torch.randn(16, 3, 24, 24)
    quantized = dsconv.quantize(model, dsconv.QuantConfig(block_size=8, weight_rule="balanced"))
    calibrated = dsconv.calibrate(quantized, model, images)
    assert calibrated.stem.given_padding == "same_upper"
    with torch.inference_mode():
        error = [(made(images) - model(images)).norm() for made in (calibrated, quantized)]
    assert error[0] < error[1]
