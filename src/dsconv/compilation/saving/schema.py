"""Tables of csrc/network/network.fbs, which documents them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from dsconv.compilation.saving.flatbuffer import Scalar, Struct, Table

Bool = Annotated[bool, Scalar("bool")]
Byte = Annotated[int, Scalar("byte")]
UByte = Annotated[int, Scalar("ubyte")]
Int = Annotated[int, Scalar("int")]
Long = Annotated[int, Scalar("long")]
ULong = Annotated[int, Scalar("ulong")]
Float = Annotated[float, Scalar("float")]
Double = Annotated[float, Scalar("double")]

IDENTIFIER = b"DSCN"
PACKED, INTEGERS = range(2)


@dataclass(frozen=True)
class Bytes(Struct):
    begin: ULong
    size: ULong


@dataclass
class Weights(Table):
    form: UByte
    winograd: Bool
    bits: UByte
    block_size: Int
    half: Bool
    weight: Bytes
    kds: Bytes
    kds_shift: Bytes | None


@dataclass
class Memory(Struct):
    base: Int
    pixel: Long
    lines: Bool


@dataclass
class FloatTensor(Struct):
    memory: Int
    first: Long
    channels: Long


@dataclass
class QuantizedTensor(Struct):
    depth: Long
    block_size: Long
    groups: Long
    pad_h: Long
    pad_w: Long
    weight_bits: Byte
    bits: Byte
    sign: Byte
    shift: Bool


@dataclass
class ConvSizes(Struct):
    channels: Long
    outputs: Long
    kernel_d: Long
    kernel_h: Long
    kernel_w: Long
    stride_d: Long
    stride_h: Long
    stride_w: Long
    pad_d: Long
    pad_h: Long
    pad_w: Long
    dilation_d: Long
    dilation_h: Long
    dilation_w: Long
    more_d: Long
    more_h: Long
    more_w: Long
    groups: Long
    block_size: Long
    flat: Bool
    winograd: Bool
    transposed: Bool
    volume: Bool


@dataclass
class Target(Struct):
    tensor: Int
    first_channel: Long


@dataclass
class Uses(Table):
    values: Int = -1
    residual: Int = -1
    targets: Sequence[Target] = ()
    activation: UByte = 0
    alpha: Float = 0.0
    beta: Float = 0.0


@dataclass
class Convolve(Table):
    sizes: ConvSizes
    source: Int = -1
    quantized: Int = -1
    weights: Int = 0
    bias: Int = -1
    gain: Int = -1
    offset: Int = -1
    weight_bits: UByte = 0
    activation_bits: UByte = 0
    sign: UByte = 0


@dataclass
class MapOperation(Table):
    operation: UByte = 0
    activation: UByte = 0
    alpha: Float = 0.0
    beta: Float = 0.0
    tensor: Int = -1
    constants: Int = -1
    offset: Int = -1


@dataclass
class Map(Table):
    source: Int
    operations: Sequence[MapOperation]


@dataclass
class Average(Table):
    source: Int
    lanes: Int
    result: Int


@dataclass
class Moments(Table):
    source: Int
    groups: Long
    weight: Int = -1
    epsilon: Float = 0.0
    mean: Int = 0
    scale: Int = 0


@dataclass
class Flatten(Table):
    source: Int
    result: Int


@dataclass
class Loop(Struct):
    size: Long
    read_channels: Long
    read_rows: Long
    read_columns: Long
    written_channels: Long
    written_rows: Long
    written_columns: Long


@dataclass
class Rearrange(Table):
    source: Int
    loops: Sequence[Loop]
    result: Int


@dataclass
class Places(Table):
    before: Sequence[Int] = ()
    begin: Int = 0
    step: Int = 0
    repeat: Int = 1
    end: Int = 0
    after: Sequence[Int] = ()


@dataclass
class Pick(Table):
    source: Int
    rows: Places
    columns: Places
    fill: Float


@dataclass
class PoolWindow(Struct):
    kernel_h: Long
    kernel_w: Long
    stride_h: Long
    stride_w: Long
    pad_h: Long
    pad_w: Long
    dilation_h: Long
    dilation_w: Long


@dataclass
class Pool(Table):
    source: Int
    window: PoolWindow
    average: Bool
    count_padding: Bool
    divisor: Long
    ceil: Bool


@dataclass
class Stretch(Struct):
    out: Int
    times: Int
    scale: Double
    corners: Bool


@dataclass
class Order(Struct):
    split: Long
    first: UByte
    rest: UByte


@dataclass
class Interpolate(Table):
    source: Int
    rows: Stretch
    columns: Stretch
    small: Order
    large: Order


@dataclass
class AverageWindows(Table):
    source: Int
    rows: Int
    columns: Int
    at_once: Bool


@dataclass
class Step(Table):
    operation: Table
    uses: Uses | None = None
    joined: Bool = False
    union: ClassVar = (Convolve, Map, Average, Moments, Flatten, Rearrange, Pick, Pool, Interpolate, AverageWindows)


@dataclass
class Port(Table):
    tensor: Int = -1
    axes: Sequence[UByte] = ()


@dataclass
class Shape(Table):
    sizes: Sequence[Long]


@dataclass
class Size(Table):
    inputs: Sequence[Shape]


@dataclass
class Program(Table):
    one_sample: Bool
    several_samples: Bool
    sizes: Sequence[Size]
    size_step: Int
    cached_bytes: Long
    joined_bytes: Long
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    memory: Sequence[Memory]
    float_tensors: Sequence[FloatTensor]
    quantized_tensors: Sequence[QuantizedTensor]
    steps: Sequence[Step]


@dataclass
class Network(Table):
    version: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    preprocess: str | None
    classes: Sequence[str] | None
    constants: Sequence[Bytes]
    weights: Sequence[Weights]
    programs: Sequence[Program]
