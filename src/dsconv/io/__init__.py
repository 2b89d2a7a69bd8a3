"""Files of quantized models."""

from dsconv.io.checkpoint import FORMAT_VERSION, Header, describe, load, read_header, save

__all__ = ["FORMAT_VERSION", "Header", "describe", "load", "read_header", "save"]
