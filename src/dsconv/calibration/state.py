"""The file from which a calibration that was stopped is resumed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsconv.calibration.report import CalibratedLayer
from dsconv.errors import ConfigError, FileFormatError
from dsconv.io.checkpoint import check_place, checksum, write

_FORMAT = "dsconv calibration"


class State:
    """Layers that are done, in memory, and in a file where there is a ``path``.

    Attributes:
        done: what became of each layer, by name.
        tensors: ``NAME.vqk`` and so on, as the layers hold them.
    """

    def __init__(self, path: Path | None, resume: bool):
        if resume and (path is None or not path.exists()):
            raise ConfigError(
                f"resume: there is no state file to resume from (state={None if path is None else str(path)!r})"
            )
        if path is not None:
            check_place(path)
            if path.exists() and not resume:
                raise ConfigError(
                    f"state: there is a file {path} already: pass resume=True to continue it, or delete it"
                )
        self._path, self._resume = path, resume
        self._made_of: dict[str, str] = {}
        self.done: dict[str, CalibratedLayer] = {}
        self.tensors: dict[str, Tensor] = {}

    def open(self, models: Mapping[str, nn.Module], x: Tensor, settings: Mapping[str, Any]) -> None:
        """Read the file, or try to write one, so that what is wrong with it shows before the work begins.

        Raises:
            FileFormatError: it is damaged, or not of these ``models``, images ``x`` and ``settings``.
            OSError: it cannot be read or written.
        """
        if self._path is None:
            return
        self._made_of = {name: checksum({}, _tensors(model)) for name, model in models.items()}
        self._made_of |= {"images": checksum({}, {"x": x})} | {name: str(value) for name, value in settings.items()}
        if not self._resume:
            self._write()
            self._path.unlink()  # there is nothing to resume yet
            return
        try:
            with safe_open(self._path, framework="pt") as file:
                entries = file.metadata() or {}
                if entries.get("format") != _FORMAT:
                    raise FileFormatError(f"{self._path}: expected the state of a calibration, it is another file")
                made_of = json.loads(entries["made_of"])
                self.done = {data["name"]: CalibratedLayer(**data) for data in json.loads(entries["layers"])}
                self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            whole = entries["checksum"] == checksum(entries, self.tensors)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{self._path}: not a complete state file ({error}): delete it and start again"
            ) from None
        if not whole:
            raise FileFormatError(f"{self._path}: its contents were changed: delete it and start again")
        if other := [name for name, value in self._made_of.items() if made_of.get(name) != value]:
            raise FileFormatError(
                f"{self._path}: was made with other {', '.join(other)}: resume with what it was started with, or "
                "delete it and start again"
            )

    def add(self, record: CalibratedLayer, **tensors: Tensor | None) -> None:
        """Note a layer that is done, and its ``tensors``."""
        self.done[record.name] = record
        named = {f"{record.name}.{name}": value for name, value in tensors.items() if value is not None}
        self.tensors |= {name: value.detach().cpu().contiguous() for name, value in named.items()}
        self._write()

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """What was noted of a layer."""
        keys = (key.rpartition(".") for key in self.tensors)
        return {own: self.tensors[f"{layer}.{own}"] for layer, _, own in keys if layer == name}

    def _write(self) -> None:
        if self._path is not None:
            layers = json.dumps([asdict(record) for record in self.done.values()])
            entries = {"format": _FORMAT, "made_of": json.dumps(self._made_of), "layers": layers}
            write(self._path, self.tensors, entries | {"checksum": checksum(entries, self.tensors)})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if torch.is_tensor(value)
    }
