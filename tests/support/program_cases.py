"""Networks for tests of single steps of compiled programs."""

from collections.abc import Callable
from typing import Any

import torch
from kernel_cases import by_isa, same_bits
from torch import Tensor, nn

import dsconv

# Winograd layers do not read mantissas, and the step before does not quantize their inputs.
CONFIG = dsconv.QuantConfig.preset("w4a4", algorithm="direct", weight_rule="paper")


class Net(nn.Module):
    """Network of named layers with a given forward function."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **settings: Any) -> nn.Conv2d:
    """Return a convolution whose output has the size of its input."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


def steps_of(
    run: Callable[[Any, Tensor], Any],
    size: tuple[int, int, int] = (3, 9, 9),
    each_isa: bool = False,
    near: float = 0.0,
    **layers: nn.Module,
) -> list[str]:
    """Compile a network for images of a size, and return the operators of its steps.

    A step that quantizes has ``+`` after its name. Bits, or values within ``near``, and strides are checked for
    batches and layouts; on request, also on each instruction set.
    """
    qmodel = dsconv.quantize(Net(run, **layers), CONFIG)
    x = torch.randn(3, *size)
    fast = dsconv.compile(qmodel, x[:1])
    for given in (x[:1], x, x.to(memory_format=torch.channels_last)):
        with torch.inference_mode():
            expected, found = tensors(qmodel(given)), tensors(fast(given))
        for a, b in zip(found, expected, strict=True):
            alike = same_bits(a, b) or torch.allclose(a, b, rtol=near, atol=near)
            assert alike and a.stride() == b.stride(), (len(given), given.stride())
    if each_isa:
        by = by_isa(lambda: tensors(dsconv.compile(qmodel, x)(x)))
        expected = tensors(fast(x))
        assert all(same_bits(a, b) for found in by.values() for a, b in zip(found, expected, strict=True)), list(by)
    return [f"{step.operator.removeprefix('dsconv.')}{'+' * ('quantize' in step.fused)}" for step in fast.plan.steps]


def tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)
