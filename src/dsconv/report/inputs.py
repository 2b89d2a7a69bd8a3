"""Samples of a layer's inputs, in the float network and in the quantized one."""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsconv import ops
from dsconv.errors import ModelError
from dsconv.layers import DSLayer
from dsconv.numerics import NONFINITE, dequantize_activation, quantize_activation
from dsconv.report.distribution import Distribution

_VALUES = 1 << 15  # number of values of a layer's input that are kept
_LEAST_ROWS = 16
_PATCHES = 1 << 23  # number of values of a batch's images that are converted to patches


@dataclass
class Sample:
    """Sample of a layer's inputs: rows ``(P, C)`` that are divided into blocks, at the same positions in both networks.

    The rows with the smallest random keys are kept, which makes it a sample of all rows added.
    """

    keys: Tensor
    before: Tensor
    after: Tensor

    def add(self, keys: Tensor, before: Tensor, after: Tensor) -> None:
        """Add more rows, with a key each."""
        self.keys = torch.cat([self.keys, keys])
        kept = self.keys.topk(min(len(self.keys), _rows_of(after.shape[1])), largest=False).indices
        self.keys = self.keys[kept]
        self.before, self.after = torch.cat([self.before, before])[kept], torch.cat([self.after, after])[kept]


def _rows_of(channels: int) -> int:
    return max(_LEAST_ROWS, _VALUES // channels)


@contextmanager
def sampled(layers: Mapping[str, DSLayer], reference: nn.Module | None) -> Iterator[dict[str, Sample]]:
    """Hook the layers and their namesakes in the reference, which must run first; yield samples of their inputs."""
    samples: dict[str, Sample] = {}
    expected: defaultdict[str, deque[Tensor]] = defaultdict(deque)
    calls: Counter[tuple[str, bool]] = Counter()

    def draw(name: str, is_float: bool, args: Any, kwargs: Any) -> tuple[Tensor, torch.Generator]:
        calls[name, is_float] += 1
        generator = torch.Generator().manual_seed(calls[name, is_float])  # the same positions in both networks
        return _rows_read(layers[name], args[0] if args else next(iter(kwargs.values())), generator), generator

    def remember(name: str, args: Any, kwargs: Any) -> None:
        expected[name].append(draw(name, True, args, kwargs)[0])

    def keep(name: str, args: Any, kwargs: Any) -> None:
        after, generator = draw(name, False, args, kwargs)
        before = after if reference is None else expected[name].popleft() if expected[name] else None
        if before is None or before.shape != after.shape:
            raise ModelError(
                f"reference: its layer {name!r} has other calls or input shapes than that of the quantized network"
            )
        keys = torch.rand(len(after), generator=generator, dtype=torch.float32, device="cpu")
        if name in samples:
            samples[name].add(keys, before, after)
        else:
            samples[name] = Sample(keys, before, after)

    def hook(module: nn.Module, name: str, call: Callable[[str, Any, Any], None]) -> Any:
        return module.register_forward_pre_hook(lambda _, args, kwargs: call(name, args, kwargs), with_kwargs=True)

    hooks = [hook(layer, name, keep) for name, layer in layers.items()]
    if reference is not None:
        hooks += [hook(reference.get_submodule(name), name, remember) for name in layers]
    try:
        yield samples
    finally:
        for handle in hooks:
            handle.remove()


def _rows_read(layer: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows ``(P, C)`` at random positions of a layer's input ``x``, on the CPU in float32."""
    if layer.dims == 0:
        x = x.reshape(-1, x.shape[-1], 1)
    elif x.dim() == layer.vqk.dim() - 1:
        x = x.unsqueeze(0)
    if layer.dims and layer.config.blocks == "flat":
        size = x[0].numel() * math.prod(layer.kernel_size) // math.prod(layer.stride)
        order = torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu")
        some = order[: max(1, _PATCHES // size)]
        x = ops.patches(layer.padded(x[some]), layer.kernel_size, layer.stride, layer.zero_padding, layer.dilation)
    x = x.flatten(2)
    count = (_rows_of(x.shape[1]),)
    image, place = (
        torch.randint(size, count, generator=generator, dtype=torch.int64, device="cpu")
        for size in (len(x), x.shape[2])
    )
    return x[image, :, place].float().cpu()


def facts_of(layer: DSLayer, sample: Sample) -> dict[str, Any]:
    """Return the distribution of a layer's inputs, and the exponents of their blocks: fields of a Layer."""
    config, after = layer.config, sample.after
    found: dict[str, Any] = {}
    if config.activation_bits is not None:
        size, groups = config.block_size, layer.groups
        mantissa, exponent = quantize_activation(after, config.activation_bits, size, sign=config.sign, groups=groups)
        after = dequantize_activation(mantissa, exponent, size, groups=groups)
        blocks = torch.split(torch.unflatten(mantissa, 1, (groups, -1)), size, dim=2)
        used = torch.stack([block.any(2) for block in blocks], 2).flatten(1)
        counts = Counter(exponent[used].tolist())
        found = {
            "exponents": dict(sorted(counts.items())),
            "zero_blocks": int((~used & (exponent != NONFINITE)).sum()),
        }
    finite = sample.before.isfinite() & after.isfinite()
    return found | ({"inputs": Distribution.of(sample.before[finite], after[finite])} if finite.any() else {})
