"""Quantized networks as ONNX files."""

from dsconv.onnx.export import STYLES, Style, export_onnx

__all__ = ["STYLES", "Style", "export_onnx"]
