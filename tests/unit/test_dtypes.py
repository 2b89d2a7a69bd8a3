"""Networks in float16, bfloat16 and float64: images get their dtype, figures are computed in float32 and float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv.conversion import model_info
from dsconv.errors import DSConvError, ModelError
from dsconv.layers.inputs import as_input_of, dtype_of

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few", "ignore:the given network is kept")
DTYPES = [torch.float16, torch.bfloat16, torch.float64]
_generator = torch.Generator().manual_seed(0)
IMAGES = torch.randn(16, 3, 12, 12, generator=_generator) + torch.randn(16, 3, 1, 1, generator=_generator)
COARSE = {"weight_bits": 2, "activation_bits": 4, "first_layer": None}


def network() -> tnn.Sequential:
    torch.manual_seed(0)
    body = tnn.Conv2d(3, 16, 3, bias=False), tnn.BatchNorm2d(16), tnn.ReLU(), tnn.Conv2d(16, 16, 3), tnn.ReLU()
    return tnn.Sequential(*body, tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(16, 10)).eval()


class Mixed(tnn.Module):
    """Network with a half-precision body and a float head, which casts its input."""

    def __init__(self) -> None:
        super().__init__()
        net = network()
        self.body, self.head = net[:-1].half(), net[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).float())


class Counting(tnn.Module):
    """Network whose first parameter has integers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = tnn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        self.net = network().half()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_function_takes_a_network_of_any_dtype(dtype: torch.dtype, given: torch.dtype) -> None:
    net, x = network().to(dtype), IMAGES.to(given)
    qnet = dsconv.quantize(net, COARSE)
    assert dsconv.evaluate(net, [(x, torch.zeros(16, dtype=torch.int64))]).nonfinite == 0
    close = dsconv.compare(net, qnet, x)
    exact = dsconv.compare(network(), dsconv.quantize(network(), COARSE), x)
    assert close.kl == pytest.approx(exact.kl, rel=0.2)
    better = dsconv.calibrate(qnet, net, x)
    info = model_info(better)
    assert info is not None and info.calibration.kept == "calibrated"
    assert all(layer.error_after <= layer.error_before for layer in info.calibration.layers)
    trained = dsconv.adapt(qnet, net, x, recipe={"steps": 2, "every": 1, "batch_size": 8})
    for model in (qnet, better, trained):
        with torch.inference_mode():
            assert model(x.to(dtype)).dtype == dtype
        assert {p.dtype for p in model.parameters()} == {dtype}
    found = dsconv.sensitivity(net, COARSE, images=x)
    assert all(0 <= trial.kl < 1 for trial in found.trials)


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_and_files_for_runtimes_ask_for_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    qnet = dsconv.quantize(network().to(dtype), "w4a4")
    for x in (IMAGES, IMAGES.to(dtype)):
        with pytest.raises(ModelError, match=rf"parameter '1\.weight' is {dtype}, .*call float\(\) on the model"):
            dsconv.compile(qnet, x)
    x = IMAGES
    with torch.inference_mode():
        assert torch.equal(dsconv.compile(qnet.float(), x)(x), qnet(x))


def test_biases_are_trained_in_float32() -> None:
    """Check that small steps are not lost, as they would be in float16, where Adam's epsilon is also zero."""
    net = network().half()
    qnet = dsconv.quantize(net, COARSE)
    trained = dsconv.adapt(qnet, net, IMAGES, recipe={"steps": 6, "every": 2, "batch_size": 8, "lr": 1e-3})
    adaptation: Any = model_info(trained).adaptation
    assert adaptation.stopped == "all steps are done" and adaptation.best_step > 0


@pytest.mark.parametrize("make", [Mixed, Counting])
def test_mixed_networks(make: Callable[[], tnn.Module]) -> None:
    net = make().eval()
    qnet = dsconv.quantize(net, "w4a4")
    assert dtype_of(net) == torch.float16
    assert dsconv.compare(net, qnet, IMAGES).nonfinite == 0
    for made in (dsconv.calibrate(qnet, net, IMAGES), dsconv.adapt(qnet, net, IMAGES, recipe={"steps": 1})):
        assert [p.dtype for p in made.parameters() if p.is_floating_point()].count(torch.float16) > 0


def test_what_a_network_of_two_dtypes_cannot_run_on_is_told() -> None:
    net = network()
    net[7].half()  # its input is not cast
    for call in (lambda: dsconv.evaluate(net, IMAGES), lambda: dsconv.calibrate(dsconv.quantize(net), net, IMAGES)):
        with pytest.raises(DSConvError, match=r"cannot run on images"):
            call()


def test_under_autocast_layers_are_fitted_in_float32() -> None:
    net = network()
    qnet = dsconv.quantize(net, "w4a4")
    expected: Any = model_info(dsconv.calibrate(qnet, net, IMAGES)).calibration
    with torch.autocast("cpu", torch.bfloat16):
        found: Any = model_info(dsconv.calibrate(qnet, net, IMAGES)).calibration
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.error_after == pytest.approx(b.error_after, rel=0.1, abs=1e-4)


def test_the_dtype_is_that_of_what_is_in_float() -> None:
    qnet = dsconv.quantize(tnn.Sequential(tnn.Conv2d(3, 8, 3)).half(), "w4a4")
    assert dtype_of(qnet) is None and as_input_of(qnet, IMAGES) is IMAGES  # its KDS are float16, which does not matter
    for dtype in (*DTYPES, torch.float32):
        assert as_input_of(tnn.Sequential(qnet, tnn.BatchNorm2d(8, affine=False)).to(dtype), IMAGES).dtype == dtype
        assert qnet(IMAGES.to(dtype)).dtype == dtype
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert as_input_of(tnn.Linear(3, 3).half(), tokens) is tokens
    assert dtype_of(tnn.ReLU()) is None and dtype_of(Counting()) == torch.float16
