"""Sums over a batch of logits: how often a network is right, and how far a quantized one is from its reference."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dsconv.data.folder import ImageFolder
from dsconv.errors import DataError

Sums = dict[str, float]


def score(logits: Tensor, labels: Tensor | None, seconds: float, folder: ImageFolder | None) -> Sums:
    """Return counts of images that are right and of those that are not finite.

    Raises:
        DataError: labels, or names of classes in ``folder``, do not belong to the model.
    """
    finite = logits.isfinite().all(1)
    found: Sums = {"images": len(logits), "nonfinite": int((~finite).sum()), "seconds": seconds}
    classes = logits.shape[1]
    # Names that were given, and not those of class folders, which may be any.
    names = None if folder is None or folder.order not in (None, "given") else folder.classes
    if names is not None and len(names) != classes:
        raise DataError(
            f"classes: expected {classes} names, one for each output of the model in their order, got {len(names)}"
        )
    if labels is None:
        return found
    labels = labels.cpu()
    _check_labels(labels, classes, folder)
    target = logits.gather(1, labels[:, None])
    # The rank argmax implies: among equal logits the lower class comes first.
    number = torch.arange(classes, dtype=torch.int64, device="cpu")
    ahead = (logits > target) | ((logits == target) & (number < labels[:, None]))
    rank = ahead.sum(1)
    found["top1"] = int((finite & (rank < 1)).sum())
    if classes > 5:
        found["top5"] = int((finite & (rank < 5)).sum())
    return found


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


def closeness(f: Tensor, q: Tensor) -> Sums:
    """Return sums from which agreement, KL and SQNR of logits follow, of the reference ``f`` and of ``q``."""
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


def total_of(batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add up the sums of all batches by name."""
    total: dict[str, Any] = {}
    for sums in batches:
        for name, value in sums.items():
            total[name] = total.get(name, 0) + value
    return total
