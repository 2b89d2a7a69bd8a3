"""From a picture to a network's input, as ``dsconv.data.Preprocess`` does it, to the bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsconv_runtime.errors import DataError


def prepare(image: NDArray[np.uint8], preprocess: Mapping[str, Any]) -> NDArray[np.float32]:
    """Resize, crop, scale and normalise a picture as :attr:`Network.preprocess` says.

    Args:
        image: uint8 ``(height, width, 3)`` in the order red, green, blue, upright; ``(height, width)`` for networks of
            gray images.
        preprocess: the settings of ``dsconv.data.Preprocess``. Where ``resize`` changes the size, Pillow is needed:
            ``pip install 'dsconv-runtime[images]'``.

    Returns:
        float32 ``(channels, height, width)``.

    Raises:
        DataError: ``image`` has another shape.
        TypeError: ``image`` is no array of uint8.
        ImportError: the picture must be resized, and Pillow is not installed.

    >>> preprocess = {"crop": (2, 4), "mean": [0.5], "std": [0.25]}
    >>> prepare(np.full((5, 6, 3), 255, np.uint8), preprocess)[:, 0, 0]
    array([2., 2., 2.], dtype=float32)
    """
    settings = {
        "resize": None, "crop": None, "mean": [0.0], "std": [1.0],
        "interpolation": "bilinear", "scale": 1.0, "channels": "rgb",
    } | dict(preprocess)  # fmt: skip
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image: expected a NumPy array of uint8, got {got}")
    gray = settings["channels"] == "gray"
    if image.shape[2:] != (() if gray else (3,)) or image.ndim < 2 or image.size == 0:
        expected = "(height, width), since the network takes gray images" if gray else "(height, width, 3)"
        raise DataError(f"image: expected {expected}, got {image.shape}")
    height, width = image.shape[:2]
    size = _resized(height, width, settings["resize"])
    if size != (height, width):
        image = _resize(image, size, settings["interpolation"])
    if settings["crop"]:
        image = _crop_centre(image, *settings["crop"])
    x = np.atleast_3d(image).transpose(2, 0, 1).astype(np.float32, order="C")
    if settings["channels"] == "bgr":
        x = x[::-1].copy()
    x /= np.float32(255 / settings["scale"])
    x -= np.array(settings["mean"], np.float32).reshape(-1, 1, 1)
    x /= np.array(settings["std"], np.float32).reshape(-1, 1, 1)
    return x


def _resized(height: int, width: int, resize: Any) -> tuple[int, int]:
    if resize is None:
        return height, width
    if not isinstance(resize, int):
        new_height, new_width = resize
        return new_height, new_width
    return (int(resize * height / width), resize) if width <= height else (resize, int(resize * width / height))


def _resize(image: NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Pillow resizes images and is not installed: pip install 'dsconv-runtime[images]'") from error
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[interpolation.upper()]))


def _crop_centre(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return the centre of ``image``, with black around it where it is smaller."""
    cropped = np.zeros((height, width, *image.shape[2:]), np.uint8)
    taken, filled = zip(*map(_overlap, image.shape, (height, width)), strict=True)
    cropped[filled] = image[taken]
    return cropped


def _overlap(there: int, wanted: int) -> tuple[slice, slice]:
    gap = there - wanted
    begin = int(gap / 2) if gap < 0 else round(gap / 2)  # as torchvision rounds them
    count = min(there, wanted)
    return slice(max(begin, 0), max(begin, 0) + count), slice(max(-begin, 0), max(-begin, 0) + count)
