"""Other number formats, applied to networks: the baselines of ``accuracy.py``.

Every convolution and linear layer is quantized, including the first and the last, weights and activations. All formats
are simulated in float32, except ``ONNX Runtime int8``, which that runtime executes.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.benchmarking.peers import OnnxModels
from dsconv.errors import import_extra
from dsconv.onnx import int8

Rounding = Callable[[Tensor], Tensor]
"""Rounds the last dimension of a tensor, whose values share their scales."""


@dataclass(frozen=True)
class Baseline:
    """A number format.

    Attributes:
        name: of the format.
        bits: bits of a weight without scales.
        block: number of weights that share a scale; None means all weights of an output.
        scale_bits: bits of a scale.
        make: function that returns the network in that format, from the float network and unlabelled images
        ``(N, C, H, W)``.
    """

    name: str
    bits: int
    block: int | None
    scale_bits: int
    make: Callable[[nn.Module, Tensor], nn.Module]

    def sizes(self, network: nn.Module) -> dict[str, float]:
        """Return effective bits per weight of all layers, including scales, and megabytes of the whole network."""
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        weights = sum(layer.weight.numel() for layer in layers)
        reads = [layer.weight[0].numel() for layer in layers]
        scales = sum(
            len(layer.weight) * math.ceil(n / (self.block or n)) for layer, n in zip(layers, reads, strict=True)
        )
        bits = self.bits * weights + self.scale_bits * scales
        others = sum(tensor.numel() for tensor in network.state_dict().values()) - weights
        return {
            "effective_bits": bits / weights,
            "effective_bits_quantized": bits / weights,
            "megabytes": (bits / 8 + 4 * others) / 1e6,
        }


def shared_exponent(x: Tensor, block: int, largest: int, element: Rounding) -> Tensor:
    """Round to an MX format: blocks of ``block`` values share a power of two, which makes the top exponent ``largest``.

    Source: "OCP Microscaling Formats (MX) Specification", version 1.0, section 6.3.
    """
    blocks = in_blocks(x, block)
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1 - largest
    return joined(torch.ldexp(element(torch.ldexp(blocks, -exponent)), exponent), x)


def nvfp4(x: Tensor) -> Tensor:
    """Round to E2M1 in blocks of 16 with an E4M3 scale each, and one float32 scale for the tensor.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, appendix on the format.
    """
    blocks = in_blocks(x, 16)
    largest = blocks.abs().amax(-1, keepdim=True) / 6
    whole = (largest.max() / 448).clamp_min(torch.finfo(torch.float32).tiny)
    scale = (largest / whole).to(torch.float8_e4m3fn).float() * whole
    return joined(torch.where(scale > 0, e2m1(blocks / scale) * scale, 0), x)


def integer(bits: int, unit: float) -> Rounding:
    """Return the rounding to two's complement numbers of ``bits``, in steps of ``unit``, without the least one."""
    most = (1 << (bits - 1)) - 1
    return lambda x: (x / unit).round().clamp(-most, most) * unit


def e2m1(x: Tensor) -> Tensor:
    """Round to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.

    >>> e2m1(torch.tensor([0.2, 0.3, -2.4, 3.6, 5.1, 9.0]))
    tensor([ 0.0000,  0.5000, -2.0000,  4.0000,  6.0000,  6.0000])
    """
    step = torch.ldexp(torch.full_like(x, 0.5), (torch.frexp(x).exponent - 1).clamp(0, 2))
    return ((x / step).round() * step).clamp(-6, 6)


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Reshape ``(..., n)`` to ``(..., blocks, size)``, padded with zeros."""
    return torch.unflatten(F.pad(x, (0, -x.shape[-1] % size)), -1, (-1, size))


def joined(blocks: Tensor, x: Tensor) -> Tensor:
    """Invert :func:`in_blocks`; ``x`` is its argument."""
    return blocks.flatten(-2)[..., : x.shape[-1]]


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Round to integers with one scale per row, set by its largest value."""
    most = (1 << (bits - 1)) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / most
    return (x / scale).round().clamp(-most, most) * scale


def between(x: Tensor, bits: int) -> Tensor:
    """Round to integers with a scale and a zero point per image ``(N, ...)``, set by its smallest and largest value."""
    rows = x.flatten(1)
    low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    scale = ((high - low).clamp_min(torch.finfo(torch.float32).tiny) / ((1 << bits) - 1)).view(-1, 1)
    zero = (low.view(-1, 1) / scale).round()
    levels = (rows / scale).round().clamp(zero, zero + (1 << bits) - 1)
    return (levels * scale).view(x.shape)


class Simulated(nn.Module):
    """Convolution or linear layer with weights and inputs in another format, in blocks of channels.

    If a layer reads fewer channels than a block holds, blocks span all inputs of an output.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: Rounding, activation: Rounding, block: int | None):
        super().__init__()
        self.layer, self.activation, w = layer, activation, layer.weight
        self.flat = block is not None and isinstance(layer, nn.Conv2d) and w.shape[1] < block
        tapwise = w.flatten(1) if self.flat or block is None else w.movedim(1, -1)
        rounded = weight(tapwise)
        layer.weight.data = rounded.view(w.shape) if self.flat or block is None else rounded.movedim(-1, 1).contiguous()
        self.whole = block is None

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear) or self.whole:
            return layer(self.activation(x))
        if not self.flat:
            return layer(self.activation(x.movedim(1, -1)).movedim(-1, 1))
        read = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        y = layer.weight.flatten(1) @ self.activation(read.mT).mT
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
            )
        ]
        return y.view(*y.shape[:2], *size) + (0 if layer.bias is None else layer.bias.view(-1, 1, 1))


def simulated(network: nn.Module, weight: Rounding, activation: Rounding, block: int | None) -> nn.Module:
    """Return a copy of ``network`` with every convolution and linear layer in another format."""
    result = copy.deepcopy(network).requires_grad_(False)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
                raise ValueError(f"layer {name!r}: expected a convolution of one group that is padded by zeros")
            result.set_submodule(name, Simulated(layer, weight, activation, block))
    return result


class _Session(nn.Module):
    """Network that ONNX Runtime executes."""

    def __init__(self, path: Path):
        super().__init__()
        runtime = import_extra("bench", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])


def onnxruntime_int8(network: nn.Module, images: Tensor) -> nn.Module:
    """Quantize with ``onnxruntime.quantization.quantize_static``: ranges of activations from the images.

        Weights use all of int8 if the processor accumulates products of bytes in 32 bits, otherwise the range that
    cannot saturate.
    """
    full_range = not {"avxvnni", "avx512vnni", "neondotprod"}.isdisjoint(dsconv.cpu_info().isa_found)
    with TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        int8.quantize(OnnxModels(network, images, Path(folder)).float32, path, images, full_range=full_range)
        return _Session(path)


def baselines() -> list[Baseline]:
    """Return all baselines."""

    def per_channel(bits: int) -> Baseline:
        def make(network: nn.Module, images: Tensor) -> nn.Module:
            return simulated(network, lambda w: symmetric(w, bits), lambda x: between(x, bits), None)

        return Baseline(f"round to nearest W{bits}A{bits}", bits, None, 32, make)

    def block(name: str, bits: int, size: int, rounding: Rounding) -> Baseline:
        def make(network: nn.Module, images: Tensor) -> nn.Module:
            return simulated(network, rounding, rounding, size)

        return Baseline(name, bits, size, 8, make)

    return [
        Baseline("ONNX Runtime int8", 8, None, 32, onnxruntime_int8),
        per_channel(8),
        block("MXINT8", 8, 32, lambda x: shared_exponent(x, 32, 0, integer(8, 1 / 64))),
        per_channel(4),
        block("MXINT4", 4, 32, lambda x: shared_exponent(x, 32, 0, integer(4, 1 / 4))),
        block("MXFP4", 4, 32, lambda x: shared_exponent(x, 32, 2, e2m1)),
        block("NVFP4", 4, 16, nvfp4),
    ]
