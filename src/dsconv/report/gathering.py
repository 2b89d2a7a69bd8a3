"""What a report on a quantized network tells, as plain data: see :func:`gather`."""

import io
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsconv import ops
from dsconv.benchmarking.profiling import Profile, profile
from dsconv.benchmarking.results import Bench
from dsconv.compilation import compile
from dsconv.config import QuantConfig
from dsconv.conversion import LayerSummary, ModelInfo, Summary, model_info, summary
from dsconv.conversion.wrappers import unwrapped
from dsconv.data import Images, Preprocess, batches
from dsconv.data.folder import Batches
from dsconv.errors import ConfigError, ModelError
from dsconv.evaluation import Comparison, Evaluation, compare, evaluate
from dsconv.layers import DSConv1d, DSConv2d, DSConv3d, DSLayer
from dsconv.mixed import sensitivity
from dsconv.modes import check_module, evaluation_mode
from dsconv.numerics import NONFINITE, dequantize_activation, quantize_activation, sqnr_db
from dsconv.zoo import preprocess_of

BINS = 64
_WEIGHTS = 1 << 17  # looked at in a layer
_VALUES = 1 << 15  # of its input that are kept
_LEAST_ROWS = 16
_PATCHES = 1 << 23  # values of the images of a batch that are cut into patches
_SHOWN = 12
_PIXELS = 160
# The share of values at each end that a histogram counts in its outermost bins.
_TAIL = 5e-4
_WEIGHTS_DIFFER_DB = 3.0


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Values before and after quantization.

    Attributes:
        low, high: ends of the histogram's :data:`BINS` equal bins; values beyond are counted in the outermost.
        before, after: number of values in each.
        figures: for each statistic its values before and after.
        sqnr_db: ``10 log10(sum before^2 / sum (before - after)^2)``, value by value.
        moved: first Wasserstein distance between the two distributions over the standard deviation of ``before``: how
            far a value moves, on average, where both are sorted. 0 is the same distribution.
    """

    low: float
    high: float
    before: list[int]
    after: list[int]
    figures: dict[str, tuple[float, float]]
    sqnr_db: float
    moved: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> "Distribution":
        """Of finite values, at least one, in the same order.

        >>> found = Distribution.of(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 3.0]))
        >>> round(found.moved, 2), found.figures["maximum"]
        (0.41, (2.0, 3.0))
        """
        before, after = before.double(), after.double()
        pair = before.sort()[0], after.sort()[0]
        ends = [_quantile(ordered, q) for ordered in pair for q in (_TAIL, 1 - _TAIL)]
        low, high = min(ends), max(ends)
        if low == high:
            low, high = low - 1, high + 1
        counts = [torch.histc(ordered.clamp(low, high), BINS, low, high).long().tolist() for ordered in pair]
        first, second = map(_statistics, pair)
        distance, deviation = float((pair[0] - pair[1]).abs().mean()), first["standard deviation"]
        return cls(
            low=low,
            high=high,
            before=counts[0],
            after=counts[1],
            figures={name: (value, second[name]) for name, value in first.items()},
            sqnr_db=sqnr_db(float(before.square().sum()), float((before - after).square().sum())),
            moved=distance / deviation if deviation else math.inf if distance else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What is known of a quantized layer; None is what was not measured.

    Attributes:
        summary: its settings and sizes.
        weights: of the float network, and what VQK and KDS stand for.
        inputs: of the layer in the float network, and what it reads in the quantized one, as mantissas and exponents.
            Without a reference both are of the quantized network.
        exponents: number of blocks of the input by their exponent e, a value being ``mantissa * 2^e``.
        zero_blocks: number of those that are all zero, and have none.
        output_sqnr_db: as in :class:`dsconv.evaluation.Comparison`.
        kl: divergence in nats that it causes alone.
    """

    summary: LayerSummary
    weights: Distribution | None = None
    inputs: Distribution | None = None
    exponents: dict[int, int] | None = None
    zero_blocks: int = 0
    output_sqnr_db: float | None = None
    kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network says of an image: the class of the largest logit, and its probability."""

    index: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """An image that the two networks see differently.

    Attributes:
        name: of its file, or its number.
        jpeg: the image as the networks see it, small.
        label: its class, None where unknown.
        kl: KL(softmax(f) || softmax(q)) in nats.
    """

    name: str
    jpeg: bytes
    label: int | None
    kl: float
    reference: Answer
    quantized: Answer


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a page shows.

    Attributes:
        name: of the network.
        reference: name of the float network, None without one.
        images: folder that the images are from, None where it was none.
        config: the settings it was quantized with, None where unknown.
        preprocess: how the images were prepared, or are to be where there are none; None where unknown.
        accuracy: beside the reference, or alone, or None without images.
        sensitivity_images: number of images that ``Layer.kl`` was measured on.
        classes: names of the classes.
        missing: for each part of the page that has no data, why; what to type stands between backticks.
        warnings: what a reader has to know before anything else.
    """

    name: str
    reference: str | None
    images: str | None
    summary: Summary
    config: QuantConfig | None
    layers: list[Layer]
    preprocess: Preprocess | None = None
    accuracy: Evaluation | None = None
    sensitivity_images: int = 0
    disagreements: list[Disagreement] = field(default_factory=list)
    classes: Sequence[str] = ()
    profile: Profile | None = None
    benches: Sequence[Bench] = ()
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def int8_bytes(self) -> int:
        """With every weight in 8 bits, a float32 scale for each output channel, and all else as it is."""
        rows = self.summary.layers
        return sum(row.bytes_before // 4 + 4 * row.shape[0] for row in rows if row.shape) + self.summary.other_bytes

    @property
    def comparison(self) -> Comparison | None:
        """``accuracy`` where there is a reference."""
        return self.accuracy if isinstance(self.accuracy, Comparison) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the figures of the page, without its images."""
        seen = [asdict(disagreement) for disagreement in self.disagreements]
        return {
            "name": self.name,
            "reference": self.reference,
            "images": self.images,
            "config": self.config and self.config.to_dict(),
            "preprocess": self.preprocess and self.preprocess.model_dump(mode="json"),
            "summary": self.summary.to_dict() | {"int8_bytes": self.int8_bytes},
            "layers": [_figures(layer) for layer in self.layers],
            "accuracy": self.accuracy and self.accuracy.to_dict(),
            "sensitivity_images": self.sensitivity_images,
            "disagreements": [{name: value for name, value in one.items() if name != "jpeg"} for one in seen],
            "classes": list(self.classes),
            "profile": self.profile and self.profile.to_dict(),
            "benches": [bench.to_dict() for bench in self.benches],
            "missing": self.missing,
            "warnings": self.warnings,
        }


def gather(
    qmodel: nn.Module,
    *,
    name: str | None = None,
    reference: nn.Module | None = None,
    images: Images | None = None,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 32,
    workers: int = 0,
    sensitivity_images: int = 16,
    input_shape: Sequence[int] | None = None,
    runs: int = 20,
    benches: Sequence[Bench] = (),
    progress: bool = False,
) -> Report:
    """Measure what a report tells of a quantized network. What cannot be known is None, and said in ``missing``.

    Args:
        qmodel: from :func:`dsconv.quantize` or :func:`dsconv.load`, on the CPU.
        name: of the network; None is how :func:`dsconv.zoo.build` was told, or its class.
        reference: the float network it was made from.
        images, preprocess, limit, batch_size, workers: as in :func:`dsconv.evaluate`; passed over more than once.
        classes: names of the classes, by index; by default those of a folder's class folders.
        sensitivity_images: number of images on which each layer is quantized alone; 0 is not at all.
        input_shape: ``(C, H, W)`` of the image that steps are timed on; None is that of ``images``.
        runs: that are timed, at least 2; 0 is none.
        benches: of :func:`dsconv.bench` or :func:`dsconv.benchmarking.results.read_benches`.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.

    Raises:
        ConfigError, DataError, ModelError: as :func:`dsconv.compare` and :func:`dsconv.sensitivity`; ``reference`` is
            another network than ``qmodel`` was made from.

    >>> import dsconv
    >>> net = dsconv.zoo.build("dsconv/digits_resnet")
    >>> report = gather(dsconv.quantize(net), reference=net, runs=0)
    >>> [layer.summary.name for layer in report.layers][:2], report.missing["outputs"]
    (['conv1', 'layer1.conv1'], 'Pass `--data DIR` (in Python `images=`).')
    """
    qmodel, reference = unwrapped(qmodel), unwrapped(reference)
    check_module("qmodel", qmodel)
    if reference is not None:
        check_module("reference", reference)
    layers = {found: layer for found, layer in qmodel.named_modules() if isinstance(layer, DSLayer)}
    if not layers:
        raise ModelError(f"qmodel: expected a quantized network, {type(qmodel).__name__} has no quantized layer")
    if sensitivity_images < 0 or (runs < 2 and runs != 0):
        raise ConfigError(f"expected sensitivity_images from 0 and runs 0 or from 2, got {sensitivity_images}, {runs}")
    info, known = model_info(qmodel), summary(qmodel)
    if reference is not None:
        _check_reference(reference, layers)
    preprocess = preprocess or preprocess_of(qmodel) or (preprocess_of(reference) if reference else None)
    source = None
    if images is not None:
        by_path = isinstance(images, str | os.PathLike)
        sizes: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "limit": limit}
        source = batches(images, preprocess=preprocess if by_path else None, **sizes)
    folder = None if source is None else source.folder
    missing, warnings = _missing(reference, source, info), list[str]()
    measured: dict[str, dict[str, Any]] = {row.name: {"summary": row} for row in known.layers if row.name in layers}

    if reference is not None and "weights" not in missing:
        for layer in layers:
            measured[layer]["weights"] = _weights(reference.get_submodule(layer), layers[layer])
        differing = [layer for layer in layers if _differ(measured[layer]["weights"], layers[layer])]
        if differing:
            warnings.append(
                f"The weights of the reference are not those that this network was made from: {len(differing)} of "
                f"{len(layers)} layers differ, {differing[0]} first. What compares the two networks means nothing."
            )
    accuracy: Evaluation | None = None
    worst = _Worst()
    if source is not None:
        with _inputs(layers, reference) as samples:
            if reference is None:
                accuracy = evaluate(qmodel, source, progress=progress)
            else:
                outputs = "outputs" not in missing
                found = compare(reference, qmodel, source, progress=progress, per_layer=outputs, each=worst.add)
                for layer, value in found.layer_sqnr_db.items():
                    measured[layer]["output_sqnr_db"] = value
                accuracy = found
        for layer, sample in samples.items():
            measured[layer] |= _input(layers[layer], sample)
    if folder is not None:
        preprocess = folder.preprocess
    disagreements = worst.found(source.files if source else [], folder.path if folder else None, preprocess)

    tried = 0
    if not sensitivity_images:
        missing.setdefault("sensitivity", "Pass `--sensitivity-images 16` (in Python `sensitivity_images=16`).")
    if reference is not None and source is not None and "sensitivity" not in missing:
        trials = sensitivity(
            reference,
            qmodel,
            images=folder or images,
            limit=sensitivity_images,
            batch_size=min(batch_size, sensitivity_images),
            progress=progress,
        )
        tried = trials.images
        for trial in trials.trials:
            measured[trial.layer]["kl"] = trial.kl

    if source is not None:
        input_shape = next((x.shape[1:] for x, _ in source), None)
    times = _profile(qmodel, input_shape, runs)
    if isinstance(times, str):
        missing["time"] = times
    if not benches:
        missing["benches"] = "Pass `--bench FILE.json`, which `dsconv bench --out` writes (in Python `benches=`)."
    return Report(
        name=name or _name(qmodel, info),
        reference=None if reference is None else _name(reference, info),
        images=str(folder.path) if folder else None,
        summary=known,
        config=None if info is None else info.config,
        layers=[Layer(**facts) for facts in measured.values()],
        preprocess=preprocess,
        accuracy=accuracy,
        sensitivity_images=tried,
        disagreements=disagreements,
        classes=classes or (folder and folder.classes) or (),
        profile=None if isinstance(times, str) else times,
        benches=benches,
        missing=missing,
        warnings=warnings,
    )


def _figures(layer: Layer) -> dict[str, Any]:
    figures = asdict(layer)
    return {"name": figures.pop("summary")["name"], **figures}


def _name(model: nn.Module, info: ModelInfo | None) -> str:
    known = getattr(model, "dsconv_architecture", None) or (info and info.architecture)
    return str(known or type(model).__name__)


def _missing(reference: nn.Module | None, source: Batches | None, info: ModelInfo | None) -> dict[str, str]:
    """For each part that has no data, what to pass to get it."""
    made_from = (info and info.architecture) or "MODEL"
    calls = {
        "reference": f"`--reference {made_from}` (in Python `reference=`)",
        "images": "`--data DIR` (in Python `images=`)",
    }
    have = {"reference": reference is not None, "images": source is not None}
    both = ("reference", "images")
    needs = {
        "weights": both[:1],
        "inputs": both[1:],
        "accuracy": both[1:],
        **dict.fromkeys(("closeness", "outputs", "sensitivity", "disagreements"), both),
    }
    missing = {}
    for part, wanted in needs.items():
        if lacking := [calls[name] for name in wanted if not have[name]]:
            missing[part] = f"Pass {' and '.join(lacking)}."
    if info is not None and (info.folded or info.affine):
        for part in ("weights", "outputs", "sensitivity"):
            missing[part] = (
                "BatchNorm is folded into the layers of this network, so that they compute something else than those "
                "of the float network: report on the network as dsconv quantize wrote it."
            )
    return missing


def _profile(qmodel: nn.Module, shape: Sequence[int] | None, runs: int) -> Profile | str:
    """Times of the steps, or why there are none."""
    if not runs:
        return "Pass `--runs 20` (in Python `runs=20`)."
    if shape is None:
        return (
            "The size of an image is not known: pass `--size` or `--data DIR` (in Python `input_shape=` or `images=`)."
        )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, generator=generator, dtype=torch.float32, device="cpu")
    try:
        with evaluation_mode([qmodel]):
            return profile(compile(qmodel, x), x, runs=runs)
    except ModelError as error:
        return f"The network cannot be compiled: {error}".replace("`", "'")


def _check_reference(reference: nn.Module, layers: Mapping[str, DSLayer]) -> None:
    modules = dict(reference.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        there: Any = modules.get(name)
        shape = tuple(layer.dequantized_weight().shape)
        got = "no such layer" if there is None else f"a {type(there).__name__}"
        if isinstance(there, layer.float_type):
            there_shape = tuple(cast(Tensor, there.weight).shape)
            if there_shape == shape:
                continue
            got += f" with {there_shape}"
        raise ModelError(
            f"reference: expected a {layer.float_type.__name__} {name!r} with a weight {shape}, as in the quantized "
            f"network, got {got}: pass the float network that was quantized"
        )


def _weights(before: nn.Module, layer: DSLayer) -> Distribution:
    pair = [
        weight.detach().float().flatten().cpu() for weight in (cast(Tensor, before.weight), layer.dequantized_weight())
    ]
    if (count := len(pair[0])) > _WEIGHTS:
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(count, (_WEIGHTS,), generator=generator, dtype=torch.int64, device="cpu")
        pair = [weight[places] for weight in pair]
    return Distribution.of(*pair)


def _differ(weights: Distribution, layer: DSLayer) -> bool:
    """Whether they are further apart than they were when ``layer`` was made."""
    known = layer.weight_sqnr_db
    return known is not None and weights.sqnr_db < known - _WEIGHTS_DIFFER_DB


@dataclass
class _Sample:
    """Some of what a layer reads: rows ``(P, C)`` of what blocks are cut from, in both networks at the same places.

    It keeps the rows of the least random keys, which is a sample of all that it was offered.
    """

    keys: Tensor
    before: Tensor
    after: Tensor

    def add(self, keys: Tensor, before: Tensor, after: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys])
        kept = self.keys.topk(min(len(self.keys), _rows_of(after.shape[1])), largest=False).indices
        self.keys = self.keys[kept]
        self.before, self.after = torch.cat([self.before, before])[kept], torch.cat([self.after, after])[kept]


def _rows_of(channels: int) -> int:
    return max(_LEAST_ROWS, _VALUES // channels)


@contextmanager
def _inputs(layers: Mapping[str, DSLayer], reference: nn.Module | None) -> Iterator[dict[str, _Sample]]:
    """Hooks on the layers and their namesakes in the reference, which is to run before; yields what they read."""
    samples: dict[str, _Sample] = {}
    expected: defaultdict[str, deque[Tensor]] = defaultdict(deque)
    calls: Counter[tuple[str, bool]] = Counter()

    def draw(name: str, is_float: bool, args: Any, kwargs: Any) -> tuple[Tensor, torch.Generator]:
        calls[name, is_float] += 1
        generator = torch.Generator().manual_seed(calls[name, is_float])  # the same places in both networks
        return _rows_read(layers[name], args[0] if args else next(iter(kwargs.values())), generator), generator

    def remember(name: str, args: Any, kwargs: Any) -> None:
        expected[name].append(draw(name, True, args, kwargs)[0])

    def keep(name: str, args: Any, kwargs: Any) -> None:
        after, generator = draw(name, False, args, kwargs)
        before = after if reference is None else expected[name].popleft() if expected[name] else None
        if before is None or before.shape != after.shape:
            raise ModelError(f"reference: its layer {name!r} does not run as that of the quantized network does")
        keys = torch.rand(len(after), generator=generator, dtype=torch.float32, device="cpu")
        if name in samples:
            samples[name].add(keys, before, after)
        else:
            samples[name] = _Sample(keys, before, after)

    def hook(module: nn.Module, name: str, call: Callable[[str, Any, Any], None]) -> Any:
        return module.register_forward_pre_hook(lambda _, args, kwargs: call(name, args, kwargs), with_kwargs=True)

    hooks = [hook(layer, name, keep) for name, layer in layers.items()]
    if reference is not None:
        hooks += [hook(reference.get_submodule(name), name, remember) for name in layers]
    try:
        yield samples
    finally:
        for handle in hooks:
            handle.remove()


def _rows_read(layer: DSLayer, x: Tensor, generator: torch.Generator) -> Tensor:
    """Rows ``(P, C)`` at random places of a layer's input ``x``, on the CPU in float32."""
    if layer.kind == "linear":
        x = x.reshape(-1, x.shape[-1], 1)
    elif x.dim() == layer.vqk.dim() - 1:
        x = x.unsqueeze(0)
    if isinstance(layer, DSConv1d | DSConv2d | DSConv3d) and layer.config.blocks == "flat":
        size = x[0].numel() * math.prod(layer.kernel_size) // math.prod(layer.stride)
        order = torch.randperm(len(x), generator=generator, dtype=torch.int64, device="cpu")
        some = order[: max(1, _PATCHES // size)]
        x = ops.patches(x[some], layer.kernel_size, layer.stride, layer.zero_padding, layer.dilation)
    x = x.flatten(2)
    count = (_rows_of(x.shape[1]),)
    image, place = (
        torch.randint(size, count, generator=generator, dtype=torch.int64, device="cpu")
        for size in (len(x), x.shape[2])
    )
    return x[image, :, place].float().cpu()


def _input(layer: DSLayer, sample: _Sample) -> dict[str, Any]:
    """Of what a layer reads: its distribution, and the exponents of its blocks."""
    config, after = layer.config, sample.after
    found: dict[str, Any] = {}
    if config.activation_bits is not None:
        size, groups = config.block_size, layer.groups
        mantissa, exponent = quantize_activation(
            after, config.activation_bits, size, sign=config.activation_sign, groups=groups
        )
        after = dequantize_activation(mantissa, exponent, size, groups=groups)
        blocks = torch.split(torch.unflatten(mantissa, 1, (groups, -1)), size, dim=2)
        used = torch.stack([block.any(2) for block in blocks], 2).flatten(1)
        counts = Counter(exponent[used].tolist())
        found = {
            "exponents": dict(sorted(counts.items())),
            "zero_blocks": int((~used & (exponent != NONFINITE)).sum()),
        }
    finite = sample.before.isfinite() & after.isfinite()
    return found | ({"inputs": Distribution.of(sample.before[finite], after[finite])} if finite.any() else {})


class _Worst:
    """The images on which two networks differ most, of those seen so far."""

    def __init__(self) -> None:
        self._seen = 0
        self._kept: list[tuple[float, int, Tensor, int | None, Answer, Answer]] = []

    def add(self, x: Tensor, labels: Tensor | None, f: Tensor, q: Tensor) -> None:
        log_p, log_q = f.log_softmax(1), q.log_softmax(1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        for i in torch.where(kl.isfinite(), kl, 0).topk(min(_SHOWN, len(kl))).indices.tolist():
            if kl[i] > 0:
                label = None if labels is None else int(labels[i])
                answers = _answer(log_p[i]), _answer(log_q[i])
                # A copy: a view would keep the whole batch.
                self._kept.append((float(kl[i]), self._seen + i, x[i].clone(), label, *answers))
        self._seen += len(kl)
        self._kept = sorted(self._kept, key=lambda entry: -entry[0])[:_SHOWN]

    def found(self, files: Sequence[Path], folder: Path | None, preprocess: Preprocess | None) -> list[Disagreement]:
        return [
            Disagreement(
                name=str(files[number].relative_to(folder)) if folder else f"image {number}",
                jpeg=_jpeg(x, preprocess),
                label=label,
                kl=kl,
                reference=f,
                quantized=q,
            )
            for kl, number, x, label, f, q in self._kept
        ]


def _answer(log_p: Tensor) -> Answer:
    index = int(log_p.argmax())
    return Answer(index=index, probability=float(log_p[index].exp()))


def _jpeg(x: Tensor, preprocess: Preprocess | None) -> bytes:
    if len(x) not in (1, 3):
        x, preprocess = x.mean(0, keepdim=True), None
    if preprocess is None:  # from its darkest value to its brightest
        low, high = x.aminmax()
        std = 1 / max(float(high - low), 1e-30)
        preprocess = Preprocess(mean=-float(low) * std, std=std)
    picture = preprocess.picture(x)
    picture.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=80)
    return file.getvalue()


def _quantile(ordered: Tensor, q: float) -> float:
    return float(ordered[round(q * (len(ordered) - 1))])


def _statistics(ordered: Tensor) -> dict[str, float]:
    spread = {"mean": ordered.mean().item(), "standard deviation": ordered.std(correction=0).item()}
    places = {"minimum": 0.0, "1st percentile": 0.01, "median": 0.5, "99th percentile": 0.99, "maximum": 1.0}
    return {**spread, **{name: _quantile(ordered, q) for name, q in places.items()}}
