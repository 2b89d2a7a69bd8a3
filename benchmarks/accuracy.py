"""Accuracy of real pretrained networks, float against quantized without labels; writes docs/results.md.

    python benchmarks/accuracy.py                            # everything, several hours on 2 cores
    python benchmarks/accuracy.py --settings '*calibrated'   # known rows, and new ones of this kind only
    python benchmarks/accuracy.py --networks cifar_resnet20 --images 100 --out part.md --json part.json

Figures are written to the JSON file as they are measured; a row that is already there, for the same configuration and
images, is not measured again.

The networks and images are those of ``nets.py`` in the folder DSCONV_SHARED (default: ``../shared`` beside the
repository), and EfficientNet-Lite0 if its packages are installed. No step of the quantization sees an evaluated image;
the rows that use other images say so.
"""

import argparse
import json
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dsconv
import machine
from baselines import Baseline, baselines
from dsconv import QuantConfig
from dsconv.data import Preprocess
from dsconv.files import replacing
from trained import LITE, shared_nets

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("cifar_resnet20", "cifar_resnet44", "resnet18_tiny", "squeezenet1_1", "tiny_darknet", LITE)
TITLES = {
    "cifar_resnet20": "ResNet-20, CIFAR-10",
    "cifar_resnet44": "ResNet-44, CIFAR-10",
    "resnet18_tiny": "ResNet-18, Tiny-ImageNet",
    "squeezenet1_1": "SqueezeNet 1.1, ImageNet",
    "tiny_darknet": "Tiny Darknet, ImageNet",
    LITE: "EfficientNet-Lite0, ImageNet",
}
# Preprocessing of images, by its name in ``nets.py``.
PREPARED: dict[str, dict[str, Any]] = {
    "rgb01": {},
    "caffe": {"mean": (104, 117, 123), "scale": 255, "channels": "bgr"},
    "tensorflow": {"mean": 127, "std": 128, "scale": 255},
    "imagenet_stats": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}
SIDES = {"imagenet": 224, "tinyimagenet": 64, "cifar10": 32}
BATCH = 50
# Limits of bits per weight for the searched rows, and the number of images (or of noise) that rank the layers.
BUDGET, SMALL_BUDGET, SMALLEST_BUDGET, SEEN = 4.7, 3.7, 2.8, 32
CALIBRATED = 128
# Recipe of the adapted rows.
RECIPE = dsconv.Recipe()
HEAD = """\
# Results

This page gives the accuracy of real pretrained networks, quantized without any data unless a row says otherwise, and
evaluated on labelled images. `python benchmarks/accuracy.py` measures it and writes this page. Quantized layers run in
integers, on the kernels of this library, which return the same bits on every machine.

{machine}

How to read the tables:

- **bits**: effective bits per weight over all convolution and linear weights, including scales, shifts and layers left
  in float32; in brackets, over the quantized layers alone. **MB**: size of the file without its header.
- **agreement**: percentage of images with the same top-1 class as the float network. **KL**: mean of
  KL(softmax(float) || softmax(quantized)) in nats. **SQNR**: of the logits.
- **seconds**: time on one thread of all steps in the name of a row, on a machine that also did other work.
- The standard error of a top-1 difference is about one point for 650 images: read KL and agreement first.

Rows of dsconv:

- `paper` rows quantize every convolution per tap, including the first, with float32 KDS. The image and the linear
  layers stay in float32. The activation convention is in the name (see [Choosing bits and blocks](choosing.md)).
- `w4a4` and `default` use the `balanced` rule with a shift and float16 KDS, with 8 bits in the first convolution. They
  quantize linear layers too. Rows of `w4a4` name one convention for all layers. The preset itself selects `extra` for
  layers whose input can be negative (all of Tiny Darknet), and `adaptive` for the others (all of the other networks
  here).
- `w3a4` and `w2a4` are `w4a4` with weights of 3 and 2 bits. *No shift*: without the shift, in blocks of 32. These
  figures themselves showed that this serves calibrated networks better.
- *Winograd*: with `algorithm="auto"`, as in the presets. 3x3 layers are computed by Winograd, whose transformed inputs
  have 8 bits, if that adds at most 1 dB of noise. Bits of weights and file sizes are the same. In all other rows,
  convolutions are direct.
- *Small layers*: layers with at most 1/512 of a network's weights have 8 bits. In all other rows, they have as many
  bits as the others. *Winograd, small layers* are the presets unchanged.
- `searched` rows apply `dsconv.search` to these presets, with a budget of {budget} bits per weight ({small_budget} for
  `w3a4`, {smallest_budget} for `w2a4`). It selects bits per layer, and 8-bit activations only for layers with 8-bit
  weights (`default` has 8-bit activations everywhere). It ranks layers on {seen} images of noise, or on {seen}
  unlabelled photographs, none of which is evaluated.
- `calibrated` rows then run `dsconv.calibrate` on {calibrated} unlabelled photographs, none of which is evaluated (see
  [Calibrating](calibrate.md)).
- `adapted` rows then run `dsconv.adapt` on all unlabelled photographs with the recipe `default` (see
  [Adapting](adapt.md)). For CIFAR and Tiny-ImageNet, these photographs come from the sets on which the networks were
  trained, so the rows say less about other cases.

Other formats quantize all layers, weights and activations alike:

- *Round to nearest* has weights with one scale per output, and activations with a scale and a zero point per image. MX
  formats and NVFP4 have blocks along the channels. All of these are simulated in float32.
- *ONNX Runtime int8* is made and executed by that runtime, with activation ranges from {seen} unlabelled photographs.

**Selection on these images.** Only the rows that say so use images for quantization. However, some choices of the
method itself were made with images that are also evaluated here, so the figures of those networks may be slightly
optimistic:

- two constants of the `balanced` rule, selected from a handful, with 250 of the 650 ImageNet images;
- the rounding of that rule and its use of BatchNorm, with 100 to 200 of the ImageNet images and those of ResNet-20;
- the kind of noise of the `searched` rows, out of three, with 150 of the ImageNet images and the CIFAR images;
- the definition of a small layer, and its bits, with 130 of the ImageNet images and EfficientNet-Lite0.

ResNet-18 and its images had no part in any of this.
"""


@dataclass(frozen=True)
class Setting:
    """A row of the tables: its name, its settings, its table, and the use of images.

    Bits are ``searched`` with noise or images within a ``budget``; the network may be ``calibrated``, and then
    ``adapted``. A ``baseline`` has its own quantization.
    """

    name: str
    config: QuantConfig
    table: str
    searched: Literal["", "noise", "images"] = ""
    budget: float = BUDGET
    calibrated: bool = False
    adapted: bool = False
    baseline: Baseline | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings that the figures depend on besides network and images."""
        found: dict[str, Any] = {"config": self.config.to_dict()}
        if self.baseline:
            found["config"] = {"block_size": self.baseline.block}
        if self.searched:
            found["search"] = [self.searched, self.budget, SEEN]
        if self.calibrated:
            found["calibrated"] = CALIBRATED
        if self.adapted:
            found["adapted"] = RECIPE.model_dump(mode="json")
        return found


def settings(name: str) -> list[Setting]:
    """Return all rows of a network, each once."""
    as_they_are = QuantConfig.preset
    preset = partial(as_they_are, algorithm="direct", small_layers=None)
    winograd = partial(as_they_are, small_layers=None)
    w4a4, w3a4, w2a4 = (preset("w4a4", activation_sign="extra", weight_bits=bits) for bits in (4, 3, 2))
    plain = {"activation_sign": "extra", "block_size": 32, "weight_shift": False}
    w4_plain, w3_plain = (preset("w4a4", **plain, weight_bits=bits) for bits in (4, 3))
    done, no_shift = "searched with images, calibrated, adapted", "extra, no shift, searched with images, calibrated"
    rows = [
        Setting(f"paper W4A4 {sign}", preset("paper", block_size=block, activation_sign=sign), "presets")
        for block in (16, 32, 64, 128)
        for sign in ("extra", "included", "adaptive")
    ]
    rows += [
        Setting("paper W3A4 extra", preset("paper", weight_bits=3), "presets"),
        Setting("paper W4A8 extra", preset("paper", activation_bits=8), "presets"),
        Setting("w4a4 adaptive", preset("w4a4", activation_sign="adaptive"), "presets"),
        Setting("w4a4 adaptive, Winograd", winograd("w4a4", activation_sign="adaptive"), "presets"),
        Setting("w4a4 extra", w4a4, "presets"),
        Setting("w4a4 extra, Winograd", winograd("w4a4", activation_sign="extra"), "presets"),
        Setting("w4a4 extra, searched", w4a4, "presets", "noise"),
        Setting("w4a4 extra, searched with images", w4a4, "presets", "images"),
        Setting("w4a4 extra, searched with images, calibrated", w4a4, "presets", "images", calibrated=True),
        Setting(f"w4a4 extra, {done}", w4a4, "presets", "images", BUDGET, True, True),
        Setting(f"w4a4 {no_shift}", w4_plain, "presets", "images", calibrated=True),
        Setting(f"w4a4 {no_shift}, adapted", w4_plain, "presets", "images", BUDGET, True, True),
        Setting("w3a4 extra, searched with images", w3a4, "presets", "images", SMALL_BUDGET),
        Setting("w3a4 extra, searched with images, calibrated", w3a4, "presets", "images", SMALL_BUDGET, True),
        Setting(f"w3a4 extra, {done}", w3a4, "presets", "images", SMALL_BUDGET, True, True),
        Setting(f"w3a4 {no_shift}", w3_plain, "presets", "images", SMALL_BUDGET, True),
        Setting(f"w3a4 {no_shift}, adapted", w3_plain, "presets", "images", SMALL_BUDGET, True, True),
        Setting("w2a4 extra, searched with images, calibrated", w2a4, "presets", "images", SMALLEST_BUDGET, True),
        Setting(f"w2a4 extra, {done}", w2a4, "presets", "images", SMALLEST_BUDGET, True, True),
        Setting("default (W4A8)", preset("default"), "presets"),
        Setting("default (W4A8), Winograd", winograd("default"), "presets"),
        Setting("default (W4A8), searched", preset("default"), "presets", "noise"),
        Setting("default (W4A8), calibrated", preset("default"), "presets", calibrated=True),
        Setting(
            "default (W4A8), searched with images, calibrated", preset("default"), "presets", "images", calibrated=True
        ),
    ]
    if name == LITE:  # which has no layer for Winograd
        small = partial(as_they_are, algorithm="direct")
        done = "default (W4A8), small layers"
        return [
            *(row for row in rows if row.name in ("w4a4 extra", "default (W4A8)")),
            Setting("w4a4 extra, small layers", small("w4a4", activation_sign="extra"), "presets"),
            Setting(done, small("default"), "presets"),
            Setting(f"{done}, searched with images", small("default"), "presets", "images"),
            Setting(f"{done}, calibrated", small("default"), "presets", calibrated=True),
        ]
    extra = as_they_are("w4a4", activation_sign="extra")
    rows += [
        Setting("w4a4 extra, Winograd, small layers", extra, "presets"),
        Setting("default (W4A8), Winograd, small layers", as_they_are("default"), "presets"),
    ]
    rows += [Setting(baseline.name, preset("default"), "baselines", baseline=baseline) for baseline in baselines()]
    rules: list[tuple[str, int, bool, str]] = [
        ("paper", 32, False, "float32"),
        ("paper", 32, False, "float16"),
        ("refined", 32, False, "float16"),
        ("balanced", 32, False, "float16"),
        ("paper", 64, True, "float16"),
        ("refined", 64, True, "float16"),
        ("balanced", 64, True, "float16"),
        ("paper", 16, False, "float16"),
        ("balanced", 16, False, "float16"),
        ("balanced", 32, True, "float16"),
    ]
    for rule, block, shift, dtype in rules:
        config = preset("default", weight_rule=rule, block_size=block, weight_shift=shift, kds_dtype=dtype)
        rows.append(Setting(f"{rule}{' + shift' if shift else ''}, {dtype} KDS", config, "rules"))
    untold = preset("default", batchnorm_statistics=False)
    return [*rows, Setting("balanced + shift, float16 KDS, no BatchNorm statistics", untold, "rules")]


class Remembered(nn.Module):
    """Reference network that computes each batch once; batches are identified by their memory address."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.outputs: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = x.data_ptr()
        if key not in self.outputs:
            self.outputs[key] = self.network(x)
        return self.outputs[key]


def measure(
    nets: Any, name: str, limit: int | None, known: list[dict[str, Any]], wanted: str
) -> Iterator[dict[str, Any]]:
    """Yield the figures of one network under all settings as they are measured; those in ``known`` are reused.

    Only settings whose name matches the pattern ``wanted`` are measured.
    """
    network = nets.load(name)
    pictures, labels = nets.images(nets.NETS[name][1])
    inputs, targets = nets.preprocess(name, pictures[:limit]), torch.from_numpy(labels[:limit])
    batches = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
    reference = Remembered(network)
    work = Work(nets, name, network)
    for row in settings(name):
        identity = {"setting": row.name, "table": row.table, "images": len(inputs), **row.identity}
        again = [old for old in known if all(old.get(key) == value for key, value in identity.items())]
        if again:
            yield again[0]
            continue
        if not fnmatchcase(row.name, wanted):
            continue
        model, seconds = work.baseline(row.baseline) if row.baseline else work.quantized(row)
        # Compiled programs give the same bits as their networks in less time.
        program = model if row.baseline else dsconv.compile(model, inputs[:1])
        result = dsconv.compare(reference, program, batches, per_layer=False)
        yield identity | {
            "float_top1": result.reference.top1,
            **(row.baseline.sizes(network) if row.baseline else sizes(model)),
            "top1": result.top1,
            "agreement": result.agreement,
            "kl": result.kl,
            "sqnr_db": result.logit_sqnr_db,
            "quantize_seconds": seconds,
        }


def sizes(qmodel: nn.Module) -> dict[str, float]:
    """Return effective bits and megabytes of a quantized network."""
    summary = dsconv.summary(qmodel)
    return {
        "effective_bits": summary.effective_bits,
        "effective_bits_quantized": summary.effective_bits_quantized,
        "megabytes": summary.bytes_after / 1e6,
    }


class Work:
    """Builds the networks of the rows, with the seconds that this took; shared parts are built once."""

    def __init__(self, nets: Any, name: str, network: nn.Module):
        self.nets, self.name, self.network = nets, name, network
        self.configs: dict[Any, tuple[QuantConfig, float]] = {}
        self.calibrated: dict[Any, tuple[nn.Module, float]] = {}

    def baseline(self, baseline: Baseline) -> tuple[nn.Module, float]:
        """Return the network in another number format."""
        images, start = self.unlabelled(SEEN), time.perf_counter()
        return baseline.make(self.network, images), time.perf_counter() - start

    def quantized(self, row: Setting) -> tuple[nn.Module, float]:
        """Return the network of a row."""
        key = json.dumps({**row.identity, "adapted": None})
        if key in self.calibrated:
            qmodel, seconds = self.calibrated[key]
        else:
            config, seconds = self.searched(row) if row.searched else (row.config, 0.0)
            start = time.perf_counter()
            qmodel = dsconv.quantize(self.network, config)
            if row.calibrated:
                qmodel = dsconv.calibrate(qmodel, self.network, self.unlabelled(CALIBRATED))
            seconds += time.perf_counter() - start
            self.calibrated[key] = qmodel, seconds
        if row.adapted:
            start = time.perf_counter()
            qmodel = dsconv.adapt(qmodel, self.network, self.unlabelled(), recipe=RECIPE)
            seconds += time.perf_counter() - start
        return qmodel, seconds

    def searched(self, row: Setting) -> tuple[QuantConfig, float]:
        """Return the config that a search within the row's budget finds."""
        key = json.dumps([row.identity["config"], row.identity["search"]])
        if key not in self.configs:
            kind, side = self.nets.NETS[self.name][2], SIDES[self.nets.NETS[self.name][1]]
            given: dict[str, Any] = {"preprocess": Preprocess(crop=side, **PREPARED[kind])}
            if row.searched == "images":
                given = {"images": self.unlabelled(SEEN)}
            start = time.perf_counter()
            config = dsconv.search(self.network, row.config, budget=row.budget, limit=SEEN, **given).config
            self.configs[key] = config, time.perf_counter() - start
        return self.configs[key]

    def unlabelled(self, count: int | None = None) -> Tensor:
        """Return that many evenly spaced images of those that are not evaluated; None for all."""
        pictures, _ = self.nets.images(self.nets.NETS[self.name][1], labelled=False)
        count = count or len(pictures)
        prepared: Tensor = self.nets.preprocess(self.name, pictures[:: len(pictures) // count][:count])
        return prepared


def markdown(results: dict[str, Any]) -> str:
    """Return the page: for each network a table of presets, one of other formats, and one of weight rules."""
    figures = {"budget": BUDGET, "small_budget": SMALL_BUDGET, "seen": SEEN, "calibrated": CALIBRATED}
    figures["smallest_budget"] = SMALLEST_BUDGET
    machine_line = textwrap.fill(f"Machine: {results['machine']}.", 120, break_on_hyphens=False)
    lines = [HEAD.format(machine=machine_line, **figures)]
    tables = {
        "presets": ("setting", []),
        "baselines": ("other format", ["Other number formats, applied to all layers:", ""]),
        "rules": ("weight rule", ["Weight rules, with all other settings as in preset `default` (W4A8):", ""]),
    }
    for name, rows in results["networks"].items():
        images, top1 = rows[0]["images"], rows[0]["float_top1"]
        lines += [f"## {TITLES[name]}", "", f"{images} images, float32 top-1 {top1:.1f} %.", ""]
        for table, (head, introduction) in tables.items():
            if all(row["table"] != table for row in rows):
                continue
            lines += [*introduction, f"| {head} | B | bits | MB | top-1 | agreement | KL | SQNR dB | seconds |"]
            lines += ["|---|---|---|---|---|---|---|---|---|"]
            for row in rows:
                if row["table"] == table:
                    whole, inner = row["effective_bits"], row["effective_bits_quantized"]
                    bits = f"{whole:.2f}" + (f" ({inner:.2f})" if table != "baselines" else "")
                    block = row["config"]["block_size"] or "row"
                    lines.append(
                        f"| {row['setting']} | {block} | {bits} | {row['megabytes']:.2f} "
                        f"| {row['top1']:.1f} | {row['agreement']:.1f} | {row['kl']:.4f} | {row['sqnr_db']:.1f} "
                        f"| {row['quantize_seconds']:.1f} |"
                    )
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--settings", default="*", metavar="PATTERN", help="measure only rows of such names anew")
    parser.add_argument("--images", type=int, help="use only the first so many of each set")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md", help="page to write")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "accuracy.json", help="file that keeps the figures"
    )
    arguments = parser.parse_args()
    nets = shared_nets()
    results: dict[str, Any] = {"machine": machine.describe(), "networks": {}}
    known = json.loads(arguments.json.read_text())["networks"] if arguments.json.exists() else {}
    for name in arguments.networks:
        if reason := nets.missing(name):
            print(f"left as it is: {reason}", flush=True)
            results["networks"] |= {name: known[name]} if name in known else {}
            continue
        rows: list[dict[str, Any]] = []
        results["networks"][name] = rows
        for row in measure(nets, name, arguments.images, known.get(name, []), arguments.settings):
            rows.append(row)
            print(
                f"{name}: {row['setting']}, B = {row['config']['block_size']}: top-1 {row['top1']:.1f} of "
                f"{row['float_top1']:.1f}, agreement {row['agreement']:.1f}, KL {row['kl']:.4f}",
                flush=True,
            )
            # Results that are not measured again yet are kept.
            later = [old for old in known.get(name, []) if all(old is not row for row in rows)]
            networks = known | results["networks"] | {name: rows + later}
            write(arguments.json, json.dumps(results | {"networks": networks}, indent=1))
    write(arguments.out, markdown(results))


def write(path: Path, text: str) -> None:
    """Replace a file atomically."""
    with replacing(path) as beside:
        beside.write_text(text + "\n")


if __name__ == "__main__":
    main()
