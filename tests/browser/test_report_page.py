"""The page of a report in headless Chromium: it needs no network, shows the right figures, and is accessible."""

import base64
import functools
import io
import itertools
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dsconv
from dsconv.demo import load_digits, load_network
from dsconv.report import Report, gather, write_page

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium to drive a browser")

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PHONE, LAPTOP = 390, 1280


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs Chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def report() -> Report:
    """Report of the digits network, with its last layer in float, that contains every part of a report."""
    network = load_network()
    qmodel = dsconv.quantize(network, {"weight_bits": 3, "activation_bits": 4, "last_layer": "float"})
    images, labels = (values[:64] for values in load_digits("test"))
    bench = dsconv.bench(network, qmodel, images[:8], against=["torch"], batch_sizes=(1, 4), turns=2)
    options = {"sensitivity_images": 4, "runs": 2, "benches": [bench], "classes": list("0123456789")}
    return gather(qmodel, name="digits <3 bits>", reference=network, images=[(images, labels)], **options)


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "report.html", report)


@pytest.fixture
def show(browser: Any, file: Path) -> Any:
    """Open the page; return a function that evaluates JavaScript in it."""

    def opened(width: int = LAPTOP, scheme: str = "light", path: Path = file) -> Any:
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == PHONE}
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        browser.get(path.as_uri())
        return lambda script, *arguments: browser.execute_script(f"return {script}", *arguments)

    return opened


def rows(js: Any, selector: str) -> list[list[str]]:
    """Return the text of the cells of a table's body."""
    script = "[...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    return [[cell.strip() for cell in row] for row in js(script, selector)]


def bars(js: Any, selector: str, column: int) -> list[float]:
    """Return the drawn lengths of the bars in a column, relative to their track."""
    script = (
        "[...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => {const b = r.cells[arguments[1]]"
        ".querySelectorAll('rect'); return b[1].getBoundingClientRect().width / b[0].getBoundingClientRect().width})"
    )
    return list(js(script, selector, column))


def test_it_opens_without_errors_and_asks_for_nothing(browser: Any, show: Any, file: Path) -> None:
    browser.get_log("performance"), browser.get_log("browser")
    js = show()
    assert js("document.title") == "digits <3 bits>: quantization report"
    assert js("document.querySelector('h1').innerText") == "digits <3 bits>"
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert file.as_uri() in asked
    assert all(url == file.as_uri() or url.startswith("data:") for url in asked)
    assert js("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert js("document.images.length") == 12


def test_sizes_and_accuracy(show: Any, report: Report) -> None:
    js, network = show(), load_network()
    before = sum(t.numel() * t.element_size() for t in network.state_dict().values()) / 1e6
    sizes = rows(js, "[aria-labelledby=size]")
    assert [row[0] for row in sizes] == ["float32", "int8", "dsconv"]
    assert sizes[0][1] == f"{before:.2f}" and sizes[2][1] == f"{report.summary.bytes_after / 1e6:.2f}"
    drawn = bars(js, "[aria-labelledby=size]", 0)
    assert drawn == pytest.approx(
        [1, report.int8_bytes / 1e6 / before, report.summary.bytes_after / 1e6 / before], abs=0.01
    )

    images, labels = (values[:64] for values in load_digits("test"))
    qmodel = dsconv.quantize(network, {"weight_bits": 3, "activation_bits": 4, "last_layer": "float"})
    with torch.inference_mode():
        f, q = network(images), qmodel(images)
    top1 = [f"{100 * (logits.argmax(1) == labels).double().mean():.2f}" for logits in (f, q)]
    kl = torch.nn.functional.kl_div(q.log_softmax(1), f.log_softmax(1), log_target=True, reduction="batchmean")
    table = rows(js, "[aria-labelledby=accuracy]")
    assert table[0] == ["top-1, %", *top1]
    assert table[3][1] == f"{100 * (f.argmax(1) == q.argmax(1)).double().mean():.2f}"
    assert float(table[4][1]) == pytest.approx(float(kl), rel=0.01)
    text = js("document.querySelector('[aria-labelledby=accuracy]').innerText")
    assert "64 images" in text and "Blocks of 32" in text and "4 bits, adaptive" in text


def test_the_images_that_differ(show: Any) -> None:
    js, network = show(), load_network()
    images = load_digits("test")[0][:64]
    qmodel = dsconv.quantize(network, {"weight_bits": 3, "activation_bits": 4, "last_layer": "float"})
    with torch.inference_mode():
        p, q = (net(images).double().softmax(1) for net in (network, qmodel))
    kl, differ = (p * (p / q).log()).sum(1), p.argmax(1) != q.argmax(1)
    order = sorted(range(64), key=lambda i: (not differ[i], -kl[i]))[:12]
    shown = js("[...document.querySelectorAll('.gallery li')].map(entry => entry.innerText)")
    for text, i in zip(shown, order, strict=True):
        words = text.split()
        assert words[:2] == ["image", str(i)]
        found = {key: words[words.index(key) + 1 : words.index(key) + 3] for key in ("float32", "dsconv")}
        for key, probabilities in (("float32", p[i]), ("dsconv", q[i])):
            assert found[key] == [str(int(probabilities.argmax())), f"{100 * probabilities.max():.1f}"]


def test_errors_by_layer(show: Any, report: Report) -> None:
    js, network = show(), load_network()
    images = load_digits("test")[0][:64]
    qmodel = dsconv.quantize(network, {"weight_bits": 3, "activation_bits": 4, "last_layer": "float"})
    outputs = dsconv.compare(network, qmodel, images).layer_sqnr_db
    table = rows(js, "[aria-labelledby=errors]")
    assert [row[0] for row in table] == list(outputs)
    assert [row[2] for row in table] == [f"{value:.1f}" for value in outputs.values()]
    weights = [qmodel.get_submodule(name).weight_sqnr_db for name in outputs]
    top = max([*outputs.values(), *weights])
    assert bars(js, "[aria-labelledby=errors]", 2) == pytest.approx([v / top for v in outputs.values()], abs=0.01)
    kls = [layer.kl for layer in report.layers]
    assert [float(row[3]) for row in table] == pytest.approx(kls, rel=0.01)
    assert sorted(range(len(kls)), key=kls.__getitem__) == sorted(
        range(len(kls)), key=bars(js, "[aria-labelledby=errors]", 3).__getitem__
    )
    floats = rows(js, "[aria-labelledby=float]")
    assert [row[0].split()[0] for row in floats] == ["fc"] and "config" in floats[0][3]


def test_histograms_have_the_right_columns(show: Any) -> None:
    """Compare heights in the paths with the counts of weights by numpy."""
    js, network = show(), load_network()
    qmodel = dsconv.quantize(network, {"weight_bits": 3, "activation_bits": 4, "last_layer": "float"})
    names = js("[...document.querySelectorAll('.layer .name')].map(name => name.innerText)")
    assert len(names) == 9
    for number, name in enumerate(names, 1):
        pair = [net.get_submodule(name).weight.detach().double().flatten().numpy() for net in (network, qmodel)]
        tails = np.quantile(pair, [5e-4, 1 - 5e-4], axis=1, method="nearest")
        low, high = tails[0].min(), tails[1].max()
        counts = [np.histogram(np.clip(values, low, high), 64, (low, high))[0] for values in pair]
        for side, expected in zip(("before", "after"), counts, strict=True):
            path = js(f"document.getElementById('layer-{number}-weights-{side}').getAttribute('d')")
            tops = [float(top) for top in re.findall(r"V([\d.]+)H", path)]
            assert [(120 - top) / 120 * np.max(counts) for top in tops] == pytest.approx(
                expected, abs=0.01 * np.max(counts)
            )
    # The small picture and the large one use the same path.
    box = js("document.querySelector('use[href=\"#layer-2-weights-after\"]').getBBox().width")
    assert box == pytest.approx(320)


def test_exponents_and_statistics(show: Any, report: Report) -> None:
    js = show()
    js("document.querySelectorAll('details').forEach(d => d.open = true)")
    for number, layer in enumerate(report.layers, 1):
        selector = f".layer:nth-of-type({number})"
        captions = js(f"[...document.querySelectorAll('{selector} caption')].map(caption => caption.innerText)")
        assert captions[0] == f"Weights of {layer.summary.name}" and len(captions) == 3
        shares = [row for row in rows(js, f"{selector} .trio > :nth-child(3)") if row[0] != "all zero"]
        total = sum(layer.exponents.values()) + layer.zero_blocks
        expected = {e: 100 * count / total for e, count in layer.exponents.items()}
        found = {int(e.replace("\N{MINUS SIGN}", "-")): float(share.split()[0]) for e, share in shares}
        assert found == pytest.approx(expected, abs=0.06)
        heights = js(
            f"[...document.querySelectorAll('{selector} .columns')].map(column => column.height.baseVal.value)"
        )
        most = max(layer.exponents.values())
        assert heights == pytest.approx([120 * count / most for count in layer.exponents.values()], abs=0.1)
        mean = rows(js, f"{selector} .trio > :nth-child(1)")[0]
        assert float(mean[1].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            load_network().get_submodule(layer.summary.name).weight.mean().item(), rel=0.01
        )


def test_times(show: Any, report: Report) -> None:
    js = show()
    table = rows(js, "[aria-labelledby=time]")
    assert report.profile is not None
    steps, (bench,) = report.profile.steps, report.benches
    assert len(table) == len(steps) + len(bench.timings)
    slowest = max(step.median_ms for step in steps)
    drawn = bars(js, "[aria-labelledby=time]", 1)
    assert drawn[: len(steps)] == pytest.approx([step.median_ms / slowest for step in steps], abs=0.01)
    for row, timing in zip(table[len(steps) :], bench.timings, strict=True):
        assert row[0] == f"{timing.contestant} {timing.executed}"
        assert float(row[1].split()[0]) == pytest.approx(timing.ms_per_image, rel=0.01, abs=0.001)
        if timing.contestant != "dsconv":
            assert float(row[2].split()[0]) == pytest.approx(bench.ratio(timing), abs=0.006)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("width", [320, PHONE, 768, LAPTOP])
def test_nothing_is_wider_than_the_window(width: int, opened: bool, show: Any) -> None:
    js = show(width)
    js("document.querySelectorAll('details').forEach(d => d.open = arguments[0])", opened)
    assert js("document.documentElement.scrollWidth") <= width
    beyond = js(
        "[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('.scroll, .skip')"
        " && e.getBoundingClientRect().right > arguments[0] + 1).map(e => e.outerHTML.slice(0, 80))",
        width,
    )
    assert beyond == []
    # A scrollable table can be focused and scrolled with the keyboard.
    assert js("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, show: Any) -> None:
    """Require 4.5 to 1 for text, 3 to 1 for graphical elements of charts (WCAG 2.2, 1.4.3 and 1.4.11)."""
    js = show(scheme=scheme)
    name = "getComputedStyle(document.documentElement).getPropertyValue(arguments[0])"
    colours = {
        key: js(name, f"--{key}") for key in ("back", "panel", "note", "text", "muted", "after", "edge", "other")
    }

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    assert (luminance(colours["back"]) < 0.1) == (scheme == "dark")
    assert js("getComputedStyle(document.body).backgroundColor") != js("getComputedStyle(document.body).color")
    for text, back in itertools.product(("text", "muted"), ("back", "panel")):
        assert contrast(text, back) >= 4.5, (text, back)
    assert contrast("text", "note") >= 4.5 and contrast("after", "back") >= 4.5
    for mark in ("after", "edge", "other"):
        assert contrast(mark, "back") >= 3, mark


def test_the_keyboard_suffices(browser: Any, show: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    js = show()
    active = functools.partial(js, "document.activeElement")
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert active().get_attribute("class") == "skip"
    assert js("document.activeElement.getBoundingClientRect().left") >= 0
    assert js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    active().send_keys(Keys.ENTER)
    assert active().get_attribute("id") == "main"
    js("document.querySelector('.layer > summary').focus()")
    assert not js("document.querySelector('.layer').open")
    active().send_keys(Keys.ENTER)
    assert js("document.querySelector('.layer').open")


def test_a_screen_reader_finds_its_way(show: Any) -> None:
    js = show()
    js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert js("document.documentElement.lang") == "en"
    levels = js("[...document.querySelectorAll('h1, h2, h3, h4')].map(heading => +heading.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert js("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))")
    ids = js("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert js("[...document.querySelectorAll('table')].every(t => t.caption && t.caption.innerText.trim())")
    assert js("[...document.querySelectorAll('th')].every(th => th.scope && th.innerText.trim())")
    assert js("[...document.images].every(image => image.alt)")
    labelled = "svg.getAttribute('aria-hidden') === 'true' || (svg.getAttribute('role') === 'img' && svg.ariaLabel)"
    assert js(f"[...document.querySelectorAll('svg')].every(svg => {labelled})")
    assert js("document.querySelectorAll('svg[role=img]').length") == 27
    sections = "[...document.querySelectorAll('section')]"
    assert js(f"{sections}.every(s => document.getElementById(s.getAttribute('aria-labelledby')).tagName === 'H2')")


def test_print_shows_what_is_folded_up(browser: Any, show: Any) -> None:
    js = show(scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    heights = js("[...document.querySelectorAll('.layer .trio')].map(e => e.getBoundingClientRect().height)")
    assert len(heights) == 9 and min(heights) > 100
    assert js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf[:5] == b"%PDF-" and 5 <= len(re.findall(rb"/Type ?/Page\b", pdf)) <= 12


def test_charts_are_drawn_in_both_schemes(browser: Any, show: Any) -> None:
    """Check that the pixels of a histogram have the colours of the scheme for before and after."""
    for scheme in ("light", "dark"):
        js = show(scheme=scheme)
        js("document.querySelector('.layer').open = true")
        box = js("document.querySelector('.plot').getBoundingClientRect().toJSON()")
        clip = {
            "x": box["x"],
            "y": box["y"] + js("scrollY"),
            "width": box["width"],
            "height": box["height"],
            "scale": 1,
        }
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        pixels = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")).reshape(-1, 3).astype(int)
        )
        for name in ("before", "after"):
            colour = js("getComputedStyle(document.documentElement).getPropertyValue(arguments[0])", f"--{name}")
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - wanted).max(1) < 12).sum() > 100, (scheme, name)


def test_a_page_of_little_and_of_long_names(browser: Any, show: Any, tmp_path: Path) -> None:
    long = "convolution" * 12
    qmodel = dsconv.quantize(nn.Sequential(OrderedDict({long: nn.Conv2d(3, 8, 3), f"{long}2": nn.Linear(8, 2)})))
    qmodel.dsconv_info.architecture = f"{long}.py:make"
    page = dsconv.write_report(tmp_path / "little.html", qmodel, name=long)
    browser.get_log("browser")
    js = show(PHONE, path=page)
    js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.get_log("browser") == [] and js("document.documentElement.scrollWidth") <= PHONE
    assert js("document.querySelectorAll('.missing').length") >= 8
