"""Networks in wrappers: every function uses the wrapped network, under its own names."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn
from torch.optim.swa_utils import AveragedModel

import dsconv
from dsconv import nn
from dsconv.conversion.wrappers import unwrapped
from dsconv.zoo import preprocess_of

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = tnn.Sequential(tnn.Conv2d(3, 8, 3, bias=False), tnn.BatchNorm2d(8), tnn.ReLU())
        self.head = tnn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


class Varargs(tnn.Module):
    """An unknown wrapper of the user."""

    def __init__(self, model: tnn.Module):
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = f"file://{tmp_path_factory.mktemp('group')}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: tnn.Module) -> Any:
    return torch.compile(model, backend="eager")


def features_compiled(model: Any) -> tnn.Module:
    model.features = compiled(model.features)
    return model


def features_parallel(model: Any) -> tnn.Module:
    model.features = tnn.DataParallel(model.features)
    return model


def of_another_package(model: tnn.Module) -> tnn.Module:
    made = Varargs(model)
    made._original_module = model
    kind = type("_FabricModule", (Varargs,), {"__module__": "lightning.fabric.wrappers"})
    made.__class__ = kind
    return made


def several(model: tnn.Module) -> tnn.Module:
    return tnn.DataParallel(compiled(AveragedModel(model)))


def parallel(model: tnn.Module) -> tnn.Module:
    return tnn.parallel.DistributedDataParallel(model)


WRAPPERS = (
    tnn.DataParallel,
    AveragedModel,
    compiled,
    features_compiled,
    features_parallel,
    of_another_package,
    several,
    parallel,
)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_is_taken_off(wrap: Callable[[Any], Any], process_group: None) -> None:
    model = wrap(net()).eval()
    quantized, expected = dsconv.quantize(model, "w8a8"), dsconv.quantize(net(), "w8a8")
    assert type(quantized) is Net and set(quantized.state_dict()) == set(expected.state_dict())
    assert [row.name for row in dsconv.summary(model).layers] == ["features.0", "head"]
    with torch.inference_mode():
        assert torch.equal(quantized(X), expected(X))


@pytest.mark.parametrize("wrap", [several, features_compiled])
def test_every_function_takes_the_network_in_a_wrapper(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    plain, model = net(), wrap(net()).eval()
    quantized, expected = dsconv.quantize(model, "w8a8"), dsconv.quantize(plain, "w8a8")
    again = wrap(dsconv.quantize(plain, "w8a8")).eval()
    path = dsconv.save(again, tmp_path / "net.safetensors")
    recipe = {"steps": 1, "batch_size": 8}
    with torch.inference_mode():
        wanted = expected(X)
        assert torch.equal(quantized(X), wanted)
        assert torch.equal(dsconv.load(path, net())(X), wanted)
        assert torch.equal(dsconv.load(path, model)(X), wanted)
        assert torch.equal(dsconv.quantize(again)(X), wanted)
        assert torch.equal(dsconv.compile(again, X)(X), wanted)
        torch.testing.assert_close(dsconv.fold_batchnorm(again)(X), wanted, rtol=1e-3, atol=1e-3)
        calibrated = [dsconv.calibrate(q, m, X)(X) for q, m in ((again, model), (expected, plain))]
        assert torch.equal(*calibrated)
    adapted = [dsconv.adapt(q, m, X, recipe=recipe) for q, m in ((again, model), (expected, plain))]
    assert all(torch.equal(*pair) for pair in zip(*(a.state_dict().values() for a in adapted), strict=True))
    found = [dsconv.compare(m, q, X) for q, m in ((again, model), (expected, plain))]
    assert found[0].kl == found[1].kl and found[0].layer_sqnr_db == found[1].layer_sqnr_db
    assert dsconv.evaluate(model, X[:4]).images == 4
    measured = [dsconv.sensitivity(m, "w4a4", images=X[:4]).trials for m in (model, plain)]
    assert measured[0] == measured[1]
    bench = dsconv.bench(model, again, X[:2], against=["torch"], turns=2, seconds=0.01)
    assert set(bench.not_run) <= {"PyTorch bf16"} and bench.timings  # not every processor supports bf16


def test_networks_in_wrappers_are_left_as_they_are() -> None:
    model = features_parallel(net())
    wrapped = AveragedModel(model)
    before = dict(wrapped.named_modules())
    network = unwrapped(wrapped)
    assert dict(wrapped.named_modules()) == before and not isinstance(network.features, tnn.DataParallel)
    assert network.head is wrapped.module.head and unwrapped(network) is network


def test_the_preparation_of_images_is_that_of_the_network_in_a_wrapper() -> None:
    model = dsconv.zoo.build("dsconv/digits_resnet")
    assert preprocess_of(tnn.DataParallel(model)) == preprocess_of(model) is not None


@pytest.mark.parametrize("depth", [1, 2])
def test_a_forward_of_any_arguments_is_compiled_and_folded(depth: int) -> None:
    model: Any = net()
    for _ in range(depth):
        model = Varargs(model)
    quantized = dsconv.quantize(model.eval(), "w8a8")
    with torch.inference_mode():
        wanted = quantized(X)
        fast = dsconv.compile(quantized, X[:1])
        assert torch.equal(fast(X), wanted) and torch.equal(fast(X[:5]), wanted[:5])
        folded = dsconv.fold_batchnorm(quantized)
        torch.testing.assert_close(folded(X), wanted, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(module, tnn.BatchNorm2d) for module in folded.modules())
    assert isinstance(folded.get_submodule("inner." * depth + "head"), nn.DSLinear)


@pytest.mark.parametrize("wrap", [tnn.DataParallel, compiled, Varargs])
def test_wrapped_networks_are_exported(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason="needs the extra dsconv[onnx]")
    onnx = pytest.importorskip("onnx")
    model = wrap(dsconv.quantize(net(), "w8a8")).eval()
    graph = onnx.load(dsconv.export_onnx(model, X[:1], tmp_path / "net.onnx")).graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
