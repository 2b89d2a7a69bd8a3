import os
import tempfile
from pathlib import Path

# Parallel test processes that each have threads for all cores would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The cache of PyTorch's inductor ignores this variable: it would reuse code compiled for another instruction set.
if "ATEN_CPU_CAPABILITY" in os.environ:
    cache = Path(tempfile.gettempdir(), f"inductor-{os.environ['ATEN_CPU_CAPABILITY']}-{os.getuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import hypothesis
import pytest
import torch
import torchvision_shim

torchvision_shim.install()

# Without a GPU, kernels for GPUs run in Triton's interpreter, which must be selected before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Modules whose examples cannot run without Triton.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*/backends/cuda/*"]

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

REPOSITORY = Path(__file__).resolve().parents[1]
SUPPORT = REPOSITORY / "tests" / "support"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real networks and images (``nets.py`` and ``data/``), which most checkouts do not have."""
    folder = Path(os.environ.get("DSCONV_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "nets.py").is_file():
        pytest.skip(f"needs the folder of real networks and images: no nets.py in {folder} (set DSCONV_SHARED)")
    return folder


@pytest.fixture(scope="session")
def nets(shared: Path) -> ModuleType:
    """Return the module of the real networks and images in that folder."""
    spec = importlib.util.spec_from_file_location("shared_nets", shared / "nets.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["shared_nets"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dsconv_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``dsconv ARGUMENTS`` in a new process, as a user does; never raise for its exit code."""

    def run(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
        # A wide terminal without colours, so that line breaks do not split messages.
        plain = {"PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        return subprocess.run(
            [sys.executable, "-m", "dsconv", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=os.environ | plain | (env or {}),
            timeout=timeout,
        )

    return run
