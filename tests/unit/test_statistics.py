"""Statistics of layer inputs, derived from BatchNorms, and their use in quantization."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import dsconv
from dsconv.conversion.statistics import input_moments, signed_inputs


def batchnorm(channels: int) -> nn.BatchNorm2d:
    """Return a BatchNorm trained on inputs with other moments than noise."""
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.normal_(3)
    layer.running_var.uniform_(4, 9)
    with torch.no_grad():
        layer.weight.uniform_(0.2, 3)
        layer.bias.normal_()
    return layer


def network(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), batchnorm(32), *between, nn.Conv2d(32, 16, 3)).eval()


def test_scale_and_shift_are_deviation_and_mean() -> None:
    net = network()
    found = input_moments(net)
    assert list(found) == [net[2]]  # nothing precedes the first layer
    torch.testing.assert_close(found[net[2]].mean, net[1].bias.detach()[None], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[net[2]].variance, net[1].weight.detach().square()[None], atol=0.01, rtol=1e-2)


def test_behind_a_relu_they_are_those_of_a_cut_normal_variable() -> None:
    net = network(nn.ReLU())
    m, s = net[1].bias.detach(), net[1].weight.detach()
    normal = torch.distributions.Normal(0.0, 1.0)
    density, inside = (-(m / s).square() / 2).exp() / math.sqrt(2 * math.pi), normal.cdf(m / s)
    mean = m * inside + s * density
    variance = (m * m + s * s) * inside + m * s * density - mean * mean
    found = input_moments(net)[net[3]]
    # The noise after a convolution is nearly normal.
    torch.testing.assert_close(found.mean[0], mean, atol=0.05, rtol=0.05)
    torch.testing.assert_close(found.variance[0], variance, atol=0.1, rtol=0.1)


def test_groups_have_inputs_of_their_own_and_what_no_batchnorm_tells_is_left_out() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        batchnorm(8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Conv2d(8, 8, 3),
        batchnorm(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    ).eval()
    found = input_moments(net)
    assert list(found) == [net[2]] and found[net[2]].mean.shape == (4, 2)


def test_the_network_stays_as_it_was() -> None:
    net = network(nn.ReLU(), nn.Dropout()).train()
    before = copy.deepcopy(net.state_dict())
    assert input_moments(net)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Particular(nn.Module):
    """Network that accepts inputs of only one size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2:] == (17, 19)
        y: Tensor = self.net(x)
        return y


@pytest.mark.parametrize(
    "net", [Particular(), nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3)), nn.Sequential(nn.Linear(64, 8))]
)
def test_what_cannot_be_told_is_not(net: nn.Module) -> None:
    assert input_moments(net) == {}
    told, plain = (
        dsconv.quantize(net, dsconv.QuantConfig.preset("default", batchnorm_statistics=known))
        for known in (True, False)
    )
    assert all(torch.equal(told.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_networks_come_closer_to_their_originals() -> None:
    net = network(nn.ReLU())
    x = torch.randn(8, 3, 16, 16)
    with torch.inference_mode():
        mean, variance = net[0](x).mean((0, 2, 3)), net[0](x).var((0, 2, 3))
        net[1].running_mean.copy_(mean)
        net[1].running_var.copy_(variance)
    error = {}
    for known in (True, False):
        settings = {"weight_bits": 2, "weight_shift": False, "first_layer": "float", "batchnorm_statistics": known}
        qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("default", **settings))
        with torch.inference_mode():
            error[known] = (qnet(x) - net(x)).square().mean().item()
    assert error[True] < 0.95 * error[False]


def test_integers_and_scales_are_the_same_bits_on_any_number_of_threads() -> None:
    net = network(nn.ReLU(), nn.Conv2d(32, 128, 1), batchnorm(128), nn.ReLU(), nn.Conv2d(128, 32, 3))
    before, states = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            states.append(dsconv.quantize(net).state_dict())
    finally:
        torch.set_num_threads(before)
    assert len(states[0]) > 10
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())


class Residual(nn.Module):
    """Blocks with inputs of all kinds: sums of rectified values, and of values before the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.expand, self.last = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8, 16))
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = x + self.body(x)  # may be negative
        z = torch.cat([x, self.expand(y).relu_()], 1)
        return self.linear(torch.nn.functional.max_pool2d(self.last(z).sigmoid(), 2).mean((2, 3)))


def test_inputs_that_may_be_negative_are_told_by_what_precedes_them() -> None:
    net = Residual()
    before = copy.deepcopy(net.state_dict())
    assert signed_inputs(net) == {net.first, net.expand}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("activation", "signed"),
    [
        (nn.ReLU(), False),
        (nn.ReLU6(inplace=True), False),
        (nn.Hardsigmoid(), False),
        (nn.Softplus(), False),
        (nn.LeakyReLU(0.1), True),
        (nn.SiLU(), True),
        (nn.Hardswish(), True),
        (nn.GELU(), True),
        (nn.PReLU(), True),
        (nn.Identity(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_signs_are_chosen_by_layer(activation: nn.Module, signed: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), activation, nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(64, 64, 3)
    ).eval()
    qnet = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", small_layers=None))
    assert qnet[5].config.activation_sign == ("extra" if signed else "adaptive") and qnet[0].config.activation_bits == 8
    assert qnet.dsconv_info.config.activation_sign == "auto"
    by_hand = {
        "activation_sign": "adaptive",
        "overrides": {"5": {"activation_sign": "extra" if signed else "adaptive"}},
    }
    same = dsconv.quantize(net, dsconv.QuantConfig.preset("w4a4", **by_hand, small_layers=None))
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(qnet(x), same(x))


def test_layers_of_which_nothing_is_known_may_read_anything() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            if self.strict and more is None:
                raise RuntimeError("two inputs")
            return self.b(self.a(x).relu())

    net = Picky()
    net.strict = False
    assert signed_inputs(net) == {net.a, net.unused}
    net.strict = True
    assert signed_inputs(net) == {net.a, net.b, net.unused}
    tokens = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    assert signed_inputs(tokens) == {tokens[1]}
    assert dsconv.nn.DSConv2d.from_float(net.b, "w4a4").config.activation_sign == "extra"


def test_at_8_bits_and_in_float_there_is_no_sign_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsconv.conversion.convert.signed_inputs", None)  # calling it is an error
    net = network(nn.SiLU())
    for bits in (8, None):
        qnet = dsconv.quantize(net, {"activation_sign": "auto", "activation_bits": bits})
        assert {layer.config.activation_sign for layer in qnet if hasattr(layer, "vqk")} == {"adaptive"}


def test_a_search_chooses_signs_as_quantize_does() -> None:
    net = network(nn.SiLU())
    config = {"activation_sign": "auto", "first_layer": None, "algorithm": "direct"}
    x = torch.randn(4, 3, 16, 16)
    trials, by_hand, other = (
        [trial.distance for trial in dsconv.sensitivity(net, config | {"activation_sign": sign}, images=x).trials]
        for sign in ("auto", "extra", "adaptive")
    )
    assert trials == by_hand != other
