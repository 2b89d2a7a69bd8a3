"""Input statistics of layers, derived from the BatchNorms of a network without data.

After a BatchNorm in inference, the mean and the standard deviation of a channel over the training images are its shift
and its scale. The effect of an activation, a pooling or a sum is measured on noise: a copy of the network runs on it
with BatchNorms that normalise the noise, so that the channels after each have exactly these moments.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dsconv.conversion.copying import copied
from dsconv.data import Preprocess, synthetic_images
from dsconv.layers.inputs import as_input_of
from dsconv.layers.kinds import kind_of
from dsconv.numerics import InputMoments
from dsconv.threads import PyTorchOnOneThread

_IMAGES, _FEW_IMAGES = 16, 4
# Sizes of noise for networks whose input size is unknown: the first one that works and makes the next unnecessary.
_SIDES = (64, 224, 32)
# Minimum number of positions for estimating the mean and variance of a channel.
_ENOUGH = 512


def input_moments(model: nn.Module, preprocess: Preprocess | None = None) -> dict[nn.Module, InputMoments]:
    """Return mean and variance of the input channels of each layer with no other layer between it and a BatchNorm.

    Layers without a BatchNorm before them are omitted, as are layers with too few pixels, and all layers of a network
    that cannot run on noise. ``model`` is unchanged.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> moments = input_moments(net)[net[3]]
    >>> moments.mean.shape, bool((moments.mean - 0.4).abs().max() < 0.05)  # of a normal variable's positive part
    (torch.Size([1, 8]), True)
    """
    if not with_statistics(model):
        return {}
    found: dict[nn.Module, InputMoments] = {}
    for images in _noises(model, preprocess, _IMAGES):
        try:
            found, missing = _measured(model, as_input_of(model, images))
        except Exception:  # a network may raise anything for unexpected inputs
            continue
        if not missing:
            break
    return found


def signed_inputs(model: nn.Module, preprocess: Preprocess | None = None) -> set[nn.Module]:
    """Return the layers whose input can be negative: those that read a negative value when the network runs on noise.

    A layer that does not run is included, as are all layers of a network that cannot run on noise. ``model`` is
    unchanged.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 8, 3))
    >>> [net[i] in signed_inputs(net) for i in (0, 2, 4)]
    [True, False, True]
    """
    layers = {module for module in model.modules() if kind_of(module) is not None}
    for images in _noises(model, preprocess, _FEW_IMAGES):
        run = copied(model).eval()
        unsigned: dict[nn.Module, bool] = {}

        def look(layer: nn.Module, args: Any, kwargs: Any, unsigned: dict[nn.Module, bool] = unsigned) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            unsigned[layer] = unsigned.get(layer, True) and bool((x >= 0).all())

        original = dict(zip(run.modules(), model.modules(), strict=True))
        for copy, module in original.items():
            if module in layers:
                copy.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.no_grad():
                run(as_input_of(run, images))
        except Exception:  # a network may raise anything for unexpected inputs
            continue
        return layers - {original[copy] for copy, found in unsigned.items() if found}
    return layers


def normalized(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a network whose BatchNorms have the statistics of ``images`` instead of the training images.

    Their outputs then have the means and standard deviations of the training images, which scale and shift determine,
    whatever ``images`` are.
    """
    result = _normalizing(model)
    with torch.no_grad():
        result(as_input_of(result, images))
    return result.eval()


def noise(preprocess: Preprocess | None, shape: Sequence[int], count: int = _IMAGES) -> Tensor:
    """Return random inputs of ``shape (C, ...)``, prepared as ``preprocess`` defines; with unit variance without it."""
    if preprocess is not None and len(shape) == 3 and shape[0] == (1 if preprocess.channels == "gray" else 3):
        sized = {**preprocess.model_dump(), "resize": tuple(shape[1:]), "crop": None}
        return synthetic_images(count, Preprocess(**sized))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float32, device="cpu")


def _noises(model: nn.Module, preprocess: Preprocess | None, count: int) -> Iterator[Tensor]:
    """Yield noise of the sizes that a network's images may have; none if its first layer does not read images."""
    first: Any = next((layer for layer in model.modules() if kind_of(layer) is not None), None)
    kind = kind_of(first)
    if kind is None or kind.dims != 2 or kind.transposed:
        return
    channels = kind.float_input_shape(first, 1)[1]
    known = preprocess is not None and (preprocess.crop or preprocess.resize) is not None
    for side in (None,) if known else _SIDES:
        yield noise(preprocess, (channels, *((side,) * 2 if side else _size(preprocess))), count)


def with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms of a model that have running statistics of the training."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _normalizing(model: nn.Module) -> nn.Module:
    """Return a copy whose BatchNorms normalise their input and record its statistics."""
    result = copied(model).eval()
    for batchnorm in with_statistics(result):
        batchnorm.reset_running_stats()
        batchnorm.momentum = None  # a plain mean over all images
        batchnorm.train()
    return result


def _size(preprocess: Preprocess | None) -> tuple[int, ...]:
    assert preprocess is not None
    size = preprocess.crop or preprocess.resize
    return (size, size) if isinstance(size, int) else tuple(size or ())


def _measured(model: nn.Module, images: Tensor) -> tuple[dict[nn.Module, InputMoments], bool]:
    """Return the moments, and whether larger images would give more of them."""
    run = _normalizing(model)
    original: Mapping[nn.Module, nn.Module] = dict(zip(run.modules(), model.modules(), strict=True))
    found: dict[nn.Module, InputMoments] = {}
    told = missing = False
    kinds = {module: kind for module in run.modules() if (kind := kind_of(module)) is not None and kind.dims in (0, 2)}
    rows = {module for module, kind in kinds.items() if kind.dims == 0}

    def before(layer: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal told, missing
        if not told or original[layer] in found:
            return
        x = inputs[0].detach().float()
        x = x.flatten(0, -2).mT.unsqueeze(0) if layer in rows else x.flatten(2)
        if x.shape[0] * x.shape[2] < _ENOUGH:
            missing = missing or layer not in rows
            return
        with PyTorchOnOneThread(always=True):
            variance, mean = _var_mean(x)
        if variance.isfinite().all():
            groups = getattr(layer, "groups", 1)
            found[original[layer]] = InputMoments(mean.view(groups, -1), variance.view(groups, -1))

    def after(module: nn.Module, *_: Any) -> None:
        nonlocal told
        told = isinstance(module, _BatchNorm)

    for module in run.modules():
        if module in kinds:
            module.register_forward_pre_hook(before)
        if module in kinds or isinstance(module, _BatchNorm):
            module.register_forward_hook(after)
    with torch.no_grad():
        run(images)
    return found, missing


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean ``(C,)`` of the channels of ``(N, C, P)``, five times as fast as ``torch.var_mean``."""
    count = x.shape[0] * x.shape[2]
    # An image fits in cache where a batch does not.
    mean = torch.stack([image.sum(1) for image in x]).sum(0) / count
    squares = torch.stack([(image - mean.unsqueeze(1)).square_().sum(1) for image in x])
    return squares.sum(0) / (count - 1), mean
