"""Conversion of inputs to the dtype and device of the network that reads them."""

import itertools

import torch
from torch import Tensor, nn

from dsconv.data.inputs import AnyBatch
from dsconv.layers.layer import DSLayer

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU if there is none."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating-point parameter, else buffer, of ``model``; None if it has none.

    Quantized layers do not count: they accept every floating-point dtype and return it, whatever the dtype of their
    KDS.

    >>> dtype_of(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8)).half())
    torch.float16
    """
    # A compiled network has its layers in a program; its remaining tensors do not determine the input dtype.
    modules = [module for module in model.modules() if not isinstance(module, DSLayer)]
    parameters = itertools.chain.from_iterable(module.parameters(recurse=False) for module in modules)
    buffers = itertools.chain.from_iterable(module.buffers(recurse=False) for module in modules)
    return next((t.dtype for t in itertools.chain(parameters, buffers) if t.dtype in _FLOATS), None)


def as_input_of(model: nn.Module, x: AnyBatch) -> AnyBatch:
    """Return ``x`` on the device of ``model``, with floating-point tensors in its dtype.

    >>> as_input_of(nn.Linear(2, 2).double(), torch.zeros(1, 2, dtype=torch.float32)).dtype
    torch.float64
    """
    dtype = None if isinstance(x, Tensor) and not x.is_floating_point() else dtype_of(model)
    return x.to(device_of(model), dtype)
