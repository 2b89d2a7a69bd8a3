"""Report as one self-contained HTML page, without network access or scripts."""

import base64
import datetime
import itertools
import math
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from dsconv.benchmarking.machine import machine_notes
from dsconv.benchmarking.results import OURS, Timing, digits, plural
from dsconv.conversion import LayerSummary
from dsconv.errors import import_extra
from dsconv.evaluation import Comparison
from dsconv.files import as_path, check_place, replacing
from dsconv.report.contents import Report
from dsconv.report.gathering import gather

_SIGNS = {
    "adaptive": "a sign bit only in blocks with a negative value",
    "extra": "a sign in addition to the bits",
    "included": "two's complement",
    "auto": "a sign in addition to the bits in layers whose input can be negative",
}

# Figures of a single network: title, field and unit.
_ACCURACIES = (("mIoU", "miou", "%"), ("PSNR", "psnr_db", "dB"), ("SSIM", "ssim", ""))
_MEASURES = {
    "agreement": "agreement, %",
    "kl": "KL divergence, nats",
    "miou": "mIoU, %",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "sqnr_db": "SQNR, dB",
    "relative_error": "relative error",
}


def write_page(path: str | os.PathLike[str], report: Report) -> Path:
    """Write a report as an HTML page, atomically.

    Raises:
        MissingExtraError: jinja2 is not installed.
        OSError: the file cannot be written.
    """
    text, path = page(report), as_path(path)
    with replacing(path) as beside:
        # Names of files may contain invalid bytes.
        beside.write_bytes(text.encode("utf-8", "backslashreplace"))
    return path


def write_report(path: str | os.PathLike[str], qmodel: nn.Module, **options: Any) -> Path:
    """Measure a quantized network and write the results as one HTML page.

    Args:
        path: path of the file, which is replaced if it exists.
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`.
        options: options of :func:`dsconv.report.gather`, such as ``reference`` and ``images``.

    Raises:
        ConfigError, DataError, ModelError: as :func:`dsconv.report.gather`.
        MissingExtraError: jinja2 is not installed: ``pip install 'dsconv[report]'``.
        OSError: the file cannot be written.

    >>> import dsconv, tempfile
    >>> net = dsconv.zoo.build("dsconv/digits_resnet")
    >>> images, labels = dsconv.demo.load_digits()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(f"{folder}/digits.html", dsconv.quantize(net), reference=net, images=images[:32])
    ...     page.read_text()[:15]
    '<!doctype html>'
    """
    import_extra("report", "jinja2")
    check_place(as_path(path))
    return write_page(path, gather(qmodel, **options))


def page(report: Report) -> str:
    """Return the page as text."""
    jinja2 = import_extra("report", "jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dsconv", "report"),
        autoescape=True,  # names of files, layers and classes come from users
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["contains"] = lambda text, part: part in text
    environment.filters |= {
        "groupby_setting": _by_setting,
        "base64": lambda data: base64.b64encode(data).decode(),
        "db": _db,
        "digits": _digits,
        "mb": lambda size: f"{size / 1e6:.2f}",
        "share": lambda part, whole=1: f"{100 * part / whole:.1f}\N{NO-BREAK SPACE}%",
        "signed": lambda value: f"{value:.3g}".replace("-", "\N{MINUS SIGN}"),
        "size": lambda shape: "\N{MULTIPLICATION SIGN}".join(map(str, shape)),
    }
    text: str = environment.get_template("page.html.j2").render(
        report=report,
        signs=_SIGNS,
        OURS=OURS,
        plural=plural,
        machine_notes=machine_notes,
        steps=_steps,
        settings=_settings,
        part=_part,
        height=_height,
        log_range=_log_range,
        isfinite=math.isfinite,
        accuracies=_ACCURACIES,
        measures=_shown(report.comparison),
        digits_of=_significant,
        today=datetime.date.today().isoformat(),
        versions=", ".join(f"{name} {metadata.version(name)}" for name in ("dsconv", "torch")),
    )
    return text


def _steps(counts: Sequence[int], most: int, width: float, base: float, *, log: bool) -> str:
    """Return the outline of a histogram as an SVG path, with a total ``width`` and a maximum height ``base``."""
    step = width / len(counts)
    tops = [base * (1 - _height(count, most, log=log)) for count in counts]
    points = "".join(f"V{top:.1f}H{step * (i + 1):.1f}" for i, top in enumerate(tops))
    return f"M0 {base:g}{points}V{base:g}Z"


def _height(count: int, most: int, *, log: bool = False) -> float:
    """Return the height of a column, 0..1; the logarithmic scale keeps a single value visible."""
    return math.log1p(count) / math.log1p(most) if log else count / most


def _log_range(values: Sequence[float]) -> tuple[int, int]:
    """Return the exponents of the powers of ten that enclose the positive ``values``."""
    logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
    low = math.floor(min(logs, default=0.0))
    return low, max(low + 1, math.ceil(max(logs, default=1.0)))


def _part(value: float, low: float, high: float, *, log: bool = False) -> float:
    """Return the length of a bar, 0..1, between these values, or these powers of ten; 0 for a missing value."""
    if math.isnan(value) or (log and value <= 0):
        return 0.0
    return min(1.0, max(0.0, ((math.log10(value) if log else value) - low) / (high - low)))


def _by_setting(timings: Sequence[Timing]) -> list[tuple[tuple[int, int], list[Timing]]]:
    """Return the timings by batch size and number of threads."""
    grouped = itertools.groupby(timings, key=lambda timing: (timing.batch_size, timing.threads))
    return [(setting, list(group)) for setting, group in grouped]


def _settings(row: LayerSummary) -> str:
    """Return the settings in words: bits, block size and sign convention of activations."""
    activations = (
        f"activations {row.activation_bits} bits {row.activation_sign}"
        if row.activation_bits
        else "activations in float"
    )
    if row.algorithm == "winograd":
        activations = "Winograd, transformed activations 8 bits"
    shift = ", a shift per block" if row.weight_shift else ""
    flat = " of flattened values" if row.blocks == "flat" else ""
    return f"weights {row.weight_bits} bits, {activations}, blocks of {row.block_size}{flat}{shift}"


def _digits(value: float) -> str:
    """Format like :func:`dsconv.benchmarking.results.digits`, with more digits for the smallest times."""
    return digits(value) if value >= 0.1 else f"{value:.4f}"


def _shown(found: Comparison | None) -> dict[str, str]:
    """Return the measures that an output has, with their titles."""
    outputs = found.outputs.values() if found is not None else ()
    return {name: title for name, title in _MEASURES.items() if any(getattr(one, name) is not None for one in outputs)}


def _significant(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.4g}" if math.isfinite(value) else "exact"


def _db(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return ("exact" if value > 0 else "no signal") if math.isinf(value) else f"{value:.1f}"
