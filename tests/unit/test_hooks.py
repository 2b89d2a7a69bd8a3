"""Hooks that write weights: the written weight is quantized, or the layer stays in float with a reason."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv import nn
from dsconv.conversion import model_info

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> tnn.Sequential:
    torch.manual_seed(0)
    return tnn.Sequential(tnn.Conv2d(8, 16, 3), tnn.ReLU(), tnn.Conv2d(16, 4, 1)).eval()


MASK = (torch.rand(16, 8, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.7).float()


def in_place(layer: Any) -> None:
    def prune(module: Any, args: Any) -> None:
        module.weight.data.mul_(MASK)

    layer.register_forward_pre_hook(prune)


def by_a_helper(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: write(module))


def write(module: Any) -> None:
    with torch.no_grad():
        module.weight.copy_(module.weight * MASK)


def of_a_parameter(layer: Any) -> None:
    weight = layer.weight

    def prune(module: Any, args: Any) -> None:
        weight.data.mul_(MASK)

    layer.register_forward_pre_hook(prune)


def with_kwargs(layer: Any) -> None:
    def prune(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        setattr(module.weight, "data", module.weight.data * MASK)  # noqa: B010

    layer.register_forward_pre_hook(prune, with_kwargs=True)


class Equalized:
    """Hook like StyleGAN's learning rates: the layer has no weight before its first run."""

    def __init__(self, layer: Any):
        weight = layer.weight.detach()
        del layer._parameters["weight"]
        layer.register_parameter("weight_orig", tnn.Parameter(weight / 2))
        layer.register_forward_pre_hook(self)

    def __call__(self, module: Any, args: Any) -> None:
        module.weight = module.weight_orig * 2 * MASK


class Standardizing(tnn.Module):
    """Module that writes the weight of its own layer, by a hook that is bound to it."""

    def __init__(self, layer: tnn.Module):
        super().__init__()
        self.mask = MASK
        layer.register_forward_pre_hook(self.write)

    def write(self, module: Any, args: Any) -> None:
        module.weight.data *= self.mask


def written_twice(layer: Any) -> None:
    """Register a hook, and run it once, so that the weight is already masked."""
    in_place(layer)
    layer(X)


WRITING = (in_place, by_a_helper, of_a_parameter, with_kwargs, Equalized, Standardizing, written_twice)


@pytest.mark.parametrize("install", WRITING)
def test_the_weight_that_a_hook_makes_is_quantized(install: Callable[[Any], Any]) -> None:
    model, plain = net(), net()
    install(model[0])
    with torch.no_grad():
        plain[0].weight *= MASK
    state = {name: value.clone() for name, value in model.state_dict().items()}
    quantized, expected = dsconv.quantize(model, "w8a8"), dsconv.quantize(plain, "w8a8")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(quantized[0].vqk, expected[0].vqk) and torch.equal(quantized[0].kds, expected[0].kds)
    with torch.inference_mode():
        assert torch.equal(quantized(X), expected(X))
    assert set(quantized.state_dict()) == set(expected.state_dict())


@pytest.mark.parametrize("install", WRITING)
def test_files_of_such_a_network_load_into_it(install: Callable[[Any], Any], tmp_path: Any) -> None:
    model = net()
    install(model[0])
    quantized = dsconv.quantize(model, "w8a8")
    again = dsconv.load(dsconv.save(quantized, tmp_path / "net.safetensors"), model)
    with torch.inference_mode():
        assert torch.equal(again(X), quantized(X))


def decaying(module: Any, args: Any) -> None:
    module.weight.data *= 0.9


def following_its_input(module: Any, args: tuple[Tensor]) -> None:
    module.weight.data = torch.full_like(module.weight, float(args[0].std()))


def also_the_bias(module: Any, args: Any) -> None:
    module.weight.data *= MASK
    module.bias.data.zero_()


def also_the_input(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    module.weight.data *= MASK
    return (args[0] * 2,)


def of_one_size(module: Any, args: tuple[Tensor]) -> None:
    assert args[0].shape[-1] == 224
    module.weight.data *= MASK


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (decaying, "another weight of it at each call"),
        (following_its_input, "another weight of it at each call"),
        (also_the_bias, "also_the_bias changes its bias, too"),
        (also_the_input, "also_the_input changes its input, too"),
        (of_one_size, "not known whether a hook, of_one_size, writes its weight.*AssertionError"),
    ],
)
def test_a_layer_whose_hook_makes_no_one_weight_stays_in_float(hook: Any, reason: str) -> None:
    model = net()
    model[0].register_forward_pre_hook(hook)
    quantized = dsconv.quantize(model, "w8a8")
    row = dsconv.summary(quantized).layers[0]
    assert isinstance(quantized[0], tnn.Conv2d) and isinstance(quantized[2], nn.DSConv2d)
    assert re.search(reason, row.reason)


def test_a_hook_that_writes_the_weight_after_each_call_leaves_it_in_float() -> None:
    model = net()
    model[0].register_forward_hook(lambda module, args, y: decaying(module, args))
    quantized = dsconv.quantize(model, "w8a8")
    assert "changed after each call by a hook" in model_info(quantized).in_float["0"]


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_layer_whose_weight_a_hook_of_the_model_writes_stays_in_float(kind: str) -> None:
    model = net()
    masks = {model[0]: MASK}

    def prune(module: Any, *args: Any) -> None:
        for layer in module.modules():
            if layer in masks:
                layer.weight.data *= masks[layer]

    getattr(model, kind)(prune)
    quantized = dsconv.quantize(model, "w8a8")
    reason = "its weight or bias is written by a hook of the model (Sequential), "
    assert model_info(quantized).in_float["0"].startswith(reason)
    with torch.inference_mode():
        for _ in range(2):
            error = quantized(X) - model(X)
    assert error.norm() < 0.05 * model(X).norm() and torch.equal(quantized[0].weight, model[0].weight)


def test_hooks_that_only_look_at_weights_are_kept_and_leave_no_trace() -> None:
    model, seen, lines = net(), [], {}

    def norm(module: Any, args: Any) -> None:
        seen.append(float(module.weight.norm()))

    def names(module: Any, args: Any, y: Any) -> None:
        lines["after"] = [name for name, _ in module.named_parameters()]

    model[0].register_forward_pre_hook(norm)
    model.register_forward_hook(names)
    quantized = dsconv.quantize(model, "w8a8")
    assert not seen and not lines and all(row.quantized for row in dsconv.summary(quantized).layers)
    with torch.inference_mode():
        quantized(X)
    assert seen == [pytest.approx(float(model[0].weight.norm()), rel=0.01)] and lines


def test_hooks_keep_their_flags() -> None:
    model, seen = net(), []
    model[2].register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    model[2].register_forward_pre_hook(lambda module, args, kwargs: (args, {}), with_kwargs=True)
    model[2].register_forward_hook(lambda module, args, kwargs, y: y + kwargs.get("shift", 1), with_kwargs=True)
    quantized = dsconv.quantize(model, "w8a8")
    with torch.inference_mode():
        y = quantized(X)
        assert seen == ["always"]
        with pytest.raises(ValueError, match="DSConv2d: expected input"):
            quantized[2](X[:, :3])
        assert seen == ["always"] * 2
        quantized[2]._forward_hooks.popitem()
        torch.testing.assert_close(y, quantized(X) + 1)


class WritesInForward(tnn.Module):
    """Module that normalizes weights before it calls the layers, like cosine classifiers and constrained networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.free, self.blocks = tnn.Conv2d(8, 8, 1), tnn.Conv2d(8, 8, 1), tnn.ModuleList([tnn.Linear(8, 8)])
        self.head = tnn.Linear(8, 4)
        self.weight = tnn.Parameter(torch.ones(()))

    def normalize(self) -> None:
        weight = self.head.weight.data
        weight.div_(weight.norm())
        for block in self.blocks:
            block.weight.data.clamp_(-0.1, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.normalize()
        self.weight.data = torch.ones((), dtype=torch.float32)
        self.conv.weight.data = self.conv.weight.data.sign()
        x = self.free(self.conv(x)).relu_() * self.weight
        return self.head(self.blocks[0](x.mean((2, 3))).add_(self.free.bias))


def test_layers_whose_weight_a_forward_writes_stay_in_float() -> None:
    model = WritesInForward().eval()
    quantized = dsconv.quantize(model, "w8a8")
    reasons = model_info(quantized).in_float
    assert "written by the code of WritesInForward.forward" in reasons["conv"] and __file__ in reasons["conv"]
    assert "written by the code of WritesInForward.normalize" in reasons["head"]
    with torch.inference_mode():
        assert (quantized(X) - model(X)).norm() < 0.05 * model(X).norm()


def test_a_weight_that_the_forward_of_a_model_only_reads_is_quantized() -> None:
    class Reads(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight = tnn.Conv2d(8, 4, 1), tnn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            scale = self.conv.weight.abs().mean()
            self.weight.data = torch.ones((), dtype=torch.float32)
            return self.conv(x).mul_(scale).add_(self.conv.bias.view(-1, 1, 1))

    assert isinstance(dsconv.quantize(Reads().eval(), "w8a8").conv, nn.DSConv2d)


class Masker:
    """Mask all layers with one object, by a hook of one of them or of any module, as pruning tools do."""

    def __init__(self, model: tnn.Module):
        generator = torch.Generator().manual_seed(2)
        layers = [module for module in model.modules() if isinstance(module, tnn.Conv2d)]
        self.masks = [(layer, (torch.rand(layer.weight.shape, generator=generator) > 0.6).float()) for layer in layers]

    def prune(self, *_: Any) -> None:
        for layer, mask in self.masks:
            layer.weight.data.mul_(mask)


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("place", [0, 1], ids=["a layer", "an activation"])
def test_layers_whose_weight_a_hook_of_another_one_writes_stay_in_float(place: int, kind: str) -> None:
    model = tnn.Sequential(*net(), tnn.Conv2d(4, 8, 1)).eval()
    masker = Masker(model[:3])
    getattr(model[place], kind)(masker.prune)
    quantized = dsconv.quantize(model, "w8a8")
    reason = f"its weight or bias is written by a hook of '{place}' ({type(model[place]).__name__}), Masker.prune"
    reasons = model_info(quantized).in_float
    assert reasons.keys() == {"0", "2"} and all(why.startswith(reason) for why in reasons.values())
    with torch.inference_mode():
        for _ in range(2):
            error = quantized(X) - model(X)
    assert error.norm() < 0.05 * model(X).norm()
    assert torch.equal(quantized[2].weight, model[2].weight) and not torch.equal(net()[2].weight, model[2].weight)


def by_state(layer: Any) -> None:
    def load(module: Any, args: Any) -> None:
        module.load_state_dict({"weight": module.state_dict()["weight"] * MASK, "bias": module.bias})

    layer.register_forward_pre_hook(load)


@pytest.mark.parametrize("install", [in_place, by_a_helper, by_state])
def test_a_mask_that_a_call_has_applied_already_is_known_for_one(install: Callable[[Any], Any]) -> None:
    model = net()
    install(model[0])
    with torch.no_grad():
        expected = model(X)
    quantized = dsconv.quantize(model, "w8a8")
    assert isinstance(quantized[0], nn.DSConv2d) and not quantized[0]._forward_pre_hooks
    assert not quantized[0].vqk[MASK == 0].any()
    with torch.inference_mode():
        assert (quantized(X) - expected).norm() < 0.05 * expected.norm()
        assert torch.equal(dsconv.compile(quantized, X)(X), quantized(X))


class Writing(tnn.Module):
    """Module whose forward writes the weight of a child, in the way given by ``how``."""

    def __init__(self, how: Callable[[Any], object]):
        super().__init__()
        self.part, self.how = tnn.Conv2d(8, 16, 3), how

    def forward(self, x: Tensor) -> Tensor:
        self.how(self.part)
        y: Tensor = self.part(x)
        return y


@pytest.mark.parametrize(
    "how",
    [
        lambda part: tnn.init.constant_(part.weight, 0.5),
        lambda part: torch.mul(part.weight, MASK, out=part.weight.data),
        lambda part: part.weight.data.__setitem__(0, 0.0),
        lambda part: part.weight.data.__imul__(MASK),
        lambda part: part.weight.detach().flatten(1)[:, :4].zero_(),
        lambda part: part.weight.split(4)[1].zero_(),
        lambda part: torch._foreach_mul_([part.weight], 2.0),
    ],
)
def test_what_writes_the_weight_of_a_quantized_layer_is_told_so(how: Callable[[Any], object]) -> None:
    quantized = dsconv.quantize(Writing(how).eval(), "w8a8")
    for call in (quantized, lambda x: dsconv.compile(quantized, x)):
        with torch.inference_mode(), pytest.raises(dsconv.errors.ModelError, match="would be lost: write the weight"):
            call(X)


class OverAll(tnn.Module):
    """Module whose forward writes all its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = tnn.Conv2d(8, 16, 3), tnn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in self.part.parameters():
                p.clamp_(-0.01, 0.01)
        y: Tensor = self.last(self.part(x))
        return y


def test_a_forward_that_writes_its_parameters_leaves_their_layers_in_float() -> None:
    network = tnn.Sequential(tnn.Conv2d(8, 8, 1), OverAll()).eval()
    info = model_info(dsconv.quantize(network, "w8a8"))
    assert info is not None and "may be written by the code of OverAll.forward" in info.in_float["1.part"]


def test_what_is_read_of_a_weight_is_a_plain_tensor() -> None:
    layer = dsconv.quantize(net())[0]
    weight = layer.weight
    assert weight.shape == (16, 8, 3, 3) and weight.dtype == torch.float32 and weight.numel() == 1152
    assert torch.equal(weight, layer.dequantized_weight())
    assert type(weight * 2) is type(weight.clone()) is type(weight.sum((1, 2, 3))) is Tensor
    assert weight.clone().mul_(2).equal(weight * 2)
    assert weight.requires_grad_(False) is not None
    assert type(copy.deepcopy(weight)) is Tensor and copy.deepcopy(weight).equal(weight)
