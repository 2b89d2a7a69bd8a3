"""Time whole networks and their convolutions on a GPU, in comparison with PyTorch in half precision in the same run.

    python benchmarks/gpu.py --json gpu.json --plot gpu.png                  # ResNet-50, a few minutes
    python benchmarks/gpu.py --networks resnet50,mobilenet_v2 --batches 1,32,256
    python benchmarks/gpu.py --networks resnet50 --batches 256 --layers      # its convolutions, one by one

It needs an NVIDIA GPU, dsconv[gpu] and torchvision, and matplotlib for the picture. Weights and images are random.

Networks: ours is the preset ``default`` with ``algorithm="direct"``, compiled by ``dsconv.compile``: a CUDA graph whose
input and output are float32, including copies of both. PyTorch's are channels-last in bf16 or fp16: called directly
(eager), and with ``torch.compile(mode="reduce-overhead")``, which also replays CUDA graphs. PyTorch has no convolution
in int8 for GPUs.

Layers: ours reads a quantized input and writes a float32 output; PyTorch's ``conv2d`` reads and writes bf16.
Shares are relative to ceilings that are measured first: a copy within the GPU's memory, and matrix products of bf16 and
int8.

Contestants take turns. Before each turn a buffer larger than the L2 cache is written. Times are measured with CUDA
events; a time is the median, with quartiles.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv import QuantConfig, zoo
from dsconv.benchmarking.machine import machine
from dsconv.files import replacing

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def times(contestants: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Return quartiles in milliseconds of each contestant's turns, after one warm-up turn."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        for name, run in contestants.items():
            flush.fill_(turn % 2)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn:
                found[name].append(start.elapsed_time(end))
    return {name: statistics.quantiles(values, n=4) for name, values in found.items()}


def captured(run: Callable[[], Any], launches: int) -> Callable[[], Any]:
    """Return a replay of ``launches`` launches as a CUDA graph, without launch overhead."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            run()
    return graph.replay


def ceilings(turns: int) -> dict[str, float]:
    """Return bytes per second of a copy, read and written; multiply-adds per second of matrix products."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda") for _ in range(2))
    half = [x.bfloat16() for x in (a, b)]
    integer = [(x * 40).clamp(-127, 127).to(torch.int8) for x in (a, b)]
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    copy = torch.empty_like(source)
    runs = {
        "copy": lambda: copy.copy_(source),
        "bf16": lambda: half[0] @ half[1],
        "int8": lambda: torch._int_mm(integer[0], integer[1].t()),
    }
    found = {name: quartiles[1] / 1e3 for name, quartiles in times(runs, turns).items()}
    return {
        "copy": 2 * source.numel() / found["copy"],
        "bf16": size**3 / found["bf16"],
        "int8": size**3 / found["int8"],
    }


def network(name: str, batches: list[int], halves: list[str], turns: int) -> dict[str, Any]:
    """Return the times of a network for each batch size."""
    torch.manual_seed(0)
    net = zoo.build(f"torchvision/{name}", weights="random").eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    floats = sum(4 * p.numel() for p in net.parameters())
    config = QuantConfig.preset("default", algorithm="direct")
    fast, row = None, {"network": name, "batches": []}
    qnet = dsconv.quantize(net.cuda(), config)
    others = {h: copy_of(net, HALVES[h]) for h in halves}
    for batch in batches:
        x = torch.randn(batch, 3, 224, 224, device="cuda")
        with torch.inference_mode():
            fast = fast or dsconv.compile(qnet, x)
            contestants: dict[str, Callable[[], Any]] = {"dsconv": lambda fast=fast, x=x: fast(x)}
            for half, model in others.items():
                given = x.to(HALVES[half], memory_format=torch.channels_last)
                torch._dynamo.reset()
                compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
                contestants[f"{half} eager"] = lambda model=model, given=given: model(given)
                contestants[f"{half} compiled"] = lambda compiled=compiled, given=given: compiled(given)
            for run in contestants.values():
                for _ in range(3):
                    run()
            expected, made = net(x[:16]), fast(x[:16])
            error = ((expected - made).norm() / expected.norm()).item()
            found = times(contestants, turns)
        row["batches"].append({"batch": batch, "ms": found, "relative_error": error})
        print(f"{name}, batch {batch} (relative error of our outputs {error:.3f}):")
        best = min(q[1] for n, q in found.items() if n.endswith("compiled"))
        for contestant, (low, median, high) in found.items():
            print(
                f"  {contestant:14} {median:8.3f} ms ({low:.3f} to {high:.3f}), "
                f"{median / best:.2f} of the best compiled"
            )
    assert fast is not None
    row["weights_of_float32"] = fast.plan.weight_bytes / floats
    row["in_pytorch"] = len(fast.plan.in_pytorch)
    print(f"  weights in memory: {row['weights_of_float32']:.3f} of float32; steps by PyTorch: {row['in_pytorch']}")
    return row


def copy_of(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the network in half precision, channels last."""
    return copy.deepcopy(net).to(dtype).to(memory_format=torch.channels_last)


def convolutions(name: str) -> list[tuple[nn.Conv2d, tuple[int, ...], int]]:
    """Return distinct convolutions of a network with blocks of 64 channels by tap, their input sizes and counts."""
    net = zoo.build(f"torchvision/{name}", weights="random").eval().cuda()
    found: dict[Any, list[Any]] = {}

    def note(layer: nn.Conv2d, given: tuple[Tensor]) -> None:
        if layer.groups == 1 and layer.in_channels >= 64:
            size = tuple(given[0].shape[1:])
            key = (size, layer.out_channels, layer.kernel_size, layer.stride)
            found.setdefault(key, [layer, size, 0])[2] += 1

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(note)
    with torch.inference_mode():
        net(torch.zeros(1, 3, 224, 224, dtype=torch.float32, device="cuda"))
    return [tuple(value) for value in found.values()]


def layers(name: str, batches: list[int], ceiling: dict[str, float], turns: int) -> list[dict[str, Any]]:
    """Return the times of a network's convolutions."""
    from dsconv.backends.cuda import launch, layers, tuning
    from dsconv.nn import DSConv2d
    from dsconv.ops.arguments import Geometry, sizes_of

    config = QuantConfig.preset("default", algorithm="direct").layer()
    rows = []
    for batch in batches:
        print(f"{name}, batch {batch}: us of ours and of bf16; ours in shares of the int8 ceiling and of the copy's")
        for layer, size, count in convolutions(name):
            made = DSConv2d.from_float(layer, config).cuda()
            weights, settings = made._kernel_weights.packed
            geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, 1)
            s = sizes_of((1, *size), layer.out_channels, geometry, settings[-1], False, native=False)
            x = torch.randn(batch, *size, device="cuda").relu()
            form = layers.form_of(s, settings[2], settings[3], weights.kds_shift is not None)
            pixels = batch * s.out_height * s.out_width
            y = launch.Pixels(
                torch.empty(pixels, layer.out_channels, dtype=torch.float32, device="cuda"), layer.out_channels
            )
            given = launch.Weights(*weights, settings[1])
            half = x.to(torch.bfloat16, memory_format=torch.channels_last)
            kernel = layer.weight.detach().to(torch.bfloat16, memory_format=torch.channels_last)
            launches = max(1, 4096 // pixels)
            with torch.inference_mode():
                source = launch.rows_of(x, form)

                def ours(
                    source: Any = source, given: Any = given, s: Any = s, pixels: int = pixels, y: Any = y
                ) -> None:
                    launch.convolve(source, given, s, pixels, launch.PostOps(), y)

                def theirs(half: Tensor = half, kernel: Tensor = kernel, of: nn.Conv2d = layer) -> Tensor:
                    return F.conv2d(half, kernel, None, of.stride, of.padding, of.dilation)

                with tuning.trying():
                    ours()
                runs = {"dsconv": captured(ours, launches), "bf16": captured(theirs, launches)}
                found = {n: [v / launches for v in q] for n, q in times(runs, turns).items()}
            macs = pixels * layer.out_channels * size[0] * s.kernel_h * s.kernel_w
            moved = form.bytes(batch * size[1] * size[2]) + 4 * pixels * layer.out_channels + given.weight.nbytes
            seconds = found["dsconv"][1] / 1e3
            shares = {"int8": macs / seconds / ceiling["int8"], "copy": moved / seconds / ceiling["copy"]}
            kind = f"{size[0]}x{size[1]}x{size[2]} {s.kernel_h}x{s.kernel_w} to {layer.out_channels}"
            rows.append({"network": name, "batch": batch, "layer": kind, "count": count, "ms": found, "shares": shares})
            print(
                f"  {count}x {kind:28} {1e3 * found['dsconv'][1]:8.1f} {1e3 * found['bf16'][1]:8.1f}"
                f"   {shares['int8']:.2f} {shares['copy']:.2f}"
            )
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw bars of the networks' times, relative to the best compiled one."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    rows = [(row["network"], b) for row in result["networks"] for b in row["batches"]]
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.9 * len(rows)), layout="constrained")
    names = list(rows[0][1]["ms"])
    for at, (_, b) in enumerate(rows):
        best = min(q[1] for n, q in b["ms"].items() if n.endswith("compiled"))
        for index, name in enumerate(names):
            place = at + (index - (len(names) - 1) / 2) * 0.8 / len(names)
            bar = axes.barh(place, b["ms"][name][1] / best, 0.75 / len(names), color=f"C{index}", label=name)
            axes.bar_label(bar, [f"{b['ms'][name][1]:.2f} ms"], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{name}\nbatch {b['batch']}" for name, b in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_xlabel("time, in parts of the fastest network compiled by PyTorch")
    axes.set_title(result["gpu"])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[: len(names)], labels[: len(names)], fontsize=8)
    axes.margins(x=0.12)
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:] or "png", dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50", help="of torchvision, with commas")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--halves", default="bf16", help="bf16, fp16 or both, with a comma")
    parser.add_argument("--layers", action="store_true", help="measure convolutions instead of networks")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="of networks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: there is no GPU that PyTorch can use", file=sys.stderr)
        return 2
    if options.plot and options.layers:
        parser.error("--plot: expected networks, got --layers")
    names, batches = options.networks.split(","), [int(b) for b in options.batches.split(",")]
    torch.backends.cudnn.benchmark = True
    ceiling = ceilings(options.turns)
    gpu = torch.cuda.get_device_name()
    print(
        f"{gpu}, PyTorch {torch.__version__}: copy {ceiling['copy'] / 1e12:.2f} TB/s, products of bf16 "
        f"{2 * ceiling['bf16'] / 1e12:.0f} TFLOP/s, of int8 {2 * ceiling['int8'] / 1e12:.0f} TOP/s"
    )
    result: dict[str, Any] = {"gpu": gpu, "machine": machine(), "ceilings": ceiling, "networks": [], "layers": []}
    for name in names:
        if options.layers:
            result["layers"] += layers(name, batches, ceiling, options.turns)
        else:
            result["networks"].append(network(name, batches, options.halves.split(","), options.turns))
    if options.json:
        with replacing(options.json) as beside:
            beside.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if options.plot:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
