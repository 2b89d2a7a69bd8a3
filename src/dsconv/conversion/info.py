"""What a quantized model carries about itself."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dsconv.config import QuantConfig
from dsconv.conversion.wrappers import peeled


@dataclass
class ModelInfo:
    """What a quantized model carries about itself.

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


def model_info(model: nn.Module) -> ModelInfo | None:
    """The :class:`ModelInfo` of a model that :func:`quantize` or :func:`dsconv.load` returned, else None."""
    info = getattr(peeled(model), "dsconv_info", None)
    return info if isinstance(info, ModelInfo) else None
