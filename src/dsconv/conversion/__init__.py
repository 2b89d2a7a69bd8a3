"""Conversion of a float model to a quantized one, and a summary of its layers."""

from dsconv.conversion.convert import quantize
from dsconv.conversion.fold import fold_batchnorm
from dsconv.conversion.info import ModelInfo, model_info
from dsconv.conversion.summary import LayerSummary, Summary, summary

__all__ = ["LayerSummary", "ModelInfo", "Summary", "fold_batchnorm", "model_info", "quantize", "summary"]
