"""Convolution and linear functions in modules are quantized like layers, or listed with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

import dsconv
from dsconv.conversion import convert, model_info
from dsconv.conversion.functional import as_layers
from dsconv.conversion.wrappers import unwrapped
from dsconv.errors import ModelError
from dsconv.nn import DSConvTranspose2d, DSLinear
from dsconv.ops import native

needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")
CHANNELS = 8
CONFIG = dsconv.QuantConfig(batchnorm_statistics=False)


def numbers(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float32, device="cpu") / 8)


class Scaled(nn.Module):
    """Layer with an equalized learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = numbers(CHANNELS, CHANNELS, 3, 3), numbers(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.5, self.bias * 2, padding=1)


class Standardized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = numbers(CHANNELS, CHANNELS, 1, 1), numbers(CHANNELS, 1, 1, 1)

    def standardized(self) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=[1, 2, 3], keepdim=True)
        return self.gain * (self.weight - mean) / (std + 1e-6)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = F.conv2d(x.to(self.weight.dtype), weight=self.standardized())
        return y if scale is None else y * scale


class WithNorm(nn.Conv2d):
    """Convolution, normalization and activation in one module, as in detectors."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding)))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([numbers(CHANNELS, CHANNELS), numbers(10, CHANNELS)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        for weight in self.weights:
            x = F.linear(x, F.normalize(weight))
        return x


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = numbers(CHANNELS, CHANNELS // 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.kernel, None, 2, groups=2)


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        parts = [Scaled(), nn.ReLU(), Standardized(), WithNorm(), Up(), Heads()]
        super().__init__(nn.Conv2d(3, CHANNELS, 3, padding=1), *parts)
        self.eval()


NAMES = [
    *("0", "1.conv2d_weight", "3.conv2d_weight", "4.conv2d_weight", "5.conv_transpose2d_kernel"),
    *("6.linear_weights_0", "6.linear_weights_1"),
]


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


@pytest.fixture(scope="module")
def quantized(net: Net) -> nn.Module:
    return dsconv.quantize(net, CONFIG)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_in_float_the_layers_do_what_the_functions_did(net: Net, x: Tensor) -> None:
    state, calls = net.state_dict(), []
    made, in_float = as_layers(net)
    for name in NAMES:
        made.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    assert torch.equal(made(x), net(x)) and calls == NAMES and not in_float
    assert net.state_dict().keys() == state.keys() and as_layers(made)[0] is made
    assert made[1].conv2d_weight.weight.equal(net[1].weight * 0.5)  # type: ignore[union-attr, operator]
    assert made[4].conv2d_weight.weight is net[4].weight  # type: ignore[union-attr]


def plain(first: nn.Module, scaled: Any) -> nn.Module:
    """Return the equivalent plain layers of these two."""
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    layer.weight, layer.bias = nn.Parameter(scaled.weight * 0.5), nn.Parameter(scaled.bias * 2)
    return nn.Sequential(first, layer)


@torch.inference_mode()
def test_they_are_quantized_as_layers_are(net: Net, quantized: nn.Module, x: Tensor) -> None:
    rows = dsconv.summary(quantized).layers
    assert sorted(row.name for row in rows) == sorted(NAMES) and all(row.quantized for row in rows)
    assert torch.equal(dsconv.quantize(nn.Sequential(net[0], net[1]))(x), dsconv.quantize(plain(net[0], net[1]))(x))
    assert isinstance(quantized[5].conv_transpose2d_kernel, DSConvTranspose2d)  # type: ignore[index]
    assert isinstance(quantized[6].linear_weights_0, DSLinear)  # type: ignore[index]
    assert max(p.numel() for p in quantized.parameters()) <= CHANNELS
    assert float((quantized(x) - net(x)).norm() / net(x).norm()) < 0.3
    given = torch.randn(2, CHANNELS, 5, 5)
    assert torch.equal(quantized[3](given, scale=2.0), quantized[3](given) * 2)  # type: ignore[index]


@needs_extension
@torch.inference_mode()
def test_compiled_they_have_the_bits_of_the_model(quantized: nn.Module, x: Tensor) -> None:
    fast = dsconv.compile(quantized, x[:1])
    assert torch.equal(fast(x), quantized(x))
    assert (
        sum("convolution" in str(step.operator) or "conv" in str(step.operator) for step in fast.plan.in_pytorch) == 0
    )


@torch.inference_mode()
def test_files_hold_them(net: Net, quantized: nn.Module, x: Tensor, tmp_path: Path) -> None:
    folded = dsconv.fold_batchnorm(quantized)
    assert model_info(folded).folded == {"4.norm": "4.conv2d_weight"}  # type: ignore[union-attr]
    for model in (quantized, folded):
        again = dsconv.load(dsconv.save(model, tmp_path / "net.safetensors"), Net())
        assert torch.equal(again(x), model(x))


def test_files_from_before_load_as_they_are(
    net: Net, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(convert, "as_layers", lambda model: (unwrapped(model), []))
        old = dsconv.quantize(net, CONFIG)
        path = dsconv.save(old, tmp_path / "net.safetensors")
    again = dsconv.load(path, net)
    with torch.inference_mode():
        assert "1.weight" in again.state_dict() and torch.equal(again(x), old(x))


def test_the_float_network_is_known_by_them(net: Net, quantized: nn.Module) -> None:
    result = dsconv.calibrate(quantized, net, torch.randn(16, 3, 8, 8))
    assert {layer.name for layer in model_info(result).calibration.layers} == set(NAMES)  # type: ignore[union-attr]


def test_weights_that_pytorch_computes_are_resolved(x: Tensor) -> None:
    for normalized in (parametrizations.weight_norm, weight_norm):
        part = normalized(Scaled())
        net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), part).eval()
        made = dsconv.quantize(net)
        assert [row.name for row in dsconv.summary(made).layers] == ["0", "1.conv2d_weight"]
        with torch.inference_mode():
            assert torch.equal(made(x), dsconv.quantize(plain(net[0], part))(x))
        assert not [name for name in made.state_dict() if "weight_v" in name or "original" in name]


def test_names_in_the_config_are_those_of_the_layers(net: Net) -> None:
    made = dsconv.quantize(net, dsconv.QuantConfig(overrides={"1.conv2d_*": "float", "4.*": {"weight_bits": 3}}))
    rows = {row.name: row for row in dsconv.summary(made).layers}
    assert rows["1.conv2d_weight"].reason == "the config leaves it in float"
    assert rows["4.conv2d_weight"].weight_bits == 3


class Refused(nn.Module):
    def __init__(self, call: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.weight, self.other = numbers(CHANNELS, CHANNELS, 1, 1), numbers(3, CHANNELS * CHANNELS)
        self.register_buffer("fixed", torch.ones(CHANNELS, 1, 3, 3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight).relu() if self.call is None else self.call(self, x)


def dynamic(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, (x.mean((0, 2, 3))[:3] @ m.other).view(m.weight.shape))


def twice(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight) + F.conv2d(x, m.weight.flip(0))


def also(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight) * m.weight.mean()


def fixed(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.fixed, groups=CHANNELS)


def sized(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, padding=x.shape[-1] // 4)


def biased(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.weight, x.mean((0, 2, 3)))


def noisy(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, F.dropout(m.weight))


def branching(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x if x.mean() > 0 else -x, m.weight)


@pytest.mark.parametrize(
    ("call", "name", "reason"),
    [
        (dynamic, "1.other", "its weight depends on the input"),
        (twice, "1.weight", "it is called with 'weight' in different ways"),
        (also, "1.weight", "its parameter 'weight' is used for something else, too"),
        (fixed, "1", "its weight is a fixed tensor, not a parameter"),
        (sized, "1.weight", "its padding or another size depends on the input"),
        (biased, "1.weight", "its bias depends on the input"),
        (noisy, "1.weight", "its weight depends on the input, or on chance"),
        (branching, "1.weight", "torch.fx cannot trace its forward"),
    ],
)
def test_what_stays_is_listed_with_the_reason_and_the_line(
    call: Callable[[Any, Tensor], Tensor], name: str, reason: str, tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), Refused(call)).eval()
    made = dsconv.quantize(net)
    line = f"{__file__}:{call.__code__.co_firstlineno + 1}"
    found = {row.name: row for row in dsconv.summary(made).layers if not row.quantized}
    assert reason in str(found[name].reason) and line in str(found[name].reason) and found[name].kind == "Refused"
    assert all("Refused" in str(row.reason) or "torch.fx" in str(row.reason) for row in found.values())
    path = dsconv.save(made, tmp_path / "net.safetensors")
    again = dsconv.load(path, net)
    x = torch.randn(1, 3, 6, 6)
    if call is not noisy:
        with torch.inference_mode():
            assert torch.equal(again(x), made(x))
    if name != "1":
        from dsconv.io.checkpoint import describe

        rows = {row.name: row for row in describe(path)[1].layers}
        assert reason in str(rows[name].reason)


def test_a_network_of_nothing_else_says_why() -> None:
    with pytest.raises(ModelError, match="depends on the input"):
        dsconv.quantize(Refused(dynamic))


def test_another_use_than_was_seen_is_an_error(x: Tensor) -> None:
    class Changing(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight.tanh() if self.training else self.weight)

    made = dsconv.quantize(nn.Sequential(nn.Conv2d(3, CHANNELS, 3), Changing()).eval())
    made(x)
    with pytest.raises(ModelError, match="used in another way, by tanh"):
        made.train()(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.scales = numbers(1, 1, 6), nn.ParameterList([numbers(8, 1, 1)])
        self.linear = weight_norm(nn.Linear(6, 5))
        self.again = self.linear
        self.table = nn.Embedding(4, 4)


def test_parameters_of_no_layer_have_a_line_and_a_layer_one_row() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Tokens())
    found = dsconv.summary(dsconv.quantize(net, dsconv.QuantConfig(linear="float")))
    assert [row.name for row in found.layers] == ["0", "1.linear", "1.table.weight"]
    assert [row.name for row in found.parameters] == ["1.token", "1.scales.0"]
    assert found.layers[1].shape == (5, 6) and found.layers[1].bytes_after == 4 * (5 + 30)
    assert "Parameters outside layers, in float: 1.token 1x1x6, 1.scales.0 8x1x1." in " ".join(str(found).split())
    assert found.bytes_before == 4 * sum(p.numel() for p in net.parameters())
