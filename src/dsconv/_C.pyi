from collections.abc import Sequence

from dsconv.backends.base import Executable

# An address of 0 is nothing. Sizes, strides and names are checked; that an address is one of enough memory, which lives
# as long as it is used, is up to the caller.

def isa_found() -> list[str]: ...
def isa_with_kernels() -> list[str]: ...
def runs() -> dict[str, int]: ...
def use_parallel_for(function: int) -> None: ...
def use_pool(threads: int) -> None: ...
def expect_threads(threads: int) -> None: ...
def peak_rate(isa: str, seconds: float) -> float: ...
def packed_sizes(sizes: ConvSizes, weight_bits: int) -> tuple[int, int]: ...
def pack_weight(sizes: ConvSizes, vqk: int, weight_bits: int, packed: int) -> None: ...
def pack_kds(sizes: ConvSizes, kds: int, packed: int) -> None: ...
def quantize_activation(
    isa: str,
    sizes: ConvSizes,
    input: int,
    input_strides: Sequence[int],
    bits: int,
    sign: int,
    mantissa: int,
    exponent: int,
) -> None: ...
def round_balanced(
    isa: str,
    shape: tuple[int, int, int, int],
    bits: int,
    shift: bool,
    held: float,
    weights: Sequence[int],
    model: Sequence[int],
    held_model: Sequence[int],
    results: Sequence[int],
) -> None: ...
def round_winograd(isa: str, sizes: tuple[int, int, int], weight: int, integers: int, scale: int) -> None: ...

class ConvSizes:
    def __init__(
        self,
        *,
        images: int,
        channels: int,
        height: int,
        width: int,
        outputs: int,
        out_height: int,
        out_width: int,
        kernel_h: int,
        kernel_w: int,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
        block_size: int,
        flat: bool,
    ) -> None: ...

class Convolution:
    def __init__(
        self,
        isa: str,
        sizes: ConvSizes,
        input_strides: Sequence[int],
        output_strides: Sequence[int],
        weight_bits: int,
        activation_bits: int,
        sign: int,
        activation: int,
        alpha: float,
        beta: float,
    ) -> None: ...
    def __call__(
        self,
        input: int,
        weight: int,
        kds: int,
        kds_shift: int,
        bias: int,
        gain: int,
        offset: int,
        residual: int,
        output: int,
    ) -> None: ...

def Program(isa: str) -> Executable: ...  # a class
