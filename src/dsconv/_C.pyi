from collections.abc import Sequence

# The order of the sizes of a convolution is that of dsconv/ops/cpu.py; an address of 0 is nothing. Sizes, strides and
# names are checked; that an address is one of enough memory, which lives as long as it is used, is up to the caller.

def isa_found() -> list[str]: ...
def isa_with_kernels() -> list[str]: ...
def runs() -> dict[str, int]: ...
def use_parallel_for(function: int) -> None: ...
def use_pool(threads: int) -> None: ...
def peak_rate(isa: str, seconds: float) -> float: ...
def packed_sizes(sizes: Sequence[int], weight_bits: int) -> tuple[int, int]: ...
def pack_weight(sizes: Sequence[int], vqk: int, weight_bits: int, packed: int) -> None: ...
def pack_kds(sizes: Sequence[int], kds: int, packed: int) -> None: ...
def quantize_activation(
    isa: str,
    sizes: Sequence[int],
    input: int,
    input_strides: Sequence[int],
    bits: int,
    sign: int,
    mantissa: int,
    exponent: int,
) -> None: ...

# (float tensor, residual, [(quantized tensor, first channel)], activation, slope), -1 for none
_Uses = tuple[int, int, Sequence[tuple[int, int]], int, float]

class Convolution:
    def __init__(
        self,
        isa: str,
        sizes: Sequence[int],
        input_strides: Sequence[int],
        output_strides: Sequence[int],
        weight_bits: int,
        activation_bits: int,
        sign: int,
        activation: int,
        slope: float,
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

class Program:
    def __init__(self, isa: str) -> None: ...
    def values(self, base: int, offset: int, first: int, size: Sequence[int], strides: Sequence[int]) -> int: ...
    def quantized(
        self,
        offset: int,
        depth: int,
        block_size: int,
        groups: int,
        grid: Sequence[int],
        weight_bits: int,
        bits: int,
        sign: int,
        shift: bool,
    ) -> int: ...
    @staticmethod
    def quantized_bytes(depth: int, block_size: int, groups: int, grid: Sequence[int], shift: bool) -> int: ...
    def convolve(
        self,
        sizes: Sequence[int],
        source: int,
        input: int,
        weight: int,
        kds: int,
        kds_shift: int,
        bias: int,
        gain: int,
        offset: int,
        weight_bits: int,
        activation_bits: int,
        sign: int,
        uses: _Uses,
    ) -> None: ...
    def map(self, source: int, scale: int, shift: int, once: bool, gate: int, uses: _Uses) -> None: ...
    def average(self, from_: int, lanes: int, to: int) -> None: ...
    def flatten(self, from_: int, to: int) -> None: ...
    def pool(
        self,
        source: int,
        window: Sequence[int],
        average: bool,
        count_zeros: bool,
        divisor: int,
        size: Sequence[int],
        uses: _Uses,
    ) -> None: ...
    def skip(self) -> None: ...
    def bytes(self, images: int) -> int: ...
    def run(self, images: int, bases: Sequence[int], first: int, last: int, seconds: int) -> None: ...
