"""Results are shown as the same table in text and in HTML."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

import dsconv
from dsconv.tables import Printed, as_html, as_text

HOSTILE = "<script>alert(1)</script> & [red]x[/red] [/]"


class Page(HTMLParser):
    """Parser for the elements of a page and the rows of its tables; it raises if elements are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: set[str] = set()
        self.rows: list[list[str]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.add(tag)
        if tag == "br":
            self.words += " "
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.words += " "

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def results() -> dict[str, Printed]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.eval()
    qnet = dsconv.quantize(net)
    images = torch.rand(4, 1, 8, 8)
    data = [(images, torch.arange(4))]
    compiled = dsconv.compile(qnet, images)
    return {
        "summary": dsconv.summary(qnet),
        "plan": compiled.plan,
        "evaluation": dsconv.evaluate(qnet, data),
        "comparison": dsconv.compare(net, qnet, data),
        "tradeoff": dsconv.tradeoff({"a": qnet, "b": dsconv.quantize(net, "w8a8")}, net, data),
        "bench": dsconv.bench(net, qnet, images, against=["torch"], batch_sizes=(1, 2), turns=2),
        "profile": dsconv.profile(compiled, images, runs=2),
        "sensitivity": dsconv.sensitivity(net, "w4a4", images=images),
    }


NAMES = ("summary", "plan", "evaluation", "comparison", "tradeoff", "bench", "profile", "sensitivity")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_the_words_of_the_text_in_a_table(name: str, results: dict[str, Printed]) -> None:
    result: Any = results[name]
    page = Page(result._repr_html_())
    assert {"table", "td", "th"} <= page.elements <= {"table", "thead", "tbody", "tr", "th", "td", "p", "strong", "br"}
    assert len({len(row) for row in page.rows if row}) >= 1 and len(page.rows) > 1
    # A terminal breaks words, but their letters are the same.
    letters = [sorted(re.sub(r"[^\w.%/,<>-]|_", "", text)) for text in (page.words, re.sub("[─-╿]", "", str(result)))]
    assert letters[0] == letters[1]


def test_names_are_escaped(results: dict[str, Printed]) -> None:
    summary: Any = results["summary"]
    comparison: Any = results["comparison"]
    bench: Any = results["bench"]
    for hostile in (
        replace(summary, layers=tuple(replace(layer, name=HOSTILE) for layer in summary.layers)),
        replace(comparison, layer_sqnr_db={HOSTILE: 1.0}, metrics={HOSTILE: 2.0}),
        replace(bench, network=HOSTILE),
    ):
        html = hostile._repr_html_()
        assert "script" not in Page(html).elements and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; [red]x" in html


def test_what_rich_shows_of_a_table_has_its_place_in_html() -> None:
    table = Table("name", title="A [bold]title[/bold]", caption="two\nlines")
    table.add_column("figure", justify="right")
    table.add_row("a", Text("[1]"), style="bold")
    table.add_row("b")
    html = as_html(Group(table, "said < meant"))
    page = Page(html)
    assert page.rows == [["name", "figure"], ["a", "[1]"], ["b", ""]]
    assert '<tr style="font-weight: bold"><td>a</td><td style="text-align: right">[1]</td></tr>' in html
    assert "<strong>A title</strong>" in html and "<p>two<br>lines</p>" in html and "<p>said &lt; meant</p>" in html


def test_a_result_without_a_table_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Printed().__rich__()
    assert as_text(Text("x")).strip() == "x"
