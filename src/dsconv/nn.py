"""Quantized layers that replace PyTorch's, and ``DSConvModel``, a quantized network for the Hugging Face Hub."""

from typing import TYPE_CHECKING, Any

from dsconv.layers import *  # noqa: F403
from dsconv.layers import __all__ as __all__

if TYPE_CHECKING:
    from dsconv.hub import DSConvModel as DSConvModel


def __getattr__(name: str) -> Any:
    # It needs an extra, so its module is imported on request.
    if name == "DSConvModel":
        from dsconv.hub import DSConvModel

        return DSConvModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
