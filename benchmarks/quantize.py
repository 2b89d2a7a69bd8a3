"""Time and extra memory of quantizing a whole ResNet-50 (random weights: the work does not depend on their values).

python benchmarks/quantize.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch

import dsconv
import machine
from dsconv import QuantConfig, zoo

RUNS = 5


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import torchvision_shim

    torchvision_shim.install()
    torch.set_num_threads(2)
    model = zoo.build("torchvision/resnet50", weights="random")
    weights_bytes = sum(4 * p.numel() for p in model.parameters())
    print(machine.describe())
    print(f"ResNet-50, {weights_bytes / 1e6:.0f} MB of weights; median of {RUNS} runs (least .. most) in seconds")
    for name, config in (
        ("paper", QuantConfig.preset("paper")),
        ("paper, kl scale", QuantConfig.preset("paper", weight_scale="kl")),
        ("default", QuantConfig.preset("default")),
    ):
        times = []
        machine.reset_peak()
        before = machine.kilobytes("VmRSS")
        for _ in range(RUNS):
            start = time.perf_counter()
            qmodel = dsconv.quantize(model, config)
            times.append(time.perf_counter() - start)
            del qmodel
        more = (machine.kilobytes("VmHWM") - before) * 1024
        print(
            f"{name:16} {statistics.median(times):5.2f} ({min(times):.2f} .. {max(times):.2f}), "
            f"peak memory grew by {more / 1e6:.0f} MB ({more / weights_bytes:.2f} of the weights)"
        )


if __name__ == "__main__":
    main()
