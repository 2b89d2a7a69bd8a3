"""Files of compiled networks, and the library installed by CMake."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv.compilation.compiled import CompiledModel
from dsconv.ops import native

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "runtime"


@pytest.fixture(scope="session")
def fast_digits() -> CompiledModel:
    """Return the compiled digits network."""
    if native.extension() is None:
        pytest.skip("the extension dsconv._C is not built")
    images, _ = dsconv.demo.load_digits()
    return dsconv.compile(dsconv.quantize(dsconv.zoo.build("dsconv/digits_resnet")), images[:1])


@pytest.fixture(scope="session")
def digits(fast_digits: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return its file, ``digits.dsconv``, in a separate folder."""
    path = tmp_path_factory.mktemp("digits") / "digits.dsconv"
    fast_digits.save(path, classes=[f"digit {i}" for i in range(10)])
    return path


class Fork(nn.Module):
    """Network with two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 8, 3, padding=1)
        self.after = nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        both = torch.relu(self.one(image) + self.other(mask))
        return {"map": self.after(both), "means": both.mean((2, 3))}


@pytest.fixture(scope="session")
def fast_fork() -> CompiledModel:
    if native.extension() is None:
        pytest.skip("the extension dsconv._C is not built")
    torch.manual_seed(0)
    example = dsconv.Inputs(*(torch.zeros(1, channels, 6, 7, dtype=torch.float32) for channels in (3, 2)))
    return dsconv.compile(dsconv.quantize(Fork().eval()), example)


@pytest.fixture(scope="session")
def fork(fast_fork: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fork") / "fork.dsconv"
    fast_fork.save(path)
    return path


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with header, both libraries and CMake package, from the build of dsconv-runtime."""
    if (cmake := shutil.which("cmake")) is None:
        pytest.skip("there is no cmake")
    if not (BUILD / "CMakeCache.txt").is_file():
        pytest.skip(f"the library is not built: make test builds it in {BUILD}")
    folder = tmp_path_factory.mktemp("installed")
    for call in (
        [cmake, "--build", BUILD, "--target", "dsconv_static"],
        [cmake, "--install", BUILD / "dsconv", "--prefix", folder, "--component", "library"],
    ):
        subprocess.run(call, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def compiler() -> str:
    """Return a C compiler."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    found = [path for name in names if name and (path := shutil.which(name))]
    if not found:
        pytest.skip("there is no compiler of C")
    return found[0]
