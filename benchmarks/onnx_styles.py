"""Measure each style of ONNX file on each runtime: bytes, milliseconds, and distance from the network.

    python benchmarks/onnx_styles.py torchvision/resnet18 torchvision/mobilenet_v2 --size 224

Random weights, random images, one thread; every runtime has a turn in every round. OpenVINO compiles for batch size
one; ONNX Runtime dequantizes weights in blocks once (``session.disable_quant_qdq``) or, by default, at every call.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import openvino
import torch

import dsconv
from dsconv.onnx import STYLES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("networks", nargs="+")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--rounds", type=int, default=7)
given = parser.parse_args()
torch.set_num_threads(1)


def by_onnxruntime(path: Path, x: torch.Tensor, disable: str) -> Callable[[], torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.disable_quant_qdq", disable)
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def by_openvino(path: Path, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: torch.from_numpy(request.infer(x.numpy())[0])


for network in given.networks:
    torch.manual_seed(0)
    qnet = dsconv.quantize(dsconv.zoo.build(network, weights="random"))
    x = torch.randn(1, 3, given.size, given.size)
    compiled = dsconv.compile(qnet, x)
    calls: dict[str, Callable[[], torch.Tensor]] = {"dsconv, compiled": lambda: compiled(x)}  # noqa: B023
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        expected = qnet(x)
        for style in STYLES:
            images = torch.randn(8, *x.shape[1:]) if style == "int8" else None
            path = dsconv.export_onnx(qnet, x, Path(folder, f"{style}.onnx"), style, images=images)
            sizes[style] = path.stat().st_size
            calls[f"{style}: ONNX Runtime"] = by_onnxruntime(path, x, "0")
            if style in ("qdq", "function"):
                calls[f"{style}: ONNX Runtime, folded"] = by_onnxruntime(path, x, "1")
            if style != "function":
                calls[f"{style}: OpenVINO"] = by_openvino(path, x)
        errors = {name: float((call() - expected).norm() / expected.norm()) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(given.rounds):
            for name, call in calls.items():
                call()
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    print(f"\n{network}, {given.size} x {given.size}: {dsconv.summary(qnet).bytes_after:,} bytes of tensors in dsconv")
    print("  ".join(f"{style} {size:,}" for style, size in sizes.items()), "bytes")
    for name in calls:
        print(f"{name:32} {statistics.median(times[name]):8.1f} ms   error {errors[name]:.2g}", flush=True)
