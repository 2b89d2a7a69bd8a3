"""``dsconv.optimize``: attempts, the selected network, and errors."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv import QuantConfig
from dsconv.data import ImageFolder, Preprocess
from dsconv.errors import ConfigError, DataError, FileFormatError, ModelError
from dsconv.evaluation import compare
from dsconv.optimization import Attempt, Optimization, Target, steps
from dsconv.optimization.goal import Goal
from dsconv.optimization.images import split
from dsconv.optimization.saved import remove_state


@pytest.fixture(autouse=True, scope="module")
def short() -> Iterator[None]:
    """Shorten the timing of networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_TIMED_SECONDS", 0.001)
        yield


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 10)).eval()


def images(count: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def figures(found: Optimization) -> list[dict[str, Any]]:
    """Return the figures of attempts without times."""
    timed = ("seconds", "first_quartile_ms", "median_ms", "third_quartile_ms")
    return [{k: v for k, v in attempt.to_dict().items() if k not in timed} for attempt in found.attempts]


@pytest.fixture(scope="module")
def small() -> Optimization:
    """Optimize a network within 5 bits per weight."""
    return dsconv.optimize(net(), images(), budget=5)


def test_within_a_budget_the_closest_to_float_is_kept(small: Optimization) -> None:
    names = [attempt.name for attempt in small.attempts]
    assert len(set(names)) == len(names) == 4
    assert sum("searched" in name for name in names) == 2 and sum("no shift" in name for name in names) == 2
    within = [attempt for attempt in small.attempts if attempt.effective_bits <= 5]
    assert small.best is min(within, key=lambda attempt: attempt.evaluation.distance)
    assert small.met and small.shortfall is None and small.config == small.best.config
    assert small.best.effective_bits == dsconv.summary(small.model).effective_bits


def test_without_budget_and_target_the_network_is_as_small_as_the_preset_makes_it() -> None:
    found = dsconv.optimize(net(), preprocess=Preprocess(crop=8))
    expected = max(4.7, dsconv.summary(dsconv.quantize(net())).effective_bits)
    assert found.budget == {"effective_bits": pytest.approx(expected)} and found.met and not found.target
    assert found.best is min(found.attempts, key=lambda attempt: attempt.evaluation.distance)


def test_figures_are_those_of_images_that_no_step_has_used(small: Optimization) -> None:
    assert small.images == {"steps": 32, "measured": 32}
    again = compare(net(), small.model, small.held_out, per_layer=False)
    assert (again.kl, again.agreement) == (small.best.evaluation.kl, small.best.evaluation.agreement)
    assert again.images == 32


def test_what_it_did_is_a_table_and_json(small: Optimization) -> None:
    text = str(small)
    assert all(attempt.name in " ".join(text.split()) for attempt in small.attempts)
    assert "float32" in text and "kept" in text and "Goal: effective_bits 5." in text
    assert "the distance from float is already within" in " ".join(text.split())
    data = json.loads(small.to_json())
    assert data["best"] == small.best.name and data["met"] is True and data["budget"] == {"effective_bits": 5.0}
    assert [QuantConfig(**row["config"]) for row in data["attempts"]] == [a.config for a in small.attempts]
    assert all(row["median_ms"] > 0 for row in data["attempts"])


def test_the_config_repeats_a_network_that_saw_no_image() -> None:
    model = net()
    found = dsconv.optimize(model, budget=4.5, preprocess=Preprocess(crop=8), seed=3)
    assert found.synthetic and found.images["steps"] == 0 and "noise" in str(found)
    assert [("searched" in a.name, a.calibrated) for a in found.attempts] == [(False, False), (True, False)]
    again = dsconv.quantize(model, found.config)
    with torch.inference_mode():
        assert torch.equal(again(images(4)), found.model(images(4)))


def test_of_networks_that_meet_a_target_the_smallest_is_kept(small: Optimization) -> None:
    target = {"kl": 2 * small.best.evaluation.kl}
    found = dsconv.optimize(net(), images(), target=target)
    meet = [attempt for attempt in found.attempts if attempt.evaluation.kl <= target["kl"]]
    assert found.met and found.best is min(meet, key=lambda attempt: attempt.bytes)
    assert {attempt.verdict for attempt in meet} == {"meets target"}
    # Attempts exist on both sides of the target.
    assert len(meet) > 1 and any(attempt.verdict == "misses target" for attempt in found.attempts)


def test_a_target_that_cannot_be_met_is_told_with_what_is_missing() -> None:
    found = dsconv.optimize(net(), images(), budget={"bytes": 4600}, target={"kl": 1e-12, "agreement": 100})
    assert not found.met and found.shortfall is not None
    assert "1e-12" in found.shortfall and f"{found.best.evaluation.kl:.4g}" in found.shortfall
    assert found.best.bytes <= 4600 and found.best.verdict == "misses target"
    assert dsconv.summary(found.model).bytes_after == found.best.bytes
    assert f"Not met: {found.shortfall}." in " ".join(str(found).split())


def test_a_budget_that_cannot_be_kept_is_told_with_the_least_there_is() -> None:
    found = dsconv.optimize(net(), images(), budget=0.5)
    assert found.shortfall is not None and "above the budget of 0.5" in found.shortfall
    assert found.best is min(found.attempts, key=lambda attempt: attempt.effective_bits)
    assert all("0.5 is less than" in reason for name, reason in found.left_out.items() if "searched" in name)


def test_a_budget_of_milliseconds() -> None:
    found = dsconv.optimize(net(), images(), budget={"ms": 1000.0, "effective_bits": 6})
    assert found.met and found.best.ms is not None and 0 < found.best.ms < 1000 and found.best.effective_bits <= 6
    found = dsconv.optimize(net(), images(), budget={"ms": 1e-6})
    assert found.shortfall is not None and found.shortfall.startswith("time is ")
    assert found.best.ms == min(attempt.ms or 0 for attempt in found.attempts)


def test_networks_on_another_device_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "device_of", lambda _: torch.device("cuda"))
    found = dsconv.optimize(net(), images(), budget=5, time_limit=1e-9)
    assert found.best.ms is None and found.machine is None and "the network is on cuda" in found.left_out["timing"]
    with pytest.raises(ModelError, match="times are measured on the CPU"):
        dsconv.optimize(net(), images(), budget={"ms": 3}, time_limit=1e-9)


def test_labels_and_the_drop_of_top1() -> None:
    model, x = net(), images(80)
    with torch.inference_mode():
        labels = model(x).argmax(1)
    pairs = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, 80, 16)]
    found = dsconv.optimize(model, pairs, target={"top1_drop": 10}, budget=8)
    best = found.best.evaluation
    assert found.met and best.reference.top1 == 100.0 and best.top1 is not None and best.top1 >= 90
    assert best.agreement == best.top1
    with pytest.raises(DataError, match="top1_drop needs labels"):
        dsconv.optimize(model, x, target={"top1_drop": 1})


class Regression(nn.Module):
    """A network of two inputs, whose outputs are not logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = net()[:4]

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.features(x).mean((2, 3)) * scale
        return y.view(-1, 4, 6)


def test_inputs_and_outputs_of_any_kind(tmp_path: Path) -> None:
    inputs = dsconv.Inputs(images(40), torch.rand(40, 1, generator=torch.Generator().manual_seed(2)))
    found = dsconv.optimize(Regression(), inputs, target={"distance": 0.5}, budget=8)
    assert found.met and found.best.evaluation.measure == "relative error" and found.best.evaluation.distance <= 0.5
    with pytest.raises(ConfigError, match=r"target: kl .*: pass a target of distance"):
        dsconv.optimize(Regression(), inputs, target={"kl": 0.1}, state=tmp_path / "state")
    assert not (tmp_path / "state").exists()  # there is nothing to resume yet


def test_a_metric_of_ones_own_is_the_distance() -> None:
    def furthest(f: Tensor, q: Tensor, labels: object) -> Tensor:
        return (f - q).abs().amax(1)

    found = dsconv.optimize(net(), images(), budget=5, metric=furthest)
    assert found.best.evaluation.measure == "furthest"
    assert found.best.evaluation.distance == min(a.evaluation.metrics["furthest"] for a in found.attempts)


def interrupting(after: int) -> Callable[[Attempt], None]:
    """Return a callback that interrupts the work after a number of attempts."""
    left: Iterator[int] = iter(range(after - 1))

    def stop(_: Attempt) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return stop


def test_what_was_stopped_is_resumed_and_ends_in_the_same(
    small: Optimization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        dsconv.optimize(net(), images(), budget=5, state=state, on_attempt=interrupting(3))
    with pytest.raises(ConfigError, match="resume=True"):
        dsconv.optimize(net(), images(), budget=5, state=state)
    measured: list[Any] = []
    monkeypatch.setattr(steps, "compare", lambda *args, **options: measured.append(args) or compare(*args, **options))
    again = dsconv.optimize(net(), images(), budget=5, state=state, resume=True)
    assert len(measured) == 1  # the remaining one
    assert figures(again) == figures(small) and again.best.name == small.best.name
    for name, value in small.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    with pytest.raises(FileFormatError, match="other images"):
        dsconv.optimize(net(), images(seed=2), budget=5, state=state, resume=True)
    (state / "optimization.state").write_bytes(b"no state")
    with pytest.raises(FileFormatError, match="delete it"):
        dsconv.optimize(net(), images(), budget=5, state=state, resume=True)
    remove_state(state)
    assert not state.exists()
    with pytest.raises(ConfigError, match="no state file"):
        dsconv.optimize(net(), images(), budget=5, state=state, resume=True)


def test_what_there_is_no_time_for_is_left_out_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dsconv.optimize(net(), images(), budget=5, time_limit=1e-9)
    (only,) = found.attempts
    assert found.best is only and not only.calibrated
    assert set(found.left_out.values()) >= {"the time limit was reached"} and "Not tried: " in str(found)
    monkeypatch.setattr(steps, "_SEARCH_SHARE", 0.0)
    found = dsconv.optimize(net(), images(), budget=5)
    assert [attempt.calibrated for attempt in found.attempts] == [False, True]
    assert sum(reason.startswith("the search would take about ") for reason in found.left_out.values()) == 2


def test_a_network_far_from_float_is_adapted_where_images_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_STEPS", 4)
    found = dsconv.optimize(net(), images(160), target={"kl": 1e-12}, budget=3.0, time_limit=None)
    (adapted,) = [attempt for attempt in found.attempts if attempt.adapted]
    assert adapted.name.endswith(", calibrated, adapted") and adapted.calibrated
    few = dsconv.optimize(net(), images(), target={"kl": 1e-12}, budget=3.0)
    assert not any(attempt.adapted for attempt in few.attempts)
    assert "training needs at least 64 images, got 32" in few.left_out.values()
    monkeypatch.setattr(steps, "_FEWEST_STEPS", 10**9)
    slow = dsconv.optimize(net(), images(160), target={"kl": 1e-12}, budget=3.0)
    assert any("it needs about" in reason for reason in slow.left_out.values())


def test_images_are_split_at_random_with_their_labels_and_without_copies() -> None:
    x = images(20)
    parts = split([(torch.cat([x, x[:4]]), torch.arange(24))], None, 1000, 0, 4, net(), progress=False)
    assert parts.steps is not None and parts.labels is not None and isinstance(parts.steps, Tensor)
    places = torch.cat([labels for _, labels in parts.measured])
    assert sorted([*parts.labels.tolist(), *places.tolist()]) == list(range(20))
    assert torch.equal(parts.steps, x[parts.labels]) and torch.equal(
        torch.cat([y for y, _ in parts.measured]), x[places]
    )
    assert places.tolist() != sorted(places.tolist()) and [len(y) for y, _ in parts.measured] == [4, 4, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: effective_bits"),
        ({"budget": {"watts": 3}}, "budget: watts"),
        ({"budget": {"activation_bits": 4}}, "activation_bits cannot be limited here"),
        ({"target": {"agreement": 101}}, "target: agreement"),
        ({"target": {"top5": 3}}, "target: top5: unknown"),
        ({"target": {}}, "target: expected at least one"),
        ({"target": 0.1}, "target: expected a dictionary"),
        ({"time_limit": 0}, "time_limit: expected"),
        ({"time_limit": float("nan")}, "time_limit: expected"),
        ({"threads": 10_000}, "threads: expected at most"),
        ({"limit": 0}, "limit: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"task": "depth"}, "task: expected one of"),
        ({"metric": 3}, "metric: expected a function"),
        ({"images": None, "target": {"kl": 1}}, "target: kl is measured on images, got none"),
        ({"images": None}, "images: got none"),
        ({"resume": True}, "resume: there is no state file"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        dsconv.optimize(net(), **{"images": images(), **options})
    assert "\n" not in str(error.value)


def test_too_few_images_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 8"):
        dsconv.optimize(net(), images(7))
    with pytest.raises(OSError, match="does not exist"):
        dsconv.optimize(net(), images(), state=tmp_path / "none" / "state")


def test_of_no_image_that_can_be_read_only_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    with warnings.catch_warnings(record=True) as told, pytest.raises(DataError, match="at least 8"):
        dsconv.optimize(net(), ImageFolder(tmp_path, Preprocess()))
    assert len(told) == 1 and "1 files could not be read" in str(told[0].message)


def test_a_goal_may_be_given_as_objects() -> None:
    goal = Goal.of(dsconv.mixed.Budget(ms=3), Target(kl=1), images=True)
    assert goal == Goal({"ms": 3.0}, {"kl": 1.0}) and goal.by_time
    assert Goal.of(None, None, images=False) == Goal({}, {})
