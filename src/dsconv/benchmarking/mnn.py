"""MNN models, made from ONNX files and inspected in another process, since MNN prints to stdout and may crash.

The process runs this file as a script, so it imports nothing from dsconv.
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
    """Call a function of this file in another process; return an empty string, or how it failed to write ``made``."""
    command = [sys.executable, "-P", __file__, function, *map(str, arguments)]
    # The converter writes files into the current folder, which is deleted with the models.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=made.parent)
    if done.returncode == 0 and made.exists():
        return ""
    # After a crash, stdout contains the converter's progress, and stderr the reason.
    said = done.stderr.splitlines()[-1:] if done.returncode else done.stdout.splitlines()[-2:]
    return ": ".join([f"MNN fails to {function} the network (exit code {done.returncode})", *said])[:300]


def convert(network: str, model: str) -> None:
    """Make a model from an ONNX file."""
    # Not through MNN.tools, which installs a package and reports every conversion to MNN's developers.
    import _tools

    _tools.mnnconvert(["", "-f", "ONNX", "--modelFile", network, "--MNNModel", model, "--bizCode", "dsconv"])


def quantize(network: str, model: str, settings: str) -> None:
    """Make an int8 model from another model."""
    import _tools

    _tools.mnnquant(["", network, model, settings])


def run(model: str, shape: str, operators: str) -> None:
    """Run a model once, and write the operators that it executes, as named by MNN, to the file ``operators``."""
    import MNN

    network = MNN.Interpreter(model)
    network.setSessionMode(0)  # Session_Debug, which is needed for this information
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
    """Suppress the output of C and C++ to stdout within the block, such as that of ``import MNN``."""
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
