"""Compare ways to deploy a network, each in its own processes: size, cold start, memory and latency, as a table.

    python benchmarks/deploy.py
    python benchmarks/deploy.py --network torchvision/mobilenet_v2 --threads 2

Installed: bytes of the packages and their dependencies without NumPy; of the C library, stripped. Cold start: time from
the start of the process to its first result. Memory: peak of the process until then. Latency: median over the runs of
one sample after the first run. Weights are random; the processes take turns, and medians over the rounds are printed,
with minimum and maximum. It needs dsconv-runtime, onnxruntime, onnxscript, and a C++ compiler.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

import dsconv
import dsconv_runtime
from machine import describe

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(dsconv_runtime.__file__).parent

# Each script gets names for the file, the shape of the input and the number of threads, and defines `run`.
PYTHON = """
import os, sys, time
import numpy
path, shape, threads, runs = sys.argv[1], tuple(map(int, sys.argv[2].split("x"))), int(sys.argv[3]), int(sys.argv[4])
x = numpy.random.default_rng(0).standard_normal(shape, numpy.float32)
{prepare}
run()
print("first", flush=True)
times = []
for _ in range(runs):
    start = time.perf_counter()
    run()
    times.append(1e3 * (time.perf_counter() - start))
print("median", sorted(times)[runs // 2], "ms")
"""
PYTORCH = """
import torch, dsconv
torch.set_num_threads(threads)
x = torch.from_numpy(x)
fast = dsconv.compile(dsconv.load(path), x)
run = lambda: fast(x)
"""
RUNTIME = """
import dsconv_runtime
dsconv_runtime.set_threads(threads)
net = dsconv_runtime.Network(path)
run = lambda: net(x)
"""
ONNX = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
options.add_session_config_entry("session.disable_quant_qdq", "{disable}")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
run = lambda: session.run(None, {{name: x}})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="torchvision/resnet50", help="as of the command line (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of an image in pixels (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20, help="of each process after the first (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each way (%(default)s)")
    given = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    qnet = dsconv.quantize(dsconv.zoo.build(given.network, weights="random"))
    x = torch.randn(1, 3, given.size, given.size, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        ways = written(qnet, x, Path(folder), given)
        measured: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for _ in range(given.rounds):
            for name, (call, _, _) in ways.items():
                measured[name].append(measure(call))
        print(f"{given.network}, {given.size} x {given.size}, {given.threads} threads of each process; {describe()}\n")
        print("| | installed, MB | file, MB | cold start, s | memory, MB | latency, ms |\n|---|---|---|---|---|---|")
        for name, (_, installed, file) in ways.items():
            cells = [f"{installed / 1e6:.1f}", f"{file.stat().st_size / 1e6:.1f}" if file.is_file() else "-"]
            cells += [spread(values) for values in zip(*measured[name], strict=True)]
            print(f"| {name} | {' | '.join(cells)} |")


def written(
    qnet: torch.nn.Module, x: torch.Tensor, folder: Path, given: argparse.Namespace
) -> dict[str, tuple[list[str], int, Path]]:
    """Return command, installed bytes and file of each way."""
    saved, compiled, fast = (folder / name for name in ("net.safetensors", "net.dsconv", "fast.dsconv"))
    dsconv.save(qnet, saved)
    network = dsconv.compile(qnet, x)
    network.save(compiled)
    network.save(fast, fast_start=True)
    onnx = {style: folder / f"{style}.onnx" for style in ("qdq", "int8")}
    for style, path in onnx.items():
        images = torch.randn(8, *x.shape[1:], dtype=torch.float32) if style == "int8" else None
        dsconv.export_onnx(qnet, x, path, style, images=images)

    def python(prepare: str, path: Path) -> list[str]:
        arguments = [path, "x".join(map(str, x.shape)), given.threads, given.runs]
        return [sys.executable, "-c", PYTHON.format(prepare=prepare), *map(str, arguments)]

    runtime = folder_bytes(LIBRARY)
    ways = {
        "Python with NumPy alone": (python("run = lambda: x", folder), 0, folder),
        "PyTorch, `dsconv.compile`": (python(PYTORCH, saved), installed_bytes("dsconv"), saved),
        "`dsconv_runtime`": (python(RUNTIME, compiled), runtime, compiled),
        "`dsconv_runtime`, fast start": (python(RUNTIME, fast), runtime, fast),
    }
    program, library = c_program(folder)
    # The program starts one run per thread: a single one uses the threads of the library.
    if given.threads == 1:
        for name, file in {"C++ program": compiled, "C++ program, fast start": fast}.items():
            ways[f"`libdsconv`, {name}"] = ([str(program), str(file), "1", str(given.runs)], library, file)
    for style, path in onnx.items():
        call = python(ONNX.format(disable=int(style == "qdq")), path)
        ways[f"ONNX Runtime, `{style}`"] = call, installed_bytes("onnxruntime"), path
    return ways


def c_program(folder: Path) -> tuple[Path, int]:
    """Return the program of examples/deploy/cpp, and its bytes with its library."""
    program, library = folder / "latency", folder / "libdsconv.so"
    shutil.copy(LIBRARY / library.name, library)
    subprocess.run(["strip", library], check=True)
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O2", "-s", f"-I{ROOT / 'include'}", f"-L{folder}", f"-Wl,-rpath,{folder}"]
    source = ROOT / "examples" / "deploy" / "cpp" / "latency.cpp"
    subprocess.run([compiler, *flags, source, "-ldsconv", "-pthread", "-o", program], check=True)
    return program, program.stat().st_size + library.stat().st_size


def measure(call: list[str]) -> tuple[float, float, float]:
    """Return seconds to the first result, peak megabytes until then, and the median milliseconds of further runs."""
    start = time.perf_counter()
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if "first" not in process.stdout.readline():
            raise SystemExit(f"{call[0]} ended without a result")
        cold = time.perf_counter() - start
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        median = re.search(r"median ([\d.e-]+) ms", process.stdout.read())
    assert peak is not None and median is not None
    return cold, int(peak[1]) * 1024 / 1e6, float(median[1])


def spread(values: tuple[float, ...]) -> str:
    middle = statistics.median(values)
    digits = 2 if middle < 10 else 0
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def installed_bytes(package: str) -> int:
    """Return the bytes of a package and all its dependencies, without NumPy."""
    found: dict[str, int] = {"numpy": 0}
    waiting = [package]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        distribution = metadata.distribution(name)
        found[name] = sum(file.locate().stat().st_size for file in distribution.files or () if file.locate().is_file())
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    if package == "dsconv":  # the files of an editable installation are elsewhere
        found[package] = folder_bytes(Path(dsconv.__file__).parent)
    return sum(found.values())


def folder_bytes(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sum(path.stat().st_size for path in files)


if __name__ == "__main__":
    main()
