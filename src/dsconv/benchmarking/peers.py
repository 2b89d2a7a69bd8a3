"""Runtimes that a network is timed in: dsconv and others; each reports the precision that it actually uses.

All take and return the tensors of the network, in float32 if they are floating-point; quantization and conversion are
part of the measured time.
"""

import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsconv.benchmarking import mnn
from dsconv.benchmarking.machine import why_no_bf16
from dsconv.benchmarking.results import OURS
from dsconv.compilation import compile
from dsconv.compilation.frontends.pytorch import Flat
from dsconv.conversion import model_info, summary
from dsconv.conversion.copying import copied
from dsconv.data.inputs import Inputs, call, input_names, joined
from dsconv.errors import import_extra
from dsconv.evaluation.outputs import named_outputs
from dsconv.layers import DSLayer
from dsconv.names import Algorithm
from dsconv.onnx import int8
from dsconv.structures import mapped

_OPSET = 17
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class NotRun(Exception):
    """A contestant cannot take part; the message gives the reason."""


@dataclass(frozen=True)
class Contestant:
    """Runtime that is ready to run a network on one input.

    Attributes:
        name: name of the runtime, and the precision it computes in.
        executed: kernels that compute the layers, as named by the runtime.
        weight_bytes: size of the weights and all other constants that it was given.
        call: runs the network once.
        outputs: returns the output tensors of such a run.
    """

    name: str
    executed: str
    weight_bytes: int
    call: Callable[[], object]
    outputs: Callable[[], Sequence[Tensor]]


def tensors_of_output(output: Any) -> list[Tensor]:
    """Return the tensors in the output of a network, in the order in which runtimes return them."""
    return list(named_outputs(output).values())


class OnnxModels:
    """Float network as ONNX files in ``folder``, with any batch size, and as MNN models made from these.

    Each is made when it is first requested.

    ``images`` are run through the network to find the ranges of activations for int8. ``inputs`` are the names of their
    tensors in the files.
    """

    def __init__(self, network: nn.Module, images: Inputs, folder: Path):
        self.network, self.images, self.folder = network, images, folder
        self.inputs = input_names(images, network)
        # These read or write whole models, and settings share them.
        self.weight_bytes = cache(_weight_bytes)
        self.layers = cache(_layers)
        self.operators = cache(_operators)
        self.crash = cache(_crash)
        self.mnn = cache(self._mnn)
        self.mnn_operators = cache(_mnn_operators)

    @cached_property
    def float32(self) -> Path:
        """File exported by PyTorch."""
        import_extra("bench", "onnx")
        if self.images.of_images:
            raise NotRun("an ONNX file has a fixed number of inputs, and the network takes a list of images")
        path = self.folder / "float32.onnx"
        two = joined([self.images[:1]] * 2)  # a batch of one would be treated as a constant
        assert isinstance(two, Inputs)
        flat = Flat(self.network, two)
        with torch.no_grad():
            made = flat(*two.tensors)
        outputs = ["y"] if len(made) == 1 else [f"y_{place}" for place in range(len(made))]
        batched = [*two.batched, *(y.dim() > 0 and len(y) == 2 for y in made)]
        batch = {name: {0: "batch"} for name, own in zip((*self.inputs, *outputs), batched, strict=True) if own}
        names: dict[str, Any] = {"input_names": self.inputs, "output_names": outputs, "dynamic_axes": batch}
        with warnings.catch_warnings(), torch.no_grad():
            # The newer exporter needs another package and several times as long, for the same graph.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Errors of a trace show in its output, which is compared.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            torch.onnx.export(flat, tuple(two.tensors), str(path), **names, opset_version=_OPSET, dynamo=False)
        return path

    @cached_property
    def int8(self) -> Path:
        """Q/DQ file with uint8 activations, one scale per tensor, and int8 weights, one scale per output."""
        return self._quantized("int8.onnx", None)

    @cached_property
    def int8_layers(self) -> Path:
        """The same with Q/DQ around convolutions and matrix products only."""
        return self._quantized("int8_layers.onnx", list(_LAYERS))

    def _quantized(self, name: str, operators: list[str] | None) -> Path:
        import_extra("bench", "onnx")
        import_extra("bench", "onnxruntime")
        path = self.folder / name
        int8.quantize(self.float32, path, self.images, inputs=self.inputs, operators=operators)
        return path

    def _mnn(self, kind: str) -> Path:
        """Return a float32 model, or one from MNN's quantizer, which reads images as text and needs their shapes."""
        path = self.folder / f"{kind}.mnn"
        if kind == "float32":
            _make(path, "convert", self.float32, path)
            return path
        images, settings = self.folder / "images", path.with_suffix(".settings")
        (whole,) = self.images.tensors
        shape = [1, *whole.shape[1:]]
        for i, image in enumerate(whole):
            (images / f"{i}").mkdir(parents=True, exist_ok=True)
            image.numpy().tofile(images / f"{i}" / "x.txt", sep=" ", format="%.7g")
            (images / f"{i}" / "input.json").write_text(json.dumps({"inputs": [{"name": "x", "shape": shape}]}))
        settings.write_text(json.dumps({"path": str(images), "input_type": "sequence", **_MNN_SETTINGS[kind]}))
        _make(path, "quantize", self.mnn("float32"), path, settings)
        return path


def _weight_bytes(path: Path) -> int:
    """Return the size of all constants of an ONNX file."""
    onnx = import_extra("bench", "onnx")
    return sum(onnx.numpy_helper.to_array(constant).nbytes for constant in onnx.load(path).graph.initializer)


def _layers(path: Path) -> int:
    """Return the number of convolutions and matrix products in an ONNX file."""
    onnx = import_extra("bench", "onnx")
    return sum(node.op_type in _LAYERS for node in onnx.load(path, load_external_data=False).graph.node)


def _operators(path: Path) -> Counter[str]:
    """Return the operators that ONNX Runtime executes for a file."""
    runtime, onnx = import_extra("bench", "onnxruntime"), import_extra("bench", "onnx")
    options, optimized = runtime.SessionOptions(), path.with_suffix(".optimized")
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    try:
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(optimized).graph.node)
    finally:
        optimized.unlink(missing_ok=True)


# KL, the default, crashes on some networks. Winograd needs scales that only EMA finds, from the last image of a
# batch.
_MNN_SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"feature_quantize_method": "ADMM"},
    "int8 Winograd": {"feature_quantize_method": "EMA", "winogradOpt": True, "batch_size": 1},
}


def _make(path: Path, function: str, *arguments: object) -> None:
    """Let MNN make a file in another process."""
    if reason := mnn.elsewhere(function, *arguments, made=path):
        raise NotRun(reason)


def _mnn_operators(path: Path, shape: torch.Size) -> list[str]:
    """Return the operators that MNN executes for a file."""
    found = path.with_suffix(".operators")
    found.unlink(missing_ok=True)
    _make(found, "run", path, list(shape), found)
    return list(json.loads(found.read_text()))


def _crash(path: Path, shapes: str) -> str:
    """Return how a process ends in which OpenVINO compiles a file, if it crashes; otherwise an empty string.

    ``shapes`` are the input shapes by name, in Python syntax.
    """
    code = (
        "import ast, sys, openvino; core = openvino.Core(); model = core.read_model(sys.argv[1]); "
        "model.reshape(ast.literal_eval(sys.argv[2])); core.compile_model(model, 'CPU')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), shapes], capture_output=True)
    # An error has the exit code 1, and occurs again here.
    return "" if done.returncode in (0, 1) else f"its compiler crashes (exit code {done.returncode})"


@dataclass(frozen=True)
class Case:
    """Case for a contestant: a network, its arguments, their expected outputs, and a number of threads."""

    network: nn.Module
    onnx: OnnxModels
    x: Inputs
    outputs: Sequence[Tensor]
    threads: int

    def named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors of the arguments by the ``names`` of a file's inputs, which lack unused ones."""
        tensors = dict(zip(self.onnx.inputs, self.x.tensors, strict=True))
        return {name: tensors[name] for name in names}

    def room(self) -> list[Tensor | None]:
        """Return memory for each output with a row per sample; other outputs may have any size, or none."""
        count = len(self.x)
        own = [y.numel() > 0 and y.dim() > 0 and len(y) == count for y in self.outputs]
        made = zip(self.outputs, own, strict=True)
        return [torch.empty(y.shape, dtype=y.dtype, device="cpu") if given else None for y, given in made]


def ours(qmodel: nn.Module, x: Inputs) -> list[Contestant]:
    """Return a quantized network compiled, not compiled, and compiled with the other algorithm if layers have two."""
    found, info = summary(qmodel), model_info(qmodel)
    bits = f"W{info.config.weight_bits}A{info.config.activation_bits or 'float'}, " if info is not None else ""
    executed = f"{bits}{', '.join(found.backends)}"

    def contestant(name: str, network: nn.Module) -> Contestant:
        run = partial(network, *x.args, **x.kwargs)
        return Contestant(name, executed, found.bytes_after, run, lambda: tensors_of_output(run()))

    def compiled(name: str, network: nn.Module) -> Contestant:
        return contestant(name, compile(network, x))

    made = [compiled(OURS, qmodel), contestant(f"{OURS}, not compiled", qmodel)]
    layers = [layer for layer in qmodel.modules() if isinstance(layer, DSLayer)]
    if any("winograd" in layer.algorithms for layer in layers):
        other: Algorithm = "direct" if any(layer.config.algorithm == "winograd" for layer in layers) else "winograd"
        made.append(compiled(f"{OURS}, {other}", _with_algorithm(qmodel, other)))
    return made


def _with_algorithm(qmodel: nn.Module, algorithm: Algorithm) -> nn.Module:
    """Return a copy whose layers use an algorithm, if they support it."""
    copy = copied(qmodel)
    for layer in copy.modules():
        if isinstance(layer, DSLayer) and algorithm in layer.algorithms:
            layer.config = layer.config.model_copy(update={"algorithm": algorithm})
    return copy


def _torch(case: Case, dtype: torch.dtype) -> Contestant:
    if dtype == torch.float32:
        name, network, x = "PyTorch float32", case.network, case.x
        run: Callable[[], Any] = partial(network, *x.args, **x.kwargs)
    else:
        if reason := why_no_bf16():
            raise NotRun(reason)
        name, network, x = "PyTorch bf16", copied(case.network).to(dtype), case.x

        def run() -> Any:
            return mapped(lambda y: y.float() if y.is_floating_point() else y, call(network, x.to(None, dtype)))

    weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    return Contestant(name, "eager", weights, run, lambda: tensors_of_output(run()))


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
    made = case.room()
    binding = session.io_binding()

    def bind(to: Callable[..., None], name: str, tensor: Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        to(name, "cpu", 0, dtype, tuple(tensor.shape), tensor.data_ptr())

    for name, tensor in case.named([given.name for given in session.get_inputs()]).items():
        bind(binding.bind_input, name, tensor)
    for returned, room in zip(session.get_outputs(), made, strict=True):
        bind(binding.bind_output, returned.name, room) if room is not None else binding.bind_output(returned.name)

    def run() -> None:
        session.run_with_iobinding(binding)

    def outputs() -> list[Tensor]:
        run()
        values = zip(made, binding.copy_outputs_to_cpu(), strict=True)
        return [torch.from_numpy(value) if room is None else room for room, value in values]

    executed = _executed(layers, case.onnx.layers(path))
    return Contestant(_named("ONNX Runtime", kind, computed), executed, case.onnx.weight_bytes(path), run, outputs)


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
    given = case.named([given.any_name for given in model.inputs])
    model.reshape({name: list(tensor.shape) for name, tensor in given.items()})
    # OpenVINO gives the thread that compiles a signal stack, and leaves it without memory after several models are
    # freed: this must not be the current thread, or the next signal with a handler would end the process.
    with ThreadPoolExecutor(1) as other:
        compiled = other.submit(core.compile_model, model, "CPU", settings).result()
    made = case.room()
    request = compiled.create_infer_request()
    for name, tensor in given.items():
        request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))
    for place, room in enumerate(made):
        if room is not None:
            request.set_output_tensor(place, openvino.Tensor(room.numpy(), shared_memory=True))

    def run() -> None:
        request.infer(share_outputs=True)  # otherwise it copies the outputs for its caller

    def outputs() -> list[Tensor]:
        run()
        values = [request.get_output_tensor(place).data.copy() for place in range(len(made))]
        return [torch.from_numpy(v) if room is None else room for room, v in zip(made, values, strict=True)]

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
    return Contestant(_named("OpenVINO", kind, computed), executed, weights, run, outputs)


def _for_openvino(case: Case, kind: str) -> tuple[Path, str]:
    """Return the file that OpenVINO compiles, and a remark about it."""
    path = case.onnx.int8 if kind == "int8" else case.onnx.float32
    onnx = import_extra("bench", "onnx")
    names = [given.name for given in onnx.load(path, load_external_data=False).graph.input]
    shapes = str({name: list(tensor.shape) for name, tensor in case.named(names).items()})
    crash = case.onnx.crash(path, shapes)
    if not crash:
        return path, ""
    if kind == "int8" and not case.onnx.crash(case.onnx.int8_layers, shapes):
        return case.onnx.int8_layers, f"; of a model that is quantized around its layers alone, since otherwise {crash}"
    raise NotRun(crash)


def _mnn(case: Case, kind: str) -> Contestant:
    with mnn.quiet():
        runtime = import_extra("mnn", "MNN")
    taken, returned = case.x.tensors, list(case.outputs)
    if case.x.of_images or any([tensor.dtype for tensor in found] != [torch.float32] for found in (taken, returned)):
        raise NotRun("it runs networks with one float32 tensor as input and one as output only")
    (given,) = taken
    path, (precision, *how) = case.onnx.mnn(kind), kind.split()
    layers, computed = Counter[str](), Counter[str]()
    for operator in case.onnx.mnn_operators(path, given.shape):
        if operator.split()[0] in ("Convolution", "ConvolutionDepthwise", "Deconvolution", "MatMul"):
            layers[operator] += 1
            computed["int8" if "DT_INT8" in operator else "float32"] += 1
    with mnn.quiet():
        network = runtime.Interpreter(str(path))
        session = network.createSession({"numThread": case.threads, "backend": "CPU"})
        input_ = network.getSessionInput(session)
        network.resizeTensor(input_, tuple(given.shape))
        network.resizeSession(session)
        output_ = network.getSessionOutput(session)

    def on_host(values: Tensor) -> Any:
        data = (runtime.Halide_Type_Float, values.numpy(), runtime.Tensor_DimensionType_Caffe)
        return runtime.Tensor(tuple(values.shape), *data)

    x, y = on_host(given), on_host(torch.empty(output_.getShape(), dtype=torch.float32, device="cpu"))

    def run() -> None:
        input_.copyFrom(x)
        network.runSession(session)
        output_.copyToHostTensor(y)

    def outputs() -> list[Tensor]:
        run()
        return [torch.from_numpy(y.getNumpyData().copy())]  # which is a view of y, and does not keep it alive

    executed = _executed(layers, case.onnx.layers(case.onnx.float32))
    name = " ".join([_named("MNN", precision, computed), *how])
    return Contestant(name, executed, path.stat().st_size, run, outputs)


def _executed(layers: Mapping[str, int], wanted: int) -> str:
    """Return the layers by the kernel that computes them, and the number of layers of the model if it differs."""
    text = ", ".join(f"{count} {name}" for name, count in sorted(layers.items()))
    # This happens where quantization makes a part of the model constant.
    return text if sum(layers.values()) == wanted else f"{text} (of {wanted} layers: the rest was left out or merged)"


def _named(runtime: str, kind: str, computed: Counter[str]) -> str:
    """Return the name of a contestant by the precision of its convolutions and products, if it is not ``kind``."""
    if not computed:
        raise NotRun("no convolution or matrix product was found among its operators, so its precision is unknown")
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
"""Precisions in which each peer can run a network, by name. Making one raises :class:`NotRun`, or any other error."""
