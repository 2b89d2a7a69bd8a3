"""Distance of a network from float when a single layer is quantized."""

import copy
import glob
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dsconv.config import FLOAT, LayerConfig, QuantConfig, as_config
from dsconv.conversion import LayerSummary, quantize, summary
from dsconv.conversion.convert import quantize_for, swapped
from dsconv.conversion.functional import as_layers
from dsconv.conversion.info import info_of
from dsconv.conversion.quantized import check_original
from dsconv.conversion.statistics import input_moments, normalized, signed_inputs, with_statistics
from dsconv.conversion.wrappers import unwrapped
from dsconv.data import Batches, Images, Preprocess, batches, synthetic_images
from dsconv.data.folder import Labels
from dsconv.data.inputs import Batch, by_sample, shape_of
from dsconv.errors import ConfigError, FileFormatError, ModelError, check_whole
from dsconv.evaluation import Comparison, compare, evaluate
from dsconv.evaluation.measures import Kinds
from dsconv.evaluation.metric import Metric, check_metric, name_of
from dsconv.evaluation.outputs import outputs_by_image
from dsconv.io.state import StateFile
from dsconv.layers import DSLayer
from dsconv.names import Task
from dsconv.progress import progress_bar
from dsconv.tables import Printed
from dsconv.zoo import preprocess_of

if TYPE_CHECKING:
    from rich.table import Table

Choice = Mapping[str, Any]
"""Fields of a LayerConfig that differ from the config's settings of a layer."""

_TURNS = 5


@dataclass(frozen=True)
class Trial:
    """Measurement with one layer quantized in one way, and all others in float.

    Attributes:
        layer: name of the layer in the model.
        settings: differences from the config's settings of the layer.
        weight_bits, activation_bits, block_size: the resulting settings; ``activation_bits`` None is a float input.
        weights: number of the layer's weights.
        bytes: their packed size, including KDS and shifts.
        kl: mean of KL(softmax(float) || softmax(quantized)) of logits in nats, None without logits; NaN if they were
            not finite.
        ms: the layer's time on one image in milliseconds, None if not measured.
        relative_error: sum (f - q)^2 / sum f^2 of outputs that are not logits, None without such outputs.
        metric: value of a user's own metric for the two networks, None without one.
    """

    layer: str
    settings: dict[str, Any]
    weight_bits: int
    activation_bits: int | None
    block_size: int
    weights: int
    bytes: int
    kl: float | None
    ms: float | None = None
    relative_error: float | None = None
    metric: float | None = None

    @property
    def distance(self) -> float:
        """Distance by which trials are ranked: the metric; without one, the sum of divergence and relative error."""
        if self.metric is not None:
            return self.metric
        return sum(value for value in (self.kl, self.relative_error) if value is not None)

    @property
    def name(self) -> str:
        """Short form of its settings, such as ``W4A8``."""
        others = [f"{k}={v}" for k, v in self.settings.items() if k not in ("weight_bits", "activation_bits")]
        return " ".join([f"W{self.weight_bits}A{self.activation_bits or 'float'}", *others])


@dataclass(frozen=True)
class Sensitivity(Printed):
    """Distance from float caused by every layer alone, for every choice of its settings; prints as a table.

    Attributes:
        trials: by layer in the order of the model, then by choice.
        images: number of images it was measured on.
        synthetic: whether those were noise, because no images were given.
        fixed_bytes: size of the weights that are not quantized, because the config leaves them in float.
        fixed_weights: number of these weights.
        other_bytes: size of everything that is not a layer's weight.
        measure: meaning of ``Trial.distance``: ``KL divergence`` of logits, ``relative error`` of other outputs,
            ``KL divergence and relative error``, or the name of a metric.
    """

    trials: tuple[Trial, ...]
    images: int
    synthetic: bool
    fixed_bytes: int
    fixed_weights: int
    other_bytes: int
    measure: str = "KL divergence"

    def layers(self) -> dict[str, list[Trial]]:
        """Return the trials by layer."""
        return {name: list(group) for name, group in itertools.groupby(self.trials, key=lambda trial: trial.layer)}

    @cached_property
    def weights(self) -> int:
        """Number of weights of the whole network, including layers in float."""
        return self.fixed_weights + sum(trials[0].weights for trials in self.layers().values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> "Table":
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        layers = self.layers()
        first = {name: trials[0].distance / trials[0].weights for name, trials in layers.items()}
        order = sorted(first, key=lambda name: -math.inf if math.isnan(first[name]) else -first[name])
        kind = "of noise" if self.synthetic else "without labels"
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption=f"{in_words(self.measure)} with one layer quantized, on {self.images} images {kind}.\n"
            f"rank: by {short(self.measure)} per weight of the first choice.",
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        # Layers with settings of their own have no common names: the choices are numbered.
        for column in (
            "weights",
            "share",
            "rank",
            *(["settings", short(self.measure)] * max(map(len, layers.values()), default=0)),
        ):
            table.add_column(column, justify="right")
        for name, trials in layers.items():
            cells = [f"{trials[0].weights:,}", f"{100 * trials[0].weights / self.weights:.1f} %"]
            cells.append(str(order.index(name) + 1))
            for trial in trials:
                cells += [trial.name, shown(trial.distance, self.measure)]
            table.add_row(escape(name), *cells)
        return table


_LOGITS = "KL divergence"


def in_words(measure: str) -> str:
    """Return the description of a distance, with its unit, for the beginning of a sentence."""
    known = {
        _LOGITS: "KL divergence of the logits in millinats",
        "relative error": "Relative error of the outputs in thousandths",
        "KL divergence and relative error": "KL divergence of logits in millinats, added to relative error of other "
        "outputs in thousandths,",
    }
    return known.get(measure, measure)


def short(measure: str) -> str:
    """Return the heading of a column."""
    return {_LOGITS: "KL", "relative error": "error", "KL divergence and relative error": "KL + error"}.get(
        measure, measure
    )


def shown(distance: float, measure: str) -> str:
    """Return a distance in the unit of its column; a metric has its own unit."""
    return f"{1e3 * distance:.3f}" if in_words(measure) != measure else f"{distance:.4g}"


def sensitivity(
    model: nn.Module,
    config: QuantConfig | Mapping[str, Any] | str | nn.Module | None = None,
    *,
    choices: Sequence[Choice] = ({},),
    images: Images | None = None,
    preprocess: Preprocess | None = None,
    limit: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    times: bool = False,
    device: str | torch.device | None = None,
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    task: Task | None = None,
    metric: Metric | None = None,
) -> Sensitivity:
    """Measure the distance from float that each layer causes when it alone is quantized. No labels are needed.

    The distance is the KL divergence of logits, per image or per pixel, and the relative error of other outputs; or a
    metric of your own.

    Args:
        model: the float network.
        config: settings for quantizing layers, as in :func:`dsconv.quantize`; or a quantized copy of ``model``, whose
            layers are then used unchanged.
        choices: settings to try on each layer: fields of :class:`dsconv.LayerConfig` that differ from the config's
            settings of it. By default, only the latter. Layers that the config leaves in float stay in float.
        images: unlabelled images, as in :func:`dsconv.evaluate`; None uses noise with the network's preprocessing.
        preprocess: preprocessing of a folder or of noise; None uses the one stored with the networks.
        limit: number of images.
        batch_size: images per batch.
        seed: seed of the noise.
        times: also measure each layer's time on one image, on the CPU.
        device: device on which the networks run; None is the device of the model.
        state: file written after each trial, so that a stopped measurement can be resumed.
        resume: continue from ``state``; the result is that of an uninterrupted measurement.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.
        on_trial: called with each trial as soon as it is finished.
        task, metric: as in :func:`dsconv.compare`; a metric gets the labels of ``images``, or None.

    Raises:
        ConfigError: the config or a choice is not valid; or there is neither an image nor a ``preprocess``; or
            ``state`` exists and ``resume`` is False, or the other way round.
        DataError: there are no images, or unusable ones.
        ModelError: there is nothing to quantize, ``model`` cannot run on the images or returns NaN, or a quantized
            network is not a copy of it.
        FileFormatError: ``state`` is damaged, or belongs to another network, images or arguments.
        OSError: ``state`` cannot be written.

    >>> import dsconv
    >>> found = sensitivity(dsconv.zoo.build("dsconv/digits_resnet"), "w4a4")
    >>> [(trial.layer, trial.name) for trial in found.trials[:2]]
    [('conv1', 'W8A8'), ('layer1.conv1', 'W4A4')]
    """
    return measure(
        "sensitivity",
        model,
        config,
        choices=choices,
        images=images,
        preprocess=preprocess,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        times=times,
        device=device,
        state=state,
        resume=resume,
        progress=progress,
        on_trial=on_trial,
        task=task,
        metric=metric,
    )


def measure(
    work: str,
    model: nn.Module,
    config: QuantConfig | Mapping[str, Any] | str | nn.Module | None,
    *,
    choices: Sequence[Choice],
    images: Images | None,
    preprocess: Preprocess | None,
    limit: int,
    batch_size: int,
    seed: int,
    times: bool,
    device: str | torch.device | None,
    state: str | os.PathLike[str] | None,
    resume: bool,
    progress: bool,
    on_trial: Callable[[Trial], None],
    task: Task | None,
    metric: Metric | None,
) -> Sensitivity:
    """Run :func:`sensitivity` as part of ``work``, whose name is used for progress and state."""
    saved = _State(None if state is None else Path(state), resume, work)
    check_metric(metric)
    model, config = as_layers(model)[0], unwrapped(config)
    if isinstance(config, nn.Module):
        if not isinstance(choices, Sequence) or list(choices) != [{}]:
            raise ConfigError(
                "choices: the settings of a quantized network are already chosen: pass a config to try others"
            )
        quantized = config
    else:
        config = as_config(config)
        _check(choices)
        # Gives the names of its layers, and the sizes of the others, which do not depend on the rounding rule.
        quickly = {"weight_rule": "paper", "batchnorm_statistics": False}
        quantized = quantize(model, QuantConfig(**{**config.to_dict(), **quickly}))
    names = _names(model, quantized)
    if images is None or isinstance(images, str | os.PathLike):
        preprocess = preprocess or preprocess_of(quantized) or preprocess_of(model)
    source = _batches(preprocess, images, limit, batch_size, seed)
    kept: list[tuple[Batch, Labels | None]] = [(x, labels if metric is not None else None) for x, labels in source]
    source.warn_of_broken(stacklevel=2)
    original = model
    if images is None and with_statistics(model):
        # With its own statistics, noise has the moments of images after each BatchNorm.
        model = normalized(model, torch.cat([x for x, _ in kept if isinstance(x, Tensor)]))
    reference = Recorded(model, [x for x, _ in kept], device, task)
    if metric is None and not reference.has_distance:
        raise ModelError("model: expected floating-point outputs, by which layers are ranked, got none: pass metric=")
    arguments = {
        "settings": "of a quantized network" if isinstance(config, nn.Module) else config.to_json(),
        "choices": choices,
        "times": times,
        "images at a time": [(len(x), *shape_of(x)) for x, _ in kept],
        "task": task,
        "metric": None if metric is None else name_of(metric),
        "dsconv version": metadata.version("dsconv"),
    }
    saved.open({"model": original, "config": quantized}, [x for x, _ in kept], arguments)
    pairs = [(name, choice) for name in names for choice in choices]
    trials = saved.trials(pairs)
    tried = _tried(model, config, pairs[len(trials) :])
    differing: str | None = None
    # Choices can be equivalent, such as algorithms of a layer that supports only one.
    known: dict[tuple[str, LayerConfig], Trial] = {}
    with progress_bar(progress, work, len(pairs), "trials", done=len(trials)) as advance:
        for name, choice, alone in tried:
            settings: Any = alone.get_submodule(name).config
            if (same := known.get((name, settings))) is not None:
                trials.append(replace(same, settings=dict(choice)))
            else:
                row = next(row for row in summary(alone).layers if row.name == name)
                found = compare(reference, alone, kept, per_layer=False, device=device, task=task, metric=metric)
                differing = differing or found.missing
                ms = _milliseconds(alone, name, kept[0][0][:1]) if times else None
                trials.append(_trial(row, choice, found, ms))
                known[name, settings] = trials[-1]
            saved.write(trials)
            advance(1)
            on_trial(trials[-1])
    if differing is not None:
        warnings.warn(differing, stacklevel=3)
    rest = summary(quantized)
    in_float = [row for row in rest.layers if row.name not in names]
    return Sensitivity(
        tuple(trials),
        images=sum(len(x) for x, _ in kept),
        synthetic=images is None,
        fixed_bytes=sum(row.bytes_after for row in in_float),
        fixed_weights=sum(row.bytes_before // 4 for row in in_float),
        other_bytes=rest.other_bytes,
        measure=reference.measure if metric is None else name_of(metric),
    )


class _State:
    """Finished trials, in a file if ``path`` is given: see :class:`StateFile`."""

    def __init__(self, path: Path | None, resume: bool, work: str):
        self._file, self._path = StateFile(path, resume, work), path
        self._stored: Any = []

    def open(self, models: Mapping[str, nn.Module], x: Sequence[Batch], settings: Mapping[str, Any]) -> None:
        """Read the file, or try to write one, so that problems with it show before the work begins."""
        if self._path is None:
            return
        # Their shapes, which may differ, are among the settings.
        found = self._file.open(models, torch.cat([by_sample(batch).flatten() for batch in x]), settings)
        if found is not None:
            self._stored = found[0]
        else:
            self.write([])
            self._file.remove()  # there is nothing to resume yet

    def trials(self, pairs: Sequence[tuple[str, Choice]]) -> list[Trial]:
        """Return the stored trials, which must match the first of ``pairs``."""
        try:
            trials = TypeAdapter(list[Trial]).validate_python(self._stored)
            known = [trial.layer for trial in trials] == [name for name, _ in pairs[: len(trials)]]
        except ValidationError:
            known = False
        if not known:
            raise FileFormatError(f"{self._path}: does not hold the trials of this network: delete it and start again")
        # The settings as given, which JSON may not represent exactly.
        return [replace(trial, settings=dict(choice)) for trial, (_, choice) in zip(trials, pairs, strict=False)]

    def write(self, trials: Sequence[Trial]) -> None:
        """Write the finished trials."""
        self._file.write([{**asdict(trial), "settings": {}} for trial in trials], {})


def with_overrides(config: QuantConfig, overrides: Mapping[str, Any]) -> QuantConfig:
    """Return ``config`` with additional overrides of higher precedence; their keys are layer names, not patterns."""
    own, added = dict(config.overrides), {}
    for name, settings in overrides.items():
        pattern = glob.escape(name)
        if own.pop(pattern, None) is not None:
            # It moves to the end, after others that would override it.
            matching = [s for p, s in config.overrides.items() if isinstance(s, dict) and fnmatchcase(name, p)]
            settings = {field: value for fields in (*matching, settings) for field, value in fields.items()}
        added[pattern] = settings
    return QuantConfig(**{**config.to_dict(), "overrides": own | added})


def _check(choices: Sequence[Choice]) -> None:
    if not isinstance(choices, Sequence) or not all(isinstance(choice, Mapping) for choice in choices):
        raise ConfigError(f"choices: expected a list of dictionaries of settings, got {type(choices).__name__}")
    if not choices:
        raise ConfigError("choices: expected at least one, got none")
    for choice in choices:
        try:
            # Compatibility of shift and scale is known only once all settings are merged.
            LayerConfig(**{field: value for field, value in choice.items() if field != "weight_shift"})
        except ConfigError as error:
            raise ConfigError(f"choices: {error}") from None


def _names(model: nn.Module, quantized: nn.Module) -> list[str]:
    """Return the names of the layers that were quantized, without those that were quantized before."""
    before = {name for name, layer in model.named_modules() if isinstance(layer, DSLayer)}
    return [name for name, m in quantized.named_modules() if isinstance(m, DSLayer) and name not in before]


class Recorded(nn.Module):
    """Replays the recorded outputs of a network for batches, in order.

    Raises:
        ModelError: an output is not finite.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], device: str | torch.device | None, task: Task | None
    ):
        super().__init__()
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            found = evaluate(model, batches, device=device, task=task)
        finally:
            hook.remove()
        if found.nonfinite:
            raise ModelError(
                f"model: its float outputs are NaN or infinite for {found.nonfinite} of {found.images} images, so "
                "nothing can be compared with them: check its weights and the preprocessing of the images"
            )
        kinds = Kinds.told_by(outputs_by_image(outputs[0], len(batches[0])), len(batches[0]), task)
        self.measure, self.has_distance = kinds.measure, bool(kinds.counted)
        self._next = itertools.cycle(outputs).__next__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._next()


def _batches(preprocess: Preprocess | None, images: Images | None, limit: int, batch_size: int, seed: int) -> Batches:
    if images is None:
        images, preprocess = noise(limit, preprocess, seed), None
    return batches(images, preprocess=preprocess, batch_size=batch_size, limit=limit)


def noise(limit: int, preprocess: Preprocess | None, seed: int) -> Tensor:
    """Return the noise that replaces ``limit`` images.

    Raises:
        ConfigError: there is no ``preprocess``, or ``limit`` is not a number of images.
    """
    if preprocess is None:
        raise ConfigError(
            "images: got none, and the noise that replaces them needs the model's preprocessing, which is unknown: "
            "pass preprocess=Preprocess(crop=224, mean=..., std=...), or images"
        )
    check_whole("limit", limit, 1)
    return synthetic_images(limit, preprocess, seed=seed)


def _tried(
    model: nn.Module, config: QuantConfig | nn.Module, pairs: Sequence[tuple[str, Choice]]
) -> Iterator[tuple[str, Choice, nn.Module]]:
    if isinstance(config, nn.Module):
        return _as_they_are(model, config, pairs)
    return _as_chosen(model, config, pairs)


def _as_they_are(
    model: nn.Module, quantized: nn.Module, pairs: Sequence[tuple[str, Choice]]
) -> Iterator[tuple[str, Choice, nn.Module]]:
    """Yield the float ``model`` with one layer of ``quantized`` at a time."""
    info = info_of(quantized)
    if info.folded or info.affine:
        raise ModelError(
            "config: BatchNorm is folded into the layers of this quantized network: pass the network before folding"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, choice in pairs:
        layer: Any = quantized.get_submodule(name)
        check_original(name, layer, modules.get(name), "model")
        yield name, choice, swapped(model, {modules[name]: copy.deepcopy(layer)}, info)


def _as_chosen(
    model: nn.Module, config: QuantConfig, pairs: Sequence[tuple[str, Choice]]
) -> Iterator[tuple[str, Choice, nn.Module]]:
    """Yield the float ``model`` with one layer quantized by one of ``choices`` at a time."""
    everything = "*"
    while everything in config.overrides:
        everything += "*"
    in_float = QuantConfig(**{**config.to_dict(), "overrides": {**config.overrides, everything: FLOAT}})
    known = input_moments(model, preprocess_of(model)) if config.batchnorm_statistics else {}
    signed = signed_inputs(model, preprocess_of(model)) if config.activation_sign == "auto" else None
    for name, choice in pairs:
        yield name, choice, quantize_for(model, with_overrides(in_float, {name: dict(choice)}), known, signed=signed)


def _milliseconds(model: nn.Module, name: str, x: Batch) -> float:
    """Return the least time over some passes that the layer takes for one image; leaves hooks in ``model``."""
    layer = model.get_submodule(name)
    since: list[float] = []
    seconds: list[float] = []
    layer.register_forward_pre_hook(lambda *_: since.append(time.perf_counter()))
    layer.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - since.pop()))
    turns = []
    for _ in range(_TURNS):
        seconds.clear()
        evaluate(model, [x])
        turns.append(sum(seconds))
    return 1e3 * min(turns)


def _trial(row: LayerSummary, choice: Choice, found: Comparison, ms: float | None) -> Trial:
    assert row.weight_bits is not None
    assert row.block_size is not None
    counted = [found.outputs[name] for name in found.counted]
    logits = [output.kl for output in counted if output.kl is not None]
    others = [output.distance for output in counted if output.kl is None]
    return Trial(
        row.name,
        dict(choice),
        row.weight_bits,
        row.activation_bits,
        row.block_size,
        weights=row.bytes_before // 4,
        bytes=row.bytes_after,
        kl=_total(logits, found),
        ms=ms,
        relative_error=_total(others, found),
        metric=None if not found.metrics else math.nan if found.nonfinite else found.distance,
    )


def _total(distances: Sequence[float], found: Comparison) -> float | None:
    """Return the sum, at least 0 despite rounding; NaN if the network returned a NaN; None for no values."""
    return (math.nan if found.nonfinite else max(0.0, sum(distances))) if distances else None
