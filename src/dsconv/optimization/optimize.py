"""``dsconv.optimize``: a few recipes are tried, and the network that serves a budget or a target best is kept."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata

import torch
from torch import nn

from dsconv.benchmarking.machine import machine
from dsconv.benchmarking.measure import Quartiles
from dsconv.calibration.images import prepared_as
from dsconv.config import QuantConfig
from dsconv.conversion import summary
from dsconv.conversion.functional import as_layers
from dsconv.conversion.preparation import preprocess_of
from dsconv.conversion.wrappers import unwrapped
from dsconv.cpu import cores
from dsconv.data import Images, Preprocess
from dsconv.data.inputs import joined
from dsconv.errors import ConfigError, ModelError, check_whole, import_extra
from dsconv.evaluation.metric import Metric, check_metric, name_of
from dsconv.files import as_path
from dsconv.mixed import Budget
from dsconv.mixed.measure import noise
from dsconv.mixed.selection import point_of, range_of, within
from dsconv.modes import check_module
from dsconv.names import Task, check_task
from dsconv.optimization.goal import Goal, Target
from dsconv.optimization.images import Parts, split
from dsconv.optimization.results import Attempt, Optimization
from dsconv.optimization.saved import Saved
from dsconv.optimization.steps import Clock, OutOfTime, Steps
from dsconv.tradeoffs import FLOAT, Candidate

# A shift pays where no image is seen; half the block without one is closer to float once it is calibrated.
_BASES = {
    "shift, B = 64": QuantConfig.preset("default"),
    "no shift, B = 32": QuantConfig.preset("default", block_size=32, weight_shift=False),
}
_SHIFT, _NO_SHIFT = _BASES
# Where the search begins without a budget; and the budget where there is no target either, or what the preset takes.
_BITS = 4.7
# Images of noise to measure on.
_NOISE = 64
# Sizes or times between which the smallest network that meets the target is found, and how close they come.
_HALVINGS, _CLOSE = 4, 0.02
# Selections that are compiled and timed to keep a budget of milliseconds.
_ROUNDS = 3
# An adaptation on fewer images, or of a network that is as close to float already, does not pay.
_FEWEST_IMAGES, _CLOSE_ALREADY = 64, 0.02
_SHORT = {"effective_bits": "bits", "bytes": "bytes", "ms": "ms"}


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
            file but for its header, ``ms`` of one image, compiled, on this machine. None is no limit; where there is no
            target either, it is 4.7 effective bits, or more if the preset ``default`` takes more.
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
        An :class:`dsconv.optimization.Optimization`, whose ``model`` is the network. If budget or target is not met,
        it is the one that comes closest, and ``shortfall`` says by how much it misses them.

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
    >>> found = optimize(net, images[:64], target={"agreement": 90}, time_limit=10)
    >>> found.met, found.best.evaluation.agreement >= 90, found.images
    (True, True, {'steps': 32, 'measured': 32})
    """
    check_module("model", model)
    goal = Goal.of(budget, target, images=images is not None)
    _check_numbers(time_limit, limit, batch_size, seed, threads)
    check_task(task)
    check_metric(metric)
    import_extra("search", "highspy")  # which may be missing: said before minutes of work
    saved, clock = Saved(None if state is None else as_path(state, "state"), resume), Clock(time_limit)
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
    steps = Steps(
        model=model,
        parts=parts,
        saved=saved,
        clock=clock,
        prepared=prepared,
        seed=seed,
        any_range=any_range,
        metric=metric,
        threads=threads,
        options={"device": device, "task": task, "progress": progress},
    )
    if not goal.budget and not goal.target:
        goal = replace(goal, budget={"effective_bits": max(_BITS, steps.sizes(_BASES[_SHIFT]).effective_bits)})

    recipes = _Recipes(steps, goal, on_attempt)
    recipes.uniform(_SHIFT)
    if images is None:
        recipes.searched(_SHIFT, recipes.first)
    else:
        recipes.uniform(_NO_SHIFT, calibrated=True)
        recipes.searched(_NO_SHIFT, recipes.first, calibrated=True)
        recipes.searched(_SHIFT, recipes.first, calibrated=True)
        recipes.approach_target()
        recipes.adapted()
    return recipes.result()


class _Recipes:
    """Each method tries a recipe, or several; what comes of them is kept for :meth:`result`."""

    def __init__(self, steps: Steps, goal: Goal, on_attempt: Callable[[Attempt], None]):
        self.steps, self.goal, self.on_attempt = steps, goal, on_attempt
        self.attempts: list[Attempt] = []
        self.networks: dict[str, nn.Module] = {}
        self.left_out: dict[str, str] = {}
        self.searches: list[tuple[Attempt, str]] = []
        # The limit along which networks are made smaller or faster.
        self.axis = next((name for name in ("ms", "bytes") if name in goal.budget), "effective_bits")
        self.first = goal.budget.get(self.axis, _BITS)
        # Milliseconds of the compiled network for one of its layers as a search times them.
        self.ratio = 1.0

    def uniform(self, base: str, *, calibrated: bool = False) -> None:
        """Try the same bits in every layer: as many as the budget allows, 4 where it does not say."""
        config = self._most_bits(_BASES[base])
        name = f"W{config.weight_bits}A{config.activation_bits}, {base}"
        self._try(name, lambda: config, calibrated=calibrated)

    def searched(self, base: str, most: float, *, calibrated: bool = False) -> Attempt | None:
        """Try bits by layer that come to ``most`` on the axis."""
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
        least, most = range_of(self.axis, self.steps.sensitivity(_BASES[base], times=self.goal.by_time))
        if not self.goal.short(best):
            low, high = least * self.ratio, self.first
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
        name, images = f"{chosen.name}, adapted", self.steps.parts.counts["steps"]
        if chosen.evaluation.distance <= _CLOSE_ALREADY and not self.goal.short(chosen):
            self.left_out[name] = f"within {_CLOSE_ALREADY} of float, a training does not pay"
        elif images < _FEWEST_IMAGES:
            self.left_out[name] = f"a training needs {_FEWEST_IMAGES} images or more, there are {images}"
        else:
            self._try(chosen.name, lambda: chosen.config, calibrated=chosen.calibrated, adapted=chosen)

    def result(self) -> Optimization:
        """Return what was tried, and the best of it."""
        steps, times = self.steps, self._times()
        attempts = [replace(a, times_ms=a.times_ms or times.get(a.config.to_json())) for a in self.attempts]
        best, sizes = self.goal.best(attempts), summary(steps.model)
        reference = Candidate(
            name=FLOAT,
            settings="",
            bytes=sizes.bytes_after,
            effective_bits=sizes.effective_bits,
            evaluation=best.evaluation.reference,
            times_ms=times.get(FLOAT),
        )
        return Optimization(
            model=self.networks[best.name],
            best=best,
            attempts=tuple(attempts),
            reference=reference,
            budget=self.goal.budget,
            target=self.goal.target,
            shortfall=self.goal.shortfall(best),
            images=steps.parts.counts,
            synthetic=steps.parts.steps is None,
            held_out=steps.parts.measured,
            left_out=self.left_out,
            seconds=steps.clock.passed,
            threads=steps.threads,
            machine=machine() if times else None,
        )

    def _times(self) -> dict[str, Quartiles]:
        """Return the times of the networks in turns, by their settings; those that decide are known already."""
        made = {} if self.goal.by_time else {a.config.to_json(): self.networks[a.name] for a in self.attempts}
        try:
            return self.steps.race({FLOAT: self.steps.model, **made})
        except ModelError as error:
            self.left_out["timing"] = str(error)
            return {}

    def _try(
        self,
        name: str,
        settings: Callable[[], QuantConfig],
        *,
        calibrated: bool = False,
        adapted: Attempt | None = None,
    ) -> Attempt | None:
        """Make a network and measure it; None, with a reason in ``left_out``, where that is not possible.

        Args:
            name: of the recipe, to which what else is done is added.
            settings: of all layers; it may raise OutOfTime, or ConfigError where the budget cannot be kept.
            calibrated: whether it is calibrated.
            adapted: what is to be adapted in place of a network of these settings.
        """
        name += ", adapted" if adapted else ", calibrated" if calibrated else ""
        steps, since = self.steps, time.perf_counter()
        try:
            if self.attempts:
                steps.clock.check()
            config = settings()
            if adapted:
                network = steps.adapted(name, self.networks[adapted.name])
            else:
                network = steps.quantized(config)
                network = steps.calibrated(network) if calibrated else network
        except OutOfTime as reason:
            self.left_out[name] = str(reason)
            return None
        except ConfigError as error:
            if not str(error).startswith("budget: "):
                raise
            self.left_out[name] = str(error)
            return None
        seconds = time.perf_counter() - since
        found = steps.saved.attempts.get(name)
        if found is None or found.config != config:
            sizes, evaluation = summary(network), steps.compared(network)
            self.goal.check_figures(evaluation)
            found = Attempt(
                name=name,
                settings="",
                bytes=sizes.bytes_after,
                effective_bits=sizes.effective_bits,
                evaluation=evaluation,
                times_ms=steps.timed(network) if self.goal.by_time else None,
                config=config,
                calibrated=calibrated,
                adapted=adapted is not None,
                seconds=seconds,
            )
            steps.saved.attempts[name] = found
            steps.saved.write()
        found = replace(found, verdict=self.goal.verdict(found))
        self.attempts.append(found)
        self.networks[name] = network
        self.on_attempt(found)
        return found

    def _most_bits(self, base: QuantConfig) -> QuantConfig:
        """Return the settings of ``base`` in the most bits that keep the budget; the fewest where none does."""
        limits = {name: limit for name, limit in self.goal.budget.items() if name != "ms"}
        config = base
        for bits in (8, 6, 5, 4, 3, 2) if limits else ():
            config = QuantConfig(**{**base.to_dict(), "weight_bits": bits})
            sizes = self.steps.sizes(config)
            taken = {"effective_bits": sizes.effective_bits, "bytes": sizes.bytes_after + self.steps.bias_bytes}
            if all(taken[name] <= limit for name, limit in limits.items()):
                break
        return config

    def _within(self, base: str, most: float) -> QuantConfig:
        """Return settings by layer that come to ``most`` at most on the axis, and keep the other limits.

        Milliseconds of layers, which a search measures, are not those of a compiled network: their ratio is that of the
        selection before, which is compiled and timed.
        """
        measured = self.steps.sensitivity(_BASES[base], times=self.goal.by_time)
        limits = {**self.goal.budget, self.axis: most}
        if "bytes" in limits:
            limits["bytes"] = max(1.0, limits["bytes"] - self.steps.bias_bytes)
        if self.axis not in self.goal.budget:
            limits[self.axis] = max(most, range_of(self.axis, measured)[0] * (1 + 1e-6))
        if not self.goal.by_time:
            return within(_BASES[base], measured, limits)[0]
        del limits["ms"]
        limits = limits or {"effective_bits": range_of("effective_bits", measured)[1]}
        for _ in range(_ROUNDS):
            config, chosen = within(_BASES[base], measured, limits)
            times, layers_ms = self.steps.timed(self.steps.quantized(config)), point_of(chosen, measured).ms
            assert layers_ms
            self.ratio = times.median / layers_ms
            if times.median <= most:
                break
            # The fastest there are, where even these take more.
            limits["ms"] = max(most / self.ratio, range_of("ms", measured)[0] * (1 + 1e-6))
        return config

    def _to_adapt(self) -> Attempt | None:
        """Return the attempt that misses the target by the least and is cheaper than the best; else the best."""
        goal, best = self.goal, self.goal.best(self.attempts)
        if goal.over(best):
            return None
        if not goal.target or goal.short(best):
            return best
        cheaper = [a for a in self.attempts if goal.short(a) and not goal.over(a) and goal.cost(a) < goal.cost(best)]
        return min(cheaper, key=goal.rank, default=None)


def _check_numbers(time_limit: float | None, limit: int, batch_size: int, seed: int, threads: int) -> None:
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    check_whole("threads", threads, 1)
    if threads > cores():
        raise ConfigError(f"threads: expected at most the {cores()} cores there are, got {threads}")
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time_limit: expected seconds above 0, or None, got {time_limit}")
