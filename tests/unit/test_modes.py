"""Training mode: measurements are those of evaluation mode, and the state of a network does not change."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv.data import Preprocess
from dsconv.errors import ModelError
from dsconv.report import gather

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONFIG = dsconv.QuantConfig.preset("w4a4", first_layer=None)
PREPARED = Preprocess(crop=8)
Run = Callable[[nn.Module, nn.Module], Any]


def networks() -> tuple[nn.Module, nn.Module]:
    """Return a network whose training and evaluation modes differ, and its quantized copy, both in evaluation mode."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1)
    )
    net.append(nn.Flatten())
    net(X)
    net.eval()
    return net, dsconv.quantize(net, CONFIG)


def state(model: nn.Module) -> list[Any]:
    return [*(value.clone() for value in model.state_dict().values()), *(m.training for m in model.modules())]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def kl(found: Any) -> list[float]:
    return [trial.kl for trial in found.trials]


def weights(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def timed(found: Any) -> int:
    return len(found.profile.steps)


MEASURES: dict[str, Run] = {
    "evaluate": lambda net, qnet: dsconv.evaluate(qnet, [(X, [3] * 64)]).top1,
    "compare": lambda net, qnet: dsconv.compare(net, qnet, X).kl,
    "tradeoff": lambda net, qnet: dsconv.tradeoff({"a": qnet}, net, X).candidates[0].evaluation.kl,
    "sensitivity": lambda net, qnet: kl(dsconv.sensitivity(net, CONFIG, images=X)),
    "sensitivity of a quantized network": lambda net, qnet: kl(dsconv.sensitivity(net, qnet, images=X)),
    "sensitivity without images": lambda net, qnet: kl(dsconv.sensitivity(net, CONFIG, preprocess=PREPARED)),
    "calibrate": lambda net, qnet: weights(dsconv.calibrate(qnet, net, X)),
    "adapt": lambda net, qnet: weights(dsconv.adapt(qnet, net, X, recipe={"steps": 2, "every": 1, "batch_size": 8})),
    "report": lambda net, qnet: gather(qnet, reference=net, images=X, runs=0).accuracy.kl,
    "quantize": lambda net, qnet: weights(dsconv.quantize(net, CONFIG)),
}
COMPILED: dict[str, Run] = {
    "times of a tradeoff": lambda net, qnet: len(
        dsconv.tradeoff({"a": qnet}, net, time_shape=(3, 8, 8), seconds=0.01).all
    ),
    "times of a report": lambda net, qnet: timed(gather(qnet, input_shape=(3, 8, 8), runs=2)),
}


def check(run: Run) -> None:
    net, qnet = networks()
    expected = run(net, qnet)
    net.train(), qnet.train()
    before = state(net), state(qnet)
    found = run(net, qnet)
    assert same(state(net), before[0]) and same(state(qnet), before[1])
    expected, found = (made if isinstance(made, list) else [made] for made in (expected, found))
    assert same(found, expected)


@pytest.mark.parametrize("name", MEASURES)
def test_what_measures_or_changes_weights_does_so_in_evaluation_mode_and_leaves_the_networks_as_they_were(
    name: str,
) -> None:
    check(MEASURES[name])


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.skipif(bool(dsconv.cpu_info().extension), reason="needs dsconv._C")
def test_so_does_what_measures_times(name: str) -> None:
    check(COMPILED[name])


REFUSALS: dict[str, Run] = {
    "compile": lambda net, qnet: dsconv.compile(qnet, X[:1]),
    "fold": lambda net, qnet: dsconv.fold_batchnorm(qnet),
    "export": lambda net, qnet: dsconv.export_onnx(qnet, X[:1], "never-written.onnx"),
    "bench": lambda net, qnet: dsconv.bench(net, qnet, X[:1], against=[], turns=2),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_makes_a_program_or_a_file_refuses_training_mode_in_the_same_words(name: str) -> None:
    if name == "export":
        pytest.importorskip("onnxscript", reason="needs the extra dsconv[onnx]")
    net, qnet = networks()
    net.train(), qnet.train()
    before = state(net), state(qnet)
    expected = r"model Sequential is in training mode, in which BatchNorm .* and Dropout .*: call the model's eval\(\)"
    with pytest.raises(ModelError, match=expected):
        REFUSALS[name](net, qnet)
    assert same(state(net), before[0]) and same(state(qnet), before[1])


@pytest.mark.parametrize("training", [True, False])
def test_what_is_loaded_is_in_evaluation_mode(training: bool, tmp_path: Path) -> None:
    net, qnet = networks()
    path = dsconv.save(qnet.train(training), tmp_path / "net.safetensors")
    into = copy.deepcopy(net).train(training)
    before = state(into)
    loaded = dsconv.load(path, into)
    assert not any(module.training for module in loaded.modules()) and same(state(into), before)
    with torch.inference_mode():
        assert torch.equal(loaded(X), loaded(X)) and torch.equal(loaded(X), qnet.eval()(X))
    folded = dsconv.save(dsconv.fold_batchnorm(qnet), tmp_path / "folded.safetensors")
    assert not any(module.training for module in dsconv.load(folded, into).modules())


def test_a_network_of_the_hub_is_in_evaluation_mode(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra dsconv[hub]")
    net, qnet = networks()
    dsconv.nn.DSConvModel(qnet).save_pretrained(tmp_path)
    loaded = dsconv.nn.DSConvModel.from_pretrained(tmp_path, model=net.train())
    assert not any(module.training for module in loaded.modules())


@pytest.mark.skipif(bool(dsconv.cpu_info().extension), reason="needs dsconv._C")
def test_a_compiled_network_stays_what_it_is_in_a_model_that_is_trained() -> None:
    _, qnet = networks()
    fast = dsconv.compile(qnet, X[:1])
    around = nn.Sequential(fast, nn.Linear(10, 2)).train()
    assert not fast.training and around.training
    larger = torch.randn(8, 3, 12, 12)
    with torch.inference_mode():
        assert torch.equal(fast(larger), qnet(larger))
