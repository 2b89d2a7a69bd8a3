"""Files of quantized models."""

from dsconv.io.checkpoint import FILE_NAME, FORMAT_VERSION, Header, describe, load, read_header, save

__all__ = ["FILE_NAME", "FORMAT_VERSION", "Header", "describe", "load", "read_header", "save"]
