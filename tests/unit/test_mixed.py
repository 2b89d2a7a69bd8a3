"""Sensitivity of layers, and the search for their bits."""

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import dsconv
from dsconv import QuantConfig
from dsconv.conversion.statistics import normalized
from dsconv.data import Preprocess, synthetic_images
from dsconv.demo import PREPROCESS, load_digits, load_network
from dsconv.errors import ConfigError, DataError, FileFormatError, MissingExtraError, ModelError
from dsconv.io.checkpoint import checksum
from dsconv.mixed import Sensitivity, Trial, search, sensitivity
from dsconv.mixed.measure import measure, with_overrides
from dsconv.mixed.selection import point_of, select
from dsconv.tables import as_text

FEW = [{"weight_bits": bits} for bits in (2, 4, 8)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(24, 10))


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def table_of(costs: list[list[tuple[int, float]]]) -> tuple[list[list[Trial]], Sensitivity]:
    """Return layers of 8 weights whose trials have these bytes and divergences."""
    layers = [
        [
            Trial(str(i), {"weight_bits": 2 + j}, 2 + j, 4, 8, 8, size, kl, float(size))
            for j, (size, kl) in enumerate(row)
        ]
        for i, row in enumerate(costs)
    ]
    trials = tuple(trial for row in layers for trial in row)
    return layers, Sensitivity(trials, 1, False, fixed_bytes=32, fixed_weights=8, other_bytes=5)


class TestSyntheticImages:
    def test_are_prepared_as_pictures_are(self) -> None:
        plain = synthetic_images(4, Preprocess(crop=48))
        caffe = synthetic_images(4, Preprocess(crop=48, mean=(104, 117, 123), scale=255, channels="bgr"))
        assert plain.shape == (4, 3, 48, 48) and plain.min() >= 0 and plain.max() <= 1
        expected = 255 * plain.flip(1) - torch.tensor([104.0, 117.0, 123.0])[:, None, None]
        assert torch.allclose(caffe, expected, atol=1e-3)

    def test_neighbouring_pixels_are_alike_and_pictures_differ(self) -> None:
        x = synthetic_images(2, Preprocess(crop=64))
        assert (x[..., 1:] - x[..., :-1]).std() < 0.9 * x.std()  # it is 1.4 for white noise
        assert not torch.equal(x[0], x[1])

    def test_the_seed_alone_decides(self) -> None:
        before = torch.get_rng_state()
        a, b, c = (synthetic_images(2, PREPROCESS, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("preprocess", "shape"),
        [
            (Preprocess(resize=(9, 13)), (3, 9, 13)),
            (Preprocess(resize=20, crop=(12, 16)), (3, 12, 16)),
            (Preprocess(crop=1, channels="gray"), (1, 1, 1)),
        ],
    )
    def test_any_size(self, preprocess: Preprocess, shape: tuple[int, ...]) -> None:
        x = synthetic_images(1, preprocess)
        assert x.shape == (1, *shape) and x.isfinite().all()

    def test_a_size_must_be_known(self) -> None:
        with pytest.raises(ConfigError, match="crop or a size to resize to"):
            synthetic_images(1, Preprocess())


class TestSensitivity:
    def test_is_the_divergence_of_the_network_with_one_layer_quantized(self) -> None:
        model, x = net(), images()
        found = sensitivity(model, "w4a4", images=x)
        assert [trial.layer for trial in found.trials] == ["0", "2", "6"]
        for trial in found.trials:
            alone = dsconv.quantize(model, QuantConfig.preset("w4a4", overrides={"*": "float", trial.layer: {}}))
            assert trial.kl == pytest.approx(dsconv.compare(model, alone, x).kl, rel=1e-9)
            row = next(row for row in dsconv.summary(alone).layers if row.name == trial.layer)
            assert (trial.bytes, trial.weights, trial.block_size) == (
                row.bytes_after,
                row.bytes_before // 4,
                row.block_size,
            )
        assert found.weights == 3 * 16 * 9 + 16 * 24 * 9 + 240 and not found.synthetic and found.images == 8

    def test_choices_are_laid_over_the_config_and_overrides_stay(self) -> None:
        config = QuantConfig.preset(
            "w4a4", overrides={"*": {"weight_rule": "paper"}, "6": "float", "2": {"block_size": 8}}
        )
        found = sensitivity(net(), config, choices=FEW, images=images())
        assert [(t.layer, t.weight_bits) for t in found.trials] == list(itertools.product("02", (2, 4, 8)))
        assert {t.block_size for t in found.trials if t.layer == "2"} == {8}
        assert {t.activation_bits for t in found.trials if t.layer == "0"} == {8}
        assert found.fixed_weights == 240 and found.fixed_bytes == 960
        for trials in found.layers().values():
            assert trials[0].kl > trials[1].kl > trials[2].kl and trials[0].bytes < trials[1].bytes < trials[2].bytes

    def test_layers_of_a_quantized_network_are_taken_as_they_are(self) -> None:
        model, x = net(), images()
        quantized = dsconv.quantize(model, "w4a4")
        expected = sensitivity(model, "w4a4", images=x)
        assert sensitivity(model, quantized, images=x).trials == expected.trials
        with torch.no_grad():
            quantized[2].vqk.zero_()
        changed = sensitivity(model, quantized, images=x).trials
        assert changed[1].kl > 2 * expected.trials[1].kl and changed[0] == expected.trials[0]

    def test_nothing_is_left_behind_in_the_networks(self) -> None:
        model = net().train()
        model[0].register_forward_hook(lambda *_: None)
        quantized = dsconv.quantize(model, "paper")
        state = {name: value.clone() for name, value in model.state_dict().items()}
        sensitivity(model, quantized, images=images())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.training and not model._forward_hooks
        assert len(model[0]._forward_hooks) == len(quantized[0]._forward_hooks) == 1

    def test_times_are_measured_where_asked_for(self) -> None:
        assert all(t.ms is not None and t.ms > 0 for t in sensitivity(net(), images=images(), times=True).trials)
        assert all(t.ms is None for t in sensitivity(net(), images=images()).trials)

    def test_noise_takes_the_place_of_images(self) -> None:
        model = load_network()
        found = sensitivity(model, "w4a4", preprocess=PREPROCESS, limit=5)
        assert found.synthetic and found.images == 5
        x = synthetic_images(5, PREPROCESS)
        # BatchNorms have the statistics of the noise.
        assert sensitivity(normalized(model, x), "w4a4", images=x).trials == found.trials
        assert sensitivity(model, "w4a4", preprocess=PREPROCESS, limit=5, seed=1).trials != found.trials

    def test_a_folder_and_its_broken_files(self, tmp_path: Path) -> None:
        for i in range(3):
            Image.new("L", (8, 8), 80 * i).save(tmp_path / f"{i}.png")
        (tmp_path / "bad.png").write_bytes(b"no image")
        with pytest.warns(UserWarning, match=r"1 files could not be read, the first .*bad\.png"):
            found = sensitivity(load_network(), images=tmp_path, preprocess=PREPROCESS)
        assert found.images == 3

    def test_as_text_and_data(self) -> None:
        found = sensitivity(net(), "w4a4", images=images(), choices=FEW)
        text = str(found)
        assert (
            "W2A4" in text
            and "8 images" in text
            and "without labels" in text
            and f"{1e3 * found.trials[0].kl:.3f}" in text
        )
        assert found.to_dict()["trials"][0]["settings"] == {"weight_bits": 2}

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"choices": []}, ConfigError, "choices: expected at least one"),
            ({"choices": [{"weight_bits": 9}]}, ConfigError, "choices: weight_bits.*9"),
            ({"choices": [{"bits": 4}]}, ConfigError, "choices: bits: unknown setting"),
            ({"config": "w5"}, ConfigError, "preset: expected one of"),
            ({"images": None}, ConfigError, "images: got none.*preprocess"),
            ({"images": None, "preprocess": PREPROCESS, "limit": 0}, ConfigError, "limit"),
            ({"images": torch.zeros(0, 3, 8, 8)}, DataError, "no images"),
            ({"images": images()[:, :2]}, ModelError, "cannot run on images"),
            ({"images": images() * math.nan}, ModelError, "NaN or infinite for 8 of 8 images"),
            ({"images": "no/such/folder", "preprocess": PREPROCESS}, DataError, "does not exist"),
        ],
    )
    def test_bad_input(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            sensitivity(net(), **{"images": images(), **arguments})

    def test_a_quantized_network_of_another_kind_is_refused(self) -> None:
        model, x = net(), images()
        quantized = dsconv.quantize(model)
        with pytest.raises(ConfigError, match="choices: the settings of a quantized network are already chosen"):
            sensitivity(model, quantized, images=x, choices=FEW)
        with pytest.raises(ModelError, match=r"model: expected a Conv2d '2' .*, got a ReLU"):
            sensitivity(nn.Sequential(model[0], nn.Flatten(), nn.ReLU()), quantized, images=x)
        digits = load_network()
        folded = dsconv.fold_batchnorm(dsconv.quantize(digits))
        with pytest.raises(ModelError, match="BatchNorm is folded"):
            sensitivity(digits, folded, preprocess=PREPROCESS)


class TestOverrides:
    def test_names_are_no_patterns_and_the_last_word(self) -> None:
        config = QuantConfig(overrides={"a": {"block_size": 8}, "*": {"block_size": 16, "weight_bits": 3}})
        changed = with_overrides(config, {"a": {"weight_bits": 5}, "b[0]": {"weight_bits": 6}})
        assert (changed.layer("a").weight_bits, changed.layer("a").block_size) == (5, 16)
        assert changed.layer("b[0]").weight_bits == 6 and changed.layer("b0").weight_bits == 3
        assert with_overrides(changed, {"a": {"weight_bits": 2}}).layer("a").weight_bits == 2


class TestSelect:
    @given(
        st.lists(
            st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=5
        ),
        st.floats(0, 1),
    )
    def test_is_as_good_as_trying_everything(self, costs: list[list[tuple[int, float]]], part: float) -> None:
        layers, measured = table_of(costs)
        points = [point_of(chosen, measured) for chosen in itertools.product(*layers)]
        sizes = sorted(point.bytes for point in points)
        cap = sizes[0] + part * (sizes[-1] - sizes[0])
        best = min(point.kl for point in points if point.bytes <= cap)
        found = point_of(select(layers, measured, {"bytes": cap}), measured)
        assert found.bytes <= cap and found.kl == pytest.approx(best, rel=2e-4, abs=1e-6)

    def test_several_limits_hold_together(self) -> None:
        chance = random.Random(0)
        costs = [[(size, chance.random() / size) for size in chance.sample(range(1, 40), 4)] for _ in range(5)]
        layers, measured = table_of(costs)
        points = [point_of(chosen, measured) for chosen in itertools.product(*layers)]
        limits = {"effective_bits": 16.0, "activation_bits": 10.0, "ms": 75.0}
        fitting = [p for p in points if all(getattr(p, name) <= limit for name, limit in limits.items())]
        assert 0 < len(fitting) < len(points)
        found = point_of(select(layers, measured, limits), measured)
        assert found.kl == pytest.approx(min(p.kl for p in fitting), rel=2e-4)

    def test_bytes_and_bits_are_those_of_the_whole_network(self) -> None:
        layers, measured = table_of([[(8, 0.1)], [(4, 0.2)]])
        point = point_of([row[0] for row in layers], measured)
        assert point.bytes == 8 + 4 + 32 + 5 and point.effective_bits == 8 * (8 + 4 + 32) / 24
        assert point.activation_bits == (4 * 16 + 32 * 8) / 24 and point.ms == 12 and point.kl == pytest.approx(0.3)


class Stopped(Exception):
    pass


def stop_after(count: int) -> Callable[[Trial], None]:
    seen: list[Trial] = []

    def stop(trial: Trial) -> None:
        seen.append(trial)
        if len(seen) == count:
            raise Stopped

    return stop


class TestResume:
    def test_a_search_that_is_resumed_ends_as_if_it_had_never_stopped(self, tmp_path: Path) -> None:
        model, file = net(), tmp_path / "state"
        run: dict[str, Any] = {"budget": 4.5, "choices": FEW, "images": images()}
        whole = search(model, "w4a4", **run)
        count = len(whole.sensitivity.trials)
        seen: list[Trial] = []
        # Stops at every trial in turn.
        for index in range(count):
            with pytest.raises(Stopped):
                search(model, "w4a4", **run, state=file, resume=index > 0, on_trial=stop_after(1))
        assert search(model, "w4a4", **run, state=file, resume=True, on_trial=seen.append) == whole
        assert seen == []
        # Trials do not depend on the budget.
        other = search(model, "w4a4", **run | {"budget": {"bytes": 2600}}, state=file, resume=True)
        assert other == search(model, "w4a4", **run | {"budget": {"bytes": 2600}})

    @pytest.mark.parametrize("config", ["a config", "a quantized network"])
    def test_a_measurement_of_noise_is_resumed(self, config: str, tmp_path: Path) -> None:
        model, file = dsconv.zoo.build("dsconv/digits_resnet"), tmp_path / "state"
        given = QuantConfig.preset("w4a4") if config == "a config" else dsconv.quantize(model, "w4a4")
        whole = sensitivity(model, given, limit=2)
        with pytest.raises(Stopped):
            sensitivity(model, given, limit=2, state=file, on_trial=stop_after(2))
        seen: list[Trial] = []
        assert sensitivity(model, given, limit=2, state=file, resume=True, on_trial=seen.append) == whole
        assert tuple(seen) == whole.trials[2:]

    def test_trials_with_nan_are_resumed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compare = dsconv.mixed.measure.compare
        monkeypatch.setattr(
            "dsconv.mixed.measure.compare", lambda *a, **o: replace(compare(*a, **o), nonfinite=1, kl=math.inf)
        )
        run: dict[str, Any] = {"images": images(), "state": tmp_path / "state"}
        with pytest.raises(Stopped):
            sensitivity(net(), "w4a4", **run, on_trial=stop_after(1))
        assert all(math.isnan(trial.kl) for trial in sensitivity(net(), "w4a4", **run, resume=True).trials)

    def test_what_cannot_be_resumed(self, tmp_path: Path) -> None:
        file, model = tmp_path / "state", net()

        def resume(**changes: Any) -> None:
            given: dict[str, Any] = {"config": "w4a4", "images": images(), "choices": FEW, "state": file}
            sensitivity(**{"model": model, "resume": True, **given, **changes})

        with pytest.raises(ConfigError, match="no state file"):
            resume()
        with pytest.raises(ConfigError, match="no state file"):
            resume(state=None)
        with pytest.raises(Stopped):
            resume(resume=False, on_trial=stop_after(2))
        with pytest.raises(ConfigError, match="resume=True"):
            resume(resume=False)
        with pytest.raises(OSError, match="nowhere"):
            resume(resume=False, state=tmp_path / "nowhere" / "state")
        other = net()
        other[2].bias.data += 1
        for changes, named in (
            ({"images": images() + 1}, "other images:"),
            ({"batch_size": 3}, "other images at a time:"),
            ({"times": True}, "other times:"),
            ({"choices": FEW[1:]}, "other choices:"),
            ({"config": "paper"}, "other config, settings:"),
            ({"model": other}, "other model, config:"),
        ):
            with pytest.raises(FileFormatError, match=named):
                resume(**changes)
        with pytest.raises(FileFormatError, match="expected a state file of format 'dsconv search'"):
            search(model, "w4a4", budget=4.5, images=images(), choices=FEW, state=file, resume=True)

    @pytest.mark.parametrize("data", [{"a": 1}, 3, None, [1], [{"layer": "0"}], [{"layer": 7}] * 99])
    def test_a_state_of_something_else_is_refused(self, tmp_path: Path, data: Any) -> None:
        file = tmp_path / "state"
        with pytest.raises(Stopped):
            sensitivity(net(), "w4a4", images=images(), state=file, on_trial=stop_after(1))
        entries = safe_open(file, framework="pt").metadata() | {"data": json.dumps(data)}
        save_file({}, file, entries | {"checksum": checksum(entries, {})})
        with pytest.raises(FileFormatError, match=r"state: .*delete it and start again"):
            sensitivity(net(), "w4a4", images=images(), state=file, resume=True)


class TestSearch:
    @pytest.mark.parametrize("budget", [4.2, {"effective_bits": 4.5}, {"bytes": 2600}, {"ms": 1e3, "bytes": 4000}])
    def test_the_budget_is_kept_by_the_network_that_the_config_makes(self, budget: Any) -> None:
        model, x = net(), images()
        found = search(model, "w4a4", budget=budget, images=x)
        summary = dsconv.summary(dsconv.quantize(model, found.config))
        assert summary.effective_bits == pytest.approx(found.point.effective_bits, rel=1e-12)
        assert summary.bytes_after == found.point.bytes
        limits = budget if isinstance(budget, dict) else {"effective_bits": budget}
        assert all(getattr(found.point, name) <= limit for name, limit in limits.items())
        assert QuantConfig.from_json(found.config.to_json()) == found.config

    def test_of_two_layers_alike_the_one_that_matters_gets_the_bits(self) -> None:
        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.loud, self.quiet = nn.Conv2d(3, 10, 8), nn.Conv2d(3, 10, 8)

            def forward(self, x: Tensor) -> Tensor:
                return (30 * self.loud(x) + 0.3 * self.quiet(x)).flatten(1)

        torch.manual_seed(0)
        # With a shift, 3 bits for blocks of three weights are as good as 8 bits, with 4-bit activations.
        config = QuantConfig.preset("w4a4", first_layer=None, weight_shift=False)
        model = Sum()
        even = dsconv.summary(dsconv.quantize(model, config)).effective_bits
        chosen = search(model, config, budget=even, images=images(16)).chosen
        assert {trial.layer: trial.weight_bits for trial in chosen} == {"loud": 6, "quiet": 2}

    def test_is_closer_than_one_width_for_all_at_the_same_size(self) -> None:
        model, (x, _) = load_network(), load_digits("unlabelled")
        config = QuantConfig.preset("w4a4", first_layer=None, last_layer={"weight_bits": 4})
        plain = dsconv.quantize(model, config)
        found = search(model, config, budget=dsconv.summary(plain).effective_bits, images=x, limit=64)
        test, labels = load_digits("test")
        before, after = (
            dsconv.compare(model, q, [(test, labels)]).kl for q in (plain, dsconv.quantize(model, found.config))
        )
        assert after < before

    def test_nothing_but_the_seed_and_the_images_decides(self) -> None:
        runs = [search(load_network(), "w4a4", budget=4.5, preprocess=PREPROCESS, choices=FEW) for _ in range(2)]
        assert runs[0] == runs[1]

    def test_the_curve_falls_and_the_choice_lies_on_it(self) -> None:
        found = search(net(), "w4a4", budget=5.0, images=images())
        bits, kl = ([getattr(point, name) for point in found.pareto] for name in ("effective_bits", "kl"))
        assert len(bits) > 5 and bits == sorted(bits) and kl == sorted(kl, reverse=True)
        assert bits[0] == pytest.approx(
            search(net(), "w4a4", budget=bits[0] + 1e-9, images=images()).point.effective_bits
        )
        above = [k for b, k in zip(bits, kl, strict=True) if b >= found.point.effective_bits]
        assert found.point.kl >= above[0] * (1 - 1e-3)

    def test_eight_bit_activations_come_with_eight_bit_weights_alone(self) -> None:
        found = search(net(), QuantConfig.preset("w4a4", first_layer=None), budget={"bytes": 1e9}, images=images())
        assert {(t.weight_bits, t.activation_bits) for t in found.sensitivity.trials if t.activation_bits == 8} == {
            (8, 8)
        }
        assert all(t.activation_bits == 8 for t in found.chosen)
        less = search(
            net(), QuantConfig.preset("w4a4", first_layer=None), budget={"activation_bits": 4}, images=images()
        )
        assert all(t.activation_bits == 4 for t in less.chosen)

    def test_a_budget_of_milliseconds_tries_both_algorithms_where_a_layer_has_both(self) -> None:
        found = search(net(), QuantConfig.preset("w4a4", first_layer=None), budget={"ms": 1e3}, images=images())
        layers = found.sensitivity.layers()
        for trials in layers.values():
            assert [trial.settings["algorithm"] for trial in trials] == ["direct"] * 7 + ["auto"] * 7
        # A linear layer has only one, and is measured once; the second convolution has both.
        assert all((a.kl, a.ms) == (b.kl, b.ms) for a, b in zip(layers["6"][:7], layers["6"][7:], strict=True))
        assert any(a.kl != b.kl for a, b in zip(layers["2"][:7], layers["2"][7:], strict=True))
        assert search(net(), "w4a4", budget=5, images=images()).sensitivity.trials[0].settings == {"weight_bits": 2}

    def test_a_time_limit_that_winograd_alone_keeps(self) -> None:
        measured = sensitivity(
            net(), "w4a4", images=images(), choices=[{"algorithm": "direct"}, {"algorithm": "auto"}], times=True
        )
        slow = {"direct": 10.0, "auto": 1.0}
        layers = [[replace(t, ms=slow[t.settings["algorithm"]]) for t in ts] for ts in measured.layers().values()]
        chosen = select(layers, measured, {"ms": 15.0})
        assert sum(trial.settings["algorithm"] == "auto" for trial in chosen) == 2
        config = with_overrides(QuantConfig.preset("w4a4"), {trial.layer: trial.settings for trial in chosen})
        dsconv.quantize(net(), config)(images())

    def test_as_text_and_data(self) -> None:
        found = search(net(), "w4a4", budget={"ms": 1e3}, images=images(), choices=FEW)
        text = " ".join(as_text(found.table).split())
        assert str(found) == as_text(found.table) and "ms in these layers" in text and "bits per weight" in text
        assert found.to_dict()["config"] == found.config.to_dict() and found.to_dict()["point"]["ms"] > 0

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ({}, "at least one of effective_bits, bytes, ms, activation_bits"),
            (-1, "effective_bits: Input should be greater than 0"),
            (math.nan, "effective_bits: Input should be a finite number"),
            ({"kilobytes": 3}, "kilobytes: Extra inputs.*bytes"),
            ("small", "effective_bits.*small"),
            (1.5, "effective_bits of 1.5 is less than the .* of the smallest choices"),
            ({"bytes": 10}, "bytes of 10 is less than the .* of the smallest choices"),
        ],
    )
    def test_budgets_that_cannot_be(self, budget: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=f"budget: .*{message}"):
            search(net(), budget=budget, images=images())

    def test_limits_that_contradict_one_another(self) -> None:
        layers, measured = table_of([[(1, 0.1), (9, 0.1)]])
        swapped = [replace(trial, ms=10.0 - trial.ms) for trial in layers[0]]
        with pytest.raises(ConfigError, match="no selection is within all of bytes 40, ms 2"):
            select([swapped], measured, {"bytes": 40, "ms": 2})

    def test_a_choice_that_makes_nan_is_not_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = net(), images()

        def with_nan(where: Callable[[Trial], bool]) -> Callable[..., Sensitivity]:
            def measured(*arguments: Any, **named: Any) -> Sensitivity:
                found = measure(*arguments, **named)
                trials = (replace(t, kl=math.nan) if where(t) else t for t in found.trials)
                return replace(found, trials=tuple(trials))

            return measured

        monkeypatch.setattr("dsconv.mixed.selection.measure", with_nan(lambda t: t.weight_bits == 8))
        assert 8 not in {t.weight_bits for t in search(model, budget=9, images=x, choices=FEW).chosen}
        monkeypatch.setattr("dsconv.mixed.selection.measure", with_nan(lambda t: t.layer == "2"))
        with pytest.raises(ModelError, match="layer '2': every choice makes the logits NaN"):
            search(model, budget=9, images=x, choices=FEW)

    def test_without_the_solver_the_error_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "highspy", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'dsconv\[search\]'"):
            search(net(), budget=4, images=images())
