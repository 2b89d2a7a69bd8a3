"""``dsconv.compile``: captures a quantized network and runs it as one graph."""

import threading
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx, nn

from dsconv.backends import lowering
from dsconv.compilation.frontends import graph_of
from dsconv.compilation.fusion import fuse
from dsconv.compilation.layouts import hold_for_batches, in_layout_of, order_in_memory, record
from dsconv.compilation.lowering import lower
from dsconv.compilation.plan import Plan, plan_of
from dsconv.compilation.program import OtherLayout, Program
from dsconv.conversion.copying import copied
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.quantized import check_inference
from dsconv.conversion.wrappers import unwrapped
from dsconv.cpu import cpu_info
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ModelError
from dsconv.threads import PyTorchOnOneThread

_SIZES_KEPT = 16


class Captured(NamedTuple):
    """What runs for images of a size in a memory layout, and its table.

    ``any_batch``: for batches of any size but one, or of one; otherwise for that of the input alone.
    """

    program: Program
    plan: Plan
    any_batch: bool


class _Captures:
    """Graphs of a model for images of one size and order in memory, and what runs for each layout of these.

    Attributes:
        graph: for any batch; None where the model cannot be captured so.
        by_batch: graphs for one batch.
        programs: by whether the batch is one, and strides; or by batch, threads and strides.
    """

    def __init__(self, graph: fx.GraphModule | None):
        self.graph = graph
        self.by_batch: dict[int, fx.GraphModule] = {}
        self.programs: dict[tuple[int, ...], Captured] = {}


class CompiledModel(nn.Module):
    """What :func:`compile` returns: call it as the model. It computes no gradients.

    Attributes:
        model: a copy of the quantized model of which it was made.
        plan: table of what runs for an image of the size of the example.
    """

    def __init__(self, model: nn.Module, example_input: Tensor):
        super().__init__()
        self.model = model
        self._device = example_input.device
        self._captured: dict[tuple[tuple[int, ...], ...], _Captures] = {}
        self._lock = threading.Lock()
        self.plan = self.program_for(example_input).plan
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Output for ``x`` of any batch size; a new image size or memory layout is captured first, and the last 16 are
        remembered.
        """
        with PyTorchOnOneThread():
            if torch.is_inference_mode_enabled():
                return self._run(x)
            with torch.inference_mode():
                return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        y: Tensor
        try:
            y = self.program_for(x).program(x)
        except OtherLayout:
            try:
                y = self.program_for(x, this_batch=True).program(x)
            except OtherLayout:
                y = self.model(x)
        return y

    def train(self, mode: bool = True) -> Self:
        """Change nothing: further image sizes are captured of the model as it was when it was compiled."""
        return self

    @property
    def preprocess(self) -> Preprocess | None:
        """How its images are prepared: what ``model`` says."""
        return preprocess_of(self.model)

    def program_for(self, x: Tensor, this_batch: bool = False) -> Captured:
        """What runs for images of the size and layout of ``x``, or for ``this_batch`` alone, and its table."""
        _check("compiled model", x, self._device)
        strides, exactly = x.stride(), (len(x), torch.get_num_threads(), *x.stride())
        key = (int(len(x) == 1), *strides)
        size = (x.shape[1:], order_in_memory(x))
        captures = self._captured.get(size)
        found = None if captures is None else captures.programs.get(key)
        if captures is not None and (this_batch or (found is not None and not found.any_batch)):
            found = captures.programs.get(exactly)
        if found is None:
            with PyTorchOnOneThread(), self._lock:  # one thread captures, the others wait for it
                captures = self._captured.get(size)
                if captures is None:
                    captures = _Captures(_graph_for_any_batch(self.model, x))
                    _keep(self._captured, size, captures)
                found = captures.programs.get(exactly if this_batch else key)
                if found is None or not (found.any_batch or this_batch):
                    found = self._made(captures, x, this_batch or found is not None)
                    if not found.any_batch:
                        _keep(captures.programs, exactly, found)
                    _keep(captures.programs, key, found)
        return found

    def _made(self, captures: _Captures, x: Tensor, this_batch: bool) -> Captured:
        graph = captures.graph
        if graph is None:
            graph = captures.by_batch.get(len(x))
            if graph is None:
                graph = graph_of(self.model, x, any_batch=False)
                _keep(captures.by_batch, len(x), graph)
        graph = _copy_of(graph)
        any_batch = captures.graph is not None and not this_batch
        example = x
        if any_batch and len(x) != 1:
            example = x[:2] if len(x) > 1 else in_layout_of(x, 2)
        with torch.inference_mode():
            record(graph, example)
            any_batch = any_batch and (len(x) == 1 or hold_for_batches(graph, len(example)))
            if not any_batch and example is not x:
                record(graph, x)
        fuse(graph)
        graph.graph.eliminate_dead_code()
        program = Program(lower(graph), any_batch)
        return Captured(program, plan_of(program), any_batch)

    # Graphs hold what cannot be copied or pickled everywhere: a copy captures anew when it is called.
    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_captured": {}, "_lock": None}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()


def compile(qmodel: nn.Module, example_input: Tensor) -> CompiledModel:
    """A quantized network as one program for inference, on the CPU or, with dsconv[gpu], on a GPU.

    The network is captured by :mod:`torch.export`, and its layers compute the BatchNorm, the additions and activations
    that follow them, and quantize what they write for the layers that read it. What lies between steps has its place in
    one piece of memory. Operators that the program does not know run in PyTorch; the plan names them.

    The result returns the strides of ``qmodel``, and its bits as far as the plan has layers, sums, products, maxima
    and piecewise linear activations, for an input of any memory layout, on the same number of threads.
    Activations with an exponential, norms, softmax and some averages, which PyTorch rounds in one way or another by
    layout, batch and processor, are rounded in one way of our own, a few units in the last place from the exact
    numbers; here and there a mantissa of a later layer then falls on its other side. docs/kernels.md says which.
    BatchNorm has PyTorch's bits where PyTorch computes one with fused multiply-adds: on processors with AVX2. A model
    without BatchNorm, as :func:`dsconv.fold_batchnorm` makes it, has the same bits as its program everywhere.

    The model is captured with the state that it has now: forward may cache by shape, and branch on parameters and
    buffers. Neither ``qmodel`` nor the graph keeps what forward sets meanwhile.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, in eval mode, on one device; it is left as it is.
        example_input: float32 ``(N, ...)`` of at least one image, of the size of those to come. The batch may vary
            afterwards, and other image sizes and memory layouts are captured when they come. A model that takes the
            batch size as a number, as ``len(x)`` does, is captured for each batch size.

    Returns:
        A module to be called as ``qmodel`` is; ``print(compiled.plan)`` shows its steps.

    Raises:
        TypeError, ValueError: ``example_input`` is no such tensor.
        ModelError: the model holds no quantized layer, is not in float32, is in training mode or cannot be captured;
            the message has the line of its code where that is known. Or dsconv was installed without its extension.

    >>> import dsconv
    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1)).eval()
    >>> fast = compile(dsconv.quantize(net), torch.zeros(1, 3, 16, 16))
    >>> [step.fused for step in fast.plan.steps], fast(torch.zeros(5, 3, 16, 16)).shape
    ([('bias', 'batch_norm', 'relu', 'quantize'), ('bias',)], torch.Size([5, 64, 14, 14]))
    """
    _check_dtype(qmodel)
    _check("example_input", example_input, _device_of(qmodel))
    if example_input.dim() < 2 or not len(example_input):
        raise ValueError(
            f"example_input: expected float32 (N, ...) with a batch of at least one, got {tuple(example_input.shape)}"
        )
    try:
        lowering(example_input.device)
    except RuntimeError:
        missing = f"the extension dsconv._C, {cpu_info().extension}" if example_input.is_cpu else "dsconv[gpu]"
        raise ModelError(f"compile needs {missing}: call the quantized model itself") from None
    qmodel = unwrapped(qmodel)
    check_inference(qmodel, "compiling")
    return CompiledModel(copied(qmodel), example_input)


def _check_dtype(model: nn.Module) -> None:
    for name, value in model.named_parameters() if isinstance(model, nn.Module) else ():
        # Quantized layers take every dtype: what they would have in float has no values.
        if value.is_floating_point() and value.dtype != torch.float32 and value.numel():
            raise ModelError(
                f"model {type(model).__name__}: parameter {name!r} is {value.dtype}, and programs compute in float32: "
                "call float() on the model and on its input"
            )


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of a model.

    Raises:
        ModelError: its tensors are on several.
    """
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    devices = list(dict.fromkeys(tensor.device for tensor in tensors))
    if len(devices) > 1:
        raise ModelError(
            f"model {type(model).__name__}: its tensors are on {' and '.join(map(str, devices))}, and programs run on "
            "one device: call to() on the model"
        )
    return devices[0] if devices else torch.device("cpu")


def _check(name: str, x: Tensor, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32 or x.device != device:
        where = "the CPU" if device.type == "cpu" else str(device)
        raise ValueError(
            f"{name}: expected float32 on {where}, got {x.dtype} on {x.device}: call float() or "
            f"to({device.type!r}) on the input"
        )


def _graph_for_any_batch(model: nn.Module, x: Tensor) -> fx.GraphModule | None:
    """None where its code turns the batch size into a number: it can be captured for one at a time."""
    try:
        return graph_of(model, x)
    except ModelError as error:
        try:
            graph_of(model, x, any_batch=False)
        except ModelError:
            raise error from error.__cause__
        return None


def _copy_of(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.set_codegen(module.graph._codegen)  # a deep copy of which warns in some versions
    return fx.GraphModule(module, graph)


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Of ever new keys the oldest go."""
    kept.pop(key, None)
    while len(kept) >= _SIZES_KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
