"""Pictures of what quantization did to a network. Needs matplotlib: ``pip install 'dsconv[report]'``."""

from dsconv.report.pictures import draw

__all__ = ["draw"]
