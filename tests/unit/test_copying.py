"""Copies run their own modules: with replaced calls of any kind, and with hooks that hold modules."""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn
from torch.nn import functional as F

import dsconv
from dsconv import nn
from dsconv.conversion import model_info
from dsconv.conversion.copying import copied
from dsconv.errors import ModelError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# Global variables that functions of the tests read, as in a script or a notebook.
held: Any = None
old_forward: Any = None


def net() -> tnn.Sequential:
    torch.manual_seed(0)
    body = tnn.Sequential(tnn.Conv2d(8, 8, 3, padding=1), tnn.ReLU())
    return tnn.Sequential(tnn.Conv2d(3, 8, 3), body, tnn.Conv2d(8, 4, 1)).eval()


def closure(module: tnn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def default(module: tnn.Module) -> None:
    module.forward = lambda x, forward=module.forward: forward(x) * 2


def global_variable(module: tnn.Module) -> None:
    global old_forward
    old_forward = module.forward
    module.forward = lambda x: old_forward(x) * 2


def called_by_helper(module: tnn.Module) -> None:
    global held
    held = module
    module.forward = lambda x: of_held(x) * 2


def of_held(x: Tensor) -> Tensor:
    return type(held).forward(held, x)


def partial(module: tnn.Module) -> None:
    module.forward = functools.partial(twice, module)


def twice(module: Any, x: Tensor) -> Tensor:
    return type(module).forward(module, x) * 2


def bound(module: tnn.Module) -> None:
    module.forward = types.MethodType(twice, module)


def bound_closure(module: tnn.Module) -> None:
    forward = module.forward
    module.forward = types.MethodType(lambda self, x: forward(x) * 2, module)


def as_accelerate_does(module: tnn.Module) -> None:
    module._old_forward = module.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs) * 2

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), module._old_forward)


class Calls:
    """A callable object."""

    def __init__(self, module: tnn.Module):
        self.forward = module.forward
        self.again = [lambda x: self.forward(x)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.again[0](x) * 2


def callable_object(module: tnn.Module) -> None:
    module.forward = Calls(module)


def held_by_an_object(module: tnn.Module) -> None:
    calls = Calls(module)
    module.forward = lambda x: calls(x)


def weak(module: tnn.Module) -> None:
    ref = weakref.ref(module)
    module.forward = lambda x: type(ref()).forward(ref(), x) * 2


def decorated(module: tnn.Module) -> None:
    forward = module.forward
    module.forward = torch.no_grad()(lambda x: forward(x) * 2)


def call_impl(module: tnn.Module) -> None:
    call = module._call_impl
    module._call_impl = lambda *args, **kwargs: call(*args, **kwargs) * 2


def of_the_class(module: tnn.Module) -> None:
    class Own(type(module)):
        def __call__(self, *args: Any) -> Tensor:
            return super().__call__(*args) * 2

    module.__class__ = Own


PATCHES = (
    closure,
    default,
    global_variable,
    called_by_helper,
    partial,
    bound,
    bound_closure,
    as_accelerate_does,
    callable_object,
    held_by_an_object,
    weak,
    decorated,
    call_impl,
    of_the_class,
)


def runs_of(model: tnn.Module, call: Callable[[], object]) -> list[tnn.Module]:
    """Return the layers of ``model`` whose functions run within ``call``, which may run other networks."""
    found: list[tnn.Module] = []
    weights = {p.data_ptr(): module for module in model.modules() for p in module.parameters(recurse=False)}

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
            found.extend(weights[t.data_ptr()] for t in tensors if t.data_ptr() in weights)
            return func(*args, **(kwargs or {}))

    with Watch(), torch.inference_mode():
        call()
    return found


def clear(quantized: tnn.Module) -> None:
    with torch.no_grad():
        for layer in quantized.modules():
            if isinstance(layer, nn.DSLayer):
                layer.vqk.zero_()


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 0.05 * b.norm())


@pytest.mark.parametrize("patch", PATCHES)
def test_a_layer_whose_call_was_replaced_stays_in_float_with_the_reason(patch: Callable[[Any], None]) -> None:
    model = net()
    patch(model[2])
    with torch.inference_mode():
        before = model(X)
        quantized = dsconv.quantize(model, "w8a8")
        assert close(quantized(X), before)
        assert torch.equal(model(X), before)
    assert isinstance(quantized[2], tnn.Conv2d) and isinstance(quantized[0], nn.DSConv2d)
    reason = {row.name: row.reason for row in dsconv.summary(quantized).layers}["2"]
    assert "was replaced by another one" in reason or "__call__ of its own" in reason
    assert not runs_of(model, lambda: quantized(X))


@pytest.mark.parametrize("place", ["", "1"])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_replaced_call_of_a_container_runs_the_layers_of_the_copy(place: str, patch: Callable[[Any], None]) -> None:
    model = net()
    patch(model.get_submodule(place))
    quantized = dsconv.quantize(model, "w8a8")
    with torch.inference_mode():
        before = model(X)
        assert close(quantized(X), before)
        for part in (quantized, quantized[1]):
            assert all(isinstance(m, nn.DSLayer | tnn.ReLU | tnn.Sequential) for m in part.modules())
        assert torch.equal(dsconv.quantize(quantized)(X), quantized(X))
    clear(quantized)
    with torch.inference_mode():
        assert not close(quantized(X), before)
        assert torch.equal(model(X), before)
    assert not runs_of(model, lambda: quantized(X))


def test_a_copy_that_would_run_the_original_is_refused() -> None:
    class Own(tnn.Sequential):
        pass

    model = Own(*net()).eval()
    Own.forward = functools.partial(twice, model)
    with pytest.raises(ModelError, match=r"model Own: Own.forward holds modules of this one model.*MethodType"):
        dsconv.quantize(model)
    model = net()
    model.act = functools.lru_cache(lambda x, layer=model[0]: layer(x))
    with pytest.raises(ModelError, match=r"model Sequential: its attribute 'act' holds modules of the model") as caught:
        dsconv.quantize(model)
    assert "\n" not in str(caught.value)


def test_a_call_that_torch_compile_made_of_the_own_one_replaces_nothing() -> None:
    model = net()
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    model.forward = torch.compile(model.forward, backend="eager")
    model[2].compile(backend="eager")
    model[1].forward = model[1].forward
    quantized = dsconv.quantize(model, "w8a8")
    assert not model_info(quantized).in_float
    with torch.inference_mode():
        assert torch.equal(quantized(X), dsconv.quantize(net(), "w8a8")(X))
    assert not runs_of(model, lambda: quantized(X))


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_patched_class_of_pytorch_is_not_taken_for_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(tnn.Conv2d, name)
    monkeypatch.setattr(tnn.Conv2d, name, lambda self, *args: own(self, *args) * 2)
    with pytest.raises(ModelError, match=f"0: its class Conv2d has a {name} of its own"):
        dsconv.quantize(net(), "w8a8")


def test_a_replaced_forward_that_computes_a_weight_is_resolved() -> None:
    model = net()
    layer = model[2]
    layer.forward = lambda x: F.conv2d(x, layer.weight * 3, layer.bias)
    plain = net()
    with torch.no_grad():
        plain[2].weight *= 3
    quantized, expected = dsconv.quantize(model, "w8a8"), dsconv.quantize(plain, "w8a8")
    assert torch.equal(quantized[2].vqk, expected[2].vqk) and torch.equal(quantized[2].kds, expected[2].kds)
    with torch.inference_mode():
        assert torch.equal(quantized(X), expected(X))


def test_lambdas_in_attributes_run_the_layers_of_the_copy() -> None:
    class Steps(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = tnn.Conv2d(3, 4, 3)
            self.steps = [lambda x: self.conv(x), torch.relu]
            self.named = {"last": (lambda x: self.steps[0](x),)}

        def forward(self, x: Tensor) -> Tensor:
            return self.steps[1](self.named["last"][0](x))

    model = Steps().eval()
    quantized = dsconv.quantize(model, "w8a8")
    assert not runs_of(model, lambda: quantized(X)) and quantized(X).shape == (2, 4, 6, 6)
    assert runs_of(model, lambda: model(X))


def test_hooks_that_run_layers_run_those_of_the_copy() -> None:
    model = net()
    layer, seen = model[2], []

    def add(module: tnn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(type(module))
        return output + layer(torch.ones_like(output).repeat(1, 2, 1, 1))

    model.register_forward_hook(add)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + model[0](X).mean(),))
    model[0].register_forward_hook(lambda module, args, y: y + layer(y).mean())
    with torch.inference_mode():
        before = model(X)
        seen.clear()
        quantized = dsconv.quantize(model, "w8a8")
        assert not seen
        assert close(quantized(X), before)
    assert seen == [tnn.Sequential]
    assert not runs_of(model, lambda: quantized(X))


def test_functions_that_share_a_variable_share_it_in_the_copy() -> None:
    model = net()
    count = 0
    layer = model[0]

    def before(module: tnn.Module, args: Any) -> None:
        nonlocal count, layer
        count += 1
        layer = module

    model[0].register_forward_pre_hook(before)
    model.register_forward_hook(lambda module, args, y: y * (layer is module[0]))
    quantized = copied(model)
    with torch.inference_mode():
        assert quantized(X).any() and count == 1


def test_every_function_that_copies_gives_a_network_of_its_own() -> None:
    model = net()
    closure(model)
    images = torch.randn(64, 3, 8, 8)
    quantized = dsconv.quantize(model, "w8a8")
    quantized.forward = lambda x, q=quantized: type(q).forward(q, x).mean((2, 3)) * 2
    model.forward = lambda x, m=model: type(m).forward(m, x).mean((2, 3)) * 2
    copies = {
        "calibrate": dsconv.calibrate(quantized, model, images),
        "adapt": dsconv.adapt(quantized, model, images, recipe={"steps": 1, "batch_size": 8}),
        "fold_batchnorm": dsconv.fold_batchnorm(quantized),
        "quantize": dsconv.quantize(quantized),
        "compile": dsconv.compile(quantized, X),
    }
    clear(quantized)
    with torch.inference_mode():
        expected = model(X)
        for name, made in copies.items():
            assert close(made(X), expected), name


def test_a_stored_forward_of_a_layer_is_that_of_the_layer_in_its_place() -> None:
    model = net()
    first, last = model[0].forward, model[2].forward
    model.steps = [first, model[1].__call__]
    model.forward = lambda x: last(model.steps[1](model.steps[0](x)))
    quantized = dsconv.quantize(model, "w8a8")
    with torch.inference_mode():
        assert close(quantized(X), model(X))
    assert not runs_of(model, lambda: quantized(X))
    model.inner = model[2]._conv_forward
    with pytest.raises(ModelError, match="model Sequential: its attribute 'inner' holds"):
        dsconv.quantize(model, "w8a8")


def test_a_class_whose_instances_are_made_of_one_network_is_no_patch() -> None:
    inner = net()

    class Wrapper(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = Wrapper().eval()
    quantized = dsconv.quantize(model, "w8a8")
    assert not runs_of(model, lambda: quantized(X))


def test_attributes_that_a_model_noted_on_its_layers_are_kept() -> None:
    model = net()
    for index, layer in enumerate(model):
        layer.index, layer.names = index, [f"layer {index}"]
    quantized = dsconv.quantize(model, "w8a8")
    assert [layer.index for layer in quantized] == [0, 1, 2]
    assert quantized[0].names == ["layer 0"] and quantized[0].names is not model[0].names
    assert isinstance(quantized[0], nn.DSConv2d)
