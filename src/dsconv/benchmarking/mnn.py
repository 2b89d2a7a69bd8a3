"""Models of MNN: made of ONNX files and looked at in another process, which MNN may print to and crash.

That process runs this file as a script, so it imports nothing of dsconv.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def elsewhere(function: str, *arguments: object, made: Path) -> str:
    """How another process ends that calls a function of this file, if it does not write ``made``; empty otherwise."""
    command = [sys.executable, "-P", __file__, function, *map(str, arguments)]
    # The converter writes files into the current folder, which is deleted with the models.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=made.parent)
    if done.returncode == 0 and made.exists():
        return ""
    # After a crash, stdout holds the converter's progress, and stderr the reason.
    said = done.stderr.splitlines()[-1:] if done.returncode else done.stdout.splitlines()[-2:]
    return ": ".join([f"MNN fails to {function} the network (exit code {done.returncode})", *said])[:300]


def convert(network: str, model: str) -> None:
    """Make a model of an ONNX file."""
    # Not by MNN.tools, which installs a package and reports every conversion to MNN's makers.
    import _tools

    _tools.mnnconvert(["", "-f", "ONNX", "--modelFile", network, "--MNNModel", model, "--bizCode", "dsconv"])


def quantize(network: str, model: str, settings: str) -> None:
    """Make a model in int8 of another model."""
    import _tools

    _tools.mnnquant(["", network, model, settings])


def run(model: str, shape: str, operators: str) -> None:
    """Run a model once, and write what it executes, in MNN's words, to the file ``operators``."""
    import MNN

    network = MNN.Interpreter(model)
    network.setSessionMode(0)  # Session_Debug, without which it does not tell
    session = network.createSession({"numThread": 1, "backend": "CPU"})
    network.resizeTensor(network.getSessionInput(session), tuple(json.loads(shape)))
    network.resizeSession(session)
    found: list[str] = []

    def note(tensors: object, operator: Any) -> bool:
        found.append(operator.getType().strip())
        return True

    network.runSessionWithCallBackInfo(session, lambda tensors, operator: True, note)
    Path(operators).write_text(json.dumps(found))


@contextmanager
def quiet() -> Iterator[None]:
    """Without what C and C++ print to stdout, as ``import MNN`` does."""
    flush = ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush
    sys.stdout.flush()
    flush(None)
    stdout = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


if __name__ == "__main__":
    functions: dict[str, Callable[..., None]] = {"convert": convert, "quantize": quantize, "run": run}
    functions[sys.argv[1]](*sys.argv[2:])
