"""Folder from which a stopped optimization is resumed."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from dsconv.benchmarking.measure import Quartiles
from dsconv.data.inputs import Batch
from dsconv.errors import ConfigError
from dsconv.files import check_place
from dsconv.io.state import StateFile
from dsconv.optimization.results import Attempt

_SUFFIX = ".state"
_MAIN = f"optimization{_SUFFIX}"


class Saved:
    """Known figures, kept in memory, and in a folder if ``path`` is given.

    The folder also holds the state files of searches, calibrations and adaptations. A resumed optimization starts from
    its beginning, and each step finds its earlier results.

    Attributes:
        attempts: attempts by the name of the recipe.
        times: quartiles of milliseconds by settings as JSON, where they affect decisions.
        steps: number of steps of each adaptation, by the name of its recipe.

    Raises:
        ConfigError: the folder exists and ``resume`` is False, or the other way round.
        OSError: it cannot be created.
    """

    def __init__(self, path: Path | None, resume: bool):
        self._path = path
        self.attempts: dict[str, Attempt] = {}
        self.times: dict[str, Quartiles] = {}
        self.steps: dict[str, int] = {}
        if path is not None and not resume:
            if path.exists():
                raise ConfigError(
                    f"state: there is a folder {path} already: pass resume=True to continue it, or delete it"
                )
            check_place(path)
        self._file = StateFile(path / _MAIN if resume and path is not None else None, resume, "optimization")

    def open(self, models: Mapping[str, nn.Module], x: Batch, settings: Mapping[str, Any]) -> None:
        """Read the existing state.

        Raises:
            FileFormatError: it is damaged, or belongs to other ``models``, images ``x`` or ``settings``.
            OSError: the folder cannot be created, read or written.
        """
        found = self._file.open(models, x, settings)
        if found is not None:
            self._read(found[0])
        elif self._path is not None:
            self._path.mkdir()
            self._file = StateFile(self._path / _MAIN, False, "optimization")
            self._file.open(models, x, settings)
            self._path.rmdir()  # there is nothing to resume yet

    def _read(self, data: Any) -> None:
        try:
            self.attempts = {a.name: a for a in _ATTEMPTS.validate_python(data["attempts"])}
            self.times = _TIMES.validate_python(data["times"])
            self.steps = _STEPS.validate_python(data["steps"])
        except (KeyError, TypeError, ValidationError) as error:
            raise self._file.refusal(str(error)) from None

    def step(self, work: str, *made_of: Any) -> dict[str, Any]:
        """Return ``state`` and ``resume`` for a step; its file is named by ``work`` and the inputs ``made_of``."""
        if self._path is None:
            return {"state": None, "resume": False}
        self._path.mkdir(exist_ok=True)
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        path = self._path / f"{work}-{digest}{_SUFFIX}"
        return {"state": path, "resume": path.exists()}

    def write(self) -> None:
        """Write the known figures."""
        if self._path is not None:
            self._path.mkdir(exist_ok=True)
        rows = _ATTEMPTS.dump_python(list(self.attempts.values()))
        self._file.write({"attempts": rows, "times": self.times, "steps": self.steps}, {})


def remove_state(path: Path) -> None:
    """Remove the state folder of :func:`dsconv.optimize` once its result is saved."""
    for file in path.glob(f"*{_SUFFIX}"):
        file.unlink()
    with suppress(OSError):  # files of others keep it
        path.rmdir()


_ATTEMPTS, _TIMES, _STEPS = TypeAdapter(list[Attempt]), TypeAdapter(dict[str, Quartiles]), TypeAdapter(dict[str, int])
