"""Training and evaluation mode: networks are measured and run in evaluation mode, whatever their mode before.

Functions that measure or change weights use :func:`evaluation_mode` and restore the mode afterwards. Functions that
make a program or another file from a network refuse one in training mode, by :func:`check_evaluation_mode`. Networks
loaded from a file are in evaluation mode.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from dsconv.errors import ModelError


def check_module(name: str, model: object) -> None:
    """Raise ModelError unless the argument ``name`` is a network.

    Raises:
        ModelError: it is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, type):
            raise ModelError(f"{name}: expected a torch.nn.Module, got the class {model.__name__}: pass an instance")
        raise ModelError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}: pass a network")


@contextmanager
def evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put ``models`` into evaluation mode for the duration of the block.

    >>> net = nn.Sequential(nn.Dropout())
    >>> with evaluation_mode([net]):
    ...     print(net.training)
    False
    >>> net.training
    True
    """
    models = list(models)
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def check_evaluation_mode(model: nn.Module, doing: str, *, parts: bool = True) -> None:
    """Raise ModelError for a model in training mode; the message says what to do before ``doing``.

    Args:
        parts: also refuse a model with a submodule in training mode.

    Raises:
        ModelError: the model is in training mode.
    """
    what = f"model {type(model).__name__}"
    if not model.training:
        modules = model.named_modules() if parts else ()
        name = next((name for name, module in modules if module.training), None)
        if name is None:
            return
        what += f": its part {name!r}"
    raise ModelError(
        f"{what} is in training mode, in which BatchNorm uses the statistics of each batch and Dropout is active: "
        f"call the model's eval() before {doing}"
    )
