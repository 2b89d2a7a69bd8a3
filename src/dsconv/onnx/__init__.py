"""Quantized networks as ONNX files."""

from dsconv.onnx.export import OPSET, STYLES, Style, export_onnx
from dsconv.onnx.runtime import OnnxNetwork

__all__ = ["OPSET", "STYLES", "OnnxNetwork", "Style", "export_onnx"]
