"""A compiled network has the bits and strides of the model in every memory layout of its input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import dsconv
from dsconv.compilation import CompiledModel, compiled, layouts
from dsconv.numerics import sqnr_db
from dsconv.ops import native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows and columns swapped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "some of the channels": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "images innermost": lambda x: x.movedim(0, 3).contiguous().movedim(3, 0),
    "one image": lambda x: x[:1].expand_as(x),
}


class Chain(nn.Module):
    """A sequence of layers and functions; functions also get the layers."""

    def __init__(self, *steps: Any, **layers: nn.Module):
        super().__init__()
        self.steps = [step for step in steps if not isinstance(step, nn.Module)]
        self.order = ["" if not isinstance(step, nn.Module) else str(i) for i, step in enumerate(steps)]
        self.chain = nn.ModuleDict({str(i): step for i, step in enumerate(steps) if isinstance(step, nn.Module)})
        for name, layer in layers.items():
            self.add_module(name, layer)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        functions = iter(self.steps)
        for name in self.order:
            x = self.chain[name](x) if name else next(functions)(self, x)
        return x


def conv(inputs: int, outputs: int, size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


def compile_(net: nn.Module, size: tuple[int, ...], overrides: dict[str, Any] | None = None) -> CompiledModel:
    config = {"activation_bits": 4, "block_size": 16, "weight_rule": "paper", "overrides": overrides or {}}
    return dsconv.compile(dsconv.quantize(net, config), torch.zeros(1, *size))


# Operators that programs round differently than PyTorch.
OWN = {"silu", "sigmoid", "gelu", "tanh", "softmax", "group_norm", "instance_norm", "layer_norm"}


def assert_as_model(fast: CompiledModel, x: Tensor) -> None:
    with torch.inference_mode():
        expected, found = fast.model(x), fast(x)
    steps = fast.program_for(x).plan.steps
    if any(step.operator == "dsconv.average" or OWN & set(step.fused) for step in steps):
        # A few mantissas of four bits may be rounded differently.
        noise, signal = (found - expected).square().sum().item(), expected.square().sum().item()
        assert sqnr_db(signal, noise) > 15
    else:
        assert torch.equal(found, expected), float((found - expected).abs().max())
    assert found.stride() == expected.stride()


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = {
    "group and instance norm": (
        Chain(conv(3, 32), nn.GroupNorm(4, 32), nn.ReLU(), conv(32, 32), nn.InstanceNorm2d(32), conv(32, 16)),
        (3, 9, 7),
        {},
    ),
    "layers in float, weights only and transposed": (
        Chain(
            conv(3, 32),
            conv(32, 24),
            nn.ReLU(),
            conv(24, 16),
            nn.ConvTranspose2d(16, 16, 2, stride=2),
            conv(16, 16),
        ),
        (3, 9, 7),
        {"chain.1": "float", "chain.3": {"activation_bits": None}},
    ),
    "channels-last images and averages": (
        Chain(lambda _, x: x.permute(0, 3, 1, 2), conv(3, 48), nn.ReLU(), conv(48, 10), lambda _, x: x.mean((2, 3))),
        (9, 7, 3),
        {},
    ),
    "layer norm over channels": (
        Chain(
            conv(3, 32),
            lambda m, x: x + m.scale(m.grow(m.norm(m.deep(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
            lambda _, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            conv(32, 8),
            deep=conv(32, 32, groups=32),
            norm=nn.LayerNorm(32),
            grow=nn.Linear(32, 64),
            scale=nn.Sequential(nn.GELU(), nn.Linear(64, 32)),
        ),
        (3, 8, 6),
        {},
    ),
    "sequences": (
        Chain(
            lambda _, x: x.flatten(2),
            nn.Conv1d(3, 32, 3, padding=1),
            nn.BatchNorm1d(32),
            lambda _, x: x.transpose(1, 2).softmax(1).transpose(1, 2),
            nn.Conv1d(32, 16, 1),
            nn.BatchNorm1d(16),
            lambda _, x: x.sum(1),
        ),
        (3, 5, 7),
        {},
    ),
    "parts of the channels": (
        Chain(
            conv(3, 33),
            lambda m, x: torch.cat([m.norm(x[:, 1:]), F.silu(x[:, :16]), x], 1),
            lambda _, x: x[:, ::3].softmax(1) * torch.sigmoid(x[:, 1::3].mean(1, keepdim=True)),
            conv(27, 8),
            norm=nn.BatchNorm2d(32),
        ),
        (3, 5, 7),
        {},
    ),
    "one channel": (Chain(conv(1, 16), nn.SiLU(), conv(16, 1), nn.GroupNorm(1, 1), conv(1, 8)), (1, 9, 1), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layout_gives_the_bits_and_strides_of_the_model(name: str) -> None:
    net, size, overrides = NETWORKS[name]
    fast = compile_(net, size, overrides)
    for layout in ("contiguous", "channels last", "rows and columns swapped"):
        for images in (1, 3):
            assert_as_model(fast, LAYOUTS[layout](torch.randn(images, *size)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_need_not_be_dense(layout: str) -> None:
    fast = compile_(Chain(nn.GroupNorm(1, 3), conv(3, 16), nn.BatchNorm2d(16), nn.GELU()), (3, 5, 7))
    assert_as_model(fast, LAYOUTS[layout](torch.randn(4, 3, 5, 7)))


def test_what_programs_round_in_their_own_way_has_the_same_bits_in_every_layout_and_batch() -> None:
    fast = compile_(
        Chain(
            *(conv(3, 33), nn.SiLU(), conv(33, 12), nn.GroupNorm(4, 12), nn.GELU(), conv(12, 9), nn.InstanceNorm2d(9)),
            *(nn.Tanh(), conv(9, 7), nn.Mish(), nn.Softmax(1)),
        ),
        (3, 5, 7),
    )
    x = torch.randn(5, 3, 5, 7)
    assert not fast.plan.in_pytorch
    y, before = fast(x), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for layout in ("channels last", "rows and columns swapped", "images innermost"):
                assert torch.equal(fast(LAYOUTS[layout](x)), y)
            assert torch.equal(torch.cat([fast(part) for part in x.split(2)]), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("always", [False, True])
def test_a_layout_that_follows_from_the_batch_is_recorded_for_it(monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
    fast = compile_(
        Chain(conv(3, 16), conv(16, 16), conv(16, 16), nn.GroupNorm(2, 16)), (3, 5, 7), {"chain.1": "float"}
    )
    record = layouts.record

    def recorded(module: torch.fx.GraphModule, x: Tensor) -> None:
        record(module, x)
        if len(x) != 5 or always:  # as if PyTorch had chosen another kernel for a batch of 2
            for node in module.graph.nodes:
                if node.target is torch.ops.aten.conv2d.default:
                    node.meta["strides"] = (560, 1, 112, 16)

    monkeypatch.setattr(compiled, "record", recorded)
    x = torch.randn(5, 3, 5, 7)
    for _ in range(2):
        assert_as_model(fast, x)
    assert not fast.program_for(x, this_batch=True).any_batch


def test_outputs_that_are_views_and_branches_on_the_layout_are_those_of_the_model() -> None:
    def views(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y = m.get_submodule("layer")(x if x.is_contiguous() else 2 * x)
        return y[:, 1:], y.permute(0, 2, 3, 1), y.amax((2, 3))[:, :, None].expand(-1, -1, 3), x, y

    fast = compile_(Chain(views, layer=conv(3, 16)), (3, 5, 7))
    for layout in ("contiguous", "channels last", "images innermost"):
        x = LAYOUTS[layout](torch.randn(4, 3, 5, 7))
        with torch.inference_mode():
            for found, expected in zip(fast(x), fast.model(x), strict=True):
                assert torch.equal(found, expected) and found.stride() == expected.stride()


CHANNELS = 16


def _gated(_: nn.Module, x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return torch.cat([one * torch.sigmoid(other), other], 1)


STEPS: dict[str, Callable[[], Any]] = {
    "conv": lambda: conv(CHANNELS, CHANNELS),
    "grouped": lambda: conv(CHANNELS, CHANNELS, groups=2),
    "depthwise": lambda: conv(CHANNELS, CHANNELS, groups=CHANNELS),
    "float": lambda: conv(CHANNELS, CHANNELS, 1),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1),
    "batch norm": lambda: nn.BatchNorm2d(CHANNELS),
    "group norm": lambda: nn.GroupNorm(4, CHANNELS),
    "prelu": lambda: nn.PReLU(CHANNELS),
    "silu": lambda: lambda _, x: F.silu(x),
    "tanh": lambda: lambda _, x: torch.tanh(x) + F.relu(x),
    "softmax": lambda: lambda _, x: x.softmax(1),
    "sums": lambda: lambda _, x: x / (1 + x.abs().sum((1, 3), keepdim=True)),
    "excitation": lambda: lambda _, x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
    "pool": lambda: lambda _, x: F.avg_pool2d(x, 3, 1, 1) + F.max_pool2d(x, 3, 1, 1),
    "resize": lambda: lambda _, x: F.interpolate(x, size=(4, 5), mode="bicubic"),
    "swap": lambda: lambda _, x: x.transpose(2, 3),
    "slices": lambda: lambda _, x: torch.cat([x[:, 4:], x[:, :4].contiguous()], 1),
    "mixed sum": lambda: lambda _, x: x + F.relu(x).contiguous(memory_format=torch.channels_last),
    "gate": lambda: _gated,
    "attention": lambda: (
        lambda _, x: (lambda t: F.scaled_dot_product_attention(t, t, t).transpose(1, 2).reshape(x.shape))(
            x.flatten(2).transpose(1, 2)
        )
    ),
}
ENDS: tuple[Any, ...] = (
    lambda _, x: x,
    lambda _, x: x.mean((2, 3)),
    lambda _, x: x.flatten(1).softmax(1),
    lambda _, x: F.gelu(x.permute(0, 2, 3, 1)),
)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_networks_of_any_layers_have_the_bits_of_the_model(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from((1, 3)))
    size = (channels, *data.draw(st.tuples(*[st.sampled_from((1, 4, 5, 8))] * 2)))
    names = data.draw(st.lists(st.sampled_from(list(STEPS)), min_size=2, max_size=6))
    end = data.draw(st.sampled_from(ENDS))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    in_float = {f"chain.{i}": "float" for i, name in enumerate(names, 1) if name == "float"}
    fast = compile_(Chain(conv(channels, CHANNELS), *(STEPS[name]() for name in names), end), size, in_float)
    for _ in range(3):
        layout = data.draw(st.sampled_from(list(LAYOUTS)))
        assert_as_model(fast, LAYOUTS[layout](torch.randn(data.draw(st.sampled_from((1, 2, 5))), *size)))
