"""Pictures of what was found. Needs matplotlib: ``pip install 'dsconv[report]'``."""

from dsconv.report.benches import draw_benches
from dsconv.report.pictures import draw, draw_pareto, draw_sensitivity, draw_tradeoff

__all__ = ["draw", "draw_benches", "draw_pareto", "draw_sensitivity", "draw_tradeoff"]
