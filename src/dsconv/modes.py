"""Training and evaluation mode: networks are measured and run in the latter, whichever they come in.

What measures or changes weights uses :func:`evaluation_mode`, and gives a network back as it came. What makes a program
or another file of a network refuses one in training mode, by :func:`check_evaluation_mode`. What is loaded from a file
is in evaluation mode.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from dsconv.errors import ModelError


def check_module(name: str, model: object) -> None:
    """Refuse what is no network as the argument ``name``.

    Raises:
        ModelError: it is none.
    """
    if not isinstance(model, nn.Module):
        got = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ModelError(f"{name}: expected a torch.nn.Module, got {got}: pass a network")


@contextmanager
def evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put ``models`` into evaluation mode for as long as the block lasts.

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
    """Refuse a model in training mode, with what to do before ``doing``.

    Args:
        parts: refuse one of which a part is in training mode, too.

    Raises:
        ModelError: it is in training mode.
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
