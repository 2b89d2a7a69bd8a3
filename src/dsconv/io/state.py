"""The file from which work that was stopped is resumed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsconv.errors import ConfigError, FileFormatError
from dsconv.files import check_place
from dsconv.io.checkpoint import checksum, write


class StateFile:
    """A file of what was done so far, of the networks, images and arguments that it was done with; or none.

    Args:
        path: of the file, None where nothing is to be kept.
        resume: whether the file is there, to be continued.
        work: what the file is of, as a word.

    Raises:
        ConfigError: the file is there and ``resume`` False, or the other way round.
        OSError: it cannot be written there.
    """

    def __init__(self, path: Path | None, resume: bool, work: str):
        if resume and (path is None or not path.exists()):
            raise ConfigError(
                f"resume: there is no state file to resume from (state={None if path is None else str(path)!r})"
            )
        if path is not None:
            place = check_place(path)
            if path.exists() and not resume:
                raise ConfigError(
                    f"state: there is a file {path} already: pass resume=True to continue it, or delete it"
                )
            path = place
        self._path, self._resume, self._format = path, resume, f"dsconv {work}"
        self._made_of: dict[str, str] = {}

    def open(
        self, models: Mapping[str, nn.Module], x: Tensor, settings: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Tensor]] | None:
        """What was written last; None where there is nothing to resume.

        Raises:
            FileFormatError: the file is damaged, or not of these ``models``, images ``x`` and ``settings``.
            OSError: it cannot be read.
        """
        if self._path is None:
            return None
        self._made_of = {name: checksum({}, _tensors(model)) for name, model in models.items()}
        self._made_of |= {"images": checksum({}, {"x": x})} | {name: str(value) for name, value in settings.items()}
        if not self._resume:
            return None
        work = self._format.partition(" ")[2]
        try:
            with safe_open(self._path, framework="pt") as file:
                entries = file.metadata() or {}
                if entries.get("format") != self._format:
                    raise FileFormatError(f"{self._path}: expected the state of a {work}, it is another file")
                made_of, data = json.loads(entries["made_of"]), json.loads(entries["data"])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            whole = entries["checksum"] == checksum(entries, tensors)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, FileFormatError):
                raise
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
        return data, tensors

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self._path is not None:
            self._path.unlink()

    def write(self, data: Any, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file by one of ``data``, which JSON can hold, and ``tensors``; once it is open.

        Raises:
            OSError: the file cannot be written; the one before it is left.
        """
        if self._path is not None:
            stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            entries = {"format": self._format, "made_of": json.dumps(self._made_of), "data": json.dumps(data)}
            write(self._path, stored, entries | {"checksum": checksum(entries, stored)})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if torch.is_tensor(value)
    }
