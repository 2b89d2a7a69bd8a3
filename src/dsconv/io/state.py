"""File from which stopped work is resumed."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dsconv import strict_json
from dsconv.data.inputs import Batch, tensors_of
from dsconv.errors import ConfigError, FileFormatError, one_line
from dsconv.files import check_place
from dsconv.io.checkpoint import checksum, read_tensors, write

Record = TypeVar("Record")
_MEND = "delete it and start again"


class StateFile:
    """File with the progress of some work, and of the networks, images and arguments used; optional.

    Args:
        path: path of the file, None to store nothing.
        resume: whether the file exists and is continued.
        work: kind of work in the file, as a word.

    Raises:
        ConfigError: the file exists and ``resume`` is False, or the other way round.
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
        self, models: Mapping[str, nn.Module], x: Batch, settings: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Tensor]] | None:
        """Return the data written last; None if there is nothing to resume.

        Raises:
            FileFormatError: the file is damaged, or belongs to other ``models``, images ``x`` or ``settings``.
            OSError: it cannot be read.
        """
        if self._path is None:
            return None
        self._made_of = {name: checksum({}, _tensors(model)) for name, model in models.items()}
        named = {"x" if isinstance(x, Tensor) else f"x{place}": tensor for place, tensor in enumerate(tensors_of(x))}
        self._made_of |= {"images": checksum({}, named)} | {name: str(value) for name, value in settings.items()}
        if not self._resume:
            return None
        entries, tensors = read_tensors(self._path, self._format, "state file", _MEND)
        try:
            made_of = strict_json.loads(entries["made_of"])
            # Diverged training has figures that are not finite.
            data = strict_json.loads(entries["data"], finite=False)
        except (KeyError, ValueError) as error:
            raise self.refusal(str(error)) from None
        if not isinstance(made_of, dict):
            raise self.refusal("it does not state its inputs")
        if other := [name for name, value in self._made_of.items() if made_of.get(name) != value]:
            raise FileFormatError(
                f"{self._path}: was written with other {', '.join(other)}: resume with the same arguments, or "
                "delete it and start again"
            )
        return data, {name: value.clone() for name, value in tensors.items()}

    def records(self, kind: type[Record], data: Any) -> list[Record]:
        """Return the dataclasses ``kind`` that were written as a list of dictionaries, at least one.

        Raises:
            FileFormatError: ``data`` is something else.
        """
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        if not isinstance(data, list) or not data or any(not isinstance(d, dict) or set(d) != names for d in data):
            raise self.refusal(f"expected at least one record of {', '.join(sorted(names))}")
        try:
            return TypeAdapter(list[kind]).validate_python(data)  # type: ignore[valid-type]
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False)[0]
            raise self.refusal(f"record {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None

    def check_tensors(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Raise FileFormatError unless names, shapes and kinds (integers or floats) match those of ``expected``.

        Raises:
            FileFormatError: it states the first difference.
        """
        for name in sorted(found.keys() ^ expected.keys()):
            raise self.refusal(f"tensor {name!r} is {'not expected' if name in found else 'missing'}")
        for name, value in found.items():
            like = expected[name]
            same_kind = value.dtype == like.dtype or (value.is_floating_point() and like.is_floating_point())
            if value.shape != like.shape or not same_kind:
                got = f"{value.dtype} of shape {tuple(value.shape)}"
                raise self.refusal(
                    f"tensor {name!r}: expected {like.dtype} of shape {tuple(like.shape)}, got {one_line(got, 200)}"
                )

    def refusal(self, reason: str) -> FileFormatError:
        """Return the error for file contents that cannot have been written by this work, with a ``reason``."""
        return FileFormatError(f"{self._path}: not a state that dsconv wrote ({one_line(reason, 400)}): {_MEND}")

    def remove(self) -> None:
        """Remove the file, if there is one."""
        if self._path is not None:
            self._path.unlink()

    def write(self, data: Any, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file by ``data``, which must be JSON, and ``tensors``; it must be open.

        Raises:
            OSError: the file cannot be written; the previous one is kept.
        """
        if self._path is not None:
            stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            entries = {
                "format": self._format,
                "format_version": "1",
                "made_of": json.dumps(self._made_of),
                "data": json.dumps(data),
            }
            write(self._path, stored, entries | {"checksum": checksum(entries, stored)})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if torch.is_tensor(value)
    }
