"""Plain 8-bit ONNX files, which today's runtimes run in their own integers, and the ranges of activations for them."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dsconv.errors import import_extra
from dsconv.progress import Advance, progress_bar

# Of ranges on noise: on photographs, features have longer tails than that. Clipping them costs far more than a bit.
_MARGIN = 2.0


def quantize(
    network: Path,
    path: Path,
    images: Tensor,
    *,
    like: Path | None = None,
    operators: Sequence[str] | None = None,
    progress: bool = False,
) -> None:
    """Write a float ONNX file with activations as uint8, of one scale per tensor, and weights as int8, one per output.

    Both stand between QuantizeLinear and DequantizeLinear, which a runtime takes into its layers.

    Args:
        network: the float file, with one input ``x``.
        path: of the file to write.
        images: inputs ``(N, ...)`` that are run, one by one, to find the ranges of activations.
        like: file of a network with the same tensors, to run on noise in the place of ``network`` on images.
        operators: types of the nodes to quantize; None: all that ONNX Runtime can.
        progress: show the progress on stderr, as :func:`dsconv.evaluate` does.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    quantization = import_extra("onnx", "onnxruntime.quantization")
    bar = progress_bar(progress, "ranges for int8", len(images), "img")
    with tempfile.TemporaryDirectory() as folder, _quiet(), bar as advance:
        found = {} if like is None else _ranges(_prepared(like, folder), _OneByOne(images, advance), folder)
        options = {} if like is None else {"TensorQuantOverrides": found}
        quantization.quantize_static(
            _prepared(network, folder),
            path,
            _OneByOne(images, advance) if like is None else _OneByOne(images[:1]),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=operators,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options=options,
        )


class _OneByOne:
    """Images as ``onnxruntime.quantization`` asks for them."""

    def __init__(self, images: Tensor, advance: Advance | None = None):
        self.rest, self.advance, self.given = iter(images.numpy()), advance, False

    def get_next(self) -> dict[str, Any] | None:
        # That it is asked for the next one tells that it is done with the last one.
        if self.given and self.advance is not None:
            self.advance(1)
        image = next(self.rest, None)
        self.given = image is not None
        return None if image is None else {"x": image[None]}


def _prepared(network: Path, folder: str) -> Path:
    """The file with shapes, and with BatchNorm folded where it can be."""
    inference = import_extra("onnx", "onnxruntime.quantization.shape_inference")
    prepared = Path(folder, f"prepared_{network.name}")
    inference.quant_pre_process(network, prepared)
    return prepared


def _ranges(network: Path, images: "_OneByOne", folder: str) -> dict[str, list[dict[str, Any]]]:
    """Ranges of all tensors of a network on noise, with a margin, as ``quantize_static`` takes them."""
    quantization = import_extra("onnx", "onnxruntime.quantization")
    calibrator = quantization.create_calibrator(network, augmented_model_path=str(Path(folder, "augmented.onnx")))
    calibrator.collect_data(images)
    found = calibrator.compute_data()
    ranges = {}
    for name in found.keys():  # noqa: SIM118
        low, high = (np.float32(value.item() * (1 if name == "x" else _MARGIN)) for value in found[name].range_value)
        ranges[name] = [{"rmin": low, "rmax": high}]
    return ranges


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the quantizer says of every BatchNorm: that there is one scale for all its channels."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
