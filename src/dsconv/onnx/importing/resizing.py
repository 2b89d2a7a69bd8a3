"""Resizing of images."""

import math
import operator as python
from typing import Any

import numpy as np
from torch import fx
from torch.nn import functional as F

from dsconv.onnx.importing.builder import Builder
from dsconv.onnx.importing.functions import resized_linear, resized_nearest
from dsconv.onnx.importing.table import operator
from dsconv.onnx.importing.values import Attributes, Sizes, Unsupported, Value

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@operator("Resize", "Upsample")
def resize(op: Builder, a: Attributes, x: Value, *given: Value) -> fx.Node:
    """Resize images to known sizes, by a factor, or by a factor computed from sizes."""
    mode, nearest = a.text("mode", "nearest"), a.text("nearest_mode", "round_prefer_floor")
    coordinates = a.text("coordinate_transformation_mode", "half_pixel")
    inputs: tuple[Value, ...] = (*given, None, None, None)
    scales, target = (inputs[1], inputs[2]) if op.opset >= 11 else (inputs[0], None)
    if op.opset < 11:
        # Upsample, and the Resize of opset 10.
        coordinates, nearest = "asymmetric", "floor"
        scales = np.array(a.get("scales"), np.float32) if "scales" in a else scales
    if isinstance(scales, np.ndarray) and not scales.size:
        scales = None
    _check(a, coordinates, mode)
    factors, sizes = _plan(op, x, scales, target, a.ints("axes"))
    source = op.tensor(x)
    if mode == "nearest":
        whole = factors is not None and all(float(factor).is_integer() for factor in factors)
        exact = coordinates in ("half_pixel", "pytorch_half_pixel")
        if (coordinates, nearest) == ("asymmetric", "floor") or (whole and exact and nearest.startswith("round")):
            return _interpolated(op, source, factors, sizes, mode="nearest")
        return op.call(resized_nearest, source, sizes, factors, coordinates, nearest)
    if mode == "linear" and coordinates == "asymmetric":
        return op.call(resized_linear, source, sizes, factors, coordinates)
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise Unsupported(f"mode {mode!r} with coordinates {coordinates!r}")
    if mode == "linear" and coordinates == "half_pixel" and any(isinstance(n, int) and n == 1 for n in sizes):
        return op.call(resized_linear, source, sizes, factors, coordinates)
    corners = coordinates == "align_corners"
    if mode == "cubic" and (len(sizes) != 2 or a.get("cubic_coeff_a", -0.75) != -0.75 or a.get("exclude_outside", 0)):
        raise Unsupported("mode 'cubic' other than bicubic with a coefficient of -0.75")
    name = "bicubic" if mode == "cubic" else _MODES[len(sizes)]
    return _interpolated(op, source, factors, sizes, mode=name, align_corners=corners)


def _check(a: Attributes, coordinates: str, mode: str) -> None:
    if mode not in ("nearest", "linear", "cubic"):
        raise Unsupported(f"mode {mode!r}")
    if coordinates in ("tf_crop_and_resize", "half_pixel_symmetric", "tf_half_pixel_for_nn"):
        raise Unsupported(f"coordinates {coordinates!r}")
    if a.get("antialias", 0) or a.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("antialias or keep_aspect_ratio_policy")


def _plan(
    op: Builder, x: Value, scales: Value, target: Value, axes: "list[int] | None"
) -> "tuple[list[float] | None, list[Any]]":
    """Return factors of the spatial dimensions, or None, and the resulting sizes."""
    rank = op.rank(x)
    given = op.numbers(target if scales is None else scales)
    if axes is not None:
        by_axis = dict(zip([op.axis(x, axis) for axis in axes], given, strict=True))
        given = [by_axis.get(dim, op.size(x, dim) if scales is None else 1.0) for dim in range(op.known_rank(x))]
    if len(given) != (rank or len(given)) or not 3 <= len(given) <= 5:
        raise Unsupported(f"an input of {rank} dimensions with {len(given)} factors or sizes")
    spatial = given[2:]
    if scales is None:
        return None, spatial
    if isinstance(scales, Sizes) and any(isinstance(factor, fx.Node) for factor in spatial):
        # A ratio of two sizes, times the second one, is the first one.
        return None, [_times(op, op.size(x, dim), factor) for dim, factor in enumerate(spatial, 2)]
    if any(factor != 1 for factor in given[:2]):
        raise Unsupported("a factor for batch or channels")
    factors = [float(factor) for factor in spatial if not isinstance(factor, fx.Node)]
    return factors, [_times(op, op.size(x, dim), factor) for dim, factor in enumerate(factors, 2)]


def _times(op: Builder, size: "int | fx.Node", factor: Any) -> Any:
    """Return a size times a factor, rounded down."""
    if isinstance(factor, fx.Node) and factor.target is python.truediv and _same(factor.args[1], size):
        whole: Any = factor.args[0]
        return whole.args[0] if isinstance(whole, fx.Node) else int(whole)
    if not isinstance(size, fx.Node) and not isinstance(factor, fx.Node):
        return math.floor(size * factor)
    if isinstance(factor, float) and factor.is_integer():
        return op.call(python.mul, size, int(factor))
    return op.call(math.floor, op.call(python.mul, size, factor))


def _same(divisor: Any, size: Any) -> bool:
    """Return whether a divisor is a size as a fraction."""
    return (divisor.args[0] is size) if isinstance(divisor, fx.Node) else divisor == size


def _interpolated(op: Builder, x: fx.Node, factors: "list[float] | None", sizes: list[Any], **how: Any) -> fx.Node:
    if factors is None:
        return op.call(F.interpolate, x, size=sizes, **how)
    return op.call(F.interpolate, x, scale_factor=factors, **how)


@operator("GridSample")
def grid_sample(op: Builder, a: Attributes, x: Value, grid: Value) -> fx.Node:
    """Sample pixels at computed positions."""
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(name := a.text("mode", "bilinear"), name)
    how = mode, a.text("padding_mode", "zeros"), bool(a.get("align_corners", 0))
    return op.call(F.grid_sample, op.tensor(x), op.tensor(grid), *how)
