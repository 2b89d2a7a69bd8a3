"""Layer-by-layer rounding of a quantized network's weights from unlabelled images, without training."""

from dsconv.calibration.calibrate import calibrate
from dsconv.calibration.report import CalibratedLayer, Calibration

__all__ = ["CalibratedLayer", "Calibration", "calibrate"]
