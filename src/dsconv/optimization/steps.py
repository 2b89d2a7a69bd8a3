"""Steps of which recipes consist, and the measurement of their results."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dsconv.adaptation import Look, Recipe, adapt
from dsconv.benchmarking.measure import Quartiles
from dsconv.calibration import calibrate
from dsconv.config import QuantConfig
from dsconv.conversion import Summary, quantize, summary
from dsconv.conversion.info import info_of
from dsconv.conversion.quantized import quantized_layers
from dsconv.conversion.statistics import normalized, with_statistics
from dsconv.data import Preprocess
from dsconv.data.inputs import call
from dsconv.errors import ModelError
from dsconv.evaluation import Comparison, compare
from dsconv.evaluation.metric import Metric
from dsconv.layers.inputs import as_input_of, device_of
from dsconv.mixed import Sensitivity, Trial, choices_of
from dsconv.mixed.measure import Recorded, measure
from dsconv.modes import evaluation_mode
from dsconv.optimization.images import Parts
from dsconv.optimization.saved import Saved
from dsconv.tradeoffs import time_each

# Numbers of images used to rank layers and to calibrate them.
_SEARCHED, _SEARCH_BATCH, _CALIBRATED = 32, 16, 128
# Fraction of the remaining time that a search may take, since its result is then calibrated and measured.
_SEARCH_SHARE = 0.6
# Maximum and minimum steps of an adaptation; the first images are used to estimate the time of a step.
_STEPS, _FEWEST_STEPS, _TIMED_IMAGES = Recipe().steps, 50, 64
# Outputs of the float network are computed once if those for all images fit in this many bytes.
_REMEMBERED_BYTES = 1 << 28
_TIMED_SECONDS = 1.0


class OutOfTime(Exception):
    """A step would exceed the time limit."""


class Clock:
    """Clock that measures the remaining time."""

    def __init__(self, seconds: float | None):
        self._start, self._limit = time.perf_counter(), math.inf if seconds is None else seconds

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._limit - self.passed

    def check(self, seconds: float = 0.0) -> None:
        """Raise OutOfTime unless more time than ``seconds``, and than none, is left."""
        if self.left <= seconds:
            more = f"it needs about {seconds:.0f} s, and {max(0.0, self.left):.0f} s were left" if seconds else ""
            raise OutOfTime(more or "the time limit was reached")


@dataclass(kw_only=True)
class Steps:
    """Steps on one network and its images. Each step reuses the results saved before it was stopped.

    Attributes:
        model: the float network.
        parts: the images for the steps, and those for measurements.
        saved: results saved before.
        clock: the clock with the time limit.
        prepared: preprocessing of the images, None if unknown.
        seed, any_range, metric: as in :func:`dsconv.optimize`.
        threads: number of threads used for timing.
        options: ``device``, ``task`` and ``progress``.
    """

    model: nn.Module
    parts: Parts
    saved: Saved
    clock: Clock
    prepared: Preprocess | None
    seed: int
    any_range: bool
    metric: Metric | None
    threads: int
    options: dict[str, Any]
    _sensitivity: dict[str, Sensitivity] = field(default_factory=dict)

    def quantized(self, config: QuantConfig) -> nn.Module:
        """Quantize the network."""
        return quantize(self.model, config, preprocess=self.prepared)

    def sensitivity(self, config: QuantConfig, *, times: bool) -> Sensitivity:
        """Measure the cost of bits in each layer, once.

        Raises:
            OutOfTime: it would take too long.
        """
        key = config.to_json()
        if key not in self._sensitivity:
            choices = choices_of(config, times=times)
            self._sensitivity[key] = measure(
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
                **self.saved.step("search", key, times),
                **self.options,
            )
        return self._sensitivity[key]

    def _in_time(self, choices: int) -> Callable[[Trial], None]:
        """Return a callback that raises OutOfTime once the trials so far show that the rest would take too long."""
        layers = list(quantized_layers(self._quickly(QuantConfig.preset("default"))))
        began, allowed, done = time.perf_counter(), _SEARCH_SHARE * self.clock.left, 0

        def look(trial: Trial) -> None:
            nonlocal done
            done += 1
            left = choices * (len(layers) - 1 - layers.index(trial.layer))
            expected = (time.perf_counter() - began) * (1 + left / done)
            if done >= choices and expected > allowed:
                raise OutOfTime(f"the search would take about {expected:.0f} s")

        return look

    def calibrated(self, network: nn.Module) -> nn.Module:
        """Calibrate a quantized network.

        Raises:
            OutOfTime: it takes too long.
        """
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

    def adapted(self, name: str, network: nn.Module) -> nn.Module:
        """Adapt a network in as many steps as the time allows; ``name`` is the name of the recipe.

        Raises:
            OutOfTime: the time allows too few steps.
        """
        assert self.parts.steps is not None
        options = {"seed": self.seed, "any_range": self.any_range, **self.options}
        if name not in self.saved.steps:
            looks: list[Look] = []
            few, images = Recipe(steps=2, every=1), self.parts.steps[:_TIMED_IMAGES]
            adapt(network, self.model, images, recipe=few, on_look=looks.append, **{**options, "progress": False})
            seconds = looks[-1].seconds - looks[-2].seconds
            self.clock.check(_FEWEST_STEPS * seconds)
            self.saved.steps[name] = int(min(_STEPS, self.clock.left / seconds))
            self.saved.write()
        recipe = Recipe(steps=self.saved.steps[name])
        state = self.saved.step("adapt", name, info_of(network).config.to_json())
        return adapt(network, self.model, self.parts.steps, recipe=recipe, **state, **options)

    def compared(self, network: nn.Module) -> Comparison:
        """Compare a network with the float one on the images that no step uses."""
        seen = network if self._float is self.model else quantize(self._float, info_of(network).config)
        return compare(self._answers, seen, self.parts.measured, per_layer=False, metric=self.metric, **self.options)

    @cached_property
    def _float(self) -> nn.Module:
        """Float network; for noise, with its BatchNorm statistics measured on noise, as in a search."""
        (x, _), *_ = self.parts.measured
        noisy = self.parts.steps is None and with_statistics(self.model)
        return normalized(self.model, x) if noisy and isinstance(x, Tensor) else self.model

    @cached_property
    def _answers(self) -> nn.Module:
        """Float network, or its recorded outputs if they are small, so that they are computed once."""
        batches = [x for x, _ in self.parts.measured]
        with evaluation_mode([self._float]), torch.inference_mode():
            outputs = call(self._float, as_input_of(self._float, batches[0][:1]))
        one = sum(y.numel() * y.element_size() for y in tree_leaves(outputs) if isinstance(y, Tensor))
        if one * self.parts.counts["measured"] > _REMEMBERED_BYTES:
            return self._float
        return Recorded(self._float, batches, self.options["device"], self.options["task"])

    def timed(self, network: nn.Module) -> Quartiles:
        """Return the times of one image, compiled, measured once for all networks with the same settings.

        Raises:
            ModelError: the network cannot be compiled.
        """
        key = info_of(network).config.to_json()
        if key not in self.saved.times:
            self.saved.times[key] = self.race({key: network})[key]
        return self.saved.times[key]

    def race(self, networks: Mapping[str, nn.Module]) -> dict[str, Quartiles]:
        """Return the times of one image, compiled, for several networks in turns; ``float32`` runs in PyTorch.

        Raises:
            ModelError: a network cannot be compiled, or is not on the CPU.
        """
        if (place := device_of(self.model)).type != "cpu":
            raise ModelError(
                f"times are measured on the CPU, and the network is on {place}: move it to the CPU and pass "
                f"device='{place}'"
            )
        times: dict[str, Quartiles] = {}
        example, seconds = self.parts.measured[0][0][:1], _TIMED_SECONDS * len(networks)
        with evaluation_mode(networks.values()):
            time_each(networks, example, self.threads, seconds, times)
        return times

    def sizes(self, config: QuantConfig) -> Summary:
        """Return the sizes of the quantized network, which do not depend on the rounding rule."""
        return summary(self._quickly(config))

    @cached_property
    def bias_bytes(self) -> int:
        """Maximum number of bytes of the biases that a calibration adds; 0 without images."""
        if self.parts.steps is None:
            return 0
        layers = quantized_layers(self._quickly(QuantConfig.preset("default"))).values()
        return sum(4 * len(layer.vqk) for layer in layers if layer.bias is None)

    def _quickly(self, config: QuantConfig) -> nn.Module:
        quickly = {"weight_rule": "paper", "batchnorm_statistics": False}
        return quantize(self.model, QuantConfig(**{**config.to_dict(), **quickly}))
