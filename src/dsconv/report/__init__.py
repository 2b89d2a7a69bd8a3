"""Pictures of what quantization did to a network. Needs matplotlib: ``pip install 'dsconv[report]'``."""

from dsconv.report.pictures import draw, draw_pareto, draw_sensitivity

__all__ = ["draw", "draw_pareto", "draw_sensitivity"]
