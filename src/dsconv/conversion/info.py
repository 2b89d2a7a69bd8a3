"""Facts that a quantized model carries about itself."""

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
    """Facts that a quantized model carries about itself.

    Attributes:
        config: the settings it was made with.
        architecture: name by which :func:`dsconv.zoo.build` makes its float model, None where unknown.
        in_float: name of each layer that was left in float, to the reason.
        preprocess: how its images are prepared, as plain data, None where unknown.
        folded: name of each BatchNorm that :func:`dsconv.fold_batchnorm` folded, to that of its layer.
        affine: names of those that became a :class:`dsconv.nn.Affine` there.
        calibrated_on: images that :func:`dsconv.calibrate` has seen, 0 where it was not called.
        biases: names of the layers that have a bias since one of the two, and had none before.
        adapted_on: images that :func:`dsconv.adapt` has seen, 0 where it was not called.
        not_folded: name of each BatchNorm that was left as it is, to the reason; files do not keep it.
        calibration: the :class:`dsconv.calibration.Calibration` of this model, else None; files do not keep it.
        adaptation: the :class:`dsconv.adaptation.Adaptation` of this model, else None; files do not keep it.
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
        """Return the fields that files keep, as a header has them."""
        kept = {name: copy.copy(value) for name, value in vars(self).items() if name not in _NOT_STORED}
        return {**kept, "config": self.config.to_dict(), "affine": list(self.affine), "biases": list(self.biases)}

    @classmethod
    def from_stored(cls, data: Mapping[str, Any]) -> "ModelInfo":
        """Return what :meth:`stored` gave, but with a QuantConfig as ``config``; other names are left out."""
        kept = {name: value for name, value in data.items() if name in vars(cls(QuantConfig())).keys() - _NOT_STORED}
        return cls(**{**kept, "affine": tuple(data["affine"]), "biases": tuple(data["biases"])})


def model_info(model: nn.Module) -> ModelInfo | None:
    """Return the :class:`ModelInfo` of a model that :func:`quantize` or :func:`dsconv.load` returned, else None."""
    info = getattr(peeled(model), "dsconv_info", None)
    return info if isinstance(info, ModelInfo) else None


def info_of(model: nn.Module) -> ModelInfo:
    """Return the :class:`ModelInfo` of a model; that of the default settings where it has none."""
    return model_info(model) or ModelInfo(QuantConfig())


def note(model: nn.Module, **changes: Any) -> None:
    """Change fields of the :class:`ModelInfo` of a model."""
    model.dsconv_info = replace(info_of(model), **changes)  # type: ignore[assignment]
