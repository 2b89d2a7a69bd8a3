"""ONNX files of whole networks in three runtimes, compared with the original networks."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv.nn import DSLayer
from dsconv.onnx import OnnxNetwork

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")

pytestmark = pytest.mark.slow

# Runtimes have different orders of sums: a different last bit can change the rounding of a mantissa, then of others.
# The effect is far below the rounding error itself, which is a few percent.
TIPPED = 0.02
REAL = ("cifar_resnet20", "cifar_resnet44", "resnet18_tiny", "tiny_darknet", "squeezenet1_1")


# Winograd layers are written as direct ones, which other tests cover.
DIRECT = dsconv.QuantConfig.preset("default", algorithm="direct")


def by_reference(path: Path, x: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    return torch.from_numpy(ReferenceEvaluator(os.fspath(path)).run(None, {"x": x.numpy()})[0])


def by_onnxruntime(path: Path, x: Tensor) -> Tensor:
    return OnnxNetwork(path)(x)


def by_openvino(path: Path, x: Tensor) -> Tensor:
    openvino = pytest.importorskip("openvino", reason="needs the extra 'bench'")
    # With 8-bit weights it would round the inputs of layers again.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    settings["INFERENCE_NUM_THREADS"] = 1
    return torch.from_numpy(openvino.Core().compile_model(path, "CPU", settings)(x.numpy())[0].copy())


RUNTIMES: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "reference": by_reference,
    "onnxruntime": by_onnxruntime,
    "openvino": by_openvino,
}


def check(qnet: nn.Module, x: Tensor, path: Path, style: Any, runtimes: list[str], within: float = TIPPED) -> None:
    with torch.inference_mode():
        expected = qnet(x)
    for name in runtimes:
        y = RUNTIMES[name](path, x)
        assert y.shape == expected.shape
        error = float((y - expected).norm() / expected.norm())
        assert error <= within, (style, name, error)


def packed_bytes(qnet: nn.Module) -> int:
    """Return the size of integers at the widths that ONNX has for them, with their scales and shifts."""
    layers = [layer for layer in qnet.modules() if isinstance(layer, DSLayer)]
    bits = sum(layer.vqk.numel() * (4 if layer.config.weight_bits <= 4 else 8) for layer in layers)
    return bits // 8 + sum(s.nbytes for layer in layers for s in (layer.kds, layer.kds_shift) if s is not None)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "mobilenet_v2"])
def test_networks_of_torchvision(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="needs the extra 'zoo'")
    torch.manual_seed(0)
    qnet = dsconv.quantize(dsconv.zoo.build(f"torchvision/{name}", weights="random"), DIRECT)
    x = torch.randn(2, 3, 32, 32)
    path = dsconv.export_onnx(qnet, x, tmp_path / "a.onnx")
    check(qnet, x, path, "qdq", ["onnxruntime", "openvino"])
    check(qnet, x[:1], path, "qdq", ["reference"])  # which is slow
    model = onnx.load(path)
    tensors = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert path.stat().st_size - tensors <= 0.05 * packed_bytes(qnet)
    check(qnet, x, dsconv.export_onnx(qnet, x, path, "function"), "function", ["onnxruntime"])
    if name == "resnet18":
        check(qnet, x[:1], path, "function", ["reference"])
    runtimes = list(RUNTIMES) if name == "resnet18" else ["onnxruntime", "openvino"]
    check_float(qnet, dsconv.zoo.build(f"torchvision/{name}", weights="random"), x, path, runtimes)


def check_float(qnet: nn.Module, net: nn.Module, x: Tensor, path: Path, runtimes: list[str]) -> None:
    """Compare the file in float32 with ``net`` with dequantized weights."""
    weights = {f"{name}.weight": layer.weight for name, layer in qnet.named_modules() if isinstance(layer, DSLayer)}
    net.load_state_dict(qnet.state_dict() | weights, strict=False)
    with torch.inference_mode():
        expected = net(x)
    dsconv.export_onnx(qnet, x, path, "float")
    for name in runtimes:
        assert (RUNTIMES[name](path, x) - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("name", REAL)
def test_real_networks_in_other_styles(name: str, nets: ModuleType, tmp_path: Path) -> None:
    qnet = dsconv.quantize(nets.load(name), DIRECT)
    x = nets.preprocess(name, nets.images(nets.NETS[name][1])[0][:4])
    path = dsconv.export_onnx(qnet, x, tmp_path / "a.onnx", "function")
    check(qnet, x, path, "function", ["onnxruntime"])
    check_float(qnet, nets.load(name), x, path, ["onnxruntime", "openvino"])


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("name", REAL)
def test_real_networks(name: str, preset: str, nets: ModuleType, tmp_path: Path) -> None:
    qnet = dsconv.quantize(nets.load(name), dsconv.QuantConfig.preset(preset, algorithm="direct"))
    x = nets.preprocess(name, nets.images(nets.NETS[name][1])[0][:4])
    # At 4 bits a differently rounded mantissa has sixteen times the effect.
    within = TIPPED if preset == "default" else 0.1
    check(qnet, x, dsconv.export_onnx(qnet, x, tmp_path / "a.onnx"), "qdq", ["onnxruntime", "openvino"], within)


def test_int8_files_keep_the_classes_of_a_real_network(nets: ModuleType, tmp_path: Path) -> None:
    name = "cifar_resnet20"
    qnet = dsconv.quantize(nets.load(name))
    x, unlabelled = (nets.preprocess(name, nets.images("cifar10", labelled)[0][:200]) for labelled in (True, False))
    for images, least in ((unlabelled[:32], 97.0), (None, 94.0)):
        path = dsconv.export_onnx(qnet, x[:1], tmp_path / "a.onnx", "int8", images=images)
        assert dsconv.compare(qnet, OnnxNetwork(path), x, per_layer=False).agreement >= least
