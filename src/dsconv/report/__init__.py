"""Pictures of results, and a page that contains all of them: ``pip install 'dsconv[report]'``."""

from dsconv.report.benches import draw_benches
from dsconv.report.contents import Report
from dsconv.report.gathering import gather
from dsconv.report.page import write_page, write_report
from dsconv.report.pictures import draw, draw_pareto, draw_sensitivity, draw_tradeoff

__all__ = [
    "Report",
    "draw",
    "draw_benches",
    "draw_pareto",
    "draw_sensitivity",
    "draw_tradeoff",
    "gather",
    "write_page",
    "write_report",
]
