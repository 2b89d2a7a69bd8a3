"""Time the integer kernels, layer by layer, in comparison with PyTorch, ONNX Runtime and OpenVINO in the same run.

    python benchmarks/kernels.py --json kernels.json --plot kernels.png     # everything, half an hour on 2 cores
    python benchmarks/kernels.py --networks resnet50 --batches 1 --threads 1 --blocks 64    # half a minute
    python benchmarks/kernels.py --quick                                                    # the same in fewer turns
    DSCONV_MAX_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/kernels.py ...

It needs torchvision, and onnx, onnxruntime, openvino and matplotlib for the respective parts; peers that are not
installed are left out and named.

The layers are the distinct convolutions of six torchvision networks at 224 x 224, and the large linear layers of
AlexNet and VGG-16. Each counts once, however often networks repeat it.

A layer's task is the same for all: float32 input, float32 output, in PyTorch's layout (NCHW), with a bias. The time of
ours and the int8 models includes the quantization of the input; weights are packed beforehand. Ours is W4A4, and
8 bits over flattened blocks if the input has three channels, as in the presets. Only PyTorch's bf16 reads and writes
bf16. PyTorch runs as plain `torch.conv2d` / `linear` or with weights packed for oneDNN, whichever is faster in a
trial. An int8 model counts only if its runtime reports that it ran in integers, bf16 only if the processor supports it.

Contestants take turns in random order, each for at least 2 ms, until the time for the layer is used up. A turn begins
with a warm-up call, which loads the contestant's data into the caches and wakes its threads.

Every runtime has its own threads, which by default spin for a while after their work. With more than one thread this
would take a core from the next contestant. Turning it off would slow down a runtime in its own turn, so it stays on,
and a turn begins only when this process has stopped using processor time.
"""

import argparse
import io
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsconv import QuantConfig, backends, zoo
from dsconv.benchmarking.machine import cores, machine, machine_notes, why_no_bf16
from dsconv.benchmarking.measure import Race, quartiles, shortest
from dsconv.benchmarking.results import plural
from dsconv.config import LayerConfig
from dsconv.files import replacing
from dsconv.names import ALGORITHMS, Algorithm
from dsconv.numerics import quantize_weight, quantize_weight_shifted
from dsconv.ops import cpu, native, packing

NETWORKS = ("resnet18", "resnet50", "vgg16", "googlenet", "densenet121", "alexnet")
IMAGE = (3, 224, 224)
# Includes the layers of 4096 outputs and excludes the classifiers.
LINEAR_WEIGHTS = 4096 * 4096
KINDS = ("all", "1x1", "3x3", "other conv", "linear")
# A larger relative error means that a contestant did not compute the layer.
MOST_ERROR = {"float32": 1e-3, "bf16": 0.03, "int8": 0.1, "ours": 0.4}


_WINOGRAD = " winograd"


class NotRun(Exception):
    """A contestant that cannot take part, and why."""


@dataclass(frozen=True)
class Layer:
    """A convolution, or a linear layer if its kernel is empty."""

    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    @property
    def name(self) -> str:
        if not self.kernel:
            return f"{self.channels}-{self.outputs}"
        size = "x".join(str(k) for k in sorted(set(self.kernel)))
        groups = f"g{self.groups}" if self.groups > 1 else ""
        where = f"k{size}s{self.stride[0]}p{self.padding[0]}{groups}"
        return f"{self.channels}x{self.height}x{self.width}-{self.outputs}{where}"

    @property
    def kind(self) -> str:
        return {(): "linear", (1, 1): "1x1", (3, 3): "3x3"}.get(self.kernel, "other conv")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.channels // self.groups, *self.kernel)

    def input_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.channels, self.height, self.width) if self.kernel else (batch, self.channels)

    def output_shape(self, batch: int) -> tuple[int, ...]:
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, strict=False)
        return (batch, self.outputs, *((size + 2 * p - k) // s + 1 for size, k, s, p in sizes))

    def macs(self, batch: int) -> int:
        return math.prod(self.output_shape(batch)) * math.prod(self.weight_shape[1:])


class Job:
    """A layer, its random weights and input, and its float32 output."""

    def __init__(self, layer: Layer, batch: int, weight: Tensor, bias: Tensor, channels_last: bool):
        self.layer, self.batch, self.weight, self.bias = layer, batch, weight, bias
        x = torch.randn(layer.input_shape(batch))
        self.x = x if layer.channels == IMAGE[0] else x.relu()
        self.last = self.x.to(memory_format=torch.channels_last) if channels_last and layer.kernel else self.x

    @cached_property
    def reference(self) -> Tensor:
        return apply(self.layer, self.x, self.weight, self.bias)


@dataclass
class Contestant:
    """Something that can compute a job.

    Attributes:
        call: function that computes it once.
        output: function that returns the output of a call.
        executed: executing kernel, as the runtime names it.
        moved_bytes: bytes of input, output and weights in memory.
    """

    name: str
    call: Callable[[], object]
    output: Callable[[], Tensor]
    executed: str
    moved_bytes: int


def apply(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not layer.kernel:
        return nn.functional.linear(x, weight, bias)
    return torch.conv2d(x, weight, bias, layer.stride, layer.padding, groups=layer.groups)


def layers_of(network: str) -> list[Layer]:
    """Return the distinct layers of a torchvision network in execution order."""
    found: dict[Layer, None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            _, channels, height, width = inputs[0].shape
            kernel, stride, padding = (
                tuple(int(value) for value in values) for values in (module.kernel_size, module.stride, module.padding)
            )
            outputs, groups = module.out_channels, module.groups
            found[Layer(channels, height, width, outputs, kernel, stride, padding, groups)] = None
        elif isinstance(module, nn.Linear) and module.weight.numel() >= LINEAR_WEIGHTS:
            found[Layer(module.in_features, 1, 1, module.out_features, (), (), (), 1)] = None

    # Only shapes are needed, so nothing is computed.
    with torch.device("meta"):
        model = zoo.build(f"torchvision/{network}", weights="random")
        for module in model.modules():
            module.register_forward_hook(note)
        model(torch.empty(1, *IMAGE))
    return list(found)


# Ours


@dataclass
class Weights:
    """A layer's weights for our kernels."""

    config: LayerConfig
    packed: packing.Packed


def our_weights(
    layer: Layer, weight: Tensor, block: int, algorithm: Algorithm, activation_bits: int, shift: bool
) -> Weights:
    whole = QuantConfig(block_size=block, activation_bits=activation_bits, weight_shift=shift)
    config = whole.layer(kind="conv" if layer.kernel else "linear", first=layer.channels == IMAGE[0])
    assert config is not None
    if algorithm == "winograd":
        plain = (layer.kernel, layer.stride, layer.groups) == ((3, 3), (1, 1), 1)
        if not plain or not config.allows_winograd:
            raise NotRun("it is no 3x3 convolution of stride 1 and one group in blocks of channels")
        config = config.model_copy(update={"algorithm": algorithm})
    if reason := backends.cpu.covers(backends.Operation(tuple(weight.shape), config)):
        raise NotRun(reason)
    rows = weight.flatten(1) if config.blocks == "flat" else weight
    moved: Tensor | None = None
    if config.weight_shift:
        vqk, kds, moved = quantize_weight_shifted(rows, config.weight_bits, config.block_size)
    else:
        vqk, kds = quantize_weight(rows, config.weight_bits, config.block_size)
    return Weights(config, packing.pack(vqk.view(weight.shape), kds, moved, config, layer.groups))


def ours(job: Job, block: int, weights: Weights) -> Contestant:
    layer, config = job.layer, weights.config
    size = packing.kernel_block_size(layer.weight_shape, config)
    settings = (layer.outputs, config.weight_bits, config.activation_bits, config.activation_sign, size)
    where: tuple[object, ...] = ()
    named = {"algorithm": config.algorithm} if layer.kernel else {}
    operator = torch.ops.dsconv.linear
    if layer.kernel:
        places = (list(layer.kernel), list(layer.stride), list(layer.padding), [1, 1])
        where = (*places, layer.groups, config.blocks == "flat")
        operator = torch.ops.dsconv.conv2d
    arguments = (job.last, *weights.packed, job.bias, *where, *settings)
    out = operator(*arguments, **named)
    # Writes into the same memory every time, bound once, as the other runtimes do.
    call = cpu.bind("conv2d" if layer.kernel else "linear", *arguments, out=out, **named)
    moved = float_bytes(job) + sum(t.nbytes for t in weights.packed if t is not None)
    how = f"{native.isa()} W{config.weight_bits}A{config.activation_bits}"
    return Contestant(our_name(block, config.algorithm), call, call, how, moved)


def our_name(block: int, algorithm: str) -> str:
    return f"ours B={block}{_WINOGRAD if algorithm == 'winograd' else ''}"


def float_bytes(job: Job) -> int:
    return 4 * (job.x.numel() + math.prod(job.layer.output_shape(job.batch)))


# PyTorch


def torch_peer(job: Job, threads: int, dtype: torch.dtype) -> Contestant:
    """Return PyTorch's fastest way: plain weights, or weights packed as torch.compile does for a frozen model."""
    if dtype == torch.bfloat16 and (reason := why_no_bf16()):
        raise NotRun(reason)
    x, weight, bias = (t.to(dtype) for t in (job.last, job.weight, job.bias))
    ways = {"weights packed for oneDNN": packed_by_torch(job.layer, x, weight, bias)}
    # The cap limits only oneDNN, and only packed weights always use it.
    if "ONEDNN_MAX_CPU_ISA" not in os.environ:
        ways["plain"] = lambda: apply(job.layer, x, weight, bias)
    way = min(ways, key=lambda name: shortest(ways[name]))
    name = "PyTorch float32" if dtype == torch.float32 else "PyTorch bf16"
    moved = (float_bytes(job) + job.weight.nbytes) * x.element_size() // 4
    return Contestant(name, ways[way], lambda: ways[way]().float(), way, moved)


# No fused operator.
PLAIN: tuple[str, list[float], str] = ("none", [], "")


def packed_by_torch(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    if not layer.kernel:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, *PLAIN)
    where = (layer.padding, layer.stride, [1, 1], layer.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *where, list(x.shape))
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    # It always returns channels_last.
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *where, *PLAIN).contiguous(
        memory_format=layout
    )


# ONNX models


def onnx_model(job: Job, *, int8: bool, int8_output: bool = False, skip_first: bool = False) -> bytes:
    """Return a model of one Conv or Gemm, in float32 or in the Q/DQ form of int8 models.

    In the latter, activations are uint8 with one scale, weights int8 with a scale per output. With ``int8_output`` the
    output is quantized too. With ``skip_first`` an operator before a strided 1x1 convolution skips pixels.
    """
    from onnx import TensorProto, helper, numpy_helper

    layer, nodes, constants = job.layer, [], []
    source, stride = "x", layer.stride

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.numpy(), name))
        return name

    def dequantized(name: str, value: Tensor, scale: Tensor) -> str:
        zeros = constant(f"{name}_zero", torch.zeros(scale.shape, dtype=value.dtype))
        inputs = [constant(f"{name}_q", value), constant(f"{name}_scale", scale), zeros]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=0))
        return name

    def through_uint8(source: str, target: str, scale: Tensor, zero: Tensor) -> str:
        by = [constant(f"{target}_scale", scale), constant(f"{target}_zero", zero)]
        nodes.append(helper.make_node("QuantizeLinear", [source, *by], [f"{target}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{target}_q", *by], [target]))
        return target

    if skip_first and layer.kind == "1x1":
        nodes.append(helper.make_node("MaxPool", ["x"], ["skipped"], kernel_shape=(1, 1), strides=stride))
        source, stride = "skipped", (1, 1)
    if int8:
        scale, zero = uint8_scale(job.x)
        scales = job.weight.flatten(1).abs().amax(1) / 127
        quantized = (job.weight / scales.view(-1, *[1] * (job.weight.dim() - 1))).round().to(torch.int8)
        inputs = [
            through_uint8(source, "x_uint8", scale, zero),
            dequantized("weight", quantized, scales),
            dequantized("bias", (job.bias / (scales * scale)).round().int(), scales * scale),
        ]
    else:
        inputs = [source, constant("weight", job.weight), constant("bias", job.bias)]
    result = "sum" if int8_output else "y"
    if layer.kernel:
        where: dict[str, Any] = {"strides": stride, "pads": layer.padding * 2, "group": layer.groups}
        nodes.append(helper.make_node("Conv", inputs, [result], kernel_shape=layer.kernel, **where))
    else:
        nodes.append(helper.make_node("Gemm", inputs, [result], transB=1))
    if int8_output:
        through_uint8(result, "y", *uint8_scale(job.reference))
    ends = {"x": layer.input_shape(job.batch), "y": layer.output_shape(job.batch)}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends.items())
    graph = helper.make_graph(nodes, layer.name, [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized


def uint8_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.min().clamp(max=0), x.max().clamp(min=1e-6)
    scale = (high - low) / 255
    return scale, (-low / scale).round().to(torch.uint8)


def int8_bytes(job: Job) -> int:
    return float_bytes(job) + job.weight.numel() + 4 * job.bias.numel()


# ONNX Runtime


def ort_peer(job: Job, threads: int, int8: bool) -> Contestant:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise NotRun(f"{error.name} is not installed") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    executed = "Conv" if job.layer.kernel else "Gemm"
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        if int8:
            options.optimized_model_filepath = str(optimized)
        # Without a quantized output it computes in float.
        model = onnx_model(job, int8=int8, int8_output=True) if int8 else onnx_model(job, int8=False)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        if int8:
            operators = {node.op_type for node in onnx.load(optimized).graph.node}
            integer = operators & {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
            if not integer:
                raise NotRun(f"ran as {', '.join(sorted(operators))}: not in integers")
            executed = ", ".join(sorted(integer))
    y = torch.empty(job.layer.output_shape(job.batch))
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, "x", job.x), (binding.bind_output, "y", y)):
        bind(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())

    def call() -> None:
        session.run_with_iobinding(binding)

    def output() -> Tensor:
        call()
        return y

    moved = int8_bytes(job) if int8 else float_bytes(job) + job.weight.nbytes
    return Contestant(f"ONNX Runtime {'int8' if int8 else 'float32'}", call, output, executed, moved)


# OpenVINO


def openvino_peer(job: Job, threads: int, kind: str) -> Contestant:
    if kind == "bf16" and (reason := why_no_bf16()):
        raise NotRun(reason)
    try:
        import onnx  # noqa: F401  (the model is made with it)
        import openvino
    except ImportError as error:
        raise NotRun(f"{error.name} is not installed") from None
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
    }
    # It moves the stride out of a 1x1 convolution by itself, but between Q and DQ, which breaks the integer pattern.
    skip_first = kind == "int8" and max(job.layer.stride, default=1) > 1
    model = core.read_model(io.BytesIO(onnx_model(job, int8=kind == "int8", skip_first=skip_first)))
    compiled = core.compile_model(model, "CPU", settings)
    executed = executed_by_openvino(compiled, kind)
    y = torch.empty(job.layer.output_shape(job.batch))
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(job.x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))

    def call() -> None:
        # Otherwise it copies the output for its caller.
        request.infer(share_outputs=True)

    def output() -> Tensor:
        call()
        return y

    weights = {"float32": job.weight.nbytes, "bf16": job.weight.nbytes // 2, "int8": job.weight.numel()}[kind]
    return Contestant(f"OpenVINO {kind}", call, output, executed, float_bytes(job) + weights)


def executed_by_openvino(compiled: Any, kind: str) -> str:
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    facts = [
        tuple(str(info[key].astype(str)) for key in ("layerType", "primitiveType", "runtimePrecision"))
        for info in layers
    ]
    found = [fact for fact in facts if fact[0] in ("Convolution", "FullyConnected", "MatMul")]
    wanted = {"float32": ("f32",), "bf16": ("bf16",), "int8": ("u8", "i8")}[kind]
    executed = ", ".join(f"{primitive} ({precision})" for _, primitive, precision in found)
    if not found or any(precision not in wanted for _, _, precision in found):
        raise NotRun(f"ran as {executed or 'something else'}: not in {kind}")
    return executed


PEERS: dict[str, Callable[[Job, int], Contestant]] = {
    "PyTorch float32": lambda job, threads: torch_peer(job, threads, torch.float32),
    "PyTorch bf16": lambda job, threads: torch_peer(job, threads, torch.bfloat16),
    "ONNX Runtime float32": lambda job, threads: ort_peer(job, threads, int8=False),
    "ONNX Runtime int8": lambda job, threads: ort_peer(job, threads, int8=True),
    "OpenVINO float32": lambda job, threads: openvino_peer(job, threads, "float32"),
    "OpenVINO bf16": lambda job, threads: openvino_peer(job, threads, "bf16"),
    "OpenVINO int8": lambda job, threads: openvino_peer(job, threads, "int8"),
}


# Measuring


@dataclass
class Result:
    """Time of one contestant for one layer; quartiles of its turns."""

    layer: str
    kind: str
    networks: list[str]
    batch: int
    threads: int
    contestant: str
    executed: str
    turns: int
    first_quartile_s: float
    median_s: float
    third_quartile_s: float
    macs: int
    moved_bytes: int
    relative_error: float

    @property
    def gmacs(self) -> float:
        """Billions of multiply-accumulates per second."""
        return self.macs / self.median_s / 1e9


def relative_error(job: Job, contestant: Contestant) -> float:
    """Return the distance of a contestant's output from that of float32.

    Raises:
        RuntimeError: it is too large for a contestant that computes the same layer.
    """
    error = float((contestant.output() - job.reference).norm() / job.reference.norm())
    limit = MOST_ERROR["ours" if contestant.name.startswith("ours") else contestant.name.split()[-1]]
    if not error <= limit:
        raise RuntimeError(f"{contestant.name}, {job.layer.name}: expected an error below {limit}, got {error:.3g}")
    return error


def measure(
    job: Job, contestants: Sequence[Contestant], networks: list[str], threads: int, seconds: float
) -> tuple[list[Result], int]:
    """Return the results, and the number of turns that began before another contestant's threads were idle."""
    errors = [relative_error(job, contestant) for contestant in contestants]
    race = Race([contestant.call for contestant in contestants], threads)
    for _ in race.rounds(seconds=seconds):
        pass
    layer, batch = job.layer, job.batch
    results = []
    for contestant, times, error in zip(contestants, race.times, errors, strict=True):
        first, median, third = quartiles(times)
        results.append(
            Result(
                layer=layer.name,
                kind=layer.kind,
                networks=networks,
                batch=batch,
                threads=threads,
                contestant=contestant.name,
                executed=contestant.executed,
                turns=len(times),
                first_quartile_s=first,
                median_s=median,
                third_quartile_s=third,
                macs=layer.macs(batch),
                moved_bytes=contestant.moved_bytes,
                relative_error=error,
            )
        )
    return results, race.unsettled


Ceilings = dict[str, dict[str, float]]
"""What a machine can do at most, by unit (``gmacs`` or ``gigabytes``, per second) and name."""


def measure_ceilings(threads: int) -> Ceilings:
    torch.set_num_threads(threads)
    size, count = 2048, 64 * 1024 * 1024
    a, b, product = (torch.rand(size, size) for _ in range(3))
    source, target = torch.ones(count), torch.ones(count)
    packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
    products = (
        lambda: torch.mm(a, b, out=product),
        lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, *PLAIN),
    )
    matmul_s = min(shortest(call, repeats=5) for call in products)
    copy_s = shortest(lambda: target.copy_(source), repeats=5)
    # Our own products of bytes with all data in the L1 cache, on each of the threads: an upper bound for layers.
    integers = threads * native.extension().peak_rate(native.isa(), 0.3) / 1e9
    return {
        "gmacs": {f"integers ({native.isa()})": integers, "float32 product": size**3 / matmul_s / 1e9},
        "gigabytes": {"copy in memory": 2 * source.nbytes / copy_s / 1e9},
    }


# Tables


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def by_contestant(results: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """Return the results of one batch size and number of threads, by contestant and layer."""
    table: dict[str, dict[str, Result]] = defaultdict(dict)
    for result in results:
        table[result.contestant][result.layer] = result
    return table


@dataclass
class Comparison:
    """Our time over that of a peer: geometric means by kind of layer, each layer counting once."""

    batch: int
    threads: int
    ours: str
    peer: str
    ratios: dict[str, float]
    faster: int
    layers: int
    worst: dict[str, float]
    our_gmacs: float
    peer_gmacs: float


def compare(results: Sequence[Result]) -> list[Comparison]:
    found = []
    for batch, threads in sorted({(r.batch, r.threads) for r in results}):
        table = by_contestant(r for r in results if (r.batch, r.threads) == (batch, threads))
        for own in (name for name in table if name.startswith("ours")):
            direct = [own.removesuffix(_WINOGRAD)] if own.endswith(_WINOGRAD) else []
            for peer in (name for name in [*PEERS, *direct] if name in table):
                both = [(table[own][name], theirs) for name, theirs in table[peer].items() if name in table[own]]
                ratios = {our.layer: our.median_s / theirs.median_s for our, theirs in both}
                kinds = {our.layer: our.kind for our, _ in both}
                means = {
                    kind: geometric_mean(ratio for name, ratio in ratios.items() if kind in ("all", kinds[name]))
                    for kind in KINDS
                }
                worst = dict(sorted(ratios.items(), key=lambda item: -item[1])[:5])
                faster = sum(ratio < 1 for ratio in ratios.values())
                rates = (geometric_mean(pair[side].gmacs for pair in both) for side in (0, 1))
                found.append(Comparison(batch, threads, own, peer, means, faster, len(ratios), worst, *rates))
    return found


def print_layer(results: Sequence[Result]) -> None:
    first = results[0]
    print(
        f"\n{first.layer}, batch {first.batch}, {plural(first.threads)}, {first.macs / 1e6:.0f} million MAC", flush=True
    )
    own = [result for result in results if result.contestant.startswith("ours")]
    for result in results:
        low, middle, high = (1000 * s for s in (result.first_quartile_s, result.median_s, result.third_quartile_s))
        ratios = "" if result in own else ", ".join(f"{our.median_s / result.median_s:.2f}" for our in own)
        print(
            f"  {result.contestant:21} {middle:9.3f} ms ({low:.3f} .. {high:.3f}) {result.gmacs:7.1f} GMAC/s"
            f"{'  ours takes ' + ratios if ratios else ''}"
        )


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    tables = sorted(
        {(c.batch, c.threads, c.ours) for c in comparisons}, key=lambda key: (*key[:2], len(key[2]), key[2])
    )
    for batch, threads, own in tables:
        rows = [c for c in comparisons if (c.batch, c.threads, c.ours) == (batch, threads, own)]
        print(
            f"\n{own}, batch {batch}, {plural(threads)}: our time / theirs and GMAC/s, geometric means over the layers"
        )
        print(f"{'':21} {' '.join(f'{kind:>10}' for kind in KINDS)}    faster on   ours  theirs  worst layer")
        for row in rows:
            means = " ".join(" " * 9 + "-" if math.isnan(row.ratios[k]) else f"{row.ratios[k]:10.3f}" for k in KINDS)
            name, ratio = next(iter(row.worst.items()))
            print(
                f"{row.peer:21} {means}  {row.faster:4} of {row.layers:3} {row.our_gmacs:6.1f} {row.peer_gmacs:7.1f}"
                f"  {name} {ratio:.2f}"
            )


def print_executed(results: Sequence[Result], not_run: dict[str, Counter[str]]) -> None:
    print("\nWhat was executed, and on how many layers")
    for name in dict.fromkeys(result.contestant for result in results):
        counts = Counter(result.executed for result in results if result.contestant == name)
        print(f"  {name:21} " + "; ".join(f"{what}: {count}" for what, count in counts.most_common()))
    for name, reasons in not_run.items():
        print(f"  {name:21} not run: " + "; ".join(f"{why}: {count}" for why, count in reasons.items()))


# Roofline


COLORS = {
    "PyTorch float32": "#f4a582",
    "PyTorch bf16": "#b2182b",
    "ONNX Runtime float32": "#92c5de",
    "ONNX Runtime int8": "#2166ac",
    "OpenVINO float32": "#d8b5e0",
    "OpenVINO bf16": "#9970ab",
    "OpenVINO int8": "#40004b",
}
OUR_COLORS = ("#1b7837", "#5aae61", "#a6dba0")


def plot_roofline(path: Path, results: Sequence[Result], ceilings: dict[int, Ceilings]) -> None:
    """Draw a panel for each batch size and number of threads."""
    from matplotlib import pyplot

    threads, batches = sorted({r.threads for r in results}), sorted({r.batch for r in results})
    size = (1 + 7 * len(batches), 1 + 4.6 * len(threads))
    figure, grid = pyplot.subplots(len(threads), len(batches), figsize=size, squeeze=False, layout="constrained")
    limits = limits_of(results, ceilings)
    for row, thread_count in zip(grid, threads, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            prepare_axes(axes, limits)
            axes.set_title(f"batch {batch}, {plural(thread_count)}", fontsize=11)
            points = [r for r in results if (r.batch, r.threads) == (batch, thread_count)]
            draw_points(axes, points)
            draw_ceilings(axes, ceilings[thread_count])
    handles, labels = grid[0][0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    order = [name for name in by_contestant(results) if name in named]
    figure.legend(
        [named[name] for name in order], order, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130)
    pyplot.close(figure)


def limits_of(results: Sequence[Result], ceilings: dict[int, Ceilings]) -> dict[str, tuple[float, float]]:
    """Return the limits of the axes, the same for all panels."""
    xs, ys = [r.macs / r.moved_bytes for r in results], [r.gmacs for r in results]
    top = max(*ys, *(rate for found in ceilings.values() for rate in found["gmacs"].values()))
    bandwidth = max(rate for found in ceilings.values() for rate in found["gigabytes"].values())
    # At least the upper decade of a bandwidth's line is visible.
    return {"xlim": (min(min(xs) / 1.5, top / bandwidth / 10), max(xs) * 1.5), "ylim": (min(ys) / 1.5, top * 1.5)}


def prepare_axes(axes: Any, limits: dict[str, tuple[float, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    # With equal decades, bandwidth lines are at 45 degrees.
    axes.set(xscale="log", yscale="log", **limits, aspect="equal")
    axes.set(xlabel="MAC per byte of input, output and weights", ylabel="GMAC/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)


def draw_points(axes: Any, results: Sequence[Result]) -> None:
    table = by_contestant(results)
    own = [name for name in table if name.startswith("ours")]
    colors = COLORS | dict(zip(own, OUR_COLORS, strict=False))
    # Ours are drawn last, on top.
    for name in [*(peer for peer in COLORS if peer in table), *reversed(own)]:
        found = list(table[name].values())
        x, y = [r.macs / r.moved_bytes for r in found], [r.gmacs for r in found]
        marker, area = ("o", 34) if name in own else ("^" if name.endswith("int8") else "s", 20)
        axes.scatter(x, y, s=area, marker=marker, color=colors[name], label=name, linewidths=0.4, edgecolors="white")


def draw_ceilings(axes: Any, ceilings: Ceilings) -> None:
    rates = dict(ceilings["gmacs"])
    (left, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    text = {"textcoords": "offset points", "fontsize": 8}
    for label, rate in rates.items():
        axes.axhline(rate, color="black", linewidth=0.8, linestyle="--", zorder=0)
        # Beside the panel, where there are no points.
        axes.annotate(f"{label}\n{rate:.0f} GMAC/s", (right, rate), (4, 0), va="center", **text)
    for label, rate in ceilings["gigabytes"].items():
        start, end = max(left, bottom / rate), min(right, max(rates.values()) / rate)
        axes.plot((start, end), (start * rate, end * rate), color="black", linewidth=0.8, zorder=0)
        middle = math.sqrt(start * end)
        place = {"rotation": 45, "rotation_mode": "anchor", "ha": "center"}
        axes.annotate(f"{label}, {rate:.0f} GB/s", (middle, middle * rate), (-3, 3), **place, **text)


# The command


def from_one(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=from_one, default=(1, 8))
    parser.add_argument("--threads", nargs="+", type=int, choices=range(1, cores() + 1), default=(1, 2))
    parser.add_argument("--blocks", nargs="+", type=from_one, default=(32, 64, 128), help="block sizes of ours")
    parser.add_argument(
        "--peers", nargs="*", choices=tuple(PEERS), default=tuple(PEERS), metavar="NAME", help=", ".join(PEERS)
    )
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=("direct",), help="of ours")
    parser.add_argument("--only", default="", help="layers whose name holds this, as in '56x56' or 'k3'")
    parser.add_argument("--activation-bits", type=int, choices=range(2, 9), default=4, help="of ours")
    parser.add_argument("--shift", action="store_true", help="ours with a shift per block, as the presets have it")
    parser.add_argument("--channels-last", action="store_true", help="input of ours and of PyTorch in channels_last")
    parser.add_argument("--seconds", type=float, default=0.5, help="for a layer, batch and number of threads")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="write the roofline here")
    parser.add_argument("--quick", action="store_true", help="ResNet-50, batch 1, one thread, B = 64, 0.05 seconds")
    given = parser.parse_args()
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            parser.error(f"argument {option}: {path.parent} is no folder that can be written to")
    if given.quick:
        given.networks, given.batches, given.threads, given.blocks = ("resnet50",), (1,), (1,), (64,)
        given.seconds = 0.05
    return given


def describe(given: argparse.Namespace) -> dict[str, Any]:
    """Return machine and settings of this run, which are printed and stored in the JSON file."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    about = {"machine": machine(), "settings": settings}
    print(*machine_notes(about["machine"]), sep="\n")
    kind = f"W4A{given.activation_bits}{' with shifts' if given.shift else ''}"
    print(f"Ours is {kind}, W8A8 over flattened blocks where the input has three channels.")
    print(
        "Runtimes spin as they do by default; with several threads a turn begins once those of the last have stopped."
    )
    return about


def chosen_layers(networks: Sequence[str], only: str) -> dict[Layer, list[str]]:
    """Return the layers and the networks that have them."""
    found: dict[Layer, list[str]] = defaultdict(list)
    for network in networks:
        for layer in layers_of(network):
            if only in layer.name:
                found[layer].append(network)
    return found


class Bench:
    """One run of this benchmark."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.results: list[Result] = []
        self.not_run: dict[str, Counter[str]] = defaultdict(Counter)
        self.unsettled = 0

    def layer(self, layer: Layer, networks: list[str]) -> None:
        weight = torch.randn(layer.weight_shape) / math.sqrt(math.prod(layer.weight_shape[1:]))
        bias = torch.randn(layer.outputs)
        weights: list[tuple[int, Weights]] = []
        for block, algorithm in itertools.product(self.given.blocks, self.given.algorithms):
            how = (block, algorithm, self.given.activation_bits, self.given.shift)
            try:
                weights.append((block, our_weights(layer, weight, *how)))
            except NotRun as reason:
                self.not_run[our_name(block, algorithm)][str(reason)] += 1
        for batch in self.given.batches:
            job = Job(layer, batch, weight, bias, self.given.channels_last)
            for threads in self.given.threads:
                torch.set_num_threads(threads)
                contestants = [ours(job, block, packed) for block, packed in weights]
                contestants += self.peers(job, threads)
                if not contestants:
                    continue
                results, unsettled = measure(job, contestants, networks, threads, self.given.seconds)
                print_layer(results)
                self.results += results
                self.unsettled += unsettled

    def peers(self, job: Job, threads: int) -> list[Contestant]:
        found = []
        for name in self.given.peers:
            try:
                found.append(PEERS[name](job, threads))
            except NotRun as reason:
                self.not_run[name][str(reason)] += 1
        return found


def write_json(path: Path, about: dict[str, Any], bench: Bench) -> None:
    found = {
        "comparisons": [asdict(comparison) for comparison in compare(bench.results)],
        "not_run": bench.not_run,
        "unsettled_turns": bench.unsettled,
        "results": [asdict(result) | {"gmacs": result.gmacs} for result in bench.results],
    }
    with replacing(path) as beside:
        beside.write_text(json.dumps(about | found, indent=1) + "\n")


def main() -> None:
    given = arguments()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import torchvision_shim

    torchvision_shim.install()
    torch.manual_seed(0)
    about = describe(given)
    ceilings = {threads: measure_ceilings(threads) for threads in given.threads}
    for threads, found in ceilings.items():
        matmul, copy = found["gmacs"], found["gigabytes"]
        each = [f"{name} {rate:.0f} GMAC/s" for name, rate in matmul.items()]
        each += [f"{name} {rate:.0f} GB/s" for name, rate in copy.items()]
        print(f"Ceilings, {plural(threads)}: {', '.join(each)}")
    layers = chosen_layers(given.networks, given.only)
    if not layers:
        sys.exit(f"no layer of {', '.join(given.networks)} has {given.only!r} in its name")
    print(f"{len(layers)} distinct layers of {', '.join(given.networks)}; medians (quartiles)")
    bench = Bench(given)
    for layer, networks in layers.items():
        bench.layer(layer, networks)
        # An interrupted long run keeps its measurements.
        if given.json:
            write_json(given.json, about | {"ceilings": ceilings}, bench)
    print_comparisons(compare(bench.results))
    print_executed(bench.results, bench.not_run)
    if bench.unsettled:
        print(f"{bench.unsettled} turns began while threads of another contestant may still have been spinning")
    if given.plot:
        plot_roofline(given.plot, bench.results, ceilings)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
