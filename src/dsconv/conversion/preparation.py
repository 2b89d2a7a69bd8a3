"""Preparation of a network's images: an attribute of the network, which travels with all that is made from it."""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from dsconv.conversion.info import model_info, note
from dsconv.conversion.wrappers import peeled
from dsconv.data.folder import Images
from dsconv.data.preprocess import Preprocess, laid_over
from dsconv.errors import ConfigError, MissingExtraError


def preprocess_of(model: nn.Module) -> Preprocess | None:
    """Return how a network says that its images are prepared, or None where it does not say.

    The first of these that there is: what it was quantized, calibrated or loaded with; what :func:`dsconv.zoo.build` or
    :func:`set_preprocess` noted; its attribute ``preprocess``, a :class:`dsconv.data.Preprocess` or a dictionary of its
    fields; the pretrained configuration of a timm model, where a ``Preprocess`` can express it.

    Raises:
        ConfigError: a dictionary holds an unknown field or a value out of range.

    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3))
    >>> net.preprocess = {"crop": 32, "mean": 0.5}
    >>> str(preprocess_of(net))
    'resize none, crop 32x32, interpolation bilinear, channels rgb, scale 1, mean 0.5, std 1'
    """
    model = peeled(model)
    info = model_info(model)
    if info is not None and info.preprocess is not None:
        return Preprocess(**info.preprocess)
    noted = getattr(model, "dsconv_preprocess", None)
    if isinstance(noted, Preprocess):
        return noted
    own = offered(getattr(model, "preprocess", None))
    if own is None and getattr(model, "pretrained_cfg", None):
        try:
            return Preprocess.from_timm(model)
        except (ConfigError, MissingExtraError, AttributeError, KeyError, TypeError):
            return None  # it is not a configuration of timm, or none that a Preprocess can express
    return own


def preprocess_for(images: Images, given: Preprocess | None, *models: nn.Module) -> Preprocess | None:
    """Return ``given``, or for a folder what the first of ``models`` says that says anything."""
    if given is not None or not isinstance(images, str | os.PathLike):
        return given
    return next((found for model in models if (found := preprocess_of(model)) is not None), None)


def set_preprocess(model: nn.Module, preprocess: Preprocess | Mapping[str, Any]) -> None:
    """Let a network, float or quantized, say how its images are prepared. Files and ONNX files made from it say so too.

    Args:
        model: any network; it is changed in place.
        preprocess: a :class:`dsconv.data.Preprocess`, or a dictionary of the fields that differ from what the network
            says so far, or from the defaults of ``Preprocess`` where it says nothing.

    Raises:
        ConfigError: it is neither, holds an unknown field or a value out of range.

    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3))
    >>> set_preprocess(net, Preprocess.imagenet(224))
    >>> set_preprocess(net, {"crop": 192})
    >>> preprocess_of(net).resize, preprocess_of(net).crop
    (256, (192, 192))
    """
    stated = laid_over(preprocess_of(model), preprocess)
    if model_info(model) is None:
        model.dsconv_preprocess = stated  # type: ignore[assignment]
    else:
        note(model, preprocess=stated.model_dump(mode="json"))


def offered(value: Any) -> Preprocess | None:
    """Return what an attribute ``preprocess`` holds; None where it is something else, such as a method of that name."""
    return laid_over(None, value) if isinstance(value, Preprocess | Mapping) else None
