"""The operators, and which backend executes them.

``cpu`` computes in integers, by the kernels of the extension ``dsconv._C``. ``simulate`` takes the same integers as
float32 and multiplies them so: on any device, differentiable, and as accurate, but not with the speed of integers.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from dsconv.config import LayerConfig
from dsconv.ops import cpu
from dsconv.ops.simulate import conv, conv_transpose, linear, patches, transposed_layout

SIMULATION = "float simulation"
IN_FLOAT = "PyTorch float"
"""Backend of a layer that is not quantized."""


class Backend(NamedTuple):
    """What executes a quantized layer: ``integers (ISA)``, or :data:`SIMULATION` and the reason for it."""

    name: str
    reason: str | None = None


def backend(
    vqk_shape: Sequence[int],
    config: LayerConfig,
    *,
    transposed: bool = False,
    device: torch.device | str = "cpu",
) -> Backend:
    """What executes a layer of VQK shape ``(O, C/groups, *K)`` on ``device`` when no gradient is asked for.

    Raises:
        ConfigError: ``DSCONV_MAX_ISA`` is not the name of an instruction set.

    >>> backend((64, 32, 3, 3, 3), LayerConfig()).name
    'float simulation'
    """
    if is_simulated():
        reason = "dsconv.ops.simulated() is in effect"
    elif torch.device(device).type != "cpu":
        reason = f"it is on the device {device}"
    else:
        reason = cpu.why_not(vqk_shape, config, transposed=transposed)
    return Backend(SIMULATION, reason) if reason else Backend(f"integers ({cpu.isa()})")


class _State(threading.local):
    # Set for each thread, and not in the class: torch.compile watches for changes of what an instance holds.
    def __init__(self) -> None:
        self.simulated = False


_state = _State()


@contextmanager
def simulated() -> Iterator[None]:
    """Within it, the layers that this thread runs are simulated in float, for comparison or export to other formats.

    >>> import torch, dsconv
    >>> layer, x = dsconv.nn.DSConv2d.from_float(torch.nn.Conv2d(64, 8, 3)), torch.randn(1, 64, 5, 5)
    >>> with torch.inference_mode():
    ...     y = layer(x)
    ...     with simulated():
    ...         bool(torch.allclose(layer(x), y, atol=1e-5))
    True
    """
    before, _state.simulated = _state.simulated, True
    try:
        yield
    finally:
        _state.simulated = before


def is_simulated() -> bool:
    """Whether :func:`simulated` is in effect in this thread."""
    return _state.simulated


__all__ = [
    "IN_FLOAT",
    "SIMULATION",
    "Backend",
    "backend",
    "conv",
    "conv_transpose",
    "cpu",
    "is_simulated",
    "linear",
    "patches",
    "simulated",
    "transposed_layout",
]
