"""Finished layers of a calibration, and the file from which a stopped calibration is resumed."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsconv.calibration.report import CalibratedLayer
from dsconv.data.inputs import Batch
from dsconv.io.state import StateFile
from dsconv.layers import DSLayer


class State:
    """Finished layers, in memory, and in a file if ``path`` is given: see :class:`StateFile`.

    Attributes:
        done: results by name of the layer.
        tensors: ``NAME.vqk`` and so on, as the layers hold them.
    """

    def __init__(self, path: Path | None, resume: bool):
        self._file = StateFile(path, resume, "calibration")
        self.done: dict[str, CalibratedLayer] = {}
        self.tensors: dict[str, Tensor] = {}

    def open(self, models: Mapping[str, nn.Module], x: Batch, settings: Mapping[str, Any]) -> None:
        """Read the file, or try to write one, so that problems with it show before the work begins.

        Raises:
            FileFormatError, OSError: as :meth:`StateFile.open` and :meth:`StateFile.write`.
        """
        found = self._file.open(models, x, settings)
        if found is None:
            self._write()
            self._file.remove()  # there is nothing to resume yet
        else:
            data, self.tensors = found
            # An interrupt may leave the file that is written only to try.
            layers = [] if data == [] else self._file.records(CalibratedLayer, data)
            self.done = {layer.name: layer for layer in layers}
            if len(self.done) < len(layers):
                raise self._file.refusal("it lists a layer twice")

    def check(self, layers: Mapping[str, DSLayer]) -> None:
        """Raise FileFormatError unless the file contains some of ``layers``, by name.

        Raises:
            FileFormatError: it contains others.
        """
        expected: dict[str, Tensor] = {}
        for name in self.done:
            if name not in layers:
                raise self._file.refusal(f"layer {name!r} is not one of those to calibrate")
            layer = layers[name]
            parts = {"vqk": layer.vqk, "kds": layer.kds, "kds_shift": layer.kds_shift}
            parts["bias"] = layer.kds.new_empty(len(layer.vqk))
            expected |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
        self._file.check_tensors(self.tensors, expected)
        for key, value in self.tensors.items():
            name, _, part = key.rpartition(".")
            half = 1 << (layers[name].config.weight_bits - 1)
            if part == "vqk" and not -half <= int(value.min()) <= int(value.max()) < half:
                raise self._file.refusal(f"tensor {key!r} holds integers outside the range of the layer's bits")
            if part in ("kds", "kds_shift") and not value.isfinite().all():
                raise self._file.refusal(f"tensor {key!r} contains NaN or infinity")

    def add(self, record: CalibratedLayer, **tensors: Tensor | None) -> None:
        """Record a finished layer, and its ``tensors``."""
        self.done[record.name] = record
        named = {f"{record.name}.{name}": value for name, value in tensors.items() if value is not None}
        self.tensors |= {name: value.detach().cpu().contiguous() for name, value in named.items()}
        self._write()

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Return the recorded tensors of a layer."""
        keys = (key.rpartition(".") for key in self.tensors)
        return {own: self.tensors[f"{layer}.{own}"] for layer, _, own in keys if layer == name}

    def _write(self) -> None:
        self._file.write([asdict(record) for record in self.done.values()], self.tensors)
