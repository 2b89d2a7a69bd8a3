"""How good a network is, and how close a quantized one stays to its float original."""

import math
import os
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dsconv.conversion.wrappers import unwrapped
from dsconv.data.folder import Batches, BrokenImage, ImageFolder, Images, batches
from dsconv.data.preprocess import Preprocess
from dsconv.errors import ConfigError, DataError, ModelError
from dsconv.layers.inputs import as_input_of, device_of
from dsconv.modes import check_module, evaluation_mode
from dsconv.numerics import sqnr_db
from dsconv.progress import progress_bar
from dsconv.zoo import preprocess_of

Sums = dict[str, float]
Step = TypeVar("Step")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one network does on a set of images.

    Attributes:
        images: number of images evaluated, without the broken ones.
        top1, top5: percent of images whose label is the largest logit, or among the five largest (equal logits rank
            by class index); None without labels, and ``top5`` also below 6 classes. A non-finite image is wrong.
        nonfinite: number of images with a NaN or an infinity among the logits.
        seconds: time in the network's forward passes, without reading and preprocessing images.
        broken: files that could not be read, each with ``.path`` and ``.reason``.
        interrupted: True if the evaluation was stopped early and covers only some of the images.
    """

    images: int
    top1: float | None
    top5: float | None
    nonfinite: int
    seconds: float
    broken: list[BrokenImage] = field(default_factory=list)
    interrupted: bool = False

    @property
    def images_per_second(self) -> float:
        """Throughput of the forward passes."""
        return self.images / self.seconds if self.seconds else math.inf

    def _figures(self) -> dict[str, float | None]:
        names = ("top1", "top5", "nonfinite", "seconds", "images_per_second")
        return {name: _json(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON; an infinite or undefined one is None."""
        broken = [entry._asdict() for entry in self.broken]
        return {"images": self.images, **self._figures(), "broken": broken, "interrupted": self.interrupted}

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(_table({"": self}), *_remarks(self))


@dataclass(frozen=True, kw_only=True)
class Comparison(Evaluation):
    """A quantized network beside its reference; the figures of `Evaluation` are those of the quantized one.

    With f the reference's logits and q the quantized network's:

    Attributes:
        reference: the same figures of the reference network.
        agreement: percent of images with the same top-1 class; a non-finite image does not agree.
        kl: mean of KL(softmax(f) || softmax(q)) in nats, over the images that are finite in both.
        logit_sqnr_db: 10 log10(sum f^2 / sum (f - q)^2) in dB over the same images; infinite where f = q.
        layer_sqnr_db: the same for the outputs of every DSConv layer that ran, by name; each network's layer sees
            that network's own inputs, so errors of earlier layers are included.
    """

    reference: Evaluation
    agreement: float
    kl: float
    logit_sqnr_db: float
    layer_sqnr_db: dict[str, float]

    @property
    def quantized(self) -> Evaluation:
        """The figures of the quantized network alone."""
        return Evaluation(**{name: getattr(self, name) for name in Evaluation.__dataclass_fields__})

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON; an infinite or undefined one is None."""
        common = super().to_dict()
        return {
            **{name: common[name] for name in ("images", "broken", "interrupted")},
            "agreement": self.agreement,
            "kl": _json(self.kl),
            "logit_sqnr_db": _json(self.logit_sqnr_db),
            "layer_sqnr_db": {name: _json(value) for name, value in self.layer_sqnr_db.items()},
            "reference": self.reference._figures(),
            "quantized": self._figures(),
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table

        closeness = Table("", Column("quantized against reference", justify="right"))
        closeness.add_row("agreement", f"{self.agreement:.2f} %")
        closeness.add_row("KL divergence", f"{self.kl:.4f} nats")
        closeness.add_row("logit SQNR", f"{self.logit_sqnr_db:.2f} dB")
        worst = sorted(self.layer_sqnr_db.items(), key=lambda entry: (not math.isnan(entry[1]), entry[1]))
        for name, value in worst[:5]:
            closeness.add_row(f"output SQNR of {name or 'the model'}", f"{value:.2f} dB")
        if len(worst) > 5:
            closeness.caption = f"the 5 lowest of {len(worst)} layers"
        both = _table({"reference": self.reference, "quantized": self})
        return Group(both, closeness, *_remarks(self))


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    on_interrupt: Literal["raise", "partial"] = "raise",
) -> Evaluation:
    """Top-1, top-5 and speed of a classifier.

    The model runs in evaluation and inference mode and leaves with the training flags and the device it came with.

    Args:
        model: returns logits ``(N, classes)``: as a tensor, or as the field ``logits`` or the first one of its output.
        images, batch_size, workers, limit: see `dsconv.data.batches`.
        preprocess: how to read a folder; None is what the model says of itself, as one of `dsconv.zoo` or timm does.
        device: where to run; None is where the model is.
        progress: show the progress, its rate and the time left on stderr: as a bar in a terminal, else as a line now
            and then.
        on_interrupt: what Ctrl-C does: ``"raise"`` KeyboardInterrupt, or end with the figures so far (``"partial"``),
            if there are any.

    Raises:
        ConfigError: an argument out of range, or a device that is not there.
        DataError: no images, unusable ones, or labels that are not classes of the model.
        ModelError: the model cannot run on the images or does not return logits.

    >>> model = nn.Sequential(nn.Flatten(), nn.Identity())
    >>> images = torch.eye(8)[:, :, None, None]
    >>> result = evaluate(model, [(images, [0, 1, 2, 3, 4, 5, 6, 0])])
    >>> result.images, result.top1
    (8, 87.5)
    """
    check_module("model", model)
    preprocess = preprocess_for(images, preprocess, model)
    source = batches(images, preprocess=preprocess, batch_size=batch_size, workers=workers, limit=limit)
    run = _Run("evaluate", source, progress, on_interrupt)

    def step(x: Tensor, labels: Tensor | None) -> Sums:
        logits, seconds = _forward(model, "model", x)
        return _score(logits, labels, seconds, source.folder)

    with ready([model], device):
        scores = run.over(step)
    return Evaluation(**run.figures(scores))


def compare(
    reference: nn.Module,
    qmodel: nn.Module,
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    on_interrupt: Literal["raise", "partial"] = "raise",
    per_layer: bool = True,
    each: Callable[[Tensor, Tensor | None, Tensor, Tensor], object] | None = None,
) -> Comparison:
    """How close a quantized network stays to its float original on the same images; labels are not needed.

    Args:
        reference: the float network.
        qmodel: its quantized copy.
        per_layer: compare the outputs of every DSConv layer as well. It keeps the reference's outputs of one batch in
            memory and adds to the measured times.
        each: called with every batch: images, labels or None, and the logits of both networks, the reference's first,
            float64 ``(N, classes)`` on the CPU.
        images, preprocess, batch_size, workers, device, limit, progress, on_interrupt: as in `evaluate`.

    Raises:
        ConfigError, DataError: as in `evaluate`.
        ModelError: as in `evaluate`; or the two networks differ in outputs or layers.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> result = compare(model, model, torch.randn(4, 3, 8, 8))
    >>> result.agreement, result.kl, result.logit_sqnr_db
    (100.0, 0.0, inf)
    """
    (result,) = compare_each(
        reference,
        {"quantized model": qmodel},
        images,
        preprocess=preprocess,
        batch_size=batch_size,
        workers=workers,
        device=device,
        limit=limit,
        progress=progress,
        on_interrupt=on_interrupt,
        per_layer=per_layer,
        each=each,
    ).values()
    return result


def compare_each(
    reference: nn.Module,
    qmodels: Mapping[str, nn.Module],
    images: Images,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    on_interrupt: Literal["raise", "partial"] = "raise",
    per_layer: bool = True,
    each: Callable[[Tensor, Tensor | None, Tensor, Tensor], object] | None = None,
) -> dict[str, Comparison]:
    """`compare` with each of several quantized networks, by name, in one pass over the images."""
    reference, qmodels = unwrapped(reference), {name: unwrapped(qmodel) for name, qmodel in qmodels.items()}
    for name, network in {"reference": reference, **qmodels}.items():
        check_module(name, network)
    preprocess = preprocess_for(images, preprocess, *qmodels.values(), reference)
    source = batches(images, preprocess=preprocess, batch_size=batch_size, workers=workers, limit=limit)
    run = _Run("compare", source, progress, on_interrupt)

    def step(x: Tensor, labels: Tensor | None) -> tuple[Sums, dict[str, tuple[Sums, Sums, dict[str, Tensor]]]]:
        f, f_seconds = _forward(reference, "reference", x)
        f_score = _score(f, labels, f_seconds, source.folder)
        found = {}
        for name, qmodel in qmodels.items():
            q, q_seconds = _forward(qmodel, name, x)
            if f.shape != q.shape:
                shapes = f"{tuple(f.shape)} from the reference, {tuple(q.shape)} from the {name}"
                raise ModelError(f"The two networks return logits of different shapes: {shapes}.")
            if each is not None:
                each(x, labels, f, q)
            found[name] = _score(q, labels, q_seconds, None), _closeness(f, q), take_layer_errors[name]()
        return f_score, found

    with ExitStack() as stack:
        stack.enter_context(ready([reference, *qmodels.values()], device))
        take_layer_errors = {
            name: stack.enter_context(_layer_errors(reference, qmodel, per_layer)) for name, qmodel in qmodels.items()
        }
        f_scores, steps = zip(*run.over(step), strict=True)
    expected = Evaluation(**run.figures(f_scores))
    return {name: _comparison(run, expected, [found[name] for found in steps]) for name in qmodels}


def _comparison(
    run: "_Run", reference: Evaluation, steps: Iterable[tuple[Sums, Sums, dict[str, Tensor]]]
) -> Comparison:
    q_scores, closeness, layers = zip(*steps, strict=True)
    total = _total(closeness)
    figures = run.figures(q_scores)
    return Comparison(
        **figures,
        reference=reference,
        agreement=100 * total["agreeing"] / figures["images"],
        kl=total["kl"] / total["finite"] if total["finite"] else math.nan,
        logit_sqnr_db=sqnr_db(total["signal"], total["noise"]) if total["finite"] else math.nan,
        layer_sqnr_db={name: sqnr_db(*sums.tolist()) for name, sums in _total(layers).items()},
    )


def preprocess_for(images: Images, given: Preprocess | None, *models: nn.Module) -> Preprocess | None:
    """What was given, or for a folder what a model says of itself."""
    if given is not None or not isinstance(images, str | os.PathLike):
        return given
    return next((found for model in models if (found := preprocess_of(model)) is not None), None)


@dataclass
class _Run:
    """One pass over the images, with progress and Ctrl-C heeded."""

    what: str
    batches: Batches
    progress: bool
    on_interrupt: str
    interrupted: bool = False

    def __post_init__(self) -> None:
        if self.on_interrupt not in ("raise", "partial"):
            raise ConfigError(f"on_interrupt must be 'raise' or 'partial', got {self.on_interrupt!r}.")

    def over(self, step: Callable[[Tensor, Tensor | None], Step]) -> list[Step]:
        # One entry per whole batch, added up afterwards: an interrupt never leaves half a batch counted.
        results: list[Step] = []
        with progress_bar(self.progress, self.what, self.batches.total, "img") as advance:
            try:
                for x, labels in self.batches:
                    results.append(step(x, labels))
                    advance(len(x))
            except KeyboardInterrupt:
                if self.on_interrupt == "raise" or not results:
                    raise
                self.interrupted = True
        if not results:
            why = "the images hold none"
            if broken := self.batches.broken:
                why = f"none of {len(broken)} files can be read, the first ({broken[0].path}): {broken[0].reason}"
            raise DataError(f"There are no images to evaluate: {why}.")
        return results

    def figures(self, scores: Iterable[Sums]) -> dict[str, Any]:
        total = _total(scores)
        count = int(total["images"])
        return {
            "images": count,
            "top1": 100 * total["top1"] / count if "top1" in total else None,
            "top5": 100 * total["top5"] / count if "top5" in total else None,
            "nonfinite": int(total["nonfinite"]),
            "seconds": total["seconds"],
            "broken": self.batches.broken,
            "interrupted": self.interrupted,
        }


@contextmanager
def ready(models: list[nn.Module], device: str | torch.device | None) -> Iterator[None]:
    """Evaluation mode, inference mode and ``device`` for as long as the block lasts."""
    homes = [device_of(model) for model in models]
    try:
        for model in models:
            if device is not None:
                try:
                    model.to(device)
                except (RuntimeError, AssertionError) as error:
                    raise ConfigError(f"The device {str(device)!r} cannot be used: {first_line(error)}") from error
        with evaluation_mode(models), torch.inference_mode():
            yield
    finally:
        if device is not None:
            for model, home in zip(models, homes, strict=True):
                model.to(home)


def _forward(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, float]:
    """Float64 logits (N, classes) on the CPU and the seconds they took; copying them waits for the device."""
    x = as_input_of(model, x)
    start = time.perf_counter()
    try:
        output = model(x)
    except RuntimeError as error:
        what = f"images of shape {tuple(x.shape)}, {x.dtype}, {x.device}"
        raise ModelError(f"The {name} cannot run on {what}: {first_line(error)}") from error
    logits = logits_in(output)
    if not isinstance(logits, Tensor):
        raise ModelError(f"The {name} must return logits (N, classes), got {type(output).__name__}.")
    values = logits.cpu()
    seconds = time.perf_counter() - start
    if values.ndim < 2 or values.shape[:2].numel() != values.numel() or len(values) != len(x):
        raise ModelError(f"The {name} must return logits ({len(x)}, classes), got a tensor {tuple(values.shape)}.")
    return values.flatten(1).double(), seconds


def logits_in(output: Any) -> Any:
    """Return the field ``logits`` of what a model returned, or its first field, item or value, or itself."""
    if isinstance(output, Mapping):
        return output.get("logits", next(iter(output.values()), None))
    if is_dataclass(output):
        values = [getattr(output, field.name) for field in fields(output)]
        first = next((value for value in values if isinstance(value, Tensor)), output)
        return getattr(output, "logits", first)
    first = output[0] if isinstance(output, tuple | list) and output else output
    return getattr(output, "logits", first)


def _score(logits: Tensor, labels: Tensor | None, seconds: float, folder: ImageFolder | None) -> Sums:
    finite = logits.isfinite().all(1)
    score: Sums = {"images": len(logits), "nonfinite": int((~finite).sum()), "seconds": seconds}
    classes = logits.shape[1]
    # Names that were given, and not those of class folders, which may be any.
    names = None if folder is None or folder.order not in (None, "given") else folder.classes
    if names is not None and len(names) != classes:
        raise DataError(
            f"classes: expected {classes} names, one for each output of the model in their order, got {len(names)}"
        )
    if labels is None:
        return score
    labels = labels.cpu()
    _check_labels(labels, classes, folder)
    target = logits.gather(1, labels[:, None])
    # The rank argmax implies: among equal logits the lower class comes first.
    number = torch.arange(classes, dtype=torch.int64, device="cpu")
    ahead = (logits > target) | ((logits == target) & (number < labels[:, None]))
    rank = ahead.sum(1)
    score["top1"] = int((finite & (rank < 1)).sum())
    if classes > 5:
        score["top5"] = int((finite & (rank < 5)).sum())
    return score


def _check_labels(labels: Tensor, classes: int, folder: ImageFolder | None) -> None:
    # A folder's labels are all known: a wrong one shows in the first batch instead of after an hour.
    known = labels if folder is None or folder.labels is None else folder.labels
    wrong = (known < 0) | (known >= classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        file = f" ({folder.files[place]})" if folder is not None else ""
        raise DataError(
            f"The labels do not belong to this model: an image{file} has the class index {int(known[place])}, but the "
            f"model has {classes} classes, 0 to {classes - 1}."
        )
    if folder is None or folder.classes is None or folder.order == "given":
        return
    if len(folder.classes) != classes:
        warnings.warn(
            f"{folder.path} has {len(folder.classes)} class folders but the model {classes} classes, so their order "
            f"({folder.order_in_words}) is probably not the model's: use ImageFolder(classes=...), --classes or a "
            "labels.csv.",
            stacklevel=2,
        )
    elif folder.is_doubtful:
        warnings.warn(
            f"The class folders of {folder.path} are ordered {folder.order_in_words}. Numbers within names do not "
            "count: if the model's outputs have another order, use ImageFolder(classes=...), --classes or a "
            "labels.csv.",
            stacklevel=2,
        )


def _closeness(f: Tensor, q: Tensor) -> Sums:
    finite = (f.isfinite() & q.isfinite()).all(1)
    agreeing = int((finite & (f.argmax(1) == q.argmax(1))).sum())
    f, q = f[finite], q[finite]
    log_p, log_q = f.log_softmax(1), q.log_softmax(1)
    return {
        "agreeing": agreeing,
        "finite": len(f),
        "kl": float((log_p.exp() * (log_p - log_q)).sum()),
        "signal": float(f.square().sum()),
        "noise": float((f - q).square().sum()),
    }


@contextmanager
def _layer_errors(reference: nn.Module, qmodel: nn.Module, wanted: bool) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Hooks on every DSConv layer of ``qmodel`` and its namesake in ``reference``.

    Yields a function that returns, by layer, the float64 pair (sum f^2, sum (f - q)^2) since it was last called.
    """
    originals = dict(reference.named_modules(remove_duplicate=False))
    expected: defaultdict[str, deque[Tensor]] = defaultdict(deque)
    errors: dict[str, Tensor] = {}
    hooks = []

    def remember(name: str, output: Tensor) -> None:
        expected[name].append(output.clone())  # a ReLU in place would overwrite it before the quantized layer runs

    def compare_outputs(name: str, q: Tensor) -> None:
        f = expected[name].popleft().to(q.device).float() if expected[name] else None
        if f is None or f.shape != q.shape:
            got = "does not run as often" if f is None else f"returns {tuple(f.shape)} instead of {tuple(q.shape)}"
            raise ModelError(
                f"The layer {name!r} of the reference {got} as in the quantized model; per_layer=False skips it."
            )
        noise = (f - q.float()).square_().sum(dtype=torch.float64)
        pair = torch.stack([f.square_().sum(dtype=torch.float64), noise]).cpu()
        errors[name] = errors[name] + pair if name in errors else pair

    def take() -> dict[str, Tensor]:
        if left := [name for name, outputs in expected.items() if outputs]:
            raise ModelError(f"The layer {left[0]!r} runs more often in the reference than in the quantized model.")
        taken = dict(errors)
        errors.clear()
        return taken

    try:
        for name, layer in qmodel.named_modules() if wanted else ():
            if hasattr(layer, "vqk"):
                if name not in originals:
                    raise ModelError(f"The reference has no layer {name!r}: give the network that was quantized.")
                hooks.append(originals[name].register_forward_hook(lambda _, __, out, name=name: remember(name, out)))
                hooks.append(layer.register_forward_hook(lambda _, __, out, name=name: compare_outputs(name, out)))
        yield take
    finally:
        for hook in hooks:
            hook.remove()


def _total(batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for sums in batches:
        for name, value in sums.items():
            total[name] = total.get(name, 0) + value
    return total


def _json(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _table(columns: Mapping[str, Evaluation]) -> Any:
    from rich.table import Column, Table

    def row(title: str, show: str, attribute: str) -> None:
        values = [getattr(result, attribute) for result in columns.values()]
        table.add_row(title, *("-" if value is None else show.format(value) for value in values))

    table = Table("", *(Column(name, justify="right") for name in columns))
    row("images", "{:,}", "images")
    row("top-1", "{:.2f} %", "top1")
    row("top-5", "{:.2f} %", "top5")
    row("non-finite images", "{:,}", "nonfinite")
    row("images per second", "{:.1f}", "images_per_second")
    return table


def _remarks(result: Evaluation) -> Iterator[Any]:
    from rich.text import Text

    if result.interrupted:
        yield Text(f"Interrupted: the figures cover the first {result.images:,} images only.", style="bold")
    if result.broken:
        yield Text(f"{len(result.broken)} files could not be read and are not counted:", style="bold")
        for path, reason in result.broken[:5]:
            yield Text(f"  {path}: {reason}")
        if len(result.broken) > 5:
            yield Text("  ...")
