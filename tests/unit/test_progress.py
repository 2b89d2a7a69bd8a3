"""Long work shows its progress: with a bar in a terminal, otherwise with occasional lines."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dsconv
from dsconv import progress
from dsconv.progress import progress_bar

Clock = Callable[[float], None]


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a function that advances the clock of the progress display."""
    now = 1000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("dsconv.progress.time.monotonic", lambda: now)
    return sleep


class TestLines:
    def test_come_after_ten_seconds_and_then_every_thirty(
        self, sleep: Clock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with progress_bar(True, "search", 120, "trials") as advance:
            seen = []
            for second in range(1, 121):
                sleep(1)
                advance(1)
                if line := capsys.readouterr().err:
                    seen.append((second, line))
        assert seen == [
            (10, "search: 10 of 120 trials, 1.0 trials/s, about 110 s left\n"),
            (40, "search: 40 of 120 trials, 1.0 trials/s, about 80 s left\n"),
            (70, "search: 70 of 120 trials, 1.0 trials/s, about 50 s left\n"),
            (100, "search: 100 of 120 trials, 1.0 trials/s, about 20 s left\n"),
        ]
        assert capsys.readouterr().err == "search: 120 of 120 trials, took 2 min\n"

    def test_are_none_for_short_work(self, sleep: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress_bar(True, "search", 99, "trials") as advance:
            for _ in range(99):
                sleep(0.1)
                advance(1)
        assert capsys.readouterr() == ("", "")

    def test_are_none_where_nothing_is_to_be_shown(self, sleep: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress_bar(False, "search", 2, "trials") as advance:
            for _ in range(2):
                sleep(1000)
                advance(1, "something")
        assert capsys.readouterr() == ("", "")

    def test_the_rate_is_of_what_is_done_here(self, sleep: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress_bar(True, "calibrate", 60, "layers", done=50) as advance:
            sleep(100)
            advance(2)
            assert capsys.readouterr().err == "calibrate: 52 of 60 layers, 0.02 layers/s, about 7 min left\n"

    def test_of_unknown_work_and_of_what_is_being_done(self, sleep: Clock, capsys: pytest.CaptureFixture[str]) -> None:
        with progress_bar(True, "evaluate", None, "img") as advance:
            sleep(10)
            advance(12_345)
        assert capsys.readouterr().err == ("evaluate: 12,345 img, 1,234.5 img/s\nevaluate: 12,345 img, took 10 s\n")
        with progress_bar(True, "bench", 4, "settings") as advance:
            sleep(20)
            advance(1.5, "batch 8: measuring")
            assert capsys.readouterr().err == (
                "bench: 1 of 4 settings, 0.075 settings/s, about 33 s left, batch 8: measuring\n"
            )
        capsys.readouterr()
        with progress_bar(True, "bench", 4, "settings") as advance:
            sleep(20)
            advance(0, "warming up")
            assert capsys.readouterr().err == "bench: 0 of 4 settings, warming up\n"

    def test_do_not_say_that_work_has_ended_which_was_stopped(
        self, sleep: Clock, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stopped() -> None:
            with progress_bar(True, "evaluate", 9, "img") as advance:
                sleep(10)
                advance(1)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert capsys.readouterr().err.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("refreshes", [True, False])
def test_a_terminal_shows_a_bar(refreshes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar(True, "bench [net]", 2, "settings", refreshes=refreshes) as advance:
        for _ in range(2):
            advance(1, "measuring")
    text = sys.stderr.getvalue()
    assert "bench [net], measuring" in text and "2/2" in text and "settings" in text and "\x1b[" in text


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_draw_gets_lines(term: str, sleep: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", term)
    with progress_bar(True, "search", 2, "trials") as advance:
        sleep(10)
        advance(1)
    assert sys.stderr.getvalue().startswith("search: 1 of 2 trials, 0.1 trials/s, about 10 s left\n")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()


@pytest.mark.parametrize(
    ("what", "unit"),
    [
        ("evaluate", "img"),
        ("compare", "img"),
        ("reading images", "img"),
        ("ranges for int8", "img"),
        ("calibrate", "layers"),
        ("adapt", "steps"),
        ("sensitivity", "trials"),
        ("search", "trials"),
        ("bench", "settings"),
    ],
)
def test_all_that_takes_a_while_says_how_far_it_is(
    what: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    model, images = net(), torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    qmodel = dsconv.quantize(model, "w4a4")
    run: dict[str, Callable[[], object]] = {
        "evaluate": lambda: dsconv.evaluate(model, images, progress=True),
        "compare": lambda: dsconv.compare(model, qmodel, images, progress=True),
        "calibrate": lambda: dsconv.calibrate(qmodel, model, images, progress=True),
        "reading images": lambda: dsconv.calibrate(qmodel, model, images.split(32), progress=True),
        "ranges for int8": lambda: dsconv.export_onnx(
            qmodel, images[:1], tmp_path / "net.onnx", "int8", images=images, progress=True
        ),
        "adapt": lambda: dsconv.adapt(qmodel, model, images, recipe={"steps": 2, "batch_size": 8}, progress=True),
        "sensitivity": lambda: dsconv.sensitivity(model, images=images, progress=True),
        "search": lambda: dsconv.search(
            model, budget=8, images=images, choices=[{"weight_bits": 3}, {"weight_bits": 4}], progress=True
        ),
        "bench": lambda: dsconv.bench(model, qmodel, (3, 8, 8), against=["torch"], turns=2, progress=True),
    }
    pytest.importorskip({"search": "highspy", "ranges for int8": "onnxruntime"}.get(what, "torch"))
    run[what]()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(what)]
    assert len(lines) > 1 and f" {unit}, " in lines[0] and f" {unit}/s" in lines[-2] and ", took " in lines[-1]
