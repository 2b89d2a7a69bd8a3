"""Wrappers around a network that change how or where it runs, but not its result."""

import copy
from typing import Any

from torch import nn

# By class and the package that defines it, so that no package is imported: the attribute with the network.
_WRAPPERS = {
    ("torch", "OptimizedModule"): "_orig_mod",  # of torch.compile
    ("torch", "DataParallel"): "module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("timm", "ModelEma"): "module",
    ("timm", "ModelEmaV2"): "module",
    ("timm", "ModelEmaV3"): "module",
    ("lightning", "_FabricModule"): "_original_module",
    ("lightning_fabric", "_FabricModule"): "_original_module",
    ("deepspeed", "DeepSpeedEngine"): "module",
}


def unwrapped(model: Any) -> Any:
    """Return the network in ``model`` without the wrappers around it or around parts of it.

    These are ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, ``AveragedModel``, and those of timm,
    Lightning Fabric and DeepSpeed. Modules have the names of the unwrapped network. ``model`` is unchanged and shares
    all layers and tensors with the result. A model without wrappers is returned itself.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)))
    >>> [name for name, _ in unwrapped(nn.DataParallel(net)).named_parameters()]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    model = peeled(model)
    return _without(model, {}) if isinstance(model, nn.Module) else model


def peeled(model: Any) -> Any:
    """Return the network in ``model`` without the wrappers around it; those around its parts stay."""
    while isinstance(model, nn.Module) and (name := _place(model)):
        model = getattr(model, name)
    return model


def _place(module: nn.Module) -> str | None:
    bases = ((base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__)
    return next((_WRAPPERS[base] for base in bases if base in _WRAPPERS), None)


def _without(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return the module itself, or a copy that shares everything with it except its wrapped children."""
    if module not in made:
        made[module] = module
        children = {
            name: None if child is None else _without(peeled(child), made) for name, child in module._modules.items()
        }
        if any(child is not module._modules[name] for name, child in children.items()):
            made[module] = twin = copy.copy(module)
            twin._modules = children
    return made[module]
