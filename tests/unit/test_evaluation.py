"""Figures of `evaluate` and `compare` against direct computation; errors of models and labels, and Ctrl-C."""

import json
import math
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.data import ImageFolder, Preprocess
from dsconv.errors import ConfigError, DataError, ModelError
from dsconv.evaluation import Comparison, compare, evaluate


class Net(nn.Module):
    """Two convolutions, the second one called twice, each followed by an in-place ReLU."""

    def __init__(self, classes: int = 8):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.relu(self.first(x))))
        x = self.relu(self.twice(self.relu(self.twice(x))))
        return self.head(x.mean((2, 3)))


def pair(bits: int = 5, classes: int = 8) -> tuple[Net, Net]:
    torch.manual_seed(0)
    reference, quantized = Net(classes), Net(classes)
    quantized.load_state_dict(reference.state_dict())
    for name in ("first", "twice"):
        float_layer, config = getattr(reference, name), dsconv.LayerConfig(weight_bits=bits, activation_bits=8)
        setattr(quantized, name, dsconv.nn.DSConv2d.from_float(float_layer, config))
    return reference, quantized


def images(count: int = 10) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Logits(nn.Module):
    """Network that returns its images as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def as_images(logits: Tensor) -> Tensor:
    return logits[:, :, None, None]


def db(f: Tensor, q: Tensor) -> float:
    f, q = f.double(), q.double()
    return 10 * math.log10(float(f.square().sum() / (f - q).square().sum()))


def render(result: object) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result)
    return console.export_text()


def hook_count(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


class TestEvaluate:
    @given(classes=st.integers(2, 9), count=st.integers(1, 30), batch_size=st.integers(1, 9), data=st.data())
    def test_top1_and_top5_are_shares_of_the_largest_logits(
        self, classes: int, count: int, batch_size: int, data: st.DataObject
    ) -> None:
        seed = data.draw(st.integers(0, 1000))
        logits = torch.rand(count, classes, generator=torch.Generator().manual_seed(seed))
        labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed + 1))
        result = evaluate(Logits(), zip(as_images(logits).split(batch_size), labels.split(batch_size), strict=True))
        assert result.images == count and result.nonfinite == 0 and not result.interrupted
        assert result.top1 == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
        if classes < 6:
            assert result.top5 is None
        else:
            hits = (logits.topk(5).indices == labels[:, None]).any(1)
            assert result.top5 == pytest.approx(100 * float(hits.double().mean()))

    def test_equal_logits_rank_by_class_index_so_a_constant_network_is_not_always_right(self) -> None:
        result = evaluate(Logits(), [(torch.zeros(10, 10, 1, 1), torch.arange(10))])
        assert (result.top1, result.top5) == (10.0, 50.0)

    def test_of_equal_logits_the_first_class_is_the_answer(self) -> None:
        logits = torch.tensor([[0.0, 2, 1, 2, 0, 0]] * 3)
        right = [evaluate(Logits(), [(as_images(logits[:1]), [label])]) for label in range(6)]
        assert [result.top1 for result in right] == [0, 100, 0, 0, 0, 0]
        assert [result.top5 for result in right] == [100, 100, 100, 100, 100, 0]

    def test_without_labels_there_is_no_accuracy(self) -> None:
        result = evaluate(Logits(), torch.randn(4, 10, 1, 1))
        assert result.top1 is None and result.top5 is None and result.images == 4
        assert result.seconds > 0 and result.images_per_second == pytest.approx(4 / result.seconds)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_nonfinite_image_is_counted_and_never_correct(self, bad: float) -> None:
        logits = torch.eye(8)
        logits[3, 3] = bad
        result = evaluate(Logits(), [(as_images(logits), torch.arange(8))])
        assert result.nonfinite == 1
        assert result.top1 == result.top5 == 87.5

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda y: (y, None),
            lambda y: [y, y * 0],
            lambda y: {"aux": None, "logits": y},
            lambda y: OrderedDict(scores=y, other=None),
            lambda y: namedtuple("Output", "hidden logits")(y * 0, y),
            lambda y: SimpleNamespace(logits=y),
            lambda y: y[:, :, None, None],
        ],
    )
    def test_logits_are_found_in_the_usual_outputs(self, wrap) -> None:
        class Wrapped(Logits):
            def forward(self, x: Tensor) -> object:
                return wrap(super().forward(x))

        assert evaluate(Wrapped(), [(as_images(torch.eye(6)), torch.arange(6))]).top1 == 100

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("text", "expected a tensor, or a container or dataclass of tensors, as output, got str"),
            ((), "got tuple"),
            ({}, "got dict"),
        ],
    )
    def test_an_output_without_tensors_is_refused(self, output: object, message: str) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> object:
                return output

        with pytest.raises(ModelError, match=message):
            evaluate(Odd(), torch.zeros(2, 8, 1, 1))

    def test_images_that_do_not_fit_the_model_are_named(self) -> None:
        with pytest.raises(
            ModelError, match=r"model: it cannot run on images of shape \(2, 5, 6, 6\), torch.float32, cpu"
        ):
            evaluate(Net(), torch.zeros(2, 5, 6, 6))

    @pytest.mark.parametrize("label", [8, -1])
    def test_a_label_outside_the_classes_is_refused(self, label: int) -> None:
        with pytest.raises(DataError, match=f"class index {label}, but the model has 8 classes, 0 to 7"):
            evaluate(Logits(), [(torch.zeros(2, 8, 1, 1), [0, label])])

    def test_a_folder_names_the_file_of_a_wrong_label_in_the_first_batch(self, tmp_path: Path) -> None:
        for i in range(6):
            Image.new("RGB", (6, 6)).save(tmp_path / f"{i}.png")
        rows = "".join(f"{i}.png,{8 * (i == 5)}\n" for i in range(6))
        (tmp_path / "labels.csv").write_text("file,class_index\n" + rows)
        seen: list[int] = []
        net = Net()
        net.register_forward_hook(lambda _, __, output: seen.append(len(output)))
        with pytest.raises(DataError, match=r"5\.png\) has the class index 8, but the model has 8 classes"):
            evaluate(net, tmp_path, preprocess=Preprocess(), batch_size=2)
        assert seen == [2]

    def test_class_folders_that_cannot_be_the_model_s_classes_give_a_warning(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).mkdir()
            Image.new("RGB", (6, 6)).save(tmp_path / name / "1.png")
        with pytest.warns(UserWarning, match="has 2 class folders but the model 8 classes"):
            evaluate(Net(), tmp_path, preprocess=Preprocess())
        names = [*"hgfedcba"]
        result = evaluate(Net(), ImageFolder(tmp_path, Preprocess(), classes=names))
        assert result.images == 2

    @pytest.mark.parametrize("layout", ["class folders", "labels.csv", "unlabelled"])
    def test_names_of_classes_must_be_as_many_as_the_outputs(self, tmp_path: Path, layout: str) -> None:
        folder = tmp_path / "a" if layout == "class folders" else tmp_path
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (6, 6)).save(folder / "1.png")
        if layout == "labels.csv":
            (tmp_path / "labels.csv").write_text("file,class_index\n1.png,0\n")
        for count in (7, 9):
            names = ImageFolder(tmp_path, Preprocess(), classes=[*"abcdefghi"][:count])
            with pytest.raises(DataError, match=f"classes: expected 8 names, one for each output .*, got {count}"):
                evaluate(Net(), names)

    def test_numbered_class_folders_are_the_outputs_in_their_order(self, tmp_path: Path) -> None:
        # Each image encodes its class, which a network that copies pixels recognizes.
        for i in range(12):
            (tmp_path / str(i)).mkdir()
            pixels = torch.zeros(1, 12, dtype=torch.uint8)
            pixels[0, i] = 255
            Image.fromarray(pixels.numpy()).save(tmp_path / str(i) / "1.png")
        assert evaluate(nn.Flatten(), tmp_path, preprocess=Preprocess(channels="gray")).top1 == 100

    def test_numbers_in_the_names_of_class_folders_that_do_not_count_give_a_warning(self, tmp_path: Path) -> None:
        for i in (1, 2, 3, 4, 5, 6, 7, 10):
            (tmp_path / f"c{i}").mkdir()
            Image.new("RGB", (6, 6)).save(tmp_path / f"c{i}" / "1.png")
        with pytest.warns(UserWarning, match=r"ordered by their names as text: c1, c10, c2, ..., c7\. Numbers"):
            evaluate(Net(), tmp_path, preprocess=Preprocess())

    def test_more_class_folders_than_outputs_are_an_error(self, tmp_path: Path) -> None:
        for i in range(9):
            (tmp_path / str(i)).mkdir()
            Image.new("RGB", (6, 6)).save(tmp_path / str(i) / "1.png")
        with pytest.raises(DataError, match=r"8/1\.png\) has the class index 8, but the model has 8 classes"):
            evaluate(Net(), tmp_path, preprocess=Preprocess(), limit=1)

    def test_broken_files_are_counted_and_shown_but_not_fatal(self, tmp_path: Path) -> None:
        Image.new("RGB", (6, 6)).save(tmp_path / "good.png")
        for i in range(7):
            (tmp_path / f"bad{i}.png").write_bytes(b"x" * i)
        result = evaluate(Net(), tmp_path, preprocess=Preprocess())
        assert result.images == 1 and len(result.broken) == 7
        assert result.to_dict()["broken"][0] == {"path": str(tmp_path / "bad0.png"), "reason": result.broken[0].reason}
        assert "7 files could not be read" in render(result)

    def test_no_images_at_all_is_an_error(self, tmp_path: Path) -> None:
        for nothing in ([], torch.zeros(0, 3, 6, 6), [torch.zeros(0, 3, 6, 6)]):
            with pytest.raises(DataError, match="There are no images"):
                evaluate(Net(), nothing)
        (tmp_path / "bad.png").touch()
        with pytest.raises(DataError, match=r"none of 1 files can be read, the first \(.*bad\.png\): "):
            evaluate(Net(), tmp_path, preprocess=Preprocess())

    def test_the_model_runs_in_evaluation_and_inference_mode_and_gets_its_flags_back(self) -> None:
        net = Net().train()
        net.norm.eval()
        seen: list[tuple[bool, bool]] = []
        net.register_forward_hook(lambda *_: seen.append((net.relu.training, torch.is_inference_mode_enabled())))
        before = {name: value.clone() for name, value in net.state_dict().items()}
        evaluate(net, images())
        with pytest.raises(ModelError):
            evaluate(net, torch.zeros(1, 1, 6, 6))
        assert seen == [(False, True)]
        assert net.training and net.relu.training and not net.norm.training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        net(images()).sum().backward()

    def test_device(self) -> None:
        net = Net()
        assert evaluate(net, images(), device="cpu").images == 10
        assert net.head.weight.device.type == "cpu"
        for device in ("no-such-device", "cuda:99"):
            with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
                evaluate(net, images(), device=device)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_model_returns_from_the_device_it_was_sent_to(self) -> None:
        reference, quantized = pair()
        on_cpu = compare(reference, quantized, images())
        on_gpu = compare(reference, quantized, images(), device="cuda")
        assert on_gpu.logit_sqnr_db == pytest.approx(on_cpu.logit_sqnr_db, abs=0.1)
        assert on_gpu.layer_sqnr_db == pytest.approx(on_cpu.layer_sqnr_db, abs=0.1)
        assert reference.head.weight.device == quantized.head.weight.device == torch.device("cpu")

    def test_limit_and_options_out_of_range(self) -> None:
        assert evaluate(Net(), images(), limit=7, batch_size=3).images == 7
        for options in ({"limit": 0}, {"batch_size": 0}, {"workers": -1}, {"on_interrupt": "stop"}):
            with pytest.raises(ConfigError, match=next(iter(options))):
                evaluate(Net(), images(), **options)


class TestCompare:
    @pytest.mark.parametrize("batch_size", [1, 3, 32])
    def test_figures_equal_direct_computation_in_any_batching(self, batch_size: int) -> None:
        reference, quantized = pair()
        x, labels = images(), torch.arange(10) % 8
        result = compare(reference, quantized, zip(x.split(batch_size), labels.split(batch_size), strict=True))
        reference.eval(), quantized.eval()
        f, q = reference(x).detach(), quantized(x).detach()
        assert result.images == 10
        assert result.agreement == pytest.approx(100 * float((f.argmax(1) == q.argmax(1)).double().mean()))
        kl = F.kl_div(q.double().log_softmax(1), f.double().log_softmax(1), reduction="batchmean", log_target=True)
        assert result.kl == pytest.approx(float(kl), rel=1e-4)
        assert result.logit_sqnr_db == pytest.approx(db(f, q), abs=1e-3)
        assert result.reference.top1 == pytest.approx(100 * float((f.argmax(1) == labels).double().mean()))
        assert result.top1 == result.quantized.top1 == evaluate(quantized, [(x, labels)]).top1

    def test_networks_agree_where_the_first_of_their_largest_logits_is_the_same(self) -> None:
        f = torch.tensor([[0.0, 2, 2, 1], [0, 2, 1, 0], [1, 0, 0, 3], [2, 2, 0, 0]])
        q = torch.tensor([[0.0, 3, 0, 1], [2, 2, 1, 0], [2, 0, 0, 2], [1, 1, 0, 0]])

        class Part(Logits):
            def __init__(self, part: slice):
                super().__init__()
                self.part = part

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)[:, self.part]

        reference, quantized = Part(slice(4)), Part(slice(4, 8))
        rows = as_images(torch.cat([f, q], 1))
        agreements = [compare(reference, quantized, row, per_layer=False).agreement for row in rows.split(1)]
        assert agreements == [100, 0, 0, 100]

    def test_layer_sqnr_covers_every_call_before_a_relu_in_place_overwrites_it(self) -> None:
        reference, quantized = pair()
        outputs: dict[str, list[Tensor]] = {}

        def record(net: Net, which: str) -> None:
            y = net.first(images())
            outputs.setdefault(which + "first", []).append(y)
            y = net.norm(y.relu())
            for _ in range(2):
                y = net.twice(y.relu())
                outputs.setdefault(which + "twice", []).append(y.flatten())

        reference.eval(), quantized.eval()
        with torch.no_grad():
            record(reference, "f"), record(quantized, "q")
        result = compare(reference, quantized, images(), batch_size=4)
        assert list(result.layer_sqnr_db) == ["first", "twice"]
        for name, value in result.layer_sqnr_db.items():
            assert value == pytest.approx(db(torch.cat(outputs["f" + name]), torch.cat(outputs["q" + name])), abs=1e-3)

    def test_identical_networks(self) -> None:
        _, quantized = pair()
        result = compare(quantized, quantized, images())
        assert (result.agreement, result.kl, result.logit_sqnr_db) == (100, 0, math.inf)
        assert result.layer_sqnr_db == {"first": math.inf, "twice": math.inf}
        assert result.to_dict()["logit_sqnr_db"] is None

    def test_more_noise_is_farther_away(self) -> None:
        near, far = (compare(*pair(bits), images()) for bits in (8, 2))
        assert near.kl < far.kl and near.logit_sqnr_db > far.logit_sqnr_db + 10
        assert all(near.layer_sqnr_db[name] > far.layer_sqnr_db[name] + 10 for name in near.layer_sqnr_db)

    def test_a_nonfinite_image_never_agrees_and_stays_out_of_kl_and_sqnr(self) -> None:
        class Spoil(Logits):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x).clone()
                y[y[:, 0] > 5] = math.nan
                return y + 0.1 * torch.arange(8)

        logits = torch.randn(10, 8, generator=torch.Generator().manual_seed(2))
        clean = compare(Logits(), Spoil(), as_images(logits[1:]))
        logits[0, 0] = 6
        result = compare(Logits(), Spoil(), as_images(logits))
        assert (result.nonfinite, result.reference.nonfinite) == (1, 0)
        assert result.agreement == pytest.approx(clean.agreement * 0.9)
        assert result.kl == pytest.approx(clean.kl) and result.logit_sqnr_db == pytest.approx(clean.logit_sqnr_db)
        assert compare(Spoil(), Spoil(), as_images(logits)).agreement == 90
        hopeless = compare(Logits(), Spoil(), as_images(torch.full((2, 8), 9.0)))
        assert hopeless.agreement == 0 and math.isnan(hopeless.kl) and math.isnan(hopeless.logit_sqnr_db)
        assert json.loads(json.dumps(hopeless.to_dict(), allow_nan=False))["kl"] is None

    def test_a_nan_in_a_layer_shows_in_its_sqnr(self) -> None:
        reference, quantized = pair()
        quantized.twice.kds[0, 0] = math.nan
        result = compare(reference, quantized, images())
        assert math.isnan(result.layer_sqnr_db["twice"]) and math.isfinite(result.layer_sqnr_db["first"])
        assert result.nonfinite == 10

    def test_a_silent_reference_layer_has_no_signal(self) -> None:
        reference, quantized = pair()
        for parameter in reference.first.parameters():
            parameter.data.zero_()
        assert compare(reference, quantized, images()).layer_sqnr_db["first"] == -math.inf

    def test_hooks_and_training_flags_never_stay_behind(self) -> None:
        reference, quantized = pair()
        reference.train(), quantized.train()
        compare(reference, quantized, images())
        with pytest.raises(ModelError):
            compare(reference, quantized, torch.zeros(1, 1, 6, 6))
        with pytest.raises(ModelError):
            compare(nn.Sequential(), quantized, images())
        assert hook_count(reference, quantized) == 0
        assert reference.training and quantized.norm.training

    def test_without_per_layer_only_the_logits_are_compared(self) -> None:
        reference, quantized = pair()
        watched: list[int] = []
        quantized.register_forward_hook(lambda *_: watched.append(hook_count(reference)))
        assert compare(reference, quantized, images(), per_layer=False).layer_sqnr_db == {}
        assert watched == [0]

    def test_networks_that_do_not_belong_together_are_refused(self) -> None:
        reference, quantized = pair()
        with pytest.raises(
            ModelError, match=r"different shapes: \(10, 5\) from the reference, \(10, 8\) from the quant"
        ):
            compare(Net(classes=5), quantized, images())
        other = Net()
        other.once = other.first
        del other.first
        other.forward = lambda x: reference(x)  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="reference has no layer 'first'"):
            compare(other, quantized, images())
        less = Net()
        less.forward = lambda x: less.head(less.twice(less.first(x)).mean((2, 3)))  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="layer 'twice' of the reference does not run as often"):
            compare(less, quantized, images())
        quantized.forward = lambda x: quantized.head(quantized.twice(quantized.first(x)).mean((2, 3)))  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="layer 'twice' runs more often in the reference"):
            compare(reference, quantized, images())
        reference.first = nn.Conv2d(3, 6, 1)
        with pytest.raises(ModelError, match=r"layer 'first' of the reference returns \(10, 6, 6, 6\) instead of"):
            compare(reference, quantized, images())

    def test_results_are_frozen_json_able_and_readable(self) -> None:
        result = compare(*pair(), [(images(), torch.arange(10) % 8)])
        with pytest.raises(AttributeError):
            result.kl = 0.0  # type: ignore[misc]
        figures = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert figures["agreement"] == result.agreement and figures["reference"]["top1"] == result.reference.top1
        assert figures["images"] == 10 and figures["quantized"]["top5"] == result.top5
        text = render(result)
        for part in ("agreement", "nats", f"{result.logit_sqnr_db:.2f} dB", "SQNR of twice", f"{result.top5:.2f} %"):
            assert part in text


class TestInterruptAndProgress:
    @staticmethod
    def interrupted_after(batches: int):
        for i in range(batches):
            yield images(4 + i)
        raise KeyboardInterrupt

    def test_ctrl_c_raises_unless_partial_figures_are_wanted(self) -> None:
        reference, quantized = pair()
        for run in (lambda **o: evaluate(quantized, **o), lambda **o: compare(reference, quantized, **o)):
            with pytest.raises(KeyboardInterrupt):
                run(images=self.interrupted_after(2))
            result = run(images=self.interrupted_after(2), on_interrupt="partial")
            assert result.interrupted and result.images == 9 and result.to_dict()["interrupted"] is True
            assert "Interrupted: the figures cover the first 9 images only" in render(result)
            with pytest.raises(KeyboardInterrupt):
                run(images=self.interrupted_after(0), on_interrupt="partial")
        assert hook_count(reference, quantized) == 0 and quantized.training

    def test_a_batch_interrupted_between_the_two_networks_does_not_count(self) -> None:
        reference, quantized = pair()

        def stop(_: nn.Module, inputs: tuple[Tensor]) -> None:
            if len(inputs[0]) == 2:
                raise KeyboardInterrupt

        quantized.register_forward_pre_hook(stop)
        result = compare(reference, quantized, images(), batch_size=4, on_interrupt="partial")
        assert isinstance(result, Comparison)
        assert result.images == result.reference.images == 8
        assert result.layer_sqnr_db == pytest.approx(
            compare(reference, quantized, images(8), batch_size=4).layer_sqnr_db
        )

    def test_progress_goes_to_stderr_with_count_and_rate(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dsconv.progress._is_terminal", lambda: True)
        evaluate(Net(), images(), batch_size=4, progress=True)
        output = capsys.readouterr()
        assert output.out == "" and "evaluate" in output.err and "10/10" in output.err and "img/s" in output.err
        evaluate(Net(), iter([images()]), progress=True)
        assert "img/s" in capsys.readouterr().err
        evaluate(Net(), images())
        assert capsys.readouterr().err == ""


def test_importing_evaluation_does_not_import_rich() -> None:
    import subprocess

    code = "import sys, dsconv.evaluation; print(sorted({'rich', 'torchvision', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
