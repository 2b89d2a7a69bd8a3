"""Reading of calibration images, and checks that they match the data that the network was trained on."""

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv.conversion.preparation import preprocess_for, preprocess_of
from dsconv.data import Batches, ImageFolder, Images, Preprocess, batches
from dsconv.data.folder import Labels
from dsconv.data.inputs import Batch, Inputs, by_sample, call, in_float32, joined, shape_of, tensors_of
from dsconv.data.preprocess import PHOTOGRAPH_DEVIATION, PHOTOGRAPH_MEAN
from dsconv.errors import DataError
from dsconv.layers.inputs import as_input_of
from dsconv.progress import progress_bar

FEWEST, ENOUGH, GOOD = 4, 16, 128
# Ratio of the widths, or shift in standard deviations, above which images cause a warning, and an error.
_ODD, _FAR = 3.0, 10.0
# Images count as copies if their squared difference is below this fraction of their variance, in this many values.
_COPY, _COMPARED = 0.01, 1024


def read_images(
    images: Images,
    preprocess: Preprocess | None,
    limit: int | None,
    *models: nn.Module,
    enough: int = ENOUGH,
    good: int = GOOD,
    progress: bool = False,
) -> Batch:
    """Return all images without copies as one batch, floating-point tensors in float32; warn if fewer than ``enough``.

    Raises:
        DataError: there are too few, they differ in shape, or one is not finite.
    """
    return read_labelled(images, preprocess, limit, *models, enough=enough, good=good, progress=progress)[0]


def read_labelled(
    images: Images,
    preprocess: Preprocess | None,
    limit: int | None,
    *models: nn.Module,
    fewest: int = FEWEST,
    enough: int = ENOUGH,
    good: int = GOOD,
    progress: bool = False,
) -> tuple[Batch, Labels | None]:
    """Return the result of :func:`read_images`, at least ``fewest`` images, and their labels if there are any."""
    source = batches(images, preprocess=preprocess_for(images, preprocess, *models), limit=limit)
    parts: list[Batch] = []
    labels: list[Labels] = []
    with progress_bar(progress, "reading images", source.total, "img") as advance:
        for x, known in source:
            parts.append(in_float32(x))
            if known is not None:
                labels.append(known)
            advance(len(x))
    shapes = sorted({shape_of(part) for part in parts}, key=str)
    if len(shapes) > 1:
        raise DataError(f"images: expected all of one shape, got {shapes[0]} and {shapes[1]}: resize or crop them")
    count = sum(map(len, parts))
    source.warn_of_broken(stacklevel=4)
    x = joined(parts) if parts else torch.empty((0, 1), dtype=torch.float32, device="cpu")
    values = by_sample(x)
    if not (finite := values.isfinite().all(1)).all():
        raise DataError(f"images: image {int((~finite).nonzero()[0])} contains NaN or infinity")
    kept = ~(copies := _copies(values))
    x = x[kept]
    different = f"{len(x)} different ones, the other {count - len(x)} are copies of these" if copies.any() else count
    if len(x) < fewest:
        raise DataError(
            f"images: expected {enough} or more (at least {fewest}), got {different}: {good} are recommended"
        )
    if copies.any():
        warnings.warn(f"{count - len(x)} of {count} images are copies of others and are left out", stacklevel=4)
    if len(x) < enough:
        warnings.warn(f"{len(x)} images are few: expected {enough} or more; {good} are recommended", stacklevel=4)
    return x, labels_at(_one(labels), kept.nonzero().flatten()) if labels else None


def labels_at(labels: Labels, places: Tensor) -> Labels:
    """Return the labels at indices ``places``, int64 ``(n,)``."""
    return labels[places] if isinstance(labels, Tensor) else [labels[place] for place in places.tolist()]


def _one(labels: list[Labels]) -> Labels:
    """Return the labels of several batches as those of one."""
    tensors = [part for part in labels if isinstance(part, Tensor)]
    return torch.cat(tensors) if tensors else [one for part in labels for one in part]


def prepared_as(images: Images, given: Preprocess | None, *models: nn.Module) -> Preprocess | None:
    """Return the preprocessing of ``images``: that of a folder, ``given``, or the first one of ``models``."""
    folder = images.folder if isinstance(images, Batches) else images
    if isinstance(folder, ImageFolder):
        return folder.preprocess
    return given or next((found for model in models if (found := preprocess_of(model)) is not None), None)


def _copies(values: Tensor) -> Tensor:
    """Return which images of ``values (N, numbers)`` equal an earlier one except for noise."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(values.shape[1], generator=generator, dtype=torch.int64, device="cpu")[:_COMPARED]
    values = values[:, some].double()
    spread = (values - values.mean(1, keepdim=True)).square().sum(1)
    values = values - values.mean(0)  # so that products lose few digits
    squares = values.square().sum(1)
    found = torch.zeros(len(values), dtype=torch.bool, device="cpu")
    for image in range(1, len(values)):
        distance = squares[:image] + squares[image] - 2 * (values[:image] @ values[image])
        allowed = _COPY / 2 * (spread[:image] + spread[image]) + 1e-9 * (squares[:image] + squares[image])
        found[image] = bool((distance <= allowed).any())
    return found


def check_images(x: Batch, reference: nn.Module, qmodel: nn.Module, *, any_range: bool = False) -> None:
    """Warn about images that do not match the preprocessing of the network, if known; reject those far out of range.

    The expected range comes from its ``dsconv.data.Preprocess``, for which photographs have a known mean and standard
    deviation, and from the statistics of the training images in its first BatchNorm.

    Raises:
        DataError: mean or standard deviation is far from the expected one, unless ``any_range``.
    """
    far = False
    known = None if isinstance(x, Inputs) else prepared_as(x, None, qmodel, reference)
    first = next((t for t in tensors_of(x) if t.is_floating_point()), None)
    if first is None:
        return
    said, seen = [], f"their mean is {float(first.mean()):.3g} and their deviation {float(first.std()):.3g}"
    if known is not None and isinstance(x, Tensor):
        size = known.crop or known.resize
        if isinstance(size, tuple) and tuple(x.shape[2:]) != size:
            got, wanted = ("x".join(map(str, pixels)) for pixels in (x.shape[2:], size))
            said.append(f"they are {got}, the network's preparation makes them {wanted}")
        mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu") for v in (known.mean, known.std))
        expected = (
            float(((known.scale * PHOTOGRAPH_MEAN - mean) / std).mean()),
            float((known.scale * PHOTOGRAPH_DEVIATION / std).mean()),
        )
        width, offset = float(x.std()) / expected[1], (float(x.mean()) - expected[0]) / expected[1]
        far = far or _is_odd(width, offset, _FAR)
        if _is_odd(width, offset):
            said.append(f"photographs preprocessed for this network have {expected[0]:.3g} and {expected[1]:.3g}")
    batchnorm = next((name for name, module in reference.named_modules() if isinstance(module, _BatchNorm)), None)
    read = None if batchnorm is None else _read_by(reference, batchnorm, x[:ENOUGH])
    if read is not None:
        width, offset = read
        far = far or _is_odd(width, offset, _FAR)
        if _is_odd(width, offset):
            said.append(
                f"the standard deviation at the first BatchNorm, {batchnorm!r}, is {width:.3g} times that of its "
                f"training, and the mean is off by {offset:.3g} standard deviations"
            )
    if said:
        text = f"images: {seen}, but {'; '.join(said)}: prepare them as for evaluation"
        if far and not any_range:
            raise DataError(f"{text}, or pass any_range=True (--any-range) to take them as they are")
        warnings.warn(text, stacklevel=3)


def _is_odd(width: float, offset: float, most: float = _ODD) -> bool:
    return not 1 / most <= width <= most or abs(offset) > most


def _read_by(reference: nn.Module, name: str, x: Batch) -> tuple[float, float] | None:
    """Return the deviation of a BatchNorm's input and the distance of the means, in units of its running deviation."""
    batchnorm = reference.get_submodule(name)
    mean, var = getattr(batchnorm, "running_mean", None), getattr(batchnorm, "running_var", None)
    # An untrained one has no statistics.
    if mean is None or var is None or (not mean.any() and bool((var == 1).all())):
        return None
    found: list[tuple[float, float]] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].float().transpose(0, 1).flatten(1)
        of_mean, of_var = mean.float(), var.float()
        used = of_var > of_var.mean() * 1e-6
        width = (values.var(1) / of_var)[used].mean().sqrt()
        offset = ((values.mean(1) - of_mean).square() / of_var)[used].mean().sqrt()
        found.append((float(width), float(offset)))

    hook = batchnorm.register_forward_pre_hook(look)
    try:
        call(reference, as_input_of(reference, x))
    finally:
        hook.remove()
    return found[0] if found and all(map(math.isfinite, found[0])) else None
