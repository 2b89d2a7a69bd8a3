"""Metadata that a quantized model carries."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dsconv.config import QuantConfig
from dsconv.conversion.wrappers import peeled

_NOT_STORED = {"not_folded", "calibration", "adaptation"}


@dataclass
class ModelInfo:
    """Metadata that a quantized model carries.

    Attributes:
        config: the settings used for quantization.
        architecture: name from which :func:`dsconv.zoo.build` builds its float model, None if unknown.
        in_float: maps the name of each layer left in float to the reason.
        preprocess: preprocessing of its images, as plain data, None if unknown.
        folded: maps the name of each BatchNorm folded by :func:`dsconv.fold_batchnorm` to that of its layer.
        affine: names of those that it replaced by a :class:`dsconv.nn.Affine`.
        calibrated_on: number of images that :func:`dsconv.calibrate` used, 0 if it was not called.
        biases: names of the layers whose bias was added by one of these two functions.
        adapted_on: number of images that :func:`dsconv.adapt` used, 0 if it was not called.
        not_folded: maps the name of each unfolded BatchNorm to the reason; not stored in files.
        calibration: the :class:`dsconv.calibration.Calibration` of this model, else None; not stored in files.
        adaptation: the :class:`dsconv.adaptation.Adaptation` of this model, else None; not stored in files.
    """

    config: QuantConfig
    architecture: str | None = None
    in_float: dict[str, str] = field(default_factory=dict)
    preprocess: dict[str, Any] | None = None
    folded: dict[str, str] = field(default_factory=dict)
    affine: tuple[str, ...] = ()
    calibrated_on: int = 0
    biases: tuple[str, ...] = ()
    adapted_on: int = 0
    not_folded: dict[str, str] = field(default_factory=dict)
    calibration: Any = None
    adaptation: Any = None

    def stored(self) -> dict[str, Any]:
        """Return the fields that files store, in the form of a header."""
        kept = {name: copy.copy(value) for name, value in vars(self).items() if name not in _NOT_STORED}
        return {**kept, "config": self.config.to_dict(), "affine": list(self.affine), "biases": list(self.biases)}

    @classmethod
    def from_stored(cls, data: Mapping[str, Any]) -> "ModelInfo":
        """Return the ModelInfo for the data of :meth:`stored`, with a QuantConfig as ``config``; ignore other names."""
        kept = {name: value for name, value in data.items() if name in vars(cls(QuantConfig())).keys() - _NOT_STORED}
        return cls(**{**kept, "affine": tuple(data["affine"]), "biases": tuple(data["biases"])})


def model_info(model: nn.Module) -> ModelInfo | None:
    """Return the :class:`ModelInfo` of a model from :func:`quantize` or :func:`dsconv.load`, None for any other."""
    info = getattr(peeled(model), "dsconv_info", None)
    return info if isinstance(info, ModelInfo) else None


def info_of(model: nn.Module) -> ModelInfo:
    """Return the :class:`ModelInfo` of a model, or one with default settings if it has none."""
    return model_info(model) or ModelInfo(QuantConfig())


def note(model: nn.Module, **changes: Any) -> None:
    """Change fields of the :class:`ModelInfo` of a model."""
    model.dsconv_info = replace(info_of(model), **changes)  # type: ignore[assignment]
