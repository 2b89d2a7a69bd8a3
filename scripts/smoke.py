"""Check an installed dsconv: quantize the embedded network, run it, write it and read it back.

python scripts/smoke.py           # a wheel, which contains the kernels
python scripts/smoke.py --pure    # an installation without the extension, which must say that it is slow
"""

import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import dsconv
from dsconv.backends import SIMULATION


def main(pure: bool) -> None:
    assert dsconv.__version__ == version("dsconv")
    assert files("dsconv").joinpath("py.typed").is_file(), "py.typed is not installed"
    info = dsconv.cpu_info()
    print(info)
    assert (info.extension is None) != pure, f"kernels: {info.extension or 'loaded'}"
    assert "slower" in str(info) or not pure

    network = dsconv.zoo.build("dsconv/digits_resnet")
    images, labels = dsconv.demo.load_digits()
    quantized = dsconv.quantize(network)
    (backend,) = dsconv.summary(quantized).backends
    assert backend == (SIMULATION.describe() if pure else f"integers ({info.isa_used})"), backend
    with TemporaryDirectory() as folder, torch.inference_mode():
        again = dsconv.load(dsconv.save(quantized, Path(folder, "digits.safetensors")))
        logits = again(images)
        assert torch.equal(logits, quantized(images))
        if not pure:
            fast = dsconv.compile(again, images[:1])
            assert torch.equal(fast(images), fast.model(images))
    right = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert right > 98, f"{right:.1f} % of the digits are right"
    print(f"dsconv {version('dsconv')}, {backend}: {right:.1f} % of the digits are right")


if __name__ == "__main__":
    main("--pure" in sys.argv[1:])
