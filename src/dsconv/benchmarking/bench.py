"""``dsconv.bench``: times a network in dsconv and in other runtimes, in turns in one process."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dsconv.benchmarking import peers
from dsconv.benchmarking.machine import machine
from dsconv.benchmarking.measure import Race, quartiles
from dsconv.benchmarking.peers import Case, Contestant, NotRun, OnnxModels, tensors_of_output
from dsconv.benchmarking.results import Bench, Timing, plural
from dsconv.conversion import model_info
from dsconv.conversion.wrappers import unwrapped
from dsconv.cpu import cores
from dsconv.data.inputs import Batch, Inputs, as_inputs, describe, joined
from dsconv.errors import ConfigError, MissingExtraError, ModelError, check_choice
from dsconv.evaluation.outputs import check_outputs, named_outputs
from dsconv.evaluation.running import forward
from dsconv.layers.inputs import dtype_of
from dsconv.modes import check_evaluation_mode, check_module
from dsconv.names import PEERS, OnInterrupt, check_on_interrupt
from dsconv.progress import Advance, progress_bar

_RANDOM_IMAGES = 8
# Relative error above which a float32 runtime did not compute the network correctly.
_MOST_ERROR = 0.01
# Relative error above which a lower-precision runtime is reported; its time does not depend on values.
_TOLD_ERROR = 0.5


def bench(
    reference: nn.Module,
    qmodel: nn.Module,
    images: Batch | Sequence[Any],
    *,
    against: Iterable[str] = PEERS,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    turns: int | None = None,
    seconds: float = 10.0,
    name: str | None = None,
    progress: bool = False,
    on_interrupt: OnInterrupt = "raise",
) -> Bench:
    """Time a quantized network, compiled and not compiled, and its float original in other runtimes, in one process.

    If layers support two algorithms, the compiled network is also timed with the other one: all such layers ``direct``
    if some use Winograd, else all ``winograd``.

    The runtimes are PyTorch (eager, float32 and bf16), ONNX Runtime (float32 and int8), OpenVINO (float32, bf16 and
    int8) and MNN (float32, and int8 with and without Winograd); bf16 only if the processor supports it. int8 is a Q/DQ
    model that ``onnxruntime.quantization`` makes from the float network, or the result of MNN's own tool: weights with
    a scale per output, 8-bit activations with a scale per tensor. The precision that a runtime actually used is read
    from it, and the contestant is named accordingly. Inputs and outputs are those of the network, in float32 if they
    are floating-point. Each contestant is warmed up; then they take turns in random order
    (:class:`dsconv.benchmarking.measure.Race`). A float32 runtime is excluded if a floating-point output differs by
    more than 1 % from PyTorch's; for other runtimes, a difference above 50 % is reported. MNN is included if the
    network has one float32 tensor as input and output.

    Args:
        reference: the float network, in eval mode, on the CPU. Its weights do not affect the times.
        qmodel: the quantized network.
        images: float32 ``(N, C, H, W)``, the input of the networks, repeated to fill a batch, and the calibration data
            of int8 models; or the shape ``(C, H, W)`` of 8 random images from a standard normal distribution. Other
            arguments are a :class:`dsconv.Inputs`, or a tuple of them, as for :func:`dsconv.compile`.
        against: some of ``torch``, ``onnxruntime``, ``openvino`` and ``mnn``. One that is not installed, or cannot run
            the network, is noted in the result.
        batch_sizes: samples per call; each is measured with each number of threads.
        threads: numbers of threads of each contestant.
        turns: turns of each contestant, at least 2; None uses as many as fit into ``seconds``, and at least 5.
        seconds: duration for all contestants together, for each batch size and number of threads, after warm-up.
        name: name of the network, for the table; None uses its name in :func:`dsconv.zoo.build`, or its class.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.
        on_interrupt: effect of Ctrl-C: ``"raise"`` raises KeyboardInterrupt, ``"partial"`` returns the times so far, if
            there are any.

    Raises:
        ConfigError: an argument is out of range.
        DataError: there is no tensor in ``images``.
        ModelError: a network is in training mode, cannot run on the images or cannot be compiled.

    >>> import dsconv
    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    >>> found = bench(net, dsconv.quantize(net), (3, 16, 16), against=["torch"], turns=2)
    >>> [timing.contestant for timing in found.timings][:4], found.timings[0].turns
    (['dsconv', 'dsconv, not compiled', 'dsconv, direct', 'PyTorch float32'], 2)
    """
    if not isinstance(against, Iterable) or not all(isinstance(peer, str) for peer in against):
        raise ConfigError(f"against: expected some of {', '.join(PEERS)}, got {type(against).__name__}")
    reference, qmodel = unwrapped(reference), unwrapped(qmodel)
    _check(reference, against := list(dict.fromkeys(against)), batch_sizes, threads, turns, seconds, on_interrupt)
    x, calibration = _images(images)
    info, threads_before, where = model_info(qmodel), torch.get_num_threads(), machine()
    name = name or str(getattr(reference, "dsconv_architecture", type(reference).__name__))
    shapes = [tuple(tensor.shape[own:]) for tensor, own in zip(x.tensors, x.batched, strict=True)]
    interrupted = False
    settings = len(batch_sizes) * len(threads)
    # A thread that refreshes the bar would take time from a contestant.
    bar = progress_bar(progress, f"bench {name}", settings, "settings", refreshes=False)
    with TemporaryDirectory() as folder, bar as advance:
        made = OnnxModels(reference, x, Path(folder))
        ours = partial(peers.ours, qmodel)
        run = _Run(reference, ours, made, x, against, advance)
        try:
            for batch_size in batch_sizes:
                run.batch(batch_size, threads, turns, seconds)
        except KeyboardInterrupt:
            if on_interrupt == "raise" or not run.timings:
                raise
            interrupted = True
        finally:
            torch.set_num_threads(threads_before)
    return Bench(
        network=name,
        input_shape=shapes[0],
        input_shapes=dict(zip(made.inputs, shapes, strict=True)) if len(shapes) > 1 and not x.of_images else {},
        config=info.config.to_dict() if info is not None else None,
        calibration=calibration,
        timings=tuple(run.timings),
        not_run=run.not_run,
        unsettled_turns=run.unsettled_turns,
        machine=where,
        interrupted=interrupted,
    )


def _check(
    reference: nn.Module,
    against: Sequence[str],
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    turns: int | None,
    seconds: float,
    on_interrupt: OnInterrupt,
) -> None:
    for peer in against:
        check_choice("against", peer, PEERS)
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"batch_sizes: expected whole numbers from 1, got {batch_sizes}")
    if not threads or min(threads) < 1 or max(threads) > cores():
        raise ConfigError(f"threads: expected whole numbers from 1 to {cores()}, the number of cores, got {threads}")
    if (turns is not None and turns < 2) or seconds <= 0:
        raise ConfigError(
            f"turns, seconds: expected at least 2 turns and more than 0 seconds, got {turns} and {seconds}"
        )
    check_on_interrupt(on_interrupt)
    check_module("reference", reference)
    check_evaluation_mode(reference, "timing it")
    if (dtype := dtype_of(reference)) not in (None, torch.float32):
        raise ModelError(
            f"reference: expected float32, in which runtimes are compared, got {dtype}: call float() on it first"
        )


def _images(images: Batch | Sequence[Any]) -> tuple[Inputs, str]:
    """Return the arguments of the networks, and a description of them."""
    if isinstance(images, Sequence) and images and all(isinstance(n, int) and n > 0 for n in images):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((_RANDOM_IMAGES, *images), generator=generator, dtype=torch.float32, device="cpu")
        return Inputs(x), f"{_RANDOM_IMAGES} random images"
    if not isinstance(images, Tensor | Inputs | list | tuple | dict):
        got = type(images).__name__
        raise ConfigError(f"images: expected a tensor (N, C, H, W), dsconv.Inputs or numbers (C, H, W), got {got}")
    inputs = as_inputs(images)
    of_others = ((x.is_floating_point() and x.dtype != torch.float32) or x.device.type != "cpu" for x in inputs.tensors)
    alone = isinstance(images, Tensor) and (images.dim() < 2 or images.dtype == torch.uint8)
    if any(of_others) or alone or not len(inputs):
        raise ConfigError(
            "images: expected at least one sample on the CPU, floating-point tensors in float32 and no image in uint8, "
            f"as (N, C, H, W), got {describe(inputs)}"
        )
    return inputs, f"{len(inputs)} given {'images' if isinstance(images, Tensor) else 'samples'}"


class _Run:
    """Settings of a benchmark, one after the other, and the results so far."""

    def __init__(
        self,
        reference: nn.Module,
        ours: Callable[[Inputs], list[Contestant]],
        onnx: OnnxModels,
        images: Inputs,
        against: Sequence[str],
        advance: Advance,
    ):
        self.reference, self.ours, self.onnx, self.images, self.advance = reference, ours, onnx, images, advance
        self.makers = {name: make for peer in against for name, make in peers.CONTESTANTS[peer].items()}
        self.timings: list[Timing] = []
        self.not_run: dict[str, str] = {}
        self.unsettled_turns = 0
        self.settings_done = 0
        self.shown = 0.0

    def show(self, what: str, done: float) -> None:
        """Show the current activity, and the number of settings done."""
        self.advance(done - self.shown, what)
        self.shown = done

    def batch(self, batch_size: int, threads: Sequence[int], turns: int | None, seconds: float) -> None:
        copies = math.ceil(batch_size / len(self.images))
        repeated = joined([self.images] * copies)[:batch_size]
        assert isinstance(repeated, Inputs)
        x = repeated.filled(tensor.contiguous() for tensor in repeated.tensors)
        expected = _outputs(self.reference, x)
        self.show(f"batch {batch_size}: compiling", self.settings_done)
        ours = self.ours(x)
        for count in threads:
            torch.set_num_threads(count)
            what = f"batch {batch_size}, {plural(count)}"
            contestants, case = list(ours), Case(self.reference, self.onnx, x, expected, count)
            for name, make in self.makers.items():
                if name not in self.not_run:
                    self.show(f"{what}: preparing {name}", self.settings_done)
                    try:
                        contestants.append(_checked(make(case), expected))
                    except (NotRun, MissingExtraError) as error:
                        self.not_run[name] = str(error)
                    except Exception as error:  # a runtime may raise anything for an unsupported network
                        self.not_run[name] = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            with torch.inference_mode():
                self._race(contestants, case, what, turns, seconds)
            self.settings_done += 1

    def _race(
        self, contestants: Sequence[Contestant], case: Case, what: str, turns: int | None, seconds: float
    ) -> None:
        self.show(f"{what}: warming up", self.settings_done)
        race = Race([contestant.call for contestant in contestants], case.threads)
        try:
            for part in race.rounds(turns=turns, seconds=seconds):
                self.show(f"{what}: measuring", self.settings_done + part)
        finally:  # also if interrupted
            self.unsettled_turns += race.unsettled
            if min(map(len, race.times)) > 1:
                self.timings += map(partial(_timing, case), contestants, race.times)


def _timing(case: Case, contestant: Contestant, times: Sequence[float]) -> Timing:
    """Return the reported figures of ``times`` in seconds."""
    first, median, third = quartiles([1e3 * time for time in times])
    return Timing(
        contestant=contestant.name,
        executed=contestant.executed,
        weight_bytes=contestant.weight_bytes,
        batch_size=len(case.x),
        threads=case.threads,
        turns=len(times),
        first_quartile_ms=first,
        median_ms=median,
        third_quartile_ms=third,
    )


def _outputs(reference: nn.Module, x: Inputs) -> list[Tensor]:
    with torch.inference_mode():
        output = forward("reference", reference, x)
    check_outputs("reference", output, named_outputs(output))
    return tensors_of_output(output)


def _checked(contestant: Contestant, expected: Sequence[Tensor]) -> Contestant:
    """Return the contestant if its outputs match those of the network."""
    with torch.inference_mode():
        found = contestant.outputs()
    shapes, wanted = (", ".join(str(tuple(y.shape)) for y in ys) for ys in (found, expected))
    if shapes != wanted:
        raise NotRun(f"returns {shapes} instead of {wanted}")
    # Integers, such as the index of the largest class, may differ by any amount if floats differ slightly.
    floats = [(a, b) for a, b in zip(found, expected, strict=True) if b.is_floating_point()]
    errors = [float((a - b).norm() / b.norm()) for a, b in floats if not torch.equal(a, b)]
    # NaN counts as the largest error.
    error = max(errors, key=lambda value: math.inf if math.isnan(value) else value, default=0.0)
    of = "its output is" if len(expected) == 1 else "one of its outputs is"
    told = f"{of} {100 * error:.1f} % off PyTorch's"
    if contestant.name.endswith("float32") and not error <= _MOST_ERROR:
        raise NotRun(told)
    return contestant if error <= _TOLD_ERROR else replace(contestant, executed=f"{contestant.executed}; {told}")
