"""Figures of a report against direct computation, and the page with unusual names and with missing data."""

import html
import importlib.resources
import io
import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import dsconv
from dsconv.benchmarking.results import Bench, Timing, read_benches
from dsconv.data import Preprocess, batches
from dsconv.demo import PREPROCESS, load_digits, load_network
from dsconv.errors import ConfigError, DataError, FileFormatError, MissingExtraError, ModelError
from dsconv.evaluation.measures import divergence
from dsconv.numerics import fake_quantize_activation
from dsconv.report import Report, gather, write_page
from dsconv.report.disagreements import Worst
from dsconv.report.inputs import Sample
from dsconv.report.page import page

HOSTILE = """<script>alert('1')</script>"&amp;<b>"""


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits("test")
    return images[:100], labels[:100]


@pytest.fixture(scope="module")
def report(digits: tuple[Tensor, Tensor]) -> Report:
    network = load_network()
    return gather(dsconv.quantize(network, "w4a4"), reference=network, images=[digits], sensitivity_images=8, runs=2)


def test_figures_of_the_whole_network(report: Report, digits: tuple[Tensor, Tensor]) -> None:
    network = load_network()
    qmodel = dsconv.quantize(network, "w4a4")
    expected = dsconv.compare(network, qmodel, [digits])
    assert report.comparison is not None and not report.missing.keys() - {"benches"}
    assert report.comparison.agreement == expected.agreement and report.comparison.kl == expected.kl
    assert {layer.summary.name: layer.output_sqnr_db for layer in report.layers} == expected.layer_sqnr_db
    trials = dsconv.sensitivity(network, qmodel, images=digits[0][:8]).trials
    assert [layer.kl for layer in report.layers] == pytest.approx([trial.kl for trial in trials], rel=1e-4)
    weights = [p for name, p in network.named_parameters() if p.dim() > 1]
    other = sum(t.numel() * t.element_size() for t in network.state_dict().values()) - 4 * sum(
        map(Tensor.numel, weights)
    )
    assert report.int8_bytes == sum(w.numel() + 4 * len(w) for w in weights) + other


def test_weights_before_and_after(report: Report) -> None:
    network = load_network()
    qmodel = dsconv.quantize(network, "w4a4")
    for layer in report.layers:
        name, found = layer.summary.name, layer.weights
        before, after = (
            net.get_submodule(name).weight.detach().double().flatten().numpy() for net in (network, qmodel)
        )
        assert found is not None and found.sqnr_db == pytest.approx(layer.summary.weight_sqnr_db)
        inside = np.clip(before, found.low, found.high)
        assert found.before == np.histogram(inside, len(found.before), (found.low, found.high))[0].tolist()
        assert sum(found.after) == len(after)
        ends = np.quantile([before, after], [5e-4, 1 - 5e-4], axis=1, method="nearest")
        assert (found.low, found.high) == pytest.approx((ends[0].min(), ends[1].max()))
        distance = np.abs(np.sort(before) - np.sort(after)).mean() / before.std()
        assert found.moved == pytest.approx(distance)
        statistics = {"mean": np.mean, "standard deviation": np.std, "minimum": np.min, "maximum": np.max}
        for title, function in statistics.items():
            assert found.figures[title] == pytest.approx((function(before), function(after)), rel=1e-6, abs=1e-12)
        for title, q in {"1st percentile": 0.01, "median": 0.5, "99th percentile": 0.99}.items():
            assert found.figures[title] == tuple(np.quantile([before, after], q, axis=1, method="nearest"))


def test_inputs_are_those_of_both_networks(report: Report, digits: tuple[Tensor, Tensor]) -> None:
    """Check the first layer, which reads the same images in both: only rounding distinguishes before and after."""
    first, config = report.layers[0], dsconv.quantize(load_network(), "w4a4").conv1.config
    assert first.inputs is not None and first.exponents is not None
    patches = torch.nn.functional.unfold(digits[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
    rounded = fake_quantize_activation(patches, config.activation_bits, config.block_size, sign=config.activation_sign)
    expected = dsconv.numerics.sqnr_db(float(patches.square().sum()), float((patches - rounded).square().sum()))
    assert first.inputs.sqnr_db == pytest.approx(expected, abs=1)
    mean, after = first.inputs.figures["mean"]
    assert mean == pytest.approx(patches.mean().item(), rel=0.05) and after == pytest.approx(mean, rel=0.02)
    # In later layers, the inputs of the two networks differ by more than the rounding of one layer.
    deep = report.layers[-1].inputs
    assert deep is not None and deep.sqnr_db < first.inputs.sqnr_db


def test_block_exponents_by_hand() -> None:
    """Use the same channels at every position, so that a sample equals all of them."""
    x = torch.zeros(4, 96, 5, 5)
    x[:, 0], x[:, 40] = 3.0, -0.3  # the third block stays zero
    net = nn.Sequential(nn.Conv2d(96, 8, 1), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    config = {"activation_bits": 4, "activation_sign": "extra", "block_size": 32, "first_layer": None}
    found = gather(dsconv.quantize(net, config), images=x, runs=0).layers[0]
    # E = floor(log2 max|x|) is 1 and -2, and e = E - m + 1 with m = 4.
    assert found.exponents is not None
    assert list(found.exponents) == [-5, -2] and len({*found.exponents.values(), found.zero_blocks}) == 1


def test_a_layer_of_float_activations_has_no_exponents() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(6, 10), nn.Flatten())
    settings = {"activation_bits": None, "first_layer": None}
    found = gather(dsconv.quantize(net, settings), reference=net, images=torch.randn(2, 8, 6, 6), runs=0)
    assert [layer.exponents for layer in found.layers] == [None, None]
    assert found.layers[0].inputs is not None and math.isinf(found.layers[0].inputs.sqnr_db)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d", "ConvTranspose2d", "grouped", "flat", "reflect", "same"])
def test_kinds_of_layers(kind: str) -> None:
    size = {"Conv1d": (6,), "Conv3d": (3, 3, 3)}.get(kind, (6, 6))
    more = {"grouped": {"groups": 4}, "reflect": {"padding": 1, "padding_mode": "reflect"}, "same": {"padding": "same"}}
    layer = getattr(nn, kind if kind[:4] == "Conv" else "Conv2d")(16, 8, 3, **more.get(kind, {}))
    net = nn.Sequential(nn.Unflatten(1, (16, *size[1:])) if len(size) != 2 else nn.Identity(), layer, nn.Flatten())
    blocks = "flat" if kind in ("flat", "reflect", "same") else "tap"
    x = torch.randn(3, 16 * size[1] if kind == "Conv3d" else 16, *size[-2:] if len(size) > 1 else (6, 1))
    net[0] = nn.Flatten(2) if kind == "Conv1d" else nn.Unflatten(1, (16, 3)) if kind == "Conv3d" else nn.Identity()
    qmodel = dsconv.quantize(net, {"blocks": blocks, "first_layer": None, "block_size": 8})
    found = gather(qmodel, reference=net, images=x, runs=0).layers[0]
    assert found.inputs is not None and found.exponents
    assert 0 < found.inputs.moved < 0.2 and 10 < found.inputs.sqnr_db < 40


def test_a_sample_is_fair_to_early_and_late() -> None:
    """Sample 50 batches of rows with the batch's number: each tenth of them makes about a tenth of the sample."""
    generator = torch.Generator().manual_seed(0)
    channels, rows = 64, 512
    parts = [torch.full((rows, channels), float(i)) for i in range(50)]
    sample = Sample(torch.rand(rows, generator=generator), parts[0], parts[0])
    for part in parts[1:]:
        sample.add(torch.rand(rows, generator=generator), part, part)
    counts = torch.histc(sample.after[:, 0], 10, 0, 50)
    assert sample.after.shape == (512, channels) and torch.equal(sample.before, sample.after)
    # Binomial with n = 512 and p = 0.1: five standard deviations.
    assert ((counts - 51.2).abs() < 5 * math.sqrt(512 * 0.1 * 0.9)).all()


def test_disagreements_are_the_largest_and_named_past_broken_files(tmp_path: Path) -> None:
    images, labels = load_digits("test")
    kept = []
    for i in range(40):
        file = tmp_path / f"{i:02}.png"
        if i in (3, 17):
            file.write_text("no image")
            continue
        kept.append(i)
        Image.fromarray((images[i, 0] * 255).round().byte().numpy()).save(file)
    rows = [f"{i:02}.png,{labels[i]}" for i in range(40)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class_index", *rows]))
    network = load_network()
    qmodel = dsconv.quantize(network, {"weight_bits": 2, "activation_bits": 2})
    found = gather(qmodel, reference=network, images=tmp_path, preprocess=PREPROCESS, batch_size=7, runs=0)
    assert found.accuracy is not None and len(found.accuracy.broken) == 2 and found.accuracy.images == 38

    x = torch.stack([PREPROCESS(Image.open(tmp_path / f"{i:02}.png")) for i in kept])
    with torch.inference_mode():
        p, q = (net(x).double().softmax(1) for net in (network, qmodel))
    kl = (p * (p / q).log()).sum(1)
    differ = p.argmax(1) != q.argmax(1)
    order = sorted(range(len(kept)), key=lambda i: (not differ[i], -kl[i]))[:12]
    assert [entry.name for entry in found.disagreements] == [f"{kept[i]:02}.png" for i in order]
    for entry, i in zip(found.disagreements, order, strict=True):
        assert entry.distance == pytest.approx(float(kl[i]), rel=1e-3) and entry.label == int(labels[kept[i]])
        assert (entry.reference.index, entry.quantized.index) == (int(p[i].argmax()), int(q[i].argmax()))
        assert entry.quantized.probability == pytest.approx(float(q[i].max()), rel=1e-3)
        with Image.open(io.BytesIO(entry.jpeg)) as seen:
            grey = torch.tensor(np.asarray(seen.convert("L")) / 255)
        assert (grey - images[kept[i], 0]).abs().mean() < 0.05
    text = page(found)
    assert "03.png: cannot identify" in text and "2 files" in text


def look(worst: Worst, x: Any, f: Tensor, q: Tensor) -> None:
    """Add a batch of a classifier as :func:`dsconv.compare` does."""
    worst.add(x, None, divergence(f.double(), q.double()), (f.double(), q.double()))


def test_images_of_two_classes_come_before_those_of_larger_divergence() -> None:
    worst, x = Worst(), torch.zeros(8, 1, 4, 4, dtype=torch.float32)
    f = torch.tensor([[9.0, 0.0, 0.0]] * 4 + [[0.1, 0.0, 0.0]] * 4)
    q = f.clone()
    q[0, 0], q[1, 0] = 1.0, 2.0  # large distance, same class
    q[4, 1], q[5, 2] = 0.2, 0.3  # small distance, another class
    q[2, 0], q[6, 0] = torch.inf, torch.nan
    for batch in (slice(0, 3), slice(3, 8)):
        look(worst, x[batch], f[batch], q[batch])
    found = worst.found([], None, None)
    assert [entry.name for entry in found] == ["image 5", "image 4", "image 0", "image 1"]
    assert found[0].distance < found[1].distance * 10 and found[2].distance > 50 * found[0].distance
    assert [(entry.reference.index, entry.quantized.index) for entry in found] == [(0, 2), (0, 1), (0, 0), (0, 0)]
    many = Worst()
    for _ in range(5):
        look(many, x, f, q)
    kept = many.found([], None, None)
    assert len(kept) == 12 and [entry.quantized.index != 0 for entry in kept] == [True] * 10 + [False] * 2


def test_networks_that_agree_have_no_disagreements() -> None:
    x, net = torch.rand(3, 3, 8, 8), nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = gather(dsconv.quantize(net, {"weight_bits": 8, "activation_bits": None}), reference=net, images=x, runs=0)
    assert len(found.disagreements) == 3
    nn.init.zeros_(net[0].weight)
    found = gather(dsconv.quantize(net), reference=net, images=x, runs=0)
    assert not found.disagreements and "On none of the images" in page(found)


def test_outputs_of_a_network_that_is_no_classifier_have_a_row_each() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3)
            self.classes, self.depth = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 1, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.body(x).relu()
            return {"classes": self.classes(x), "depth": self.depth(x)}

    def lost(f: Any, q: Any, labels: None) -> float:
        return float((f["depth"] - q["depth"]).abs().max())

    x, net = torch.rand(3, 3, 14, 14), Heads().eval()
    qnet = dsconv.quantize(net, "w4a4")
    found = gather(qnet, reference=net, images=x, runs=0)
    text = " ".join(page(found).split())
    assert found.sensitivity_measure == "KL divergence and relative error" and len(found.disagreements) == 3
    trials = dsconv.sensitivity(net, qnet, images=x).trials
    assert [layer.distance for layer in found.layers] == pytest.approx([trial.distance for trial in trials])
    for name, output in found.comparison.outputs.items():
        row = text.partition(f'<tr><th scope="row">{name}')[2].partition("</tr>")[0]
        assert f"<td>{output.relative_error:.4g}</td>" in row and output.kind in row
    assert "measured as segmentation, according to the shape of its main output, classes" in text
    assert "Images are sorted by the distance of the outputs" in text and text.count("<img") == 3
    assert "top-5" not in text and "Distance alone" in text
    own = gather(qnet, reference=net, images=x, runs=0, metric=lost, task="other")
    text = page(own)
    assert own.sensitivity_measure == "lost" and f"<td>{own.comparison.metrics['lost']:.6g}</td>" in text
    assert "according to the user" in text and json.loads(json.dumps(own.to_dict()))["sensitivity_measure"] == "lost"
    alone = gather(qnet, images=x, runs=0)
    assert "maps of classes (N, H, W)" in page(alone)


@pytest.mark.parametrize(
    ("net", "x", "task"),
    [
        (nn.Conv2d(3, 12, 3), torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "segmentation"),
        (nn.Sequential(nn.Conv2d(3, 12, 3), nn.PixelShuffle(2)), torch.rand(20, 3, 8, 8), "images"),
        (nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten()), torch.rand(20, 3, 8, 8), "other"),
    ],
)
def test_the_images_of_other_networks_are_those_whose_outputs_are_furthest_apart(
    net: nn.Module, x: Tensor, task: str
) -> None:
    qnet = dsconv.quantize(net.eval(), {"weight_bits": 2, "activation_bits": 3, "first_layer": None})
    options = {"images": x, "batch_size": 20, "runs": 0, "sensitivity_images": 0}
    found = gather(qnet, reference=net, **options)
    assert found.accuracy is not None and found.accuracy.task == task
    with torch.inference_mode():
        f, q = net(x), qnet(x)
    far = divergence(f, q) if task == "segmentation" else (f - q).flatten(1).square().sum(1)
    far = far if task == "segmentation" else far / f.flatten(1).square().sum(1).mean()
    order = far.argsort(descending=True)[:12]
    assert [entry.name for entry in found.disagreements] == [f"image {i}" for i in order]
    assert [entry.distance for entry in found.disagreements] == pytest.approx(far[order].tolist(), rel=1e-4)
    assert all(entry.reference is None and entry.label is None for entry in found.disagreements)
    text = page(found)
    assert (
        text.count("<img") == 12
        and ">distance</dt>" in text
        and "class " not in text.partition('class="gallery"')[2][:2000]
    )


def test_inputs_that_are_no_images_are_listed_without_a_picture() -> None:
    net = nn.Sequential(nn.Conv1d(1, 16, 9, stride=4), nn.ReLU(), nn.Conv1d(16, 5, 5), nn.AdaptiveAvgPool1d(1))
    x = torch.randn(4, 1, 100)
    found = gather(dsconv.quantize(net.eval(), "w4a4"), reference=net, images=x, runs=0, sensitivity_images=0)
    assert {entry.name for entry in found.disagreements} == {f"input {i}" for i in range(4)}
    assert all(entry.jpeg is None and entry.quantized is not None for entry in found.disagreements)
    text = page(found)
    assert "<img" not in text and "input 3" in text and "On none of the images" not in text


def test_what_is_missing_is_said() -> None:
    network = load_network()
    qmodel = dsconv.quantize(network)
    text = page(gather(qmodel, runs=0))
    for part in ("--data DIR", "--reference MODEL", "--bench FILE.json", "--runs 20", "images=", "benches="):
        assert part in text
    qmodel.dsconv_info.architecture = "torchvision/resnet50"
    assert "--reference torchvision/resnet50" in page(gather(qmodel, runs=0))
    found = gather(qmodel)
    assert "--size" in found.missing["time"]
    assert gather(qmodel, input_shape=(1, 8, 8), runs=2).profile is not None
    found = gather(qmodel, images=load_digits()[0][:4], runs=0)
    assert found.comparison is None and found.accuracy is not None and set(found.missing) == {
        "weights", "closeness", "outputs", "sensitivity", "disagreements", "time", "benches"
    }  # fmt: skip
    assert "closeness" not in gather(qmodel, reference=network, images=load_digits()[0][:4], runs=0).missing


def test_a_folded_network_is_not_compared_layer_by_layer(digits: tuple[Tensor, Tensor]) -> None:
    network = load_network()
    folded = dsconv.fold_batchnorm(dsconv.quantize(network))
    found = gather(folded, reference=network, images=digits[0][:8], runs=0)
    assert found.comparison is not None and found.comparison.agreement == 100
    for part in ("weights", "outputs", "sensitivity"):
        assert "folded" in found.missing[part]
    assert "BatchNorm is folded" in page(found)


def test_a_network_that_cannot_be_compiled_says_why(digits: tuple[Tensor, Tensor]) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) if x.sum() > 0 else self.conv(-x).mean((2, 3))

    found = gather(dsconv.quantize(Branching().eval()), images=digits[0][:2])
    assert "cannot be compiled" in found.missing["time"] and found.missing["time"] in html.unescape(page(found))


def test_mistakes(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    network = load_network()
    qmodel = dsconv.quantize(network)
    with pytest.raises(ModelError, match="no quantized layer"):
        gather(network)
    with pytest.raises(ModelError, match=r"'conv1'.*got no such layer.*float network that was quantized"):
        gather(qmodel, reference=nn.Sequential(nn.Conv2d(1, 8, 3)))
    wider = dsconv.demo.digits_resnet(pretrained=False)
    wider.layer2.conv1 = nn.Conv2d(32, 63, 3)
    with pytest.raises(ModelError, match=r"'layer2.conv1' with a weight \(64, .* got a Conv2d with \(63"):
        gather(qmodel, reference=wider)
    with pytest.raises(ConfigError, match="0 or at least 2, got 16, 1"):
        gather(qmodel, runs=1)
    with pytest.raises(DataError, match="does not exist"):
        gather(qmodel, images=tmp_path / "none", preprocess=PREPROCESS)
    with pytest.raises(OSError, match="none"):
        write_page(tmp_path / "none" / "a.html", gather(qmodel, runs=0))


def test_other_weights_than_those_that_were_quantized() -> None:
    qmodel = dsconv.quantize(load_network())
    found = gather(qmodel, reference=dsconv.demo.digits_resnet(pretrained=False), runs=0)
    assert "10 of 10 layers differ, conv1 first" in found.warnings[0] and found.warnings[0] in page(found)
    assert not gather(qmodel, reference=load_network(), runs=0).warnings


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_names_are_escaped(tmp_path: Path) -> None:
    """Check names of the network, layers, folder, files, classes and runtimes: none becomes a tag or an attribute."""
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{HOSTILE}{name}".replace("/", "")).mkdir()
        grey = Image.effect_noise((8, 8), 90)
        grey.save(folder / f"{HOSTILE}{name}".replace("/", "") / f"{HOSTILE}.png".replace("/", ""))
    (folder / f"{HOSTILE}a".replace("/", "") / "broken<b>.png").write_text("no image")
    net = nn.Sequential()
    net.add_module(HOSTILE.replace(".", ""), nn.Conv2d(1, 8, 3))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module(f"{HOSTILE}2", nn.Linear(8, 2))
    net.eval()
    qmodel = dsconv.quantize(net, {"last_layer": "float"})
    qmodel.dsconv_info.in_float[f"{HOSTILE}2"] = f"why {HOSTILE}"
    timing = {"contestant": HOSTILE, "executed": HOSTILE, "weight_bytes": 1, "batch_size": 1, "threads": 1, "turns": 2}
    times = {"first_quartile_ms": 1.0, "median_ms": 2.0, "third_quartile_ms": 3.0}
    bench = Bench(
        network=HOSTILE,
        input_shape=(1, 8, 8),
        config={HOSTILE: HOSTILE},
        calibration=HOSTILE,
        timings=(Timing(**timing, **times),),
        not_run={HOSTILE: HOSTILE},
        unsettled_turns=0,
        machine=dsconv.benchmarking.machine.machine(),
    )
    preprocess = Preprocess(channels="gray")
    found = gather(qmodel, name=HOSTILE, reference=net, images=folder, preprocess=preprocess, benches=[bench])
    text = page(found)
    assert len(found.disagreements) == 2 and text.count("alert(&#39;1&#39;)") > 20
    tags = Tags(text).tags
    names = {tag for tag, _ in tags}
    assert not names & {"script", "b", "iframe", "object"} and HOSTILE not in text
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all((attributes.get(name) or "#").startswith(("#", "data:")) for name in ("src", "href"))


def test_the_page_needs_nothing_but_itself(report: Report, tmp_path: Path) -> None:
    file = write_page(tmp_path / "a.html", report)
    text = file.read_text()
    assert "http://" not in text and "https://" not in text and "<script" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert file.stat().st_size < 300_000
    assert (importlib.resources.files("dsconv.report") / "page.html.j2").is_file()


def test_without_jinja2_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"jinja2 is not installed: pip install 'dsconv\[report\]'"):
        dsconv.write_report(tmp_path / "a.html", dsconv.quantize(load_network()))
    assert not list(tmp_path.iterdir())


def test_benches_are_read_back(tmp_path: Path) -> None:
    network = load_network()
    found = dsconv.bench(network, dsconv.quantize(network), (1, 8, 8), against=["torch"], turns=2)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"networks": [found.to_dict()]}))
    assert read_benches(file) == [found]
    for text in ("[]", "{}", '{"networks": [{"network": 3}]}', "no JSON", '{"networks": {}}'):
        file.write_text(text)
        with pytest.raises(FileFormatError, match=r"bench.json.*dsconv bench --out"):
            read_benches(file)


def test_a_picture_is_what_the_network_saw() -> None:
    generator = np.random.default_rng(0)
    for channels, shape in (("rgb", (6, 5, 3)), ("bgr", (6, 5, 3)), ("gray", (6, 5))):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        preprocess = Preprocess(channels=channels, scale=255, mean=10, std=3)
        assert np.array_equal(np.asarray(preprocess.picture(preprocess(Image.fromarray(pixels)))), pixels)


def test_batches_name_their_files(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("no image")
    source = batches(tmp_path, preprocess=Preprocess(channels="gray"), batch_size=2)
    for _ in range(2):
        values = torch.cat([x[:, 0, 0, 0] for x, _ in source]) * 255
        assert [file.stem for file in source.files] == [str(round(v)) for v in values.tolist()]
    assert batches(source) is source


def test_layers_that_never_run_run_twice_or_read_zeros() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.zeros = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(x))
            return (x + self.zeros(0 * x)).mean((2, 3))

    net = Odd().eval()
    qmodel = dsconv.quantize(net, {"first_layer": None, "last_layer": None})
    found = gather(qmodel, reference=net, images=torch.randn(4, 8, 6, 6), runs=0)
    twice, never, zeros = found.layers
    assert twice.inputs is not None and twice.exponents and zeros.inputs is not None and zeros.inputs.moved == 0
    assert never.inputs is None and never.output_sqnr_db is None and never.weights is not None
    assert zeros.exponents == {} and zeros.zero_blocks > 0
    text = page(found)
    assert "inputs not available: it did not run" in text and "All blocks are zero" in text


def test_layers_made_by_hand() -> None:
    """Check a network without own settings, and one that is a single layer, whose name is empty."""
    layer = nn.Conv2d(8, 8, 1)
    qmodel = nn.Sequential(dsconv.nn.DSConv2d.from_float(layer), nn.Flatten())
    found = gather(qmodel, reference=nn.Sequential(layer, nn.Flatten()), images=torch.randn(2, 8, 1, 1), runs=0)
    assert found.config is None and "general settings are unknown" in page(found)
    assert found.layers[0].kl is not None
    single = gather(dsconv.quantize(nn.Linear(8, 3)), reference=nn.Linear(8, 3), runs=0)
    assert single.layers[0].summary.name == "" and "the network" in page(single)


def test_logits_that_are_not_finite() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())
    x = torch.randn(3, 3, 2, 2)
    x[1] = torch.nan
    found = gather(dsconv.quantize(net), reference=net, images=x, sensitivity_images=0, runs=0)
    assert found.accuracy is not None and found.accuracy.nonfinite == 1
    assert {entry.name for entry in found.disagreements} == {"image 0", "image 2"}
    assert 'width="nan"' not in page(found)
