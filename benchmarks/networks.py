"""Times whole networks: PyTorch in float32, quantized layer by layer, and compiled.

    python benchmarks/networks.py
    python benchmarks/networks.py --networks resnet50 --threads 2 --batch 8

Networks of torchvision with random weights, which take as long as trained ones. The three take turns in one process.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
import torchvision_shim

import dsconv
import machine

torchvision_shim.install()
from torchvision import models  # noqa: E402

NETWORKS = (
    "alexnet",
    "vgg16",
    "resnet18",
    "resnet50",
    "googlenet",
    "densenet121",
    "squeezenet1_1",
    "mobilenet_v2",
    "efficientnet_b0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--preset", default="w4a4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine.describe())
    print(f"{given.threads} threads, batch {given.batch}, 224x224, preset {given.preset}, {dsconv.ops.cpu.isa()}")
    print("medians (quartiles) in ms; compiled / float32; steps that PyTorch executes; seconds to compile")
    x = torch.randn(given.batch, 3, 224, 224)
    for name in given.networks:
        torch.manual_seed(0)
        settings = {"init_weights": False} if name == "googlenet" else {}
        net = getattr(models, name)(**settings).eval()
        qnet = dsconv.quantize(net, given.preset)
        since = time.perf_counter()
        fast = dsconv.compile(qnet, x)
        seconds = time.perf_counter() - since
        columns, ratio = measured([net, qnet, fast], x, given.turns)
        steps = f"{len(fast.plan.in_pytorch)} of {len(fast.plan.steps)}"
        print(f"{name:16} {'  '.join(columns)}  {ratio:.2f}  {steps}  {seconds:.1f} s", flush=True)


def measured(contestants: list[nn.Module], x: Tensor, turns: int) -> tuple[list[str], float]:
    times: list[list[float]] = [[] for _ in contestants]
    with torch.inference_mode():
        for turn in range(turns + 2):
            for call, taken in zip(contestants, times, strict=True):
                seconds = timed(call, x)
                if turn >= 2:  # the first two warm up
                    taken.append(seconds * 1e3)
    columns = []
    for taken in times:
        low, middle, high = statistics.quantiles(taken, n=4)
        columns.append(f"{middle:7.1f} ({low:.1f} .. {high:.1f})")
    return columns, statistics.median(times[-1]) / statistics.median(times[0])


def timed(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    since = time.perf_counter()
    call(x)
    return time.perf_counter() - since


if __name__ == "__main__":
    main()
