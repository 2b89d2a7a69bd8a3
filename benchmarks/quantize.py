"""Measure time and extra memory of quantizing whole networks (with random weights, since values do not matter).

python benchmarks/quantize.py
python benchmarks/quantize.py --networks resnet18,vgg16 --threads 2 --presets default
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import dsconv
import machine
from dsconv import QuantConfig, zoo

NETWORKS = "resnet18,resnet50,mobilenet_v2,densenet121,vgg16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS, help=f"names of torchvision's, with commas; default {NETWORKS}")
    parser.add_argument("--presets", default="paper,default", help="default: %(default)s")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="of each, default %(default)s")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import torchvision_shim

    torchvision_shim.install()
    print(machine.describe())
    print(f"median of {arguments.runs} runs (least .. most) in seconds; memory at its peak, beyond that before")
    for name in arguments.networks.split(","):
        model = zoo.build(f"torchvision/{name}", weights="random")
        weights_bytes = sum(4 * p.numel() for p in model.parameters())
        print(f"{name}, {weights_bytes / 1e6:.0f} MB of weights")
        for preset in arguments.presets.split(","):
            for threads in map(int, arguments.threads.split(",")):
                torch.set_num_threads(threads)
                print(
                    f"  {preset:8} {threads} threads  {measured(model, preset, arguments.runs, weights_bytes)}",
                    flush=True,
                )


def measured(model: torch.nn.Module, preset: str, runs: int, weights_bytes: int) -> str:
    """Return time and memory of quantizing a network, as text."""
    config = QuantConfig.preset(preset)
    times = []
    machine.reset_peak()
    before = machine.kilobytes("VmRSS")
    for _ in range(runs):
        start = time.perf_counter()
        qmodel = dsconv.quantize(model, config)
        times.append(time.perf_counter() - start)
        del qmodel
    more = (machine.kilobytes("VmHWM") - before) * 1024
    spread = f"{statistics.median(times):5.2f} ({min(times):.2f} .. {max(times):.2f})"
    return f"{spread}  {more / 1e6:5.0f} MB ({more / weights_bytes:.2f} of the weights)"


if __name__ == "__main__":
    main()
