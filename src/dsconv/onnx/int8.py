"""Plain 8-bit ONNX files, which current runtimes execute in integers, and the ranges of activations for them."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsconv.data.inputs import Batch, in_batches, tensors_of
from dsconv.errors import import_extra
from dsconv.progress import Advance, progress_bar

# Factor for ranges on noise: features of photographs have longer tails. Clipping them costs far more than a bit.
_MARGIN = 2.0
# x86 processors without VNNI multiply bytes by vpmaddubsw, which adds the products of two neighbours in 16 bits and
# saturates: with activations of up to 255, the sum of two weights may be at most 128. Rounding adds at most one to
# such a sum.
_LARGEST_PAIR = ((1 << 15) - 1) // 255 - 1
_LARGEST = 127
# Axis of the output channels, by the operator whose second input is the weight.
_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


def quantize(
    network: Path,
    path: Path,
    images: Batch,
    *,
    inputs: Sequence[str] | None = None,
    like: Path | None = None,
    operators: Sequence[str] | None = None,
    full_range: bool = False,
    progress: bool = False,
) -> None:
    """Write a float ONNX file with uint8 activations, one scale per tensor, and int8 weights, one scale per output.

    Both are placed between QuantizeLinear and DequantizeLinear, which a runtime merges into its layers.

    Args:
        network: the float file.
        path: path of the file to write.
        images: inputs that are run, one by one, to find the ranges of activations.
        inputs: names of their tensors; a file lacks inputs that have no effect; None uses those of the file.
        like: file of a network with the same tensors, which is run on noise instead of ``network`` on images.
        operators: types of the nodes to quantize; None: all that ONNX Runtime supports.
        full_range: let weights use all of int8. Otherwise their scales ensure that no two products of a filter's
            weights with activations, added in 16 bits, can saturate.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    quantization = import_extra("onnx", "onnxruntime.quantization")
    bar = progress_bar(progress, "ranges for int8", len(images), "img")
    with tempfile.TemporaryDirectory() as folder, _quiet(), bar as advance:
        onnx = import_extra("onnx", "onnx")
        read = [given.name for given in onnx.load(network, load_external_data=False).graph.input]
        names = [name if name in read else None for name in inputs or read]
        overrides = {} if like is None else _ranges(_prepared(like, folder), _OneByOne(names, images, advance), folder)
        prepared = _prepared(network, folder)
        if not full_range:
            overrides |= _weight_scales(prepared)
        quantization.quantize_static(
            prepared,
            path,
            _OneByOne(names, images, advance) if like is None else _OneByOne(names, images[:1]),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=operators,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"TensorQuantOverrides": overrides},
        )


def feed(names: Sequence[str | None], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return the feed of ONNX Runtime for inputs with these ``names``; None marks those that a file lacks."""
    return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True) if name is not None}


class _OneByOne:
    """Images in the form that ``onnxruntime.quantization`` requests, by the ``names`` of their tensors."""

    def __init__(self, names: Sequence[str | None], images: Batch, advance: Advance | None = None):
        self.names, self.advance, self.given = list(names), advance, False
        self.rest: Iterator[Batch] = iter(in_batches(images, 1))

    def get_next(self) -> dict[str, Any] | None:
        # A request for the next image means that the last one is finished.
        if self.given and self.advance is not None:
            self.advance(1)
        image = next(self.rest, None)
        self.given = image is not None
        return None if image is None else feed(self.names, tensors_of(image))


def _prepared(network: Path, folder: str) -> Path:
    """Return the file with shapes, and with BatchNorm folded where possible."""
    inference = import_extra("onnx", "onnxruntime.quantization.shape_inference")
    prepared = Path(folder, f"prepared_{network.name}")
    inference.quant_pre_process(network, prepared)
    return prepared


def _ranges(network: Path, images: "_OneByOne", folder: str) -> dict[str, list[dict[str, Any]]]:
    """Return ranges of all tensors of a network on noise, with a margin, in the format of ``quantize_static``."""
    quantization = import_extra("onnx", "onnxruntime.quantization")
    calibrator = quantization.create_calibrator(network, augmented_model_path=str(Path(folder, "augmented.onnx")))
    calibrator.collect_data(images)
    found = calibrator.compute_data()
    ranges = {}
    for name in found.keys():  # noqa: SIM118
        low, high = (np.float32(value.item() * (1 if name == "x" else _MARGIN)) for value in found[name].range_value)
        ranges[name] = [{"rmin": low, "rmax": high}]
    return ranges


def _weight_scales(network: Path) -> dict[str, list[dict[str, Any]]]:
    """Return scales of the weights that keep pairs of products within 16 bits, in the format of ``quantize_static``.

    There is one scale per output channel, or per tensor if its rank is not that of a weight with output channels.
    """
    onnx = import_extra("onnx", "onnx")
    graph = onnx.load(network).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    scales: dict[str, list[dict[str, Any]]] = {}
    for node in graph.node:
        if node.op_type not in _OUTPUT_AXIS or node.input[1] not in constants:
            continue
        weight = onnx.numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        axis = 0 if transposed else _OUTPUT_AXIS[node.op_type]
        by_channel = "Conv" in node.op_type or weight.ndim == 2
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1) if by_channel else weight.reshape(1, -1)
        where = {"axis": axis} if by_channel else {}
        scales[node.input[1]] = [
            {**where, "scale": scale, "zero_point": np.int8(0)} for scale in scales_without_saturation(rows)
        ]
    return scales


def scales_without_saturation(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the smallest scale ``(N,)`` of each row of weights ``(N, K)`` whose int8 values never saturate in pairs.

    Rounded to multiples of it, no weight exceeds 127 and no two weights of one sign have a sum above 128: products with
    two uint8 activations stay within the 16 bits in which processors without VNNI add them, in any order.

    >>> scales_without_saturation(np.array([[127.0, 0, -127], [127, 127, 0]]))
    array([1., 2.], dtype=float32)
    """
    largest = (np.sort(np.maximum(signed, 0), axis=1)[:, -2:].sum(1) for signed in (rows, -rows))
    scale = np.maximum(np.abs(rows).max(1, initial=0) / _LARGEST, np.maximum(*largest) / _LARGEST_PAIR)
    # Like ONNX Runtime for rows that are zero, or almost zero.
    return np.where(scale < np.finfo(np.float32).tiny, 1, scale).astype(np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the quantizer's messages about every BatchNorm, which has a single scale for all its channels."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
