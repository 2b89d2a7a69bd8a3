"""Check an installed dsconv-runtime: run the digits network, without dsconv and PyTorch.

python scripts/smoke_runtime.py digits.dsconv
"""

import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np

import dsconv_runtime

MOST_BYTES = 5_000_000


def main(path: Path) -> None:
    package = files("dsconv_runtime")
    assert package.joinpath("py.typed").is_file(), "py.typed is not installed"
    assert dsconv_runtime.__version__ == version("dsconv-runtime")
    size = sum(len(file.read_bytes()) for file in package.iterdir() if file.is_file())
    assert size < MOST_BYTES, f"{size} bytes"
    net = dsconv_runtime.Network(path)
    image = np.zeros((1, 1, 8, 8), np.float32)
    image[..., 1:7, 3:5] = 1
    assert net(image).argmax() == 1
    assert not {"torch", "dsconv"} & set(sys.modules)
    print(f"dsconv-runtime {version('dsconv-runtime')}, {dsconv_runtime.isa()}, {size / 1e6:.1f} MB: {net}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
