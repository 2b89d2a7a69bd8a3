"""Backends that execute quantized layers, and the choice between them."""

from typing import NamedTuple

import torch

from dsconv.backends import cpu, cuda, simulate
from dsconv.backends.base import Backend, Executable, Operation
from dsconv.backends.simulate import prepare, quantized, run_whole
from dsconv.ops import is_simulated

BACKENDS: list[Backend] = [cpu, cuda, simulate]
"""Backends by preference; the last one supports everything. ``base.py`` defines their interface."""
SIMULATION: Backend = simulate
IN_FLOAT = "PyTorch float"
"""Name of the execution of a layer that is not quantized."""


class Execution(NamedTuple):
    """Name of the backend that executes a layer, and, for the simulation, the reason."""

    name: str
    reason: str | None = None


def choose(operation: Operation, device: torch.device | str = "cpu") -> tuple[Backend, str]:
    """Return the first backend that supports an operation on ``device``, and why those before it do not."""
    reasons: list[str] = []
    for backend in BACKENDS:
        if backend.device in (None, torch.device(device).type):
            reasons.append(backend.covers(operation))
            if not reasons[-1]:
                break
    return backend, "; ".join(reasons[:-1])


def lowering(device: torch.device | str = "cpu") -> tuple[Backend, Executable]:
    """Return the first backend that executes whole networks on ``device``, and an executable of it without steps.

    Raises:
        RuntimeError: there is none.
    """
    for backend in BACKENDS:
        if backend.device in (None, torch.device(device).type) and (made := backend.lower()) is not None:
            return backend, made
    raise RuntimeError(f"no backend executes whole networks on the device {device}")


def execution(operation: Operation, device: torch.device | str = "cpu") -> Execution:
    """Return how an operation is executed on ``device`` when no gradient is required.

    Raises:
        ConfigError: ``DSCONV_MAX_ISA`` is not the name of an instruction set.

    >>> from dsconv.config import LayerConfig
    >>> execution(Operation((64, 32, 3, 3), LayerConfig(activation_bits=None))).name
    'float simulation'
    """
    if is_simulated():
        return Execution(SIMULATION.describe(), "dsconv.ops.simulated() is in effect")
    backend, reason = choose(operation, device)
    if backend is not SIMULATION:
        return Execution(backend.describe(operation.config.activation_bits is not None))
    return Execution(backend.describe(), reason or f"it is on the device {device}")


__all__ = [
    "BACKENDS",
    "IN_FLOAT",
    "SIMULATION",
    "Backend",
    "Executable",
    "Execution",
    "Operation",
    "choose",
    "execution",
    "lowering",
    "prepare",
    "quantized",
    "run_whole",
]
