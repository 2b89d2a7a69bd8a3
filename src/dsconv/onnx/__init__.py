"""Import of networks from ONNX files, and export of quantized networks to ONNX files."""

from dsconv.names import OPSET, STYLES, Style
from dsconv.onnx.export import export_onnx
from dsconv.onnx.importing import from_onnx
from dsconv.onnx.runtime import OnnxNetwork

__all__ = ["OPSET", "STYLES", "OnnxNetwork", "Style", "export_onnx", "from_onnx"]
