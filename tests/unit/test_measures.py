"""Measures of outputs of any kind, against direct computation: maps, images, detections, and a custom metric."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.errors import ConfigError, DataError, ModelError
from dsconv.evaluation import Comparison, compare, evaluate
from dsconv.evaluation.measures import Kinds, distances, powers
from dsconv.evaluation.pixels import ssim
from dsconv.tables import as_text


class Of(nn.Module):
    """Network that applies a function to the images."""

    def __init__(self, make: Callable[[Tensor], Any]):
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def noisy(x: Tensor) -> Tensor:
    """Add noise, the same for an image in any batch."""
    return x + 0.3 * (40 * x).sin()


def maps(count: int = 5, channels: int = 6, size: int = 7) -> Tensor:
    return torch.randn(count, channels, size, size + 1, generator=torch.Generator().manual_seed(0))


def closeness(f: Callable[[Tensor], Any], q: Callable[[Tensor], Any], x: Any, **options: Any) -> Comparison:
    return compare(Of(f), Of(q), x, **options)


def as_is(x: Tensor) -> Tensor:
    return x


class TestMaps:
    @pytest.mark.parametrize("batch_size", [1, 2, 32])
    def test_figures_of_pixels_equal_direct_computation_in_any_batching(self, batch_size: int) -> None:
        x = maps()
        found = closeness(as_is, noisy, x, batch_size=batch_size)
        f, q = x.double(), noisy(x).double()
        assert (found.task, found.measure, list(found.outputs)) == ("segmentation", "KL divergence", ["output"])
        one = found.outputs["output"]
        assert one.kind == "segmentation" and one.images == 5 and one.psnr_db is None and one.ssim is None
        assert (
            found.agreement == one.agreement == pytest.approx(100 * float((f.argmax(1) == q.argmax(1)).double().mean()))
        )
        rows = [t.movedim(1, -1).reshape(-1, 6).log_softmax(1) for t in (f, q)]
        kl = F.kl_div(rows[1], rows[0], reduction="batchmean", log_target=True)
        assert found.kl == one.kl == found.distance == pytest.approx(float(kl), rel=1e-5)
        error = float((f - q).square().sum() / f.square().sum())
        assert one.relative_error == pytest.approx(error, rel=1e-5)
        assert one.sqnr_db == found.logit_sqnr_db == pytest.approx(-10 * math.log10(error), rel=1e-5)
        assert one.miou == pytest.approx(self.iou(f.argmax(1), q.argmax(1), 6))

    @staticmethod
    def iou(wanted: Tensor, got: Tensor, classes: int) -> float:
        each = []
        for c in range(classes):
            either = int(((wanted == c) | (got == c)).sum())
            if either:
                each.append(int(((wanted == c) & (got == c)).sum()) / either)
        return 100 * sum(each) / len(each)

    def test_maps_of_classes_are_the_labels_and_void_pixels_do_not_count(self) -> None:
        x = maps()
        labels = torch.randint(0, 4, (5, 7, 8), generator=torch.Generator().manual_seed(1))
        labels[:, :2] = 255
        labels[:, 3, 0] = -1
        data = [(x[:2], labels[:2]), (x[2:], labels[2:])]
        there = (labels >= 0) & (labels < 255)
        expected = [self.iou(labels[there], one.argmax(1)[there], 6) for one in (x, noisy(x))]
        found = closeness(as_is, noisy, data)
        assert [found.reference.miou, found.miou] == pytest.approx(expected)
        assert evaluate(Of(as_is), data).miou == pytest.approx(expected[0]) and found.top1 is None
        assert f"{expected[0]:.2f} %" in as_text(found)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.full((5, 7, 8), 6), r"class indices from 0 to 5, and 255 for none, got 6"),
            (torch.zeros(5, 7, 7, dtype=torch.int64), r"expected maps \(5, 7, 8\)"),
            (torch.zeros(5, 7, 8), r"expected maps \(5, 7, 8\) .*torch.float32"),
        ],
    )
    def test_labels_that_are_no_such_maps_are_refused(self, labels: Tensor, message: str) -> None:
        with pytest.raises(DataError, match=message):
            evaluate(Of(as_is), [(maps(), labels)])

    def test_a_single_logit_is_that_of_the_second_of_two_classes(self) -> None:
        x = maps(channels=1)
        both = [closeness(f, q, x, task="segmentation") for f, q in ((as_is, noisy), (two(as_is), two(noisy)))]
        assert both[0].kl == pytest.approx(both[1].kl) and both[0].agreement == both[1].agreement < 100
        # Without the argument it would be an image.
        assert closeness(as_is, noisy, x).task == "images"

    def test_sequences_are_logits_where_the_user_says_so(self) -> None:
        def flat(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: make(x).flatten(2)

        x = maps()
        assert closeness(flat(as_is), flat(noisy), x).task == "other"
        said = closeness(flat(as_is), flat(noisy), x, task="segmentation")
        assert said.kl == pytest.approx(closeness(as_is, noisy, x).kl)


def two(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([torch.zeros_like(x), make(x)], 1)


class TestImages:
    def test_structural_similarity_equals_its_definition(self) -> None:
        a, b = torch.rand(2, 1, 2, 14, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        place = torch.arange(11, dtype=torch.float64) - 5
        window = (-(place[:, None] ** 2 + place**2) / (2 * 1.5**2)).exp()
        window /= window.sum()
        found = []
        for c, i, j in itertools.product(range(2), range(4), range(2)):
            x, y = (t[0, c, i : i + 11, j : j + 11] for t in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            sx, sy, sxy = ((window * u * v).sum() - m for u, v, m in ((x, x, mx**2), (y, y, my**2), (x, y, mx * my)))
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            found.append((2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2)))
        assert float(ssim(a, b, 2.0)) == pytest.approx(float(torch.stack(found).mean()), rel=1e-9)

    @pytest.mark.parametrize("data_range", [None, 4.0])
    @pytest.mark.parametrize("batch_size", [2, 32])
    def test_figures_of_images_in_any_batching(self, data_range: float | None, batch_size: int) -> None:
        x = maps(channels=3, size=12)
        found = closeness(as_is, noisy, x, batch_size=batch_size, data_range=data_range)
        assert (found.task, found.measure, found.kl, found.agreement) == ("images", "relative error", None, None)
        ranges = [data_range or float(one.max() - one.min()) for one in x]
        errors = [float((a - b).square().mean()) / r**2 for a, b, r in zip(x, noisy(x), ranges, strict=True)]
        one = found.outputs["output"]
        assert one.psnr_db == pytest.approx(-10 * math.log10(sum(errors) / 5), rel=1e-5)
        alike = [float(ssim(a[None], noisy(a)[None], r)) for a, r in zip(x, ranges, strict=True)]
        assert one.ssim == pytest.approx(sum(alike) / 5, rel=1e-4)
        assert found.distance == one.relative_error and f"{one.ssim:.4f}" in as_text(found)

    def test_targets_are_the_labels(self) -> None:
        x = maps(channels=1, size=12)
        found = closeness(noisy, as_is, [(x, x)], data_range=1.0)
        assert found.psnr_db == math.inf and found.ssim == pytest.approx(1)
        assert found.reference.psnr_db == pytest.approx(found.outputs["output"].psnr_db)
        assert evaluate(Of(noisy), [(x, x)], data_range=1.0).psnr_db == pytest.approx(found.reference.psnr_db)
        with pytest.raises(DataError, match=r"expected targets \(5, 1, 12, 13\)"):
            evaluate(Of(noisy), [(x, x[:, :, 1:])])

    def test_images_smaller_than_the_window_have_no_similarity(self) -> None:
        found = closeness(as_is, noisy, maps(channels=3)).outputs["output"]
        assert found.ssim is None and math.isfinite(found.psnr_db)

    @pytest.mark.parametrize("data_range", [0, -1.0, math.nan])
    def test_a_range_is_above_zero(self, data_range: float) -> None:
        with pytest.raises(ConfigError, match="data_range: expected a number above 0"):
            closeness(as_is, noisy, maps(), data_range=data_range)


class TestSeveralOutputs:
    def test_each_is_measured_and_the_distance_is_their_sum(self) -> None:
        def make(one: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
            return lambda x: {
                "out": one(x),
                "aux": {"depth": one(x)[:, :1]},
                "size": torch.tensor(7),
                "text": "no tensor",
            }

        x = maps()
        found = closeness(make(as_is), make(noisy), x)
        kinds = {name: output.kind for name, output in found.outputs.items()}
        assert kinds == {"out": "segmentation", "aux.depth": "other", "size": "other"}
        assert (found.main, found.counted) == ("out", ("out", "aux.depth"))
        assert found.measure == "KL divergence and relative error"
        out, depth, size = found.outputs.values()
        assert out == closeness(as_is, noisy, x).outputs["output"]
        assert found.distance == out.kl + depth.relative_error > out.kl
        assert (size.agreement, size.sqnr_db, size.kl) == (100, None, None)
        assert found.to_dict()["outputs"]["out"]["kl"] == out.kl
        text = " ".join(as_text(found).split())
        assert "aux.depth" in text and "task: segmentation; distance: KL divergence and relative error" in text

    def test_features_of_a_classifier_do_not_count(self) -> None:
        def make(one: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
            return lambda x: {"features": one(x), "logits": one(x).mean((2, 3))}

        found = closeness(make(as_is), make(noisy), maps())
        assert (found.task, found.main, found.counted) == ("classification", "logits", ("logits",))
        assert found.distance == found.kl == found.outputs["logits"].kl
        assert found.outputs["features"].kl is None and found.outputs["features"].relative_error > 0
        both = closeness(make(as_is), make(noisy), maps(), task="other")
        assert both.measure == "relative error" and both.kl is None and both.counted == ("features", "logits")

    def test_networks_and_batches_of_other_outputs_than_the_first_are_named(self) -> None:
        with pytest.raises(ModelError, match=r"the reference returns out, the quantized model returns out, aux"):
            closeness(lambda x: {"out": x}, lambda x: {"out": x, "aux": x}, maps())

        def changing(x: Tensor) -> Any:
            return (x, x) if len(x) == 2 else (x,)

        with pytest.raises(
            ModelError, match=r"the model, for the first batch, returns 0, 1, for another batch it returns 0"
        ):
            evaluate(Of(changing), maps(), batch_size=2)


class TestDetections:
    @staticmethod
    def detect(threshold: float) -> Callable[[Tensor], Any]:
        def found(x: Tensor) -> Any:
            return [{"boxes": one[:, 0, one[0, 0] > threshold], "labels": one[0].long()} for one in x]

        return found

    def test_what_differs_in_shape_is_counted_and_a_metric_recommended(self) -> None:
        x = maps()
        x[0, 0, 0], x[1:, 0, 0] = -5, torch.linspace(-1, 1, 8)
        found = closeness(self.detect(0.0), self.detect(0.5), x, batch_size=2)
        boxes, labels = found.outputs["boxes"], found.outputs["labels"]
        assert (boxes.images, boxes.differing, labels.differing, labels.agreement) == (1, 4, 0, 100)
        # An image with other detections is as wrong as one without detections.
        assert boxes.relative_error == found.distance == 1
        text = " ".join(as_text(found).split())
        assert "boxes for 4 of 5 images" in text and "a custom metric" in text
        same = closeness(self.detect(0.0), self.detect(0.0), x)
        assert same.distance == 0 and same.missing is None and same.outputs["boxes"].images == 5

    def test_a_list_of_logits_of_each_image_is_that_of_a_classifier_where_the_user_says_so(self) -> None:
        x, labels = maps(), torch.arange(5)
        plain = closeness(lambda x: x.mean((2, 3)), lambda x: noisy(x).mean((2, 3)), [(x, labels)])
        parts: Any = [lambda x, make=make: [make(one[None])[0].mean((1, 2)) for one in x] for make in (as_is, noisy)]
        said = closeness(*parts, [(x, labels)], task="classification")
        assert (said.top1, said.agreement, said.reference.top5) == (plain.top1, plain.agreement, plain.reference.top5)
        assert said.kl == pytest.approx(plain.kl) and closeness(*parts, x).task == "other"

    def test_an_output_of_the_batch_as_a_whole(self) -> None:
        found = closeness(lambda x: x[x > 0], lambda x: x[x > 1], maps(), batch_size=2)
        assert found.outputs["output"].differing == 5 and math.isnan(found.logit_sqnr_db) and found.distance == 1
        found = closeness(lambda x: x.sum(), lambda x: x.sum() + 1, maps(), batch_size=2)
        total = [maps()[i : i + 2].sum().double() for i in (0, 2, 4)]
        assert found.distance == pytest.approx(3 / float(torch.stack(total).square().sum()), rel=1e-5)

    def test_evaluate_tells_speed_and_what_is_not_finite(self) -> None:
        x = maps()
        x[2, 0, 0, 0] = math.inf
        result = evaluate(Of(self.detect(0.0)), x)
        assert (result.task, result.images, result.nonfinite, result.top1) == ("other", 5, 1, None)
        text = " ".join(as_text(result).split())
        assert "No accuracy: these outputs are neither logits nor images" in text and "top-1" not in text
        assert evaluate(Of(as_is), maps()).missing.startswith("No accuracy: pass labels as maps")
        assert evaluate(Of(lambda x: x[:, :, 0, 0]), maps()).missing is None


class TestMetric:
    def test_numbers_are_means_over_images_and_the_first_ranks(self) -> None:
        x = maps()
        seen: list[Any] = []

        def largest(f: Any, q: Any, labels: Tensor | None) -> Any:
            seen.append((type(f), q, labels))
            return {"largest": (f["out"] - q["out"]).flatten(1).abs().amax(1), "batch": len(q["out"]), "one": True}

        data = [(x[:3], torch.arange(3)), (x[3:], torch.arange(2))]
        found = closeness(lambda x: {"out": x}, lambda x: {"out": noisy(x)}, data, metric=largest)
        expected = (x - noisy(x)).flatten(1).abs().amax(1).mean()
        assert found.metrics == pytest.approx({"largest": float(expected), "batch": (3 * 3 + 2 * 2) / 5, "one": 1.0})
        assert found.distance == found.metrics["largest"] and found.measure == "largest"
        assert [kind for kind, _, _ in seen] == [dict] * 2 and torch.equal(seen[1][2], torch.arange(2))
        assert "largest" in as_text(found) and found.to_dict()["metrics"] == found.metrics

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (math.nan, "it returned nan as bad: expected finite numbers"),
            (
                torch.zeros(3),
                r"it returned a tensor \(3,\) as bad: expected a number, or a tensor of one for each of the 2",
            ),
            ("text", "it returned a str as bad: expected a number"),
            ({}, "it returned an empty dictionary"),
            (ZeroDivisionError("by zero"), "it raised ZeroDivisionError: by zero"),
        ],
    )
    def test_what_is_no_number_is_named_with_the_batch(self, result: Any, message: str) -> None:
        def bad(f: Tensor, q: Tensor, labels: None) -> Any:
            if f.sum() == maps()[:2].sum():
                return 1.0
            if isinstance(result, Exception):
                raise result
            return result

        with pytest.raises(ModelError, match=f"metric bad: for the batch of images 2 to 3, {message}"):
            closeness(as_is, noisy, maps(), batch_size=2, metric=bad)

    def test_it_reads_the_boxes_of_images(self) -> None:
        boxes = [{"boxes": torch.zeros(n, 4)} for n in range(5)]

        def missing(f: Any, q: Any, labels: Any) -> float:
            return sum(len(one["boxes"]) for one in labels) / len(q)

        x = maps()
        data = [(x[:2], boxes[:2]), (x[2:], boxes[2:])]
        assert closeness(as_is, noisy, data, metric=missing).metrics["missing"] == 2
        assert closeness(lambda x: x.mean((2, 3)), lambda x: noisy(x).mean((2, 3)), data).top1 is None

    def test_that_of_a_network_that_returns_nan_may_be_nan(self) -> None:
        def error(f: Tensor, q: Tensor, labels: None) -> float:
            return float((f - q).abs().max())

        found = closeness(as_is, lambda x: x / 0, maps(), metric=error)
        assert not math.isfinite(found.distance) and found.to_dict()["metrics"] == {"error": None}

    def test_it_must_be_callable(self) -> None:
        with pytest.raises(ConfigError, match=r"metric: expected a function .*, got str"):
            closeness(as_is, noisy, maps(), metric="mse")


class TestKinds:
    @pytest.mark.parametrize(
        ("shape", "task"),
        [
            ((2, 10), "classification"),
            ((2, 10, 1, 1), "classification"),
            ((2, 1), "other"),
            ((2,), "other"),
            ((), "other"),
            ((3, 10), "other"),
            ((2, 1, 8, 8), "images"),
            ((2, 3, 8, 8), "images"),
            ((2, 2, 8, 8), "segmentation"),
            ((2, 4, 8, 8), "segmentation"),
            ((2, 4, 8), "other"),
            ((2, 4, 8, 8, 8), "other"),
        ],
    )
    def test_are_told_by_the_shape(self, shape: tuple[int, ...], task: str) -> None:
        assert Kinds.told_by({"output": torch.zeros(shape)}, 2).task == task

    def test_a_task_that_there_is_not_is_refused(self) -> None:
        for call in (evaluate, lambda *a, **o: compare(Of(as_is), *a, **o)):
            with pytest.raises(ConfigError, match="task: expected one of classification, segmentation, images, other"):
                call(Of(as_is), maps(), task="detection")


@pytest.mark.parametrize("task", [None, "other"])
def test_the_distance_of_training_and_calibration_is_that_of_compare(task: Any) -> None:
    x = maps()

    def make(one: Callable[[Tensor], Tensor]) -> Callable[[Tensor], dict[str, Tensor]]:
        return lambda x: {"out": one(x), "boxes": one(x).flatten(2)}

    f, q = make(as_is)(x.double()), make(noisy)(x.double().requires_grad_())
    kinds = Kinds.told_by(f, len(x), task)
    power = {name: value / len(x) for name, value in powers(f, kinds).items()}
    each = distances(f, q, len(x), kinds, power)
    assert each.shape == (5,)
    assert float(each.detach().mean()) == pytest.approx(
        closeness(make(as_is), make(noisy), x, task=task).distance, rel=1e-5
    )
    each.sum().backward()


def test_a_network_that_decides_how_much_it_finds_is_calibrated_with_a_warning() -> None:
    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small(6)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [{"scores": one[one > 0.1]} for one in self.body(x)]

    net, x = Finds().eval(), photographs()
    with pytest.warns(UserWarning, match=r"reference: for one image it returns tensors of shapes .* wholly wrong"):
        better = dsconv.calibrate(dsconv.quantize(net, {"weight_bits": 2}), net, x)
    assert better.dsconv_info.calibration.measure == "relative error"


def small(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, channels, 3)).eval()


def photographs(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("channels", "measure"), [(6, "KL divergence"), (3, "relative error")])
def test_layers_are_ranked_calibrated_and_adapted_by_the_same_measure(channels: int, measure: str) -> None:
    net, x = small(channels), photographs()
    qnet = dsconv.quantize(net, "w4a4")
    found = dsconv.sensitivity(net, "w4a4", images=x[:4])
    for trial in found.trials:
        alone = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", overrides={"*": "float", trial.layer: {}}))
        assert trial.distance == pytest.approx(dsconv.compare(net, alone, x[:4]).distance)
        assert (trial.kl is None, trial.relative_error is None) == (channels == 3, channels == 6)
    assert found.measure == measure and found.to_dict()["measure"] == measure
    assert (measure.split()[0].lower() in str(found).lower()) and found.trials[1].distance > found.trials[0].distance
    calibrated = dsconv.calibrate(qnet, net, x)
    assert calibrated.dsconv_info.calibration.measure == measure
    with pytest.warns(UserWarning, match="16 images are few"):
        adapted = dsconv.adapt(qnet, net, x, recipe={"steps": 3, "every": 3, "batch_size": 8, "features": 0.0})
    report = adapted.dsconv_info.adaptation
    assert report.measure == measure and report.best.held_back_kl < report.looks[0].held_back_kl


def test_layers_of_a_network_that_returns_whole_numbers_are_ranked_by_a_metric_alone() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(1)

    net, x = Largest().eval(), photographs(4)
    assert dsconv.compare(net, dsconv.quantize(net), x).outputs["output"].agreement > 50
    with pytest.raises(
        ModelError, match="expected floating-point outputs, by which layers are ranked, got none: pass metric="
    ):
        dsconv.sensitivity(net, images=x)
    found = dsconv.sensitivity(net, {"weight_bits": 2}, images=x, metric=lambda f, q, _: (f != q).float().mean((1, 2)))
    assert max(trial.distance for trial in found.trials) > 0
    assert all(trial.kl is None and trial.distance == trial.metric for trial in found.trials)
    with pytest.raises(ModelError, match="expected floating-point outputs, by which networks are compared, got output"):
        dsconv.calibrate(dsconv.quantize(net), net, photographs())


def test_layers_are_ranked_by_a_metric() -> None:
    net, x = small(6), photographs(4)
    labels = torch.arange(4)

    def worst(f: Tensor, q: Tensor, given: Tensor) -> Tensor:
        assert torch.equal(given, labels)
        return (f - q).flatten(1).abs().amax(1)

    found = dsconv.sensitivity(net, "w4a4", images=[(x, labels)], metric=worst)
    assert found.measure == "worst" and "worst" in str(found)
    for trial in found.trials:
        alone = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", overrides={"*": "float", trial.layer: {}}))
        with torch.inference_mode():
            assert (
                trial.distance == trial.metric == pytest.approx(float(worst(net(x), alone(x), labels).mean()), rel=1e-5)
            )
        assert trial.kl > 0
