"""``dsconv.optimize``: tries a few recipes and keeps the network that meets a budget or a target best."""

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

# A shift helps without images; after calibration, half the block size without a shift is closer to float.
_BASES = {
    "shift, B = 64": QuantConfig.preset("default"),
    "no shift, B = 32": QuantConfig.preset("default", block_size=32, weight_shift=False),
}
_SHIFT, _NO_SHIFT = _BASES
# Start of the search without a budget. Without a target it is also the budget, unless the preset takes more.
_BITS = 4.7
# Number of noise images to measure on.
_NOISE = 64
# Number of bisections in the search for the smallest network that meets the target, and their relative tolerance.
_HALVINGS, _CLOSE = 4, 0.02
# Maximum number of selections that are compiled and timed to meet a budget of milliseconds.
_ROUNDS = 3
# Adaptation does not pay with fewer images, or for a network that is already this close to float.
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
    """Quantize a network within a budget or to a target of accuracy, in one call.

    A few recipes are tried: 8-bit activations and the same bits in all layers; bits by layer (:func:`dsconv.search`);
    both with a shift per block, and without one in smaller blocks; calibrated (:func:`dsconv.calibrate`); fewer bits
    while the target is met, more while it is not; and adapted (:func:`dsconv.adapt`) if the network is still far from
    float and time allows. With a target, the smallest network that meets it is kept, or the fastest under a budget of
    milliseconds; without one, the network closest to float within the budget.

    Half of the images, drawn at random, are for these steps. All figures are measured on the other half, at most 500
    images, which no step uses. Without images, both the search and the figures use noise.

    Args:
        model: the float network.
        images: unlabelled or labelled images, as in :func:`dsconv.evaluate`, 8 or more; a few hundred are recommended.
            They are kept in memory.
        budget: effective bits per weight, or a dictionary of limits that must all hold: ``effective_bits``, ``bytes``
            of the file without its header, ``ms`` per image, compiled, on this machine. None sets no limit; without a
            target as well, the budget is 4.7 effective bits, or more if the preset ``default`` takes more.
        target: a dictionary of the fields of :class:`dsconv.optimization.Target`: least ``agreement`` in percent,
            largest ``kl`` in nats, largest ``top1_drop`` in percent points, or largest ``distance``; it needs images.
        time_limit: limit in seconds, None for no limit. Work not begun when it expires is omitted, and a step that
            would exceed it ends; the first attempt is always made.
        preprocess: preprocessing of a folder or of noise; None uses the one stored with the network.
        limit: maximum number of images: the first ones, or, from a folder, evenly spaced ones.
        batch_size: images per batch in measurements.
        seed: seed of all random choices. The same arguments give the same result on the same machine, unless the time
            limit or a budget of milliseconds affects it.
        threads: number of threads used for timing.
        device: device on which the networks run, except for timing, which uses the CPU; None is the model's device.
        state: folder to which all intermediate results are written, so that a stopped optimization can be resumed.
        resume: continue from ``state``; budget, target and time limit may differ.
        any_range, task: as in :func:`dsconv.calibrate`.
        metric: as in :func:`dsconv.compare`; its first number is the ``distance``.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.
        on_attempt: called with each attempt as soon as it is measured.

    Returns:
        An :class:`dsconv.optimization.Optimization`, whose ``model`` is the network. If no network meets budget and
        target, it is the closest one, and ``shortfall`` states the difference.

    Raises:
        ConfigError: an argument is out of range, or a target is given without images; or ``state`` exists and
            ``resume`` is False, or the other way round.
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
    import_extra("search", "highspy")  # raise before minutes of work if it is missing
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
    """Recipes of an optimization. Each method tries one or more; the attempts are kept for :meth:`result`."""

    def __init__(self, steps: Steps, goal: Goal, on_attempt: Callable[[Attempt], None]):
        self.steps, self.goal, self.on_attempt = steps, goal, on_attempt
        self.attempts: list[Attempt] = []
        self.networks: dict[str, nn.Module] = {}
        self.left_out: dict[str, str] = {}
        self.searches: list[tuple[Attempt, str]] = []
        # The limit along which networks are made smaller or faster.
        self.axis = next((name for name in ("ms", "bytes") if name in goal.budget), "effective_bits")
        self.first = goal.budget.get(self.axis, _BITS)
        # Ratio of the time of the compiled network to the sum of the layer times measured by a search.
        self.ratio = 1.0

    def uniform(self, base: str, *, calibrated: bool = False) -> None:
        """Try the same bits in every layer: the most that the budget allows, 4 without a budget."""
        config = self._most_bits(_BASES[base])
        name = f"W{config.weight_bits}A{config.activation_bits}, {base}"
        self._try(name, lambda: config, calibrated=calibrated)

    def searched(self, base: str, most: float, *, calibrated: bool = False) -> Attempt | None:
        """Try bits by layer with a total of ``most`` on the axis."""
        name = f"searched, {most:.4g} {_SHORT[self.axis]}, {base}"
        found = self._try(name, lambda: self._within(base, most), calibrated=calibrated)
        if found is not None:
            self.searches.append((found, base))
        return found

    def approach_target(self) -> None:
        """Bisect for the fewest bits that meet the target."""
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
        """Adapt the network that benefits most from it."""
        chosen = self._to_adapt()
        if chosen is None:
            return
        name, images = f"{chosen.name}, adapted", self.steps.parts.counts["steps"]
        if chosen.evaluation.distance <= _CLOSE_ALREADY and not self.goal.short(chosen):
            self.left_out[name] = f"the distance from float is already within {_CLOSE_ALREADY}"
        elif images < _FEWEST_IMAGES:
            self.left_out[name] = f"training needs at least {_FEWEST_IMAGES} images, got {images}"
        else:
            self._try(chosen.name, lambda: chosen.config, calibrated=chosen.calibrated, adapted=chosen)

    def result(self) -> Optimization:
        """Return all attempts and the best of them."""
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
        """Time the networks in turns and return the times by settings; times used in decisions are already known."""
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
        """Make a network and measure it; return None, with a reason in ``left_out``, if that is not possible.

        Args:
            name: name of the recipe, to which further steps are added.
            settings: returns the settings of all layers; it may raise OutOfTime, or ConfigError if the budget cannot be
                met.
            calibrated: whether the network is calibrated.
            adapted: attempt whose network is adapted instead of one with these settings.
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
        """Return the settings of ``base`` with the most bits within the budget; the fewest bits if none fits."""
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
        """Return settings by layer with a total of at most ``most`` on the axis, within the other limits.

        The layer times measured by a search differ from the time of a compiled network: their ratio is that of the
        previous selection, which is compiled and timed.
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
            # The fastest selection, if even that takes more.
            limits["ms"] = max(most / self.ratio, range_of("ms", measured)[0] * (1 + 1e-6))
        return config

    def _to_adapt(self) -> Attempt | None:
        """Return the attempt that misses the target by the least and is cheaper than the best; otherwise the best."""
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
        raise ConfigError(f"threads: expected at most {cores()}, the number of cores, got {threads}")
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time_limit: expected seconds above 0, or None, got {time_limit}")
