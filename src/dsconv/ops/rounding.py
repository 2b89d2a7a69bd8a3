"""Rounding of weights by kernels: rule ``balanced``, and the transformed weights of Winograd."""

import torch
from torch import Tensor

from dsconv.numerics import WinogradWeight, block_count, check_block_size, winograd_weight
from dsconv.numerics.balanced import Model, solve
from dsconv.numerics.rounding import HELD
from dsconv.numerics.winograd import PRODUCTS
from dsconv.ops import native

# The kernels' normal equations grow with the square of the taps, and their memory with taps and channels of a block.
_MOST_TAPS, _MOST_COLUMNS = 128, 1 << 18


def solve_balanced(w: Tensor, model: Model, held: Model, half: int, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`dsconv.numerics.balanced.solve`, which defines the result, by kernels where these support it.

    The kernels sum in another order, the same on every processor. They support weights on the CPU, with up to 128 taps.

    >>> from dsconv.numerics import quantize_weight
    >>> w = torch.randn(8, 32, 3, 3)
    >>> vqk, kds = quantize_weight(w, bits=4, block_size=32, rule="balanced", solver=solve_balanced)
    """
    module = native.extension()
    taps, channels, rows = w.shape
    if module is None or not w.is_cpu or taps > _MOST_TAPS or taps * channels > _MOST_COLUMNS:
        return solve(w, model, held, half, shift)
    w = w.float().contiguous()
    kinds = max(value.shape[1] for value in (*model, *held))
    model, held = (Model(*(value.double().expand(-1, kinds).contiguous() for value in of)) for of in (model, held))
    q = torch.empty(w.shape, dtype=torch.int8, device="cpu")
    scale, offset = (torch.empty(taps, 1, rows, dtype=torch.float32, device="cpu") for _ in range(2))
    addresses = [[value.data_ptr() for value in of] for of in ((w,), model, held, (q, scale, offset))]
    with native.KernelThreads():
        module.round_balanced(native.isa(), (*w.shape, kinds), half.bit_length(), shift, HELD, *addresses)
    return q, scale, offset


def round_winograd(w: Tensor, block_size: int) -> WinogradWeight:
    """Return the result of :func:`dsconv.numerics.winograd_weight`, bitwise equal, by kernels where supported.

    They support float32 weights on the CPU.

    >>> integers, scale = round_winograd(torch.ones(4, 64, 3, 3, dtype=torch.float32), block_size=32)
    >>> integers.shape, scale.shape
    (torch.Size([17, 4, 64]), torch.Size([17, 4, 2]))
    """
    module = native.extension()
    covered = w.is_cpu and w.dtype == torch.float32 and w.shape[2:] == (3, 3) and w.numel() > 0
    if module is None or not covered:
        return winograd_weight(w, block_size)
    check_block_size(block_size)
    w, (outputs, channels) = w.detach().contiguous(), w.shape[:2]
    size = min(block_size, channels)
    integers = torch.empty(PRODUCTS, outputs, channels, dtype=torch.int8, device="cpu")
    scale = torch.empty(PRODUCTS, outputs, block_count(channels, size), dtype=torch.float32, device="cpu")
    with native.KernelThreads():
        module.round_winograd(
            native.isa(), (outputs, channels, size), w.data_ptr(), integers.data_ptr(), scale.data_ptr()
        )
    return WinogradWeight(integers, scale)
