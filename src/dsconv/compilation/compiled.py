"""``dsconv.compile``: captures a quantized network and runs it as one graph."""

import threading
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from dsconv.compilation.capture import capture
from dsconv.compilation.fusion import EXACT, INEXACT, fuse
from dsconv.compilation.lowering import lower
from dsconv.compilation.plan import Plan, plan_of
from dsconv.compilation.program import Program
from dsconv.conversion.copying import copied
from dsconv.conversion.fold import check_inference
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.wrappers import unwrapped
from dsconv.cpu import cpu_info
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ModelError

_SIZES_KEPT = 16


class Captured(NamedTuple):
    """What runs for images of a size, and its table."""

    program: Program
    plan: Plan


class CompiledModel(nn.Module):
    """What :func:`compile` returns: call it as the model. It computes no gradients.

    Attributes:
        model: a copy of the quantized model of which it was made.
        fast_math: as it was given.
        plan: table of what runs for an image of the size of the example.
    """

    def __init__(self, model: nn.Module, example_input: Tensor, fast_math: bool = False):
        super().__init__()
        self.model, self.fast_math = model, fast_math
        self._captured: dict[tuple[int, ...], Captured] = {}
        self._lock = threading.Lock()
        self.plan = self.program_for(example_input).plan
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Output for ``x`` of any batch size; a new image size is captured first, and the last 16 are remembered."""
        program = self.program_for(x).program
        if torch.is_inference_mode_enabled():
            y: Tensor = program(x)
        else:
            with torch.inference_mode():
                y = program(x)
        return y

    def train(self, mode: bool = True) -> Self:
        """Change nothing: further image sizes are captured of the model as it was when it was compiled."""
        return self

    @property
    def preprocess(self) -> Preprocess | None:
        """How its images are prepared: what ``model`` says."""
        return preprocess_of(self.model)

    def program_for(self, x: Tensor) -> Captured:
        """What runs for images of the size of ``x``, and its table."""
        _check("compiled model", x)
        size = x.shape[1:]
        found = self._captured.get(size)
        if found is None:
            with self._lock:  # one thread captures, the others wait for it
                found = self._captured.get(size)
                if found is None:
                    found = _captured(self.model, x, self.fast_math)
                    # Of ever new sizes the oldest go.
                    kept = list(self._captured.items())[1 - _SIZES_KEPT :]
                    self._captured = dict([*kept, (size, found)])
        return found

    # Graphs hold what cannot be copied or pickled everywhere: a copy captures anew when it is called.
    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_captured": {}, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()


def compile(qmodel: nn.Module, example_input: Tensor, *, fast_math: bool = False) -> CompiledModel:
    """A quantized network as one program for inference on the CPU.

    The network is captured by :mod:`torch.export`, and its layers compute the BatchNorm, the additions and activations
    that follow them, and quantize what they write for the layers that read it. What lies between steps has its place in
    one piece of memory. Operators that the program does not know run in PyTorch; the plan names them.

    The result returns the same bits as ``qmodel``, BatchNorm included, where PyTorch computes one with fused
    multiply-adds: on processors with AVX2. A model without BatchNorm, as :func:`dsconv.fold_batchnorm` makes it, gives
    the same bits everywhere.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, in eval mode, on the CPU; it is left as it is.
        example_input: float32 ``(N, ...)`` of at least one image, of the size of those to come. The batch may vary
            afterwards, and other image sizes are captured when they come.
        fast_math: compute SiLU and sigmoid by kernels of our own as well, not by PyTorch, and averages over whole
            images in an order of our own: faster, and a few units in the last place from its results, so that here and
            there a mantissa of a later layer falls on its other side. The bits then depend on neither instruction set,
            threads nor batch, which is more than PyTorch's do.

    Returns:
        A module to be called as ``qmodel`` is; ``print(compiled.plan)`` shows its steps.

    Raises:
        TypeError, ValueError: ``example_input`` is no such tensor.
        ModelError: the model holds no quantized layer, is in training mode or cannot be captured; the message has the
            line of its code where that is known. Or dsconv was installed without its extension.

    >>> import dsconv
    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    >>> fast = compile(dsconv.quantize(net), torch.zeros(1, 3, 16, 16))
    >>> [step.fused for step in fast.plan.steps], fast(torch.zeros(5, 3, 16, 16)).shape
    ([('bias', 'batch_norm', 'relu', 'quantize'), ('bias',)], torch.Size([5, 64, 12, 12]))
    """
    _check("example_input", example_input)
    if example_input.dim() < 2 or not len(example_input):
        raise ValueError(
            "example_input: expected float32 on the CPU (N, ...) with a batch of at least one, "
            f"got {tuple(example_input.shape)}"
        )
    if missing := cpu_info().extension:
        raise ModelError(f"compile needs the extension dsconv._C, {missing}: call the quantized model itself")
    qmodel = unwrapped(qmodel)
    check_inference(qmodel, "compiling")
    return CompiledModel(copied(qmodel), example_input, fast_math)


def _check(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32 or not x.is_cpu:
        raise ValueError(f"{name}: expected float32 on the CPU, got {x.dtype} on {x.device}")


def _captured(model: nn.Module, x: Tensor, fast_math: bool) -> Captured:
    module = capture(model, x)
    activations = EXACT | INEXACT if fast_math else EXACT
    fuse(module, activations)
    module.graph.eliminate_dead_code()
    program = Program(lower(module, activations, own_averages=fast_math))
    return Captured(program, plan_of(program))
