"""Sums over a batch: correct outputs of a network, and distance of a quantized network from its reference."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsconv.data.folder import ImageFolder, Labels
from dsconv.errors import DataError
from dsconv.evaluation.maps import mean_iou, overlaps
from dsconv.evaluation.measures import Kinds, Output, divergence, is_logits, logits_of, rows
from dsconv.evaluation.pixels import has_windows, squared_error, ssim
from dsconv.evaluation.results import Closeness
from dsconv.names import Task
from dsconv.numerics import sqnr_db

Sums = dict[str, Any]

# Number of values of an output that are processed together, in float64.
_AT_ONCE = 1 << 22


def score(
    outputs: Mapping[str, Output],
    kinds: Kinds,
    images: int,
    labels: Labels | None,
    seconds: float,
    folder: ImageFolder | None,
    data_range: float | None = None,
) -> Sums:
    """Return sums for a single network: non-finite images, and correctness of the others.

    Raises:
        DataError: labels, or names of classes in ``folder``, do not match the model.
    """
    counted = kinds.counted if kinds.task == "classification" else kinds.of
    finite = torch.ones(images, dtype=torch.bool, device="cpu")
    for name in counted:
        finite &= _finite(outputs[name], images)
    found: Sums = {"images": images, "nonfinite": int((~finite).sum()), "seconds": seconds}
    main = None if kinds.main is None or kinds.of[kinds.main] != kinds.task else outputs[kinds.main]
    if isinstance(main, list) and len({tensor.shape for tensor in main}) == 1:
        main = torch.stack(main)
    if not isinstance(main, Tensor):
        return found
    if not isinstance(labels, Tensor):
        labels = None
    if kinds.task == "classification":
        logits = logits_of(main, kinds.task).double()
        return found | _right(logits, finite, None if labels is None else labels.cpu(), folder)
    if labels is None or labels.dim() == 1:  # labels of class folders, which cannot be compared with maps
        return found
    labels = labels.cpu()
    if kinds.task == "segmentation":
        return found | {"overlaps": _overlaps_with(labels, logits_of(main, kinds.task))}
    if kinds.task == "images":
        if labels.shape != main.shape:
            expected = f"targets {tuple(main.shape)} like the output"
            raise DataError(f"labels: expected {expected}, got a {labels.dtype} tensor {tuple(labels.shape)}")
        return found | _of_pictures(labels, main, data_range)
    return found


def _finite(output: Output, images: int) -> Tensor:
    """Return for which images ``(N,)`` an output is finite; an output that is not per image counts for all."""
    if isinstance(output, list):
        return torch.stack([tensor.isfinite().all() for tensor in output])
    if output.dim() and len(output) == images:
        return rows(output.isfinite()).all(1)
    return output.isfinite().all().expand(images)


def _right(logits: Tensor, finite: Tensor, labels: Tensor | None, folder: ImageFolder | None) -> Sums:
    """Count the images whose label is the largest of the logits ``(N, classes)``, or among the five largest."""
    classes = logits.shape[1]
    # Only names that were given, since those of class folders may be anything.
    names = None if folder is None or folder.order not in (None, "given") else folder.classes
    if names is not None and len(names) != classes:
        raise DataError(
            f"classes: expected {classes} names, one for each output of the model in their order, got {len(names)}"
        )
    if labels is None:
        return {}
    if labels.dim() != 1 or labels.is_floating_point():
        expected = f"{len(logits)} class indices, one for each image of logits {tuple(logits.shape)}"
        raise DataError(f"labels: expected {expected}, got a {labels.dtype} tensor {tuple(labels.shape)}")
    _check_labels(labels, classes, folder)
    target = logits.gather(1, labels[:, None])
    # The rank that argmax implies: among equal logits the lower class comes first.
    number = torch.arange(classes, dtype=torch.int64, device="cpu")
    ahead = (logits > target) | ((logits == target) & (number < labels[:, None]))
    rank = ahead.sum(1)
    found: Sums = {"top1": int((finite & (rank < 1)).sum())}
    if classes > 5:
        found["top5"] = int((finite & (rank < 5)).sum())
    return found


def _overlaps_with(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.shape != logits[:, 0].shape:
        expected = f"maps {tuple(logits[:, 0].shape)} of class indices, for logits {tuple(logits.shape)}"
        raise DataError(f"labels: expected {expected}, got a {labels.dtype} tensor {tuple(labels.shape)}")
    return overlaps(labels, logits.argmax(1), logits.shape[1])


def _check_labels(labels: Tensor, classes: int, folder: ImageFolder | None) -> None:
    # All labels of a folder are known: a wrong one shows in the first batch instead of after an hour.
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


def closeness(f: Output, q: Output, kind: Task | None, images: int, data_range: float | None = None) -> Sums:
    """Return sums over a batch for the measures of an output ``f`` of the reference and ``q`` of the quantized network.

    Args:
        kind: None if the output is not floating-point.
        data_range: range of the pixel values, see :func:`dsconv.evaluation.pixels.ssim`.
    """
    total: Sums = {"images": images, "differing": 0, "lost": 0.0}
    for a, b, weight in _alike(f, q, images):
        if b is None:
            total["differing"] += len(a) * weight
            a = a.double()
            total["lost"] += float(a[a.isfinite()].square().sum())
        elif kind is None:
            total = total_of([total, {"finite": len(a) * weight, "agreeing": weight * _share(a == b)}])
        else:
            total = total_of([total, _sums(a.double(), b.double(), kind, weight, data_range)])
    return total


def _alike(f: Output, q: Output, images: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Split a batch: yield some images ``(n, ...)`` of both outputs, or None for those that differ in shape.

    The number is the count of images that each entry represents: one, unless the output is for the batch as a whole.
    """
    if isinstance(f, list):
        for a, b in zip(f, q, strict=True):
            yield a[None], b[None] if a.shape == b.shape else None, 1
        return
    assert isinstance(q, Tensor)
    if not f.dim() or len(f) != images:
        yield f[None], q[None] if f.shape == q.shape else None, images
        return
    if f.shape != q.shape:
        yield f, None, 1
        return
    count = max(1, _AT_ONCE * images // max(1, f.numel()))
    for a, b in zip(torch.split(f, count), torch.split(q, count), strict=True):
        yield a, b, 1


def _sums(f: Tensor, q: Tensor, kind: Task, weight: int, data_range: float | None) -> Sums:
    finite = rows(f.isfinite() & q.isfinite()).all(1)
    f, q = f[finite], q[finite]
    found: Sums = {
        "finite": len(f) * weight,
        "signal": float(f.square().sum()),
        "noise": float((f - q).square().sum()),
    }
    if kind == "images":
        return found | _of_pictures(f, q, data_range)
    if is_logits(kind):
        log_f, log_q = logits_of(f, kind), logits_of(q, kind)
        first, second = log_f.argmax(1), log_q.argmax(1)
        found |= {"agreeing": _share(first == second), "kl": float(divergence(log_f, log_q).sum())}
        if kind == "segmentation":
            found["overlaps"] = overlaps(first, second, log_f.shape[1])
    return found


def _share(equal: Tensor) -> float:
    """Return the mean over the positions of each image, summed over images."""
    values = rows(equal).double()
    return float(values.mean(1).sum()) if values.numel() else float(len(values))


def _of_pictures(wanted: Tensor, got: Tensor, data_range: float | None) -> Sums:
    wanted, got = wanted.double(), got.double()
    found: Sums = {"pictures": len(got), "squared_error": float(squared_error(wanted, got, data_range).sum())}
    if has_windows(got):
        found["ssim"] = float(ssim(wanted, got, data_range).sum())
    return found


def map_figures(total: Sums) -> dict[str, float | None]:
    """Return the figures of maps and images from sums: mean IoU, PSNR and SSIM, None for missing ones."""
    count = total.get("pictures")
    return {
        "miou": mean_iou(total["overlaps"]) if "overlaps" in total else None,
        "psnr_db": sqnr_db(count, total["squared_error"]) if count else None,
        "ssim": total["ssim"] / count if count and "ssim" in total else None,
    }


def of_output(total: Sums, kind: Task | None) -> Closeness:
    """Return the closeness of an output, from the sums of :func:`closeness` over all batches."""
    count, images = total.get("finite", 0), total["images"]
    figures: dict[str, float | None] = map_figures(total)
    if kind is not None:
        signal, noise, lost = total.get("signal", 0.0), total.get("noise", 0.0), total["lost"]
        error = noise + lost
        figures["sqnr_db"] = sqnr_db(signal, noise) if count else math.nan
        figures["relative_error"] = (error / (signal + lost) if error else 0.0) if count or lost else math.nan
    if kind is None or is_logits(kind):
        figures["agreement"] = 100 * total.get("agreeing", 0) / images
    if kind is not None and is_logits(kind):
        figures["kl"] = total["kl"] / count if count else math.nan
    return Closeness(kind=kind or "other", images=count, differing=total["differing"], **figures)


def total_of(batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add up the sums of all batches by name."""
    total: dict[str, Any] = {}
    for sums in batches:
        for name, value in sums.items():
            total[name] = total.get(name, 0) + value
    return total
