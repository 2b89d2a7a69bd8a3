"""Part-by-part compilation of models that cannot be captured as a whole, such as detectors with post-processing."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dsconv.compilation.plan import Plan, PlanStep
from dsconv.data.inputs import Inputs, call
from dsconv.errors import DataError, ModelError
from dsconv.layers import DSLayer


class Part(nn.Module):
    """Replacement for a module of a model: it is called in the same way, runs a program, and has its attributes."""

    def __init__(self, program: nn.Module):
        super().__init__()
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "program" or name.startswith("__"):
                raise
            return getattr(self.program.model, name)


def compile_parts(model: nn.Module, inputs: Inputs, make: Callable[[nn.Module, Inputs], nn.Module]) -> list[str]:
    """Replace the largest modules of ``model`` that ``make`` can compile by their programs; return their names.

    Args:
        model: run once on ``inputs`` to record the arguments of each module.
        make: raises ModelError for a module that cannot be captured.
    """
    calls: dict[str, Inputs] = {}

    def note(name: str, args: Any, kwargs: Any) -> None:
        # A module whose arguments are not supported may contain modules whose arguments are.
        with suppress(DataError):
            calls.setdefault(name, Inputs(*args, **kwargs))

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in model.named_modules():
            if name and _has_layers(module):
                hook = module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
                )
                hooks.enter_context(hook)
        call(model, inputs)
    names: list[str] = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for own, child in parent.named_children():
            name = f"{prefix}{own}"
            if not _has_layers(child):
                continue
            try:
                if name not in calls:
                    raise ModelError("it is not called")
                setattr(parent, own, Part(make(child, calls[name])))
                names.append(name)
            except ValueError:  # or it computes in another dtype
                visit(child, f"{name}.")

    visit(model, "")
    return names


def plan_of_parts(model: nn.Module, names: list[str]) -> Plan:
    """Return the table of a model with parts: their steps, and one for everything that PyTorch runs between them."""
    parts: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    plans: dict[str, Plan] = {name: part.program.plan for name, part in parts.items()}
    steps = [
        replace(step, name=f"{name}.{step.name}".removesuffix("."))
        for name, plan in plans.items()
        for step in plan.steps
    ]
    rest = PlanStep("", f"{type(model).__name__}.forward, but for {', '.join(names)}", "PyTorch", (), (), 0)
    memory, weights = (sum(getattr(plan, of) for plan in plans.values()) for of in ("memory_bytes", "weight_bytes"))
    return Plan((*steps, rest), memory, weights)


def _has_layers(module: nn.Module) -> bool:
    """Return whether it contains a quantized layer, and is not just one."""
    return not isinstance(module, DSLayer) and any(isinstance(m, DSLayer) for m in module.modules())
