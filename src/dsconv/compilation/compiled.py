"""``dsconv.compile``: captures a quantized network and runs it as one graph."""

import os
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import fx, nn

from dsconv.backends import lowering
from dsconv.compilation.frontends import Graph, graph_of
from dsconv.compilation.fusion import fuse
from dsconv.compilation.layouts import hold_for_batches, order_in_memory, record, zeros_like
from dsconv.compilation.lowering import lower
from dsconv.compilation.parts import compile_parts, plan_of_parts
from dsconv.compilation.plan import Plan, plan_of
from dsconv.compilation.program import Axis, OtherLayout, Program
from dsconv.compilation.saving.writing import Saved, Size, check_saved, write
from dsconv.conversion.copying import copied
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.quantized import check_inference, quantized_layers
from dsconv.conversion.wrappers import unwrapped
from dsconv.cpu import cpu_info
from dsconv.data.inputs import Inputs, as_inputs, call, input_names
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ConfigError, DataError, ModelError, one_line
from dsconv.files import as_path
from dsconv.threads import PyTorchOnOneThread

_SIZES_KEPT = 16


class Captured(NamedTuple):
    """Program for inputs of a size in a memory layout, and its table.

    ``any_batch``: for all batch sizes except one, or for one; otherwise for the batch size of the input alone.
    """

    program: Program
    plan: Plan
    any_batch: bool


class _Captures:
    """Graphs of a model for inputs of one size and dimension order, and the programs for each memory layout of these.

    Attributes:
        graph: for any batch size; None if the model cannot be captured that way.
        by_batch: graphs for a single batch size.
        programs: by whether the batch size is one, and strides; or by batch size, threads and strides.
    """

    def __init__(self, graph: Graph | None):
        self.graph = graph
        self.by_batch: dict[int, Graph] = {}
        self.programs: dict[tuple[int, ...], Captured] = {}


class CompiledModel(nn.Module):
    """Result of :func:`compile`: call it as the model. It computes no gradients.

    Attributes:
        model: a copy of the quantized model that it was made from.
        plan: table of the steps for a sample of the size of the example.
        parts: names of the modules that are programs, if the model cannot be one as a whole: PyTorch runs the rest.
            Otherwise empty.
    """

    def __init__(self, model: nn.Module, example: Inputs, whole: bool = False):
        super().__init__()
        self.model = model
        self._device = example.tensors[0].device
        self._example = zeros_like(example, 1) if all(example.batched) else example
        self._captured: dict[tuple[Any, ...], _Captures] = {}
        self._lock = threading.Lock()
        self.parts: tuple[str, ...] = ()
        self._in_parts: nn.Module | None = None
        self.training = False
        try:
            self.plan = self.program_for(example).plan
        except ModelError as error:
            if whole:
                raise
            self.plan = self._compile_parts(example, error)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output for arguments of any batch size.

        Other image sizes, memory layouts and non-tensor arguments are captured first, and the last 16 captures are
        kept.
        """
        inputs = Inputs(*args, **kwargs)
        with PyTorchOnOneThread():
            if torch.is_inference_mode_enabled():
                return self._run(inputs)
            with torch.inference_mode():
                return self._run(inputs)

    def _compile_parts(self, example: Inputs, error: ModelError) -> Plan:
        """Compile the parts of the model; raise ``error`` if no part can be compiled either."""
        in_parts = copied(self.model)
        try:
            names = compile_parts(in_parts, example, partial(CompiledModel, whole=True))
        except Exception:
            raise error from error.__cause__
        if not names:
            raise error from error.__cause__
        self._in_parts, self.parts = in_parts, tuple(names)
        warnings.warn(
            f"{type(self.model).__name__} is compiled in parts ({', '.join(names)}), PyTorch runs the rest: {error}",
            stacklevel=4,
        )
        return plan_of_parts(in_parts, names)

    def _run(self, inputs: Inputs) -> Any:
        if self._in_parts is not None:
            return call(self._in_parts, inputs)
        try:
            return self.program_for(inputs).program(inputs.tensors)
        except OtherLayout:
            try:
                return self.program_for(inputs, this_batch=True).program(inputs.tensors)
            except OtherLayout:
                return call(self.model, inputs)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: further image sizes are captured from the model as it was when it was compiled."""
        return self

    @property
    def preprocess(self) -> Preprocess | None:
        """Preprocessing of its images, as stored with ``model``."""
        return preprocess_of(self.model)

    def program_for(self, example: Any, this_batch: bool = False) -> Captured:
        """Return the program for the sizes and layouts of ``example``, or for ``this_batch`` alone, and its table.

        Raises:
            ModelError: the model is compiled in parts.
        """
        if self.parts:
            raise ModelError(f"the model is compiled in parts: look at one of {', '.join(self.parts)}")
        inputs = as_inputs(example)
        _check("compiled model", inputs, self._device)
        count, both = len(inputs), list(zip(inputs.tensors, inputs.batched, strict=True))
        strides = [step for x in inputs.tensors for step in x.stride()]
        exactly, key = (count, torch.get_num_threads(), *strides), (int(count == 1), *strides)
        size = (inputs.structure(), *((x.shape[own:], order_in_memory(x), x.dtype, own) for x, own in both))
        captures = self._captured.get(size)
        found = None if captures is None else captures.programs.get(key)
        if captures is not None and (this_batch or (found is not None and not found.any_batch)):
            found = captures.programs.get(exactly)
        if found is None:
            with PyTorchOnOneThread(), self._lock:  # one thread captures, the others wait for it
                captures = self._captured.get(size)
                if captures is None:
                    captures = _Captures(_graph_for_any_batch(self.model, inputs))
                    _keep(self._captured, size, captures)
                found = captures.programs.get(exactly if this_batch else key)
                if found is None or not (found.any_batch or this_batch):
                    found = self._made(captures, inputs, this_batch or found is not None)
                    if not found.any_batch:
                        _keep(captures.programs, exactly, found)
                    _keep(captures.programs, key, found)
        return found

    def _made(self, captures: _Captures, inputs: Inputs, this_batch: bool) -> Captured:
        count, found = len(inputs), captures.graph
        if found is None:
            found = captures.by_batch.get(count)
            if found is None:
                found = graph_of(self.model, inputs, any_batch=False)
                _keep(captures.by_batch, count, found)
        graph = _copy_of(found.module)
        any_batch = captures.graph is not None and not this_batch
        example = inputs
        if any_batch and count != 1:
            example = inputs[:2] if count > 1 else zeros_like(inputs, 2)
        with torch.inference_mode():
            record(graph, example)
            any_batch = any_batch and (count == 1 or hold_for_batches(graph, len(example)))
            if not any_batch and example is not inputs:
                record(graph, inputs)
        fuse(graph)
        graph.graph.eliminate_dead_code()
        program = Program(lower(graph, _batch_in(graph, inputs)), found.structure, any_batch)
        return Captured(program, plan_of(program), any_batch)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        sizes: Sequence[Any] = (),
        classes: Sequence[str] | None = None,
        fast_start: bool = False,
        other_sizes: bool = True,
    ) -> Saved:
        """Write the network as a file that runs without PyTorch: by ``dsconv_runtime`` in Python, by libdsconv in C.

        The file contains the steps of the plan, the weights at their bit width, the names of inputs and outputs as in
        :func:`dsconv.export_onnx`, and the preprocessing if the model has one. Its outputs are bitwise equal to those
        of this module for contiguous inputs, for any batch size and on any processor (docs/compiled-files.md specifies
        the format). Image sizes are as flexible as the steps of the network: it is captured for some larger sizes, and
        if these have the same steps, the steps are used for all sizes.

        Args:
            path: replaced when the file is complete.
            sizes: further examples, as for :func:`compile`: the file accepts inputs of their sizes, and of that of the
                compiled example, whatever its steps are.
            classes: names of the classes, for a classifier.
            fast_start: write the weights of all layers in the layout of the kernels. Winograd layers then take four
                times as much space in the file, which is opened several times faster, and processes share its memory.
            other_sizes: whether the file may accept image sizes that are not given. To find out, the network is
                captured twice more, which takes most of the time.

        Returns:
            The size of the file in bytes, and the image sizes that it accepts besides those given.

        Raises:
            ConfigError: ``sizes`` or ``classes`` are not valid.
            ModelError: PyTorch computes steps of the network, or the network is captured for each batch size
                separately, or it is not on the CPU.
            OSError: the file cannot be written.

        >>> import dsconv, tempfile
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)).eval()
        >>> fast = compile(dsconv.quantize(net), torch.zeros(1, 3, 8, 8, dtype=torch.float32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = fast.save(f"{folder}/net.dsconv")
        >>> saved.bytes > 1000, saved.size_step
        (True, 0)
        """
        place, examples = as_path(path), _examples(sizes)
        if classes is not None:
            _check_classes(classes)
        if self.parts:
            raise ModelError(f"the network cannot be saved: it is compiled in parts, {', '.join(self.parts)}")
        if self._device.type != "cpu":
            raise ModelError(f"the network cannot be saved: it is on {self._device}: compile it on the CPU")
        before = dict(self._captured)
        try:
            made = [self._size_for_saving(example) for example in [self._example, *examples]]
            taken = input_names(self._example, self.model)
            names = taken, made[0].several.output_names(taken)
            for size in made:
                for program in size:
                    check_saved(program, names[1])
                shapes = [port.shape for port in size.several.ports()[1] if port is not None]
                if classes is not None and len(shapes) == 1 and len(shapes[0]) == 1 and len(classes) != shapes[0][0]:
                    raise ConfigError(f"classes: expected {shapes[0][0]} names, one of each output, got {len(classes)}")
            preprocess = None if self.preprocess is None else self.preprocess.model_dump_json()
            layers = quantized_layers(self.model).values()
            probe = partial(self._larger, made[0], names[1]) if other_sizes else None
            return write(place, made, probe, layers, names, preprocess, classes, fast_start)
        finally:
            self._captured = before

    def _size_for_saving(self, example: Inputs) -> Size:
        return Size(self._for_saving(example, 1), self._for_saving(example, 2))

    def _larger(self, size: Size, outputs: Sequence[str], rows: int, columns: int, alone: bool) -> Size:
        """Return the programs for ``rows`` and ``columns`` more than those of ``size``, the size of the example.

        ``alone``: one sample has the same steps as several.

        Raises:
            ModelError: the inputs have no rows and columns, or the network does not accept that many, or not with its
                steps.
        """
        more = {Axis.ROWS: rows, Axis.COLUMNS: columns}
        ports = size.several.ports()[0]
        if not any(axis in more for port in ports for axis in port.axes):
            raise ModelError("no input has rows and columns")
        shapes = [[n + more.get(axis, 0) for n, axis in zip(port.shape, port.axes, strict=True)] for port in ports]
        larger = self._example.filled(torch.zeros(1, *shape, dtype=torch.float32, device="cpu") for shape in shapes)
        try:  # before a capture, which would log an error if it fails
            with torch.inference_mode():
                call(self.model, larger)
        except Exception as error:
            sizes = " and ".join("x".join(map(str, shape)) for shape in shapes)
            raise ModelError(f"the model does not take {sizes}: {one_line(str(error), 200)}") from None
        several = self._for_saving(larger, 2)
        check_saved(several, outputs)
        if alone:
            return Size(several, several)
        one = self._for_saving(larger, 1)
        check_saved(one, outputs)
        return Size(one, several)

    def _for_saving(self, example: Inputs, count: int) -> Program:
        """Return the program for ``count`` contiguous samples of the sizes of ``example``."""
        both = list(zip(example.tensors, example.batched, strict=True))
        for name, (x, batched) in zip(input_names(example, self.model), both, strict=True):
            if not batched or x.dtype != torch.float32:
                raise ModelError(
                    f"the network cannot be saved: input {name!r} is {x.dtype} {tuple(x.shape)}, expected float32 "
                    "(N, ...)"
                )
        zeros = (torch.zeros((count, *x.shape[1:]), dtype=torch.float32, device="cpu") for x, _ in both)
        captured = self.program_for(example.filled(zeros))
        if not captured.any_batch:
            raise ModelError("the network cannot be saved: it contains the batch size as a constant")
        return captured.program

    # Graphs contain objects that cannot be copied or pickled everywhere: a copy captures again when it is called.
    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_captured": {}, "_lock": None}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()


def compile(qmodel: nn.Module, example_input: Any) -> CompiledModel:
    """Compile a quantized network to one program for inference, on the CPU or, with dsconv[gpu], on a GPU.

    The network is captured by :mod:`torch.export`; its layers compute the BatchNorm, additions and activations that
    follow them, and quantize their output for the layers that read it. Intermediate tensors are placed in one block of
    memory. Operators that the compiler does not support run in PyTorch; the plan lists them. If a model cannot be
    captured as a whole, such as a detector whose post-processing depends on the detections, the largest modules that
    can be captured become programs, and PyTorch runs the rest: a warning gives the reason, and the plan and ``parts``
    list them.

    The result has the strides of ``qmodel``, and is bitwise equal as far as the plan consists of layers, sums,
    products, maxima and piecewise linear activations, for an input of any memory layout, on the same number of threads.
    Activations with an exponential, norms, softmax and some averages, whose rounding in PyTorch depends on layout,
    batch and processor, are rounded in one defined way, a few units in the last place from the exact values; this
    occasionally changes a mantissa of a later layer. docs/kernels.md has the details. BatchNorm is bitwise equal if
    PyTorch computes it with fused multiply-adds: on processors with AVX2. A model without BatchNorm, as
    :func:`dsconv.fold_batchnorm` returns it, is bitwise equal to its program everywhere.

    The model is captured with its current state: forward may cache by shape, and branch on parameters and buffers.
    Neither ``qmodel`` nor the graph keeps what forward sets meanwhile.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, in eval mode, on one device; it is unchanged.
        example_input: arguments of ``qmodel``, for at least one sample: float32 ``(N, ...)``; or a tuple of its
            arguments, or :class:`dsconv.Inputs`; or one list, dictionary or dataclass. Integer tensors may be among
            them. The batch size may vary afterwards; other image sizes, memory layouts and arguments are captured when
            they first occur. A model that uses the batch size as a number, as ``len(x)`` does, is captured for each
            batch size, as is one that takes a list of images.

    Returns:
        A module that is called like ``qmodel`` and returns the same structure: tensors, or lists, tuples, dictionaries
            and dataclasses of them; ``print(compiled.plan)`` shows its steps.

    Raises:
        DataError, ValueError: there is no tensor, or one that is not float32 or on another device than the model.
        ModelError: the model has no quantized layer, is not in float32, is in training mode or cannot be captured; the
            message names the line of its code if that is known. Or dsconv was installed without its extension.

    >>> import dsconv
    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1)).eval()
    >>> fast = compile(dsconv.quantize(net), torch.zeros(1, 3, 16, 16))
    >>> [step.fused for step in fast.plan.steps], fast(torch.zeros(5, 3, 16, 16)).shape
    ([('bias', 'batch_norm', 'relu', 'quantize'), ('bias',)], torch.Size([5, 64, 14, 14]))
    """
    _check_dtype(qmodel)
    inputs, device = as_inputs(example_input), _device_of(qmodel)
    _check("example_input", inputs, device)
    if not len(inputs):
        raise ValueError(f"example_input: expected a batch of at least one, got {inputs}")
    try:
        lowering(device)
    except RuntimeError:
        missing = f"the extension dsconv._C, {cpu_info().extension}" if device.type == "cpu" else "dsconv[gpu]"
        raise ModelError(f"compile needs {missing}: call the quantized model itself") from None
    qmodel = unwrapped(qmodel)
    check_inference(qmodel, "compiling")
    return CompiledModel(copied(qmodel), inputs)


def _examples(sizes: Any) -> list[Inputs]:
    """Return the examples of further sizes.

    Raises:
        ConfigError: they are not valid examples.
    """
    told = "sizes: expected a list of examples, as torch.zeros(1, 3, 320, 480, dtype=torch.float32), got "
    if not isinstance(sizes, list | tuple):
        raise ConfigError(f"{told}{type(sizes).__name__}")
    examples = []
    for size in sizes:
        try:
            examples.append(as_inputs(size))
        except DataError:
            raise ConfigError(f"{told}{one_line(repr(size), 100)} in it") from None
        if not all(x.numel() for x in examples[-1].tensors):
            raise ConfigError(f"{told}an empty one: {examples[-1]}")
    return examples


def _check_classes(classes: Sequence[str]) -> None:
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise ConfigError(f"classes: expected a list of names, got {one_line(repr(classes), 100)}")
    for name in classes:
        if not isinstance(name, str) or not name or "\0" in name or not name.isprintable():
            raise ConfigError(f"classes: expected names of printable characters, got {one_line(repr(name), 100)}")


def _check_dtype(model: nn.Module) -> None:
    for name, value in model.named_parameters() if isinstance(model, nn.Module) else ():
        # Quantized layers accept every dtype: the parameter for their float dtype has no values.
        if value.is_floating_point() and value.dtype != torch.float32 and value.numel():
            raise ModelError(
                f"model {type(model).__name__}: parameter {name!r} is {value.dtype}, and programs compute in float32: "
                "call float() on the model and on its input"
            )


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of a model.

    Raises:
        ModelError: its tensors are on several devices.
    """
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    devices = list(dict.fromkeys(tensor.device for tensor in tensors))
    if len(devices) > 1:
        raise ModelError(
            f"model {type(model).__name__}: its tensors are on {' and '.join(map(str, devices))}, and programs run on "
            "one device: call to() on the model"
        )
    return devices[0] if devices else torch.device("cpu")


def _check(name: str, inputs: Inputs, device: torch.device) -> None:
    for x in inputs.tensors:
        if (x.is_floating_point() and x.dtype != torch.float32) or x.is_complex() or x.device != device:
            where = "the CPU" if device.type == "cpu" else str(device)
            raise ValueError(
                f"{name}: expected float32 on {where}, got {x.dtype} on {x.device}: call float() or "
                f"to({device.type!r}) on the input"
            )


def _graph_for_any_batch(model: nn.Module, inputs: Inputs) -> Graph | None:
    """Return None if its code converts the batch size to a number: it can be captured for one at a time."""
    if not any(inputs.batched):
        return None
    try:
        return graph_of(model, inputs)
    except ModelError as error:
        try:
            graph_of(model, inputs, any_batch=False)
        except ModelError:
            raise error from error.__cause__
        return None


def _batch_in(graph: fx.GraphModule, inputs: Inputs) -> Any:
    """Return the batch size, or its symbol."""
    made = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return next((x.shape[0] for x, batched in zip(made, inputs.batched, strict=True) if batched), len(inputs))


def _copy_of(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.set_codegen(module.graph._codegen)  # a deep copy of it warns in some versions
    return fx.GraphModule(module, graph)


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Store a value, and remove the oldest ones beyond the limit."""
    kept.pop(key, None)
    while len(kept) >= _SIZES_KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
