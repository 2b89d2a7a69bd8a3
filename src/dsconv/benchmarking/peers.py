"""What a network is timed in: dsconv and other runtimes, each asked in which precision it really computes.

All take float32 ``(N, C, H, W)`` and return float32, and quantize and convert within the time that is measured.
"""

import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsconv.benchmarking import mnn
from dsconv.benchmarking.machine import why_no_bf16
from dsconv.benchmarking.results import OURS
from dsconv.compilation import compile
from dsconv.conversion import model_info, summary
from dsconv.conversion.copying import copied
from dsconv.errors import import_extra
from dsconv.layers import DSLayer
from dsconv.names import Algorithm
from dsconv.onnx import int8

_OPSET = 17
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class NotRun(Exception):
    """A contestant that cannot take part, and why."""


@dataclass(frozen=True)
class Contestant:
    """A runtime that is ready to run a network on one input.

    Attributes:
        name: of the runtime, and the precision it computes in.
        executed: what computes the layers, in the words of the runtime.
        weight_bytes: of the weights and all other constants that it was given.
        call: runs the network once.
        output: the output of such a run.
    """

    name: str
    executed: str
    weight_bytes: int
    call: Callable[[], object]
    output: Callable[[], Tensor]


class OnnxModels:
    """The float network as ONNX files in ``folder``, of any batch size, and as MNN's, which are made of these.

    Each is made when it is first asked for.

    ``images`` are run through the network to find the ranges of activations for int8.
    """

    def __init__(self, network: nn.Module, images: Tensor, folder: Path):
        self.network, self.images, self.folder = network, images, folder
        # These read or write whole models, and settings share them.
        self.weight_bytes = cache(_weight_bytes)
        self.layers = cache(_layers)
        self.operators = cache(_operators)
        self.crash = cache(_crash)
        self.mnn = cache(self._mnn)
        self.mnn_operators = cache(_mnn_operators)

    @cached_property
    def float32(self) -> Path:
        """As PyTorch exports it."""
        import_extra("bench", "onnx")
        path = self.folder / "float32.onnx"
        two = self.images[:1].repeat(2, *[1] * (self.images.dim() - 1))  # one would be taken for a constant
        batch = {"x": {0: "batch"}, "y": {0: "batch"}}
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": batch}
        with warnings.catch_warnings(), torch.no_grad():
            # The newer exporter needs one more package and several times as long, for the same graph.
            warnings.simplefilter("ignore", DeprecationWarning)
            # What a trace does not see shows in its output, which is compared.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            torch.onnx.export(self.network, (two,), str(path), **names, opset_version=_OPSET, dynamo=False)
        return path

    @cached_property
    def int8(self) -> Path:
        """Activations as uint8 with one scale per tensor, weights as int8 with one per output, between Q and DQ."""
        return self._quantized("int8.onnx", None)

    @cached_property
    def int8_layers(self) -> Path:
        """The same around convolutions and products alone."""
        return self._quantized("int8_layers.onnx", list(_LAYERS))

    def _quantized(self, name: str, operators: list[str] | None) -> Path:
        import_extra("bench", "onnx")
        import_extra("bench", "onnxruntime")
        path = self.folder / name
        int8.quantize(self.float32, path, self.images, operators=operators)
        return path

    def _mnn(self, kind: str) -> Path:
        """In float32, or quantized by MNN's own tool, which reads images as text and crashes without their shapes."""
        path = self.folder / f"{kind}.mnn"
        if kind == "float32":
            _make(path, "convert", self.float32, path)
            return path
        images, settings = self.folder / "images", path.with_suffix(".settings")
        shape = [1, *self.images.shape[1:]]
        for i, image in enumerate(self.images):
            (images / f"{i}").mkdir(parents=True, exist_ok=True)
            image.numpy().tofile(images / f"{i}" / "x.txt", sep=" ", format="%.7g")
            (images / f"{i}" / "input.json").write_text(json.dumps({"inputs": [{"name": "x", "shape": shape}]}))
        settings.write_text(json.dumps({"path": str(images), "input_type": "sequence", **_MNN_SETTINGS[kind]}))
        _make(path, "quantize", self.mnn("float32"), path, settings)
        return path


def _weight_bytes(path: Path) -> int:
    """Of all constants of an ONNX file."""
    onnx = import_extra("bench", "onnx")
    return sum(onnx.numpy_helper.to_array(constant).nbytes for constant in onnx.load(path).graph.initializer)


def _layers(path: Path) -> int:
    """Number of convolutions and products in an ONNX file."""
    onnx = import_extra("bench", "onnx")
    return sum(node.op_type in _LAYERS for node in onnx.load(path, load_external_data=False).graph.node)


def _operators(path: Path) -> Counter[str]:
    """What ONNX Runtime makes of the operators of a file."""
    runtime, onnx = import_extra("bench", "onnxruntime"), import_extra("bench", "onnx")
    options, optimized = runtime.SessionOptions(), path.with_suffix(".optimized")
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    try:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(optimized).graph.node)
    finally:
        optimized.unlink(missing_ok=True)


# KL, the default, crashes on some networks. Winograd needs scales that EMA alone finds, of a batch from its last image.
_MNN_SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"feature_quantize_method": "ADMM"},
    "int8 Winograd": {"feature_quantize_method": "EMA", "winogradOpt": True, "batch_size": 1},
}


def _make(path: Path, function: str, *arguments: object) -> None:
    """Have MNN make a file in another process."""
    if reason := mnn.elsewhere(function, *arguments, made=path):
        raise NotRun(reason)


def _mnn_operators(path: Path, shape: torch.Size) -> list[str]:
    """What MNN makes of the operators of a file."""
    found = path.with_suffix(".operators")
    found.unlink(missing_ok=True)
    _make(found, "run", path, list(shape), found)
    return list(json.loads(found.read_text()))


def _crash(path: Path, shape: torch.Size) -> str:
    """How a process ends in which OpenVINO compiles a file, if it does not survive that; empty otherwise."""
    code = (
        "import ast, sys, openvino; core = openvino.Core(); model = core.read_model(sys.argv[1]); "
        "model.reshape(ast.literal_eval(sys.argv[2])); core.compile_model(model, 'CPU')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(list(shape))], capture_output=True)
    # An error has the exit code 1, and shows itself again here.
    return "" if done.returncode in (0, 1) else f"its compiler crashes (exit code {done.returncode})"


@dataclass(frozen=True)
class Case:
    """What a contestant is made for: a network, an input ``(N, ...)``, the shape of its output, a number of threads."""

    network: nn.Module
    onnx: OnnxModels
    x: Tensor
    output_shape: torch.Size
    threads: int


def ours(qmodel: nn.Module, x: Tensor) -> list[Contestant]:
    """A quantized network compiled, as it is, and compiled with the other algorithm where layers have two."""
    found, info = summary(qmodel), model_info(qmodel)
    bits = f"W{info.config.weight_bits}A{info.config.activation_bits or 'float'}, " if info is not None else ""
    executed = f"{bits}{', '.join(found.backends)}"

    def contestant(name: str, network: nn.Module) -> Contestant:
        return Contestant(name, executed, found.bytes_after, lambda: network(x), lambda: network(x))

    def compiled(name: str, network: nn.Module) -> Contestant:
        return contestant(name, compile(network, x))

    made = [compiled(OURS, qmodel), contestant(f"{OURS}, not compiled", qmodel)]
    layers = [layer for layer in qmodel.modules() if isinstance(layer, DSLayer)]
    if any("winograd" in layer.algorithms for layer in layers):
        other: Algorithm = "direct" if any(layer.config.algorithm == "winograd" for layer in layers) else "winograd"
        made.append(compiled(f"{OURS}, {other}", _with_algorithm(qmodel, other)))
    return made


def _with_algorithm(qmodel: nn.Module, algorithm: Algorithm) -> nn.Module:
    """A copy whose layers go by an algorithm, where they have it."""
    copy = copied(qmodel)
    for layer in copy.modules():
        if isinstance(layer, DSLayer) and algorithm in layer.algorithms:
            layer.config = layer.config.model_copy(update={"algorithm": algorithm})
    return copy


def _torch(case: Case, dtype: torch.dtype) -> Contestant:
    if dtype == torch.float32:
        name, network, x = "PyTorch float32", case.network, case.x

        def call() -> Any:
            return network(x)
    else:
        if reason := why_no_bf16():
            raise NotRun(reason)
        name, network, x = "PyTorch bf16", copied(case.network).to(dtype), case.x

        def call() -> Any:
            return network(x.to(dtype)).float()

    weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    return Contestant(name, "eager", weights, call, call)


_INTEGER = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
_FLOAT = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def _onnxruntime(case: Case, kind: str) -> Contestant:
    runtime = import_extra("bench", "onnxruntime")
    path = case.onnx.int8 if kind == "int8" else case.onnx.float32
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.add_free_dimension_override_by_name("batch", len(case.x))
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    layers = {name: count for name, count in case.onnx.operators(path).items() if name in _INTEGER | _FLOAT}
    computed: Counter[str] = Counter()
    for name, count in layers.items():
        computed["int8" if name in _INTEGER else "float32"] += count
    y = torch.empty(case.output_shape, dtype=torch.float32, device="cpu")
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, "x", case.x), (binding.bind_output, "y", y)):
        bind(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())

    def call() -> None:
        session.run_with_iobinding(binding)

    def output() -> Tensor:
        call()
        return y

    executed = _executed(layers, case.onnx.layers(path))
    return Contestant(_named("ONNX Runtime", kind, computed), executed, case.onnx.weight_bytes(path), call, output)


_PRECISIONS = {"f32": "float32", "bf16": "bf16", "f16": "float16", "u8": "int8", "i8": "int8"}


def _openvino(case: Case, kind: str) -> Contestant:
    if kind == "bf16" and (reason := why_no_bf16()):
        raise NotRun(reason)
    openvino = import_extra("bench", "openvino")
    path, remark = _for_openvino(case, kind)
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
    }
    model = core.read_model(path)
    model.reshape(list(case.x.shape))
    compiled = core.compile_model(model, "CPU", settings)
    y = torch.empty(case.output_shape, dtype=torch.float32, device="cpu")
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(case.x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))

    def call() -> None:
        request.infer(share_outputs=True)  # otherwise it copies the output for its caller

    def output() -> Tensor:
        call()
        return y

    layers, computed = Counter[str](), Counter[str]()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        layer, primitive, precision = (
            str(info[key].astype(str)) for key in ("layerType", "primitiveType", "runtimePrecision")
        )
        if layer in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            layers[f"{primitive} ({precision})"] += 1
            computed[_PRECISIONS.get(precision, precision)] += 1
    weights = case.onnx.weight_bytes(path) // (2 if kind == "bf16" else 1)
    executed = _executed(layers, case.onnx.layers(path)) + remark
    return Contestant(_named("OpenVINO", kind, computed), executed, weights, call, output)


def _for_openvino(case: Case, kind: str) -> tuple[Path, str]:
    """The file that OpenVINO is to compile, and what is to be said about it."""
    path = case.onnx.int8 if kind == "int8" else case.onnx.float32
    crash = case.onnx.crash(path, case.x.shape)
    if not crash:
        return path, ""
    if kind == "int8" and not case.onnx.crash(case.onnx.int8_layers, case.x.shape):
        return case.onnx.int8_layers, f"; of a model that is quantized around its layers alone, since otherwise {crash}"
    raise NotRun(crash)


def _mnn(case: Case, kind: str) -> Contestant:
    with mnn.quiet():
        runtime = import_extra("mnn", "MNN")
    path, (precision, *how) = case.onnx.mnn(kind), kind.split()
    layers, computed = Counter[str](), Counter[str]()
    for operator in case.onnx.mnn_operators(path, case.x.shape):
        if operator.split()[0] in ("Convolution", "ConvolutionDepthwise", "Deconvolution", "MatMul"):
            layers[operator] += 1
            computed["int8" if "DT_INT8" in operator else "float32"] += 1
    with mnn.quiet():
        network = runtime.Interpreter(str(path))
        session = network.createSession({"numThread": case.threads, "backend": "CPU"})
        input_ = network.getSessionInput(session)
        network.resizeTensor(input_, tuple(case.x.shape))
        network.resizeSession(session)
        output_ = network.getSessionOutput(session)

    def on_host(values: Tensor) -> Any:
        data = (runtime.Halide_Type_Float, values.numpy(), runtime.Tensor_DimensionType_Caffe)
        return runtime.Tensor(tuple(values.shape), *data)

    x, y = on_host(case.x), on_host(torch.empty(output_.getShape(), dtype=torch.float32, device="cpu"))

    def call() -> None:
        input_.copyFrom(x)
        network.runSession(session)
        output_.copyToHostTensor(y)

    def output() -> Tensor:
        call()
        return torch.from_numpy(y.getNumpyData().copy())  # which looks into y, and does not keep it

    executed = _executed(layers, case.onnx.layers(case.onnx.float32))
    name = " ".join([_named("MNN", precision, computed), *how])
    return Contestant(name, executed, path.stat().st_size, call, output)


def _executed(layers: Mapping[str, int], wanted: int) -> str:
    """Layers by what computes them, and if these are not ``wanted``, how many the model has."""
    text = ", ".join(f"{count} {name}" for name, count in sorted(layers.items()))
    # As where quantization makes a part of the model constant.
    return text if sum(layers.values()) == wanted else f"{text} (of {wanted} layers: the rest was left out or merged)"


def _named(runtime: str, kind: str, computed: Counter[str]) -> str:
    """A contestant after what its convolutions and products were computed in, as far as that is not ``kind``."""
    if not computed:
        raise NotRun("no convolution or product was found in what it runs, so its precision is not known")
    if set(computed) == {kind}:
        return f"{runtime} {kind}"
    mixed = ", ".join(f"{count} {precision}" for precision, count in computed.most_common())
    return f"{runtime} {kind} model ({mixed})"


CONTESTANTS: dict[str, dict[str, Callable[[Case], Contestant]]] = {
    "torch": {
        "PyTorch float32": lambda case: _torch(case, torch.float32),
        "PyTorch bf16": lambda case: _torch(case, torch.bfloat16),
    },
    "onnxruntime": {
        "ONNX Runtime float32": lambda case: _onnxruntime(case, "float32"),
        "ONNX Runtime int8": lambda case: _onnxruntime(case, "int8"),
    },
    "openvino": {
        "OpenVINO float32": lambda case: _openvino(case, "float32"),
        "OpenVINO bf16": lambda case: _openvino(case, "bf16"),
        "OpenVINO int8": lambda case: _openvino(case, "int8"),
    },
    "mnn": {
        "MNN float32": lambda case: _mnn(case, "float32"),
        "MNN int8": lambda case: _mnn(case, "int8"),
        "MNN int8 Winograd": lambda case: _mnn(case, "int8 Winograd"),
    },
}
"""What each peer can run a network in, by name. Making one raises :class:`NotRun`, or whatever a runtime raises."""
