"""Comparison of networks: figures are those of the functions for one network, and the front is the Pareto front."""

import csv
import io
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dsconv
from dsconv import report
from dsconv.benchmarking.measure import Quartiles
from dsconv.demo import load_digits
from dsconv.errors import ConfigError, ModelError
from dsconv.evaluation import Evaluation
from dsconv.tradeoffs import Candidate, Tradeoff, tradeoff

IMAGES, LABELS = (part[:60] for part in load_digits("test"))
PRESETS = ("paper", "default", "w8a8")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return dsconv.zoo.build("dsconv/digits_resnet")


@pytest.fixture(scope="module")
def networks(network: nn.Module) -> dict[str, nn.Module]:
    return {name: dsconv.quantize(network, name) for name in PRESETS}


def test_figures_are_those_of_each_alone(network: nn.Module, networks: dict[str, nn.Module]) -> None:
    found = tradeoff(networks, network, [(IMAGES, LABELS)])
    assert [candidate.name for candidate in found.candidates] == list(PRESETS)
    for candidate in found.candidates:
        alone, size = dsconv.compare(network, networks[candidate.name], [(IMAGES, LABELS)]), candidate.bytes
        assert (size, candidate.effective_bits) == (
            dsconv.summary(networks[candidate.name]).bytes_after,
            dsconv.summary(networks[candidate.name]).effective_bits,
        )
        got, expected = candidate.to_dict(), alone.to_dict()
        assert {name: got[name] for name in ("agreement", "kl")} == {
            name: expected[name] for name in ("agreement", "kl")
        }
        assert (got["top1"], got["top5"]) == (alone.top1, alone.top5)
        assert candidate.settings.startswith(candidate.name) and candidate.ms is None
    assert found.reference is not None and found.reference.accuracy == alone.reference.top1
    assert found.reference.bytes == dsconv.summary(network).bytes_after


def test_every_network_sees_every_image_of_a_source_that_is_read_once(
    network: nn.Module, networks: dict[str, nn.Module]
) -> None:
    def once() -> Iterator[Tensor]:
        yield from IMAGES.split(20)

    found = tradeoff(networks, network, once())
    assert {candidate.evaluation.images for candidate in found.all} == {60}
    # Without labels the accuracy is the agreement.
    assert [candidate.accuracy for candidate in found.candidates] == [
        dsconv.compare(network, networks[name], IMAGES).agreement for name in PRESETS
    ]


def test_times_are_measured_on_the_threads_asked_for_and_these_restored(
    network: nn.Module, networks: dict[str, nn.Module]
) -> None:
    before = torch.get_num_threads()
    found = tradeoff({"paper": networks["paper"]}, network, time_shape=(1, 8, 8), seconds=0.05)
    assert torch.get_num_threads() == before
    for candidate in found.all:
        assert candidate.times_ms is not None
        assert 0 < candidate.times_ms.first <= candidate.ms <= candidate.times_ms.third
        assert candidate.accuracy is None
    assert found.front("ms") == () and found.machine is not None and "1 thread" in str(found)


def test_sizes_need_no_reference(networks: dict[str, nn.Module]) -> None:
    found = tradeoff(networks)
    assert found.reference is None and "top-1" not in str(found) and "w8a8 W8A8" in str(found)


def candidate(name: str, size: int, top1: float | None, ms: float | None = None) -> Candidate:
    found = None if top1 is None else Evaluation(images=10, top1=top1, top5=None, nonfinite=0, seconds=1.0)
    times = None if ms is None else Quartiles(ms, ms, ms)
    return Candidate(name=name, settings="", bytes=size, effective_bits=4.0, evaluation=found, times_ms=times)


def test_the_front_by_hand() -> None:
    found = Tradeoff(
        candidates=(
            candidate("large", 9, 80.0, 1.0),
            candidate("as good and smaller", 7, 80.0, 3.0),
            candidate("beaten", 8, 79.0, 2.0),
            candidate("small", 1, 20.0, 1.0),
            candidate("its equal", 1, 20.0, 4.0),
            candidate("unknown", 0, None, 0.5),
        )
    )
    assert [point.name for point in found.front()] == ["as good and smaller", "small", "its equal"]
    assert [point.name for point in found.front("ms")] == ["large"]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_what_is_not_on_the_front_is_beaten_by_one_that_is(points: list[tuple[int, int]]) -> None:
    found = Tradeoff(candidates=tuple(candidate(str(i), x, float(y)) for i, (x, y) in enumerate(points)))
    front = found.front()
    for other in found.candidates:
        beaten = [
            best
            for best in front
            if best.bytes <= other.bytes
            and best.accuracy >= other.accuracy
            and (best.bytes, best.accuracy) != (other.bytes, other.accuracy)
        ]
        assert bool(beaten) == (other not in front)


def test_json_and_csv_hold_the_same(network: nn.Module, networks: dict[str, nn.Module]) -> None:
    found = tradeoff(networks, network, [(IMAGES, LABELS)])
    rows = json.loads(json.dumps(found.to_dict(), allow_nan=False))["networks"]
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows] == lines
    assert [row["name"] for row in rows if row["on_bytes_front"]] == [
        point.name for point in found.candidates if point in found.front()
    ]


def test_the_picture_has_a_panel_for_each_cost(tmp_path: Path) -> None:
    points = (candidate("a", 1, 20.0, 2.0), candidate("b", 3, 40.0, 1.0))
    both = report.draw_tradeoff(tmp_path / "both.svg", Tradeoff(candidates=points)).read_text()
    points = (candidate("a", 1, 20.0), candidate("b", 3, 40.0))
    size = report.draw_tradeoff(tmp_path / "size.svg", Tradeoff(candidates=points)).read_text()
    assert both.count('id="axes_') == 2 and size.count('id="axes_') == 1
    with pytest.raises(ConfigError, match="accuracies"):
        report.draw_tradeoff(tmp_path / "none.svg", Tradeoff(candidates=(candidate("a", 1, None),)))


def test_networks_of_different_originals_are_refused(networks: dict[str, nn.Module], network: nn.Module) -> None:
    other = dsconv.quantize(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)))
    with pytest.raises(
        ModelError,
        match="paper and other are of different networks: layer 'conv1' has 288 weights in paper and 0 in other",
    ):
        tradeoff({"paper": networks["paper"], "other": other})
    with pytest.raises(ModelError, match="float32 and other are of different networks"):
        tradeoff({"other": other}, network, IMAGES)


def test_mistakes_are_told_before_anything_runs(networks: dict[str, nn.Module], network: nn.Module) -> None:
    with pytest.raises(ConfigError, match="networks: expected one or more"):
        tradeoff({})
    with pytest.raises(ConfigError, match="none called 'float32', got paper, float32"):
        tradeoff({"paper": networks["paper"], "float32": networks["w8a8"]})
    with pytest.raises(ConfigError, match="reference: expected the float network"):
        tradeoff(networks, images=IMAGES)
    with pytest.raises(ConfigError, match="threads from 1"):
        tradeoff(networks, network, time_shape=(1, 8, 8), threads=0)


def test_ctrl_c_leaves_what_there_is(
    network: nn.Module, networks: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped() -> Iterator[Tensor]:
        yield IMAGES[:20]
        raise KeyboardInterrupt

    found = tradeoff(networks, network, stopped(), time_shape=(1, 8, 8), on_interrupt="partial")
    assert found.interrupted and found.machine is None and "Interrupted" in str(found)
    assert {point.evaluation.images for point in found.all} == {20}
    with pytest.raises(KeyboardInterrupt):
        tradeoff(networks, network, stopped())

    def compiling(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsconv.tradeoffs.compile", compiling)
    found = tradeoff(networks, network, IMAGES, time_shape=(1, 8, 8), on_interrupt="partial")
    assert found.interrupted and {point.evaluation.images for point in found.all} == {60} and found.costs == ("bytes",)

    calls = itertools.count()

    def running(x: Tensor) -> None:
        time.sleep(0.003)
        if next(calls) > 100:
            raise KeyboardInterrupt

    monkeypatch.setattr("dsconv.tradeoffs.compile", lambda model, x: running)
    found = tradeoff(networks, time_shape=(1, 8, 8), seconds=600, on_interrupt="partial")
    assert found.interrupted and all(point.ms > 0 for point in found.candidates)
