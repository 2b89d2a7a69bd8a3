"""``dsconv.optimize``: a few recipes are tried, and the network that serves a budget or a target best is kept."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dsconv.adaptation import adapt
from dsconv.benchmarking.machine import machine
from dsconv.benchmarking.measure import Quartiles
from dsconv.calibration import calibrate
from dsconv.calibration.images import prepared_as
from dsconv.config import QuantConfig
from dsconv.conversion import Summary, quantize, summary
from dsconv.conversion.functional import as_layers
from dsconv.conversion.info import info_of
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.quantized import quantized_layers
from dsconv.conversion.statistics import normalized, with_statistics
from dsconv.conversion.wrappers import unwrapped
from dsconv.cpu import cores
from dsconv.data import Images, Preprocess
from dsconv.data.inputs import call, joined
from dsconv.errors import ConfigError, ModelError, check_whole, import_extra
from dsconv.evaluation import compare
from dsconv.evaluation.metric import Metric, check_metric, name_of
from dsconv.files import as_path
from dsconv.layers.inputs import as_input_of
from dsconv.mixed import Budget, Sensitivity, Trial, choices_of
from dsconv.mixed.measure import Recorded, measure, noise
from dsconv.mixed.selection import point_of, range_of, within
from dsconv.modes import check_module, evaluation_mode
from dsconv.names import Task, check_task
from dsconv.optimization.goal import DEFAULT_BUDGET, Goal, Target
from dsconv.optimization.images import Parts, split
from dsconv.optimization.results import Attempt, Optimization
from dsconv.optimization.saved import Saved
from dsconv.recipe import Recipe
from dsconv.tradeoffs import FLOAT, Candidate, time_each

# A shift pays where no image is seen; half the block without one is closer to float once it is calibrated.
_BASES = {
    "shift, B = 64": QuantConfig.preset("default"),
    "no shift, B = 32": QuantConfig.preset("default", block_size=32, weight_shift=False),
}
_SHIFT, _NO_SHIFT = _BASES
# Images that layers are ranked on, and that layers are calibrated on; images of noise to measure on.
_SEARCHED, _SEARCH_BATCH, _CALIBRATED, _NOISE = 32, 16, 128, 64
# The part of the time left that a search may take: what it finds is calibrated and measured.
_SEARCH_SHARE = 0.6
# Sizes or times between which the smallest network that meets the target is found, and how close they come.
_HALVINGS, _CLOSE = 4, 0.02
# Selections that are compiled and timed to keep a budget of milliseconds.
_ROUNDS = 3
# An adaptation of fewer steps, on fewer images, or of a network that is as close as this already, does not pay.
_FEWEST_STEPS, _FEWEST_IMAGES, _CLOSE_ALREADY = 50, 64, 0.02
_STEPS = Recipe().steps
# The float network answers once where its outputs for all images fit in so many bytes.
_REMEMBERED_BYTES = 1 << 28
_TIMED_SECONDS = 1.0


def optimize(
    model: nn.Module,
    images: Images | None = None,
    *,
    budget: float | Mapping[str, float] | Budget | None = None,
    target: Mapping[str, float] | Target | None = None,
    time_limit: float | None = 600.0,
    preprocess: Preprocess | None = None,
    limit: int = 1000,
    batch_size: int = 32,
    seed: int = 0,
    threads: int = 1,
    device: str | torch.device | None = None,
    state: str | os.PathLike[str] | None = None,
    resume: bool = False,
    any_range: bool = False,
    task: Task | None = None,
    metric: Metric | None = None,
    progress: bool = False,
    on_attempt: Callable[[Attempt], None] = lambda attempt: None,
) -> Optimization:
    """Quantize a network as small, as fast or as close to float as asked for: the whole work in one call.

    A few recipes are tried: 8-bit activations and the same bits in all layers; bits by layer (:func:`dsconv.search`);
    both with a shift per block, and without one in smaller blocks; calibrated (:func:`dsconv.calibrate`); fewer bits
    while the target is met, more while it is not; and adapted (:func:`dsconv.adapt`) where the network is still far
    from float and the time suffices. With a target, the smallest network that meets it is kept, or the fastest under a
    budget of milliseconds; without one, the closest to float within the budget.

    Half of the images, drawn at random, are for these steps. All figures are measured on the others, 500 at most, which
    no step sees. Without images the search is on noise, and so are the figures.

    Args:
        model: the float network.
        images: unlabelled or labelled images, as in :func:`dsconv.evaluate`, 8 or more; a few hundred are good. They
            are kept in memory.
        budget: effective bits a weight, or a dictionary of limits that all hold: ``effective_bits``, ``bytes`` of the
            file but for its header, ``ms`` of one image, compiled, on this machine. None is no limit, or 4.7 effective
            bits where there is no target either.
        target: a dictionary of the fields of :class:`dsconv.optimization.Target`: least ``agreement`` in percent,
            largest ``kl`` in nats, largest ``top1_drop`` in percent points, or largest ``distance``; it needs images.
        time_limit: seconds, None for as many as it takes. What is not begun when they are over is left out, and a step
            that would outlast them ends; the first attempt is always made.
        preprocess: how a folder is read or noise prepared; None is what the network says of itself.
        limit: use this many images at most: the first ones, or, of a folder, evenly spaced ones.
        batch_size: images per batch in measurements.
        seed: of all that is random. The same arguments give the same result on the same machine, as long as neither the
            time limit nor a budget of milliseconds decides.
        threads: that networks are timed on.
        device: where networks run, but for times, which are of the CPU; None is where the model is.
        state: folder to write all that is done to, so that an optimization that was stopped can be resumed.
        resume: continue from ``state``; budget, target and time limit may be others.
        any_range, task: as in :func:`dsconv.calibrate`.
        metric: as in :func:`dsconv.compare`; its first number is the ``distance``.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.
        on_attempt: is called with each attempt as soon as it is measured.

    Returns:
        An :class:`dsconv.optimization.Optimization`, whose ``model`` is the network. Where budget or target cannot be
        met it is the one that comes closest, and ``shortfall`` says by how much it misses them.

    Raises:
        ConfigError: an argument is out of range, or a target is given without images; or ``state`` is there and
            ``resume`` False, or the other way round.
        DataError: there are fewer than 8 different images, or unusable ones, or no labels for ``top1_drop``.
        ModelError: as in :func:`dsconv.search`, :func:`dsconv.calibrate` and :func:`dsconv.compare`.
        FileFormatError: ``state`` is damaged, or belongs to another network, images or arguments.
        OSError: ``state`` cannot be written.
        MissingExtraError: highspy is not installed.

    >>> import dsconv
    >>> net, (images, labels) = dsconv.zoo.build("dsconv/digits_resnet"), dsconv.demo.load_digits("unlabelled")
    >>> found = optimize(net, images[:128], target={"agreement": 90}, time_limit=60)
    >>> found.met, found.best.evaluation.agreement >= 90, found.images
    (True, True, {'steps': 64, 'measured': 64})
    """
    check_module("model", model)
    goal = Goal.of(budget, target, images=images is not None)
    _check_numbers(time_limit, limit, batch_size, seed, threads)
    check_task(task)
    check_metric(metric)
    import_extra("search", "highspy")  # which may be missing: said before minutes of work
    saved = Saved(None if state is None else as_path(state, "state"), resume)
    clock = _Clock(time_limit)
    model = as_layers(unwrapped(model))[0]
    if images is None:
        prepared = preprocess or preprocess_of(model)
        parts = Parts(None, None, [(noise(_NOISE, prepared, seed + 1), None)])
    else:
        parts = split(images, preprocess, limit, seed, batch_size, model, progress)
        prepared = prepared_as(images, preprocess, model)
        goal.check_labels(parts.labels is not None)
    settings = {
        "preprocess": prepared,
        "limit": limit,
        "batch size": batch_size,
        "seed": seed,
        "threads": threads,
        "any range": any_range,
        "task": task,
        "metric": None if metric is None else name_of(metric),
        "dsconv version": metadata.version("dsconv"),
    }
    saved.open({"model": model}, joined([x for x, _ in parts.measured]), settings)
    options = {"device": device, "task": task, "progress": progress}
    run = _Run(model, parts, goal, saved, clock, prepared, seed, threads, any_range, metric, options, on_attempt)
    run.uniform(_SHIFT)
    if parts.steps is None:
        run.searched(_SHIFT, run.first)
    else:
        run.uniform(_NO_SHIFT, calibrated=True)
        run.searched(_NO_SHIFT, run.first, calibrated=True)
        run.searched(_SHIFT, run.first, calibrated=True)
        run.approach_target()
        run.adapted()
    return run.result()


class _OutOfTime(Exception):
    """A step would outlast the time limit."""


class _Clock:
    """The time that is left."""

    def __init__(self, seconds: float | None):
        self._start, self._limit = time.perf_counter(), math.inf if seconds is None else seconds

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds to the limit."""
        return self._limit - self.passed

    def check(self, seconds: float = 0.0) -> None:
        """Raise _OutOfTime unless so many seconds, and more than none, are left."""
        if self.left <= seconds:
            more = f"about {seconds:.0f} s would be needed and {max(0.0, self.left):.0f} s were left" if seconds else ""
            raise _OutOfTime(more or "the time limit was over")


class _Run:
    """The network, the images, and what was tried so far; each method is a recipe."""

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        goal: Goal,
        saved: Saved,
        clock: _Clock,
        prepared: Preprocess | None,
        seed: int,
        threads: int,
        any_range: bool,
        metric: Metric | None,
        options: dict[str, Any],
        on_attempt: Callable[[Attempt], None],
    ):
        self.model, self.parts, self.goal, self.saved, self.clock = model, parts, goal, saved, clock
        self.prepared, self.seed, self.threads, self.any_range = prepared, seed, threads, any_range
        self.metric, self.options, self.on_attempt = metric, options, on_attempt
        self.attempts: list[Attempt] = []
        self.searches: list[tuple[Attempt, str]] = []
        self.networks: dict[str, nn.Module] = {}
        self.left_out: dict[str, str] = {}
        self.measured: dict[str, Sensitivity] = {}
        self.untimed = ""
        # Milliseconds of the compiled network for one of its layers as the search times them.
        self.ratio = 1.0

    # Recipes

    def uniform(self, base: str, *, calibrated: bool = False) -> None:
        """Try the same bits in every layer: as many as the budget allows, 4 where it does not say."""
        config = self._most_bits(_BASES[base])
        self._try(f"W{config.weight_bits}A{config.activation_bits}, {base}", lambda: config, calibrated=calibrated)

    def searched(self, base: str, most: float, *, calibrated: bool = False) -> Attempt | None:
        """Try bits by layer of which ``self.axis`` comes to ``most``."""
        name = f"searched, {most:.4g} {_SHORT[self.axis]}, {base}"
        found = self._try(name, lambda: self._within(base, most), calibrated=calibrated)
        if found is not None:
            self.searches.append((found, base))
        return found

    def approach_target(self) -> None:
        """Try fewer bits while the target is met and more while it is not, by halving what lies between."""
        if not self.goal.target or not self.searches:
            return
        best, base = min(self.searches, key=lambda search: self.goal.rank(search[0]))
        least, most = range_of(self.axis, self._sensitivity(base))
        if self.goal.by_time:
            least *= self.ratio
        if not self.goal.short(best):
            low, high = least, self.first
        elif self.axis in self.goal.budget:
            return
        else:
            low, high = self.first, most
        for _ in range(_HALVINGS):
            if high - low < _CLOSE * high:
                return
            middle = (low + high) / 2
            found = self.searched(base, middle, calibrated=True)
            if found is None:
                return
            low, high = (middle, high) if self.goal.short(found) else (low, middle)

    def adapted(self) -> None:
        """Adapt the network that has the most to win by it."""
        chosen = self._to_adapt()
        if chosen is None:
            return
        name, network = f"{chosen.name}, adapted", self.networks[chosen.name]
        assert self.parts.steps is not None
        if chosen.evaluation.distance <= _CLOSE_ALREADY and not self.goal.short(chosen):
            self.left_out[name] = f"within {_CLOSE_ALREADY} of float, a training does not pay"
        elif len(self.parts.steps) < _FEWEST_IMAGES:
            self.left_out[name] = f"a training needs {_FEWEST_IMAGES} images or more, there are {len(self.parts.steps)}"
        else:
            make = partial(self._adapted, name, network)
            self._try(name, lambda: chosen.config, make, calibrated=chosen.calibrated, adapted=True)

    def result(self) -> Optimization:
        """Return what was tried, and the best of it."""
        best = self.goal.best(self.attempts)
        sizes, times = summary(self.model), self._times(FLOAT, self.model)
        reference = Candidate(
            name=FLOAT,
            settings="",
            bytes=sizes.bytes_after,
            effective_bits=sizes.effective_bits,
            evaluation=best.evaluation.reference,
            times_ms=times,
        )
        if self.untimed:
            self.left_out["times"] = self.untimed
        return Optimization(
            model=self.networks[best.name],
            best=best,
            attempts=tuple(self.attempts),
            reference=reference,
            budget=self.goal.budget,
            target=self.goal.target,
            shortfall=self.goal.shortfall(best),
            images=self.parts.counts,
            synthetic=self.parts.steps is None,
            held_out=self.parts.measured,
            left_out=self.left_out,
            seconds=self.clock.passed,
            threads=self.threads,
            machine=machine() if times else None,
        )

    # What recipes are made of

    @property
    def axis(self) -> str:
        """The limit along which networks are made smaller or faster."""
        return next((name for name in ("ms", "bytes") if name in self.goal.budget), "effective_bits")

    @cached_property
    def first(self) -> float:
        """Where the search begins on the axis: at the budget, else at the bits of the default budget."""
        return self.goal.budget.get(self.axis, DEFAULT_BUDGET["effective_bits"])

    def _most_bits(self, base: QuantConfig) -> QuantConfig:
        """Return the settings of ``base`` in the most bits that keep the budget; the fewest where none does."""
        limits = {name: limit for name, limit in self.goal.budget.items() if name != "ms"}
        if not limits:
            return base
        for bits in (8, 6, 5, 4, 3, 2):
            config = QuantConfig(**{**base.to_dict(), "weight_bits": bits})
            sizes = self._sizes(config)
            taken = {"effective_bits": sizes.effective_bits, "bytes": sizes.bytes_after + self._bias_bytes}
            if all(taken[name] <= limit for name, limit in limits.items()):
                break
        return config

    def _within(self, base: str, most: float) -> QuantConfig:
        """Return settings by layer that come to ``most`` at most on the axis, and keep the other limits.

        Milliseconds of layers, which a search measures, are not those of a compiled network: their ratio is that of the
        selection before, which is compiled and timed.
        """
        measured, limits = self._sensitivity(base), {**self.goal.budget, self.axis: most}
        if "bytes" in limits:
            limits["bytes"] = max(1.0, limits["bytes"] - self._bias_bytes)
        if not self.goal.by_time:
            return within(_BASES[base], measured, limits)[0]
        del limits["ms"]
        limits = limits or {"effective_bits": range_of("effective_bits", measured)[1]}
        for _ in range(_ROUNDS):
            config, chosen = within(_BASES[base], measured, limits)
            times, layers_ms = (
                self._times(config.to_json(), quantize(self.model, config)),
                point_of(chosen, measured).ms,
            )
            assert times is not None
            assert layers_ms
            self.ratio = times.median / layers_ms
            # The fastest there are, where even these take more.
            limits["ms"] = max(most / self.ratio, range_of("ms", measured)[0] * (1 + 1e-6))
            if times.median <= most:
                break
        return config

    def _sensitivity(self, base: str) -> Sensitivity:
        """Measure what each layer's bits cost, or stop where that would take too long."""
        if base not in self.measured:
            config, times = _BASES[base], self.goal.by_time
            choices = choices_of(config, times=times)
            self.measured[base] = measure(
                "search",
                self.model,
                config,
                choices=choices,
                images=self.parts.searched(_SEARCHED, _SEARCH_BATCH),
                preprocess=self.prepared if self.parts.steps is None else None,
                limit=_SEARCHED,
                batch_size=_SEARCH_BATCH,
                seed=self.seed,
                times=times,
                metric=self.metric,
                on_trial=self._in_time(len(choices)),
                **self.saved.step("search", config.to_json(), times),
                **self.options,
            )
        return self.measured[base]

    def _in_time(self, choices: int) -> Callable[[Trial], None]:
        """Return what raises _OutOfTime once the trials so far tell that the others would take too long."""
        layers = [row.name for row in self._sizes(_BASES[_SHIFT]).layers if row.quantized]
        began, allowed, done = time.perf_counter(), _SEARCH_SHARE * self.clock.left, 0

        def look(trial: Trial) -> None:
            nonlocal done
            done += 1
            took = time.perf_counter() - began
            expected = took * (1 + choices * (len(layers) - 1 - layers.index(trial.layer)) / done)
            if done >= choices and expected > allowed:
                raise _OutOfTime(f"the search would take about {expected:.0f} s")

        return look

    def _calibrated(self, network: nn.Module) -> nn.Module:
        assert self.parts.steps is not None
        return calibrate(
            network,
            self.model,
            self.parts.steps,
            limit=_CALIBRATED,
            seed=self.seed,
            any_range=self.any_range,
            on_layer=lambda _: self.clock.check(),
            **self.saved.step("calibrate", info_of(network).config.to_json()),
            **self.options,
        )

    def _adapted(self, name: str, network: nn.Module) -> nn.Module:
        """Adapt a network in as many steps as the time allows."""
        assert self.parts.steps is not None
        options = {"seed": self.seed, "any_range": self.any_range, **self.options}
        if name not in self.saved.steps:
            looks: list[Any] = []
            few = Recipe(steps=2, every=1)
            images = self.parts.steps[:_FEWEST_IMAGES]
            adapt(network, self.model, images, recipe=few, on_look=looks.append, **{**options, "progress": False})
            seconds = looks[-1].seconds - looks[-2].seconds
            self.clock.check(_FEWEST_STEPS * seconds)
            self.saved.steps[name] = int(min(_STEPS, self.clock.left / seconds))
            self.saved.write()
        recipe = Recipe(steps=self.saved.steps[name])
        state = self.saved.step("adapt", name, info_of(network).config.to_json())
        return adapt(network, self.model, self.parts.steps, recipe=recipe, **state, **options)

    def _to_adapt(self) -> Attempt | None:
        """Return the attempt that misses the target by the least and is cheaper than the best; else the best."""
        best = self.goal.best(self.attempts)
        if self.goal.over(best):
            return None
        if not self.goal.target or self.goal.short(best):
            return best
        cheaper = [a for a in self.attempts if self.goal.short(a) and self.goal.cost(a) < self.goal.cost(best)]
        kept = [a for a in cheaper if not self.goal.over(a)]
        return min(kept, key=self.goal.rank) if kept else None

    # Measurements

    def _try(
        self,
        name: str,
        settings: Callable[[], QuantConfig],
        make: Callable[[], nn.Module] | None = None,
        *,
        calibrated: bool = False,
        adapted: bool = False,
    ) -> Attempt | None:
        """Make a network and measure it; None, with a reason in ``left_out``, where that is not possible."""
        if calibrated and not adapted:
            name += ", calibrated"
        since = time.perf_counter()
        try:
            if self.attempts:
                self.clock.check()
            config = settings()
            if make is None:
                network = quantize(self.model, config, preprocess=self.prepared)
                network = self._calibrated(network) if calibrated else network
            else:
                network = make()
        except _OutOfTime as reason:
            self.left_out[name] = str(reason)
            return None
        except ConfigError as error:
            if not str(error).startswith("budget: "):
                raise
            self.left_out[name] = str(error)
            return None
        found = self.saved.attempts.get(name)
        if found is None or found.config != config:
            found = self._measured(name, config, network, time.perf_counter() - since)
            found = replace(found, calibrated=calibrated, adapted=adapted)
            self.saved.attempts[name] = found
            self.saved.write()
        found = replace(found, verdict=self.goal.verdict(found))
        self.attempts.append(found)
        self.networks[name] = network
        self.on_attempt(found)
        return found

    def _measured(self, name: str, config: QuantConfig, network: nn.Module, seconds: float) -> Attempt:
        """Return the figures of a network on the images that no step has used."""
        seen = network if self._float is self.model else quantize(self._float, config)
        found = compare(self._answers, seen, self.parts.measured, per_layer=False, metric=self.metric, **self.options)
        self.goal.check_figures(found)
        sizes = summary(network)
        return Attempt(
            name=name,
            settings="",
            bytes=sizes.bytes_after,
            effective_bits=sizes.effective_bits,
            evaluation=found,
            times_ms=self._times(config.to_json(), network),
            config=config,
            seconds=seconds,
        )

    @cached_property
    def _float(self) -> nn.Module:
        """The float network, for noise with the statistics that noise has, as a search takes it."""
        (x, _), *_ = self.parts.measured
        noisy = self.parts.steps is None and with_statistics(self.model)
        return normalized(self.model, x) if noisy and isinstance(x, Tensor) else self.model

    @cached_property
    def _answers(self) -> nn.Module:
        """The float network, or what it answers where that is little: it is then computed once."""
        batches = [x for x, _ in self.parts.measured]
        with evaluation_mode([self._float]), torch.inference_mode():
            outputs = call(self._float, as_input_of(self._float, batches[0][:1]))
        one = sum(y.numel() * y.element_size() for y in tree_leaves(outputs) if isinstance(y, Tensor))
        if one * self.parts.counts["measured"] > _REMEMBERED_BYTES:
            return self._float
        return Recorded(self._float, batches, self.options["device"], self.options["task"])

    def _times(self, key: str, network: nn.Module) -> Quartiles | None:
        """Return the times of one image, compiled; None where the network cannot be compiled."""
        if key not in self.saved.times:
            times: dict[str, Quartiles] = {}
            name = FLOAT if key == FLOAT else "network"
            try:
                with evaluation_mode([network]):
                    example = self.parts.measured[0][0][:1]
                    time_each({name: network}, example, self.threads, _TIMED_SECONDS, times)
            except ModelError as error:
                if self.goal.by_time:
                    raise
                self.untimed = str(error)
                return None
            self.saved.times[key] = times[name]
        return self.saved.times[key]

    def _sizes(self, config: QuantConfig) -> Summary:
        """Return the sizes of the quantized network, which do not depend on how weights are rounded."""
        return summary(self._quickly(config))

    def _quickly(self, config: QuantConfig) -> nn.Module:
        quickly = {"weight_rule": "paper", "batchnorm_statistics": False}
        return quantize(self.model, QuantConfig(**{**config.to_dict(), **quickly}))

    @cached_property
    def _bias_bytes(self) -> int:
        """Bytes of the biases that a calibration adds, at most."""
        layers = quantized_layers(self._quickly(_BASES[_SHIFT])).values()
        return sum(4 * len(layer.vqk) for layer in layers if layer.bias is None) if self.parts.steps is not None else 0


_SHORT = {"effective_bits": "bits", "bytes": "bytes", "ms": "ms"}


def _check_numbers(time_limit: float | None, limit: int, batch_size: int, seed: int, threads: int) -> None:
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    check_whole("threads", threads, 1)
    if threads > cores():
        raise ConfigError(f"threads: expected at most the {cores()} cores there are, got {threads}")
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time_limit: expected seconds above 0, or None, got {time_limit}")
