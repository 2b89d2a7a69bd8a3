"""Rounds the weights of a quantized network again, layer by layer, from unlabelled images and without training."""

from dsconv.calibration.calibrate import calibrate
from dsconv.calibration.report import CalibratedLayer, Calibration

__all__ = ["CalibratedLayer", "Calibration", "calibrate"]
