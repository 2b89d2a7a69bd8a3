"""Preprocessing of a network's images: an attribute of the network, copied to everything made from it."""

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
    """Return the preprocessing stored with a network, None if there is none.

    The first of the following is used: the one that it was quantized, calibrated or loaded with; the one noted by
    :func:`dsconv.zoo.build` or :func:`set_preprocess`; its attribute ``preprocess``, a :class:`dsconv.data.Preprocess`
    or a dictionary of its fields; the pretrained configuration of a timm model, if a ``Preprocess`` can express it.

    Raises:
        ConfigError: a dictionary contains an unknown field or a value out of range.

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
            return None  # not a timm configuration, or one that a Preprocess cannot express
    return own


def preprocess_for(images: Images, given: Preprocess | None, *models: nn.Module) -> Preprocess | None:
    """Return ``given``, or for a folder the preprocessing of the first of ``models`` that has one."""
    if given is not None or not isinstance(images, str | os.PathLike):
        return given
    return next((found for model in models if (found := preprocess_of(model)) is not None), None)


def set_preprocess(model: nn.Module, preprocess: Preprocess | Mapping[str, Any]) -> None:
    """Set the preprocessing of a network's images. Files and ONNX files made from the network store it.

    Args:
        model: any network, float or quantized; it is changed in place.
        preprocess: a :class:`dsconv.data.Preprocess`, or a dictionary of the fields that differ from the network's
            current one, or from the defaults of ``Preprocess`` if it has none.

    Raises:
        ConfigError: it is neither, or contains an unknown field or a value out of range.

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
    """Return the value of an attribute ``preprocess``; None if it is something else, such as a method of that name."""
    return laid_over(None, value) if isinstance(value, Preprocess | Mapping) else None
