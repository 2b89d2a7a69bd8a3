"""Network in training: its layers use shadows, and are compared with those of the teacher."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsconv.adaptation.shadow import LearnedWeight, RecomputedWeight, Shadow
from dsconv.calibration.layers import Pair
from dsconv.data.inputs import Batch
from dsconv.errors import ModelError
from dsconv.evaluation.measures import Output
from dsconv.evaluation.running import outputs_of
from dsconv.layers.inputs import device_of
from dsconv.recipe import Recipe

# Maximum squared relative difference between a layer's dequantized weight and the recomputed one at the start.
_SAME = 1e-3
# Learning rate of a scale or a bias relative to that of a level, since many outputs depend on it.
_SLOWER = 0.1


class Student(nn.Module):
    """Quantized network in training; its forward returns outputs, and the errors of the layers' outputs.

    Attributes:
        model: the network, in which the layers of ``pairs`` use the shadows within :meth:`training_`.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Pair], variances: Sequence[float], recipe: Recipe):
        super().__init__()
        self.model, self.pairs, self.variances = model, pairs, variances
        make = LearnedWeight if recipe.weights == "learned" else RecomputedWeight
        self.shadows = nn.ModuleList(make(pair.layer, pair.weight) for pair in pairs)
        self.watches = recipe.features > 0
        self._expected: dict[str, list[Tensor]] = {}

    def expect(self, outputs: dict[str, list[Tensor]]) -> None:
        """Set the expected outputs of the layers in the next forward, by name and call."""
        self._expected = outputs

    def forward(self, x: Batch) -> tuple[dict[str, Output], Tensor]:
        errors: list[Tensor] = []
        calls: dict[str, int] = defaultdict(int)

        def compare(pair: Pair, variance: float, y: Tensor) -> None:
            wanted = self._expected[pair.name][calls[pair.name]]
            calls[pair.name] += 1
            errors.append((y.float() - wanted).square().mean() / (variance * len(pair.outputs)))

        with ExitStack() as hooks:
            for pair, variance in zip(self.pairs, self.variances, strict=True):
                if self.watches and self._expected:
                    look = lambda _, __, y, pair=pair, variance=variance: compare(pair, variance, y)  # noqa: E731
                    hooks.enter_context(pair.layer.register_forward_hook(look))
            outputs = outputs_of("student", self.model, x, torch.float32)
        none = torch.zeros((), dtype=torch.float32, device=device_of(self.model))
        return outputs, torch.stack(errors).sum() / len(self.pairs) if errors else none

    def groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Return parameter groups for the optimizer, with their learning rates."""
        groups: list[dict[str, Any]] = []
        for pair, shadow, variance in zip(self.pairs, self.shadows, self.variances, strict=True):
            # A scale moves all levels of its block together, by its change times the largest of them.
            scales = recipe.lr * _SLOWER / (1 << (pair.layer.config.weight_bits - 1))
            rates = {"level": recipe.lr, "gain": scales, "offset": scales, "bias": scales * variance**0.5}
            for name, p in (*shadow.named_parameters(), ("bias", pair.layer.bias)):
                rate = rates[name] if recipe.weights == "learned" else recipe.lr
                groups.append({"params": [p], "lr": rate, "initial_lr": rate})
        return groups

    def trained(self) -> dict[str, nn.Parameter]:
        """Return all trained parameters, by name."""
        named = {f"{pair.name}.{name}": p for pair, s in self._both() for name, p in s.named_parameters()}
        return named | {f"{pair.name}.bias": cast(nn.Parameter, pair.layer.bias) for pair in self.pairs}

    def bound_(self) -> None:
        """Limit the parameters; call it after each step."""
        for _, shadow in self._both():
            cast(Shadow, shadow).bound_()

    @torch.no_grad()
    def check_start(self) -> None:
        """Raise ModelError if the shadows do not represent the weights of the network."""
        for pair, shadow in self._both():
            held, shadowed = pair.layer.conv_weight(), cast(Shadow, shadow)()
            if (held - shadowed).square().sum() > _SAME * held.square().sum():
                raise ModelError(
                    f"layer {pair.name!r}: its integers differ from those of its weight rule, as after a calibration, "
                    "and this recipe computes them again: use the recipe 'default', or a network from quantize"
                )

    @torch.no_grad()
    def store(self) -> None:
        """Store the values of the shadows in the layers."""
        for pair, shadow in self._both():
            pair.layer.store_(*cast(Shadow, shadow).stored(), pair.weight)

    @contextmanager
    def training_(self) -> Iterator[None]:
        """Let the layers use the shadows within the block, in which nothing else requires gradients."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        trained = {id(p) for p in self.trained().values()}
        try:
            for p, _ in flags:
                p.requires_grad_(id(p) in trained)
            for pair, shadow in self._both():
                # Not a submodule: the layer would have its parameters in its state.
                vars(pair.layer)["_shadow"] = shadow
            yield
        finally:
            for pair in self.pairs:
                vars(pair.layer).pop("_shadow", None)
            for p, flag in flags:
                p.requires_grad_(flag)

    def _both(self) -> Iterator[tuple[Pair, nn.Module]]:
        return zip(self.pairs, self.shadows, strict=True)


@contextmanager
def noting_outputs(pairs: Sequence[Pair]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of the teacher's layers within the block, by name and call, float32."""
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as hooks:
        for pair in pairs:
            # A copy: an in-place ReLU would overwrite it.
            look = lambda _, __, y, name=pair.name: outputs[name].append(y.float().clone())  # noqa: E731
            hooks.enter_context(pair.watched.register_forward_hook(look))
        yield outputs
