"""BatchNorm folded into quantized layers: the same outputs, only where folding is correct, and also in files."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn
from torch.nn import functional as F

import dsconv
from dsconv import nn, ops
from dsconv.conversion import model_info
from dsconv.errors import FileFormatError, ModelError
from dsconv.io import read_header
from dsconv.numerics import fake_quantize_activation, sqnr_db

CONFIG = dsconv.QuantConfig(activation_bits=8, block_size=8)


def randomize(model: tnn.Module, x: Tensor) -> tnn.Module:
    """Set statistics near those of ``x``, and factors of both signs, including zero and values far from one."""
    generator = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator)

    norms = [m for m in model.modules() if isinstance(m, tnn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        for norm in norms:
            norm.running_mean += 0.1 * noise(norm.running_mean)
            norm.running_var *= noise(norm.running_var).mul(0.3).exp()
            if norm.affine:
                norm.weight.copy_(noise(norm.weight) * 0.5 + 0.8)
                norm.weight[::7] = 0
                norm.bias.copy_(noise(norm.bias) * 0.3)
    return model.eval()


def quality(expected: Tensor, y: Tensor) -> float:
    signal, noise = expected.double().square().sum(), (expected.double() - y.double()).square().sum()
    return sqnr_db(signal.item(), noise.item())


def info(model: tnn.Module) -> Any:
    return model_info(model)


def check_layers(quantized: tnn.Module, folded: tnn.Module, x: Tensor) -> None:
    """Compare every folded layer with the layer and its BatchNorm on the same input, simulated and in integers."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.__setitem__(name, args[0])

    # Hooks are added to a copy, since the folded model must not change.
    watched = copy.deepcopy(quantized)
    for name in info(folded).folded.values():
        watched.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.inference_mode():
        watched(x)
        for norm_name, name in info(folded).folded.items():
            layer, norm, made = (
                model.get_submodule(at) for model, at in ((quantized, name), (quantized, norm_name), (folded, name))
            )
            assert type(folded.get_submodule(norm_name)) is tnn.Identity
            assert torch.equal(made.vqk, layer.vqk) and made.kds.dtype == torch.float32
            expected_config = layer.config.model_copy(update={"kds_dtype": "float32"})
            assert made.config == expected_config and made.training == layer.training
            with ops.simulated():
                expected = norm(layer(inputs[name]))
                assert quality(expected, made(inputs[name])) > 100, name
            assert quality(expected, made(inputs[name])) > 90, name


@contextmanager
def untouched(model: tnn.Module) -> Iterator[None]:
    state, modules = copy.deepcopy(model.state_dict()), [*model.named_modules()]
    attributes = {name: {*vars(module)} for name, module in modules}
    yield
    assert [*model.named_modules()] == modules
    assert {name: {*vars(module)} for name, module in modules} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# The arithmetic


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kds_dtype", ["float32", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_convolution_is_that_of_float64(bias: bool, kds_dtype: str, shift: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 7, 7)
    model = randomize(tnn.Sequential(tnn.Conv2d(20, 12, 3, padding=1, bias=bias), tnn.BatchNorm2d(12, eps=0.1)), x)
    config = dsconv.LayerConfig(activation_bits=8, block_size=8, kds_dtype=kds_dtype, weight_shift=shift)
    model[0], norm = nn.DSConv2d.from_float(model[0], config), model[1]
    layer, made = model[0], dsconv.fold_batchnorm(model)[0]
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert (factor < 0).any() and (factor == 0).any()
    for name in ("kds", "kds_shift") if shift else ("kds",):
        expected = getattr(layer, name).double() * factor.view(-1, 1, 1, 1)
        assert torch.equal(getattr(made, name), expected.float())
        assert (getattr(made, name)[factor == 0] == 0).all()
    before = 0.0 if layer.bias is None else layer.bias.double()
    expected_bias = norm.bias.double() + (before - norm.running_mean.double()) * factor
    assert made.bias.dtype == torch.float32 and torch.equal(made.bias, expected_bias.float())
    weight = layer.vqk * layer.kds.double().repeat_interleave(8, 1)[:, :20]
    if shift:
        weight += layer.kds_shift.double().repeat_interleave(8, 1)[:, :20]
    x_q = fake_quantize_activation(x, 8, 8, sign=config.activation_sign).double()
    y = F.conv2d(x_q, weight, layer.bias.double() if bias else None, padding=1)
    terms = (t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    y = F.batch_norm(y, *terms, eps=0.1)
    with torch.inference_mode():
        for simulated in (False, True):
            with ops.simulated() if simulated else nullcontext():
                torch.testing.assert_close(made(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_a_batchnorm_that_no_layer_takes_up_is_that_of_float64(affine: bool) -> None:
    torch.manual_seed(0)
    norm, x = tnn.BatchNorm2d(12, eps=0.1, affine=affine), torch.randn(2, 3, 7, 7)
    model = randomize(tnn.Sequential(tnn.Conv2d(3, 12, 3), tnn.ReLU(), norm), x)
    folded = dsconv.fold_batchnorm(dsconv.quantize(model, "w8a8"))
    assert info(folded).affine == ("2",)
    y = torch.randn(2, 12, 5, 5)
    with torch.inference_mode():
        torch.testing.assert_close(folded[2](y).double(), norm.double()(y.double()), rtol=1e-5, atol=1e-6)


PAIRS: dict[str, tuple[tnn.Module, tnn.Module, tuple[int, ...]]] = {
    "conv1d": (tnn.Conv1d(12, 10, 3, padding=1, groups=2), tnn.BatchNorm1d(10), (4, 12, 9)),
    "conv2d": (tnn.Conv2d(12, 10, 3, stride=2), tnn.BatchNorm2d(10), (4, 12, 9, 9)),
    "conv3d": (tnn.Conv3d(12, 10, 2), tnn.BatchNorm3d(10), (2, 12, 5, 5, 5)),
    "flat": (tnn.Conv2d(3, 10, 3, padding="same"), tnn.BatchNorm2d(10), (4, 3, 9, 9)),
    "depthwise": (tnn.Conv2d(12, 12, 3, groups=12), tnn.BatchNorm2d(12), (4, 12, 9, 9)),
    "transposed 1d": (tnn.ConvTranspose1d(12, 10, 3, groups=2), tnn.BatchNorm1d(10), (4, 12, 9)),
    "transposed 2d": (tnn.ConvTranspose2d(12, 10, 3, stride=2), tnn.BatchNorm2d(10), (4, 12, 6, 6)),
    "transposed 3d": (tnn.ConvTranspose3d(12, 10, 2), tnn.BatchNorm3d(10), (2, 12, 4, 4, 4)),
    "linear": (tnn.Linear(30, 10), tnn.BatchNorm1d(10), (6, 30)),
    "no gamma": (tnn.Conv2d(12, 10, 3, bias=False), tnn.BatchNorm2d(10, affine=False), (4, 12, 9, 9)),
}


@pytest.mark.parametrize("preset", ["default", "paper", "w8a8"])
@pytest.mark.parametrize("kind", PAIRS)
def test_every_kind_of_layer_is_folded(kind: str, preset: str) -> None:
    layer, norm, shape = PAIRS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model = randomize(tnn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)), x)
    config = dsconv.QuantConfig.preset(preset, first_layer=None if kind != "flat" else {"blocks": "flat"}, linear=None)
    quantized = dsconv.quantize(model, config)
    with untouched(quantized):
        folded = dsconv.fold_batchnorm(quantized)
    assert info(folded).folded == {"1": "0"} and info(folded).not_folded == {}
    check_layers(quantized, folded, x)
    assert "1.weight" not in folded.state_dict() and "0.bias" in folded.state_dict()


def test_half_precision_and_trainable_flags_are_kept() -> None:
    quantized = dsconv.quantize(tnn.Sequential(tnn.Conv2d(8, 8, 3, bias=False), tnn.BatchNorm2d(8)).eval(), CONFIG)
    assert dsconv.fold_batchnorm(quantized)[0].bias.requires_grad
    x = torch.randn(1, 8, 5, 5)
    folded = dsconv.fold_batchnorm(quantized.requires_grad_(False).half())
    assert not folded[0].bias.requires_grad and folded[0].bias.dtype == torch.float32
    assert folded(x.half()).dtype == torch.float16
    torch.testing.assert_close(folded(x.half()), quantized(x.half()), rtol=1e-2, atol=1e-2)


def test_numbers_that_float32_does_not_hold_are_not_folded() -> None:
    for name, value in (("weight", 3e38), ("running_var", -1.0), ("bias", torch.nan)):
        model = tnn.Sequential(tnn.Conv2d(8, 8, 3), tnn.BatchNorm2d(8)).eval()
        with torch.no_grad():
            model[0].weight.mul_(1e5)
            getattr(model[1], name).fill_(value)
        folded = dsconv.fold_batchnorm(dsconv.quantize(model, CONFIG))
        assert info(folded).not_folded == {"1": "folding it gives values that are not finite in float32"}
        assert not isinstance(folded[1], tnn.Identity)


# Whole networks


def vgg16_bn(models: Any) -> tnn.Module:
    with torch.device("meta"):  # its classifier is large
        model = models.vgg16_bn(init_weights=False)
    model.features = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=True)
    model.avgpool, model.classifier = tnn.AdaptiveAvgPool2d(1), tnn.Linear(512, 10)
    return model


NETWORKS: dict[str, tuple[Callable[[Any], tnn.Module], int, int]] = {
    "resnet18": (lambda models: models.resnet18(), 20, 0),
    "densenet121": (lambda models: models.densenet121(), 59, 62),
    "mobilenet_v2": (lambda models: models.mobilenet_v2(), 52, 0),
    "googlenet": (lambda models: models.googlenet(aux_logits=True, init_weights=False), 57, 2),
    "vgg16_bn": (vgg16_bn, 13, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_the_same(name: str) -> None:
    models = pytest.importorskip("torchvision", reason="needs the extra dsconv[zoo]").models
    build, expected, left = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    model = randomize(build(models), x)
    quantized = dsconv.quantize(model, dsconv.QuantConfig(activation_bits=8))
    folded = dsconv.fold_batchnorm(quantized)
    assert (len(info(folded).folded), len(info(folded).not_folded)) == (expected, left)
    reasons = {*info(folded).not_folded.values()}
    if name == "densenet121":
        assert reasons == {"it reads cat, which is not a quantized layer"}
    if name == "googlenet":
        assert reasons == {"forward does not call it"}
        assert {norm.split(".")[0] for norm in info(folded).not_folded} == {"aux1", "aux2"}
    check_layers(quantized, folded, x[:1])
    exact = copy.deepcopy(quantized)
    for layer in exact.modules():
        if isinstance(layer, nn.DSLayer):
            layer.config = layer.config.model_copy(update={"activation_bits": None})
    with torch.inference_mode():
        y = exact(x)
        assert quality(y, dsconv.fold_batchnorm(exact)(x)) > 100
        # Float32 rounding occasionally changes the rounding of a mantissa, and then of others: the kernels and the
        # simulation of one model differ as much. The error stays below two independent roundings of all activations.
        for simulated in (False, True):
            with ops.simulated() if simulated else nullcontext():
                before = quantized(x)
                assert quality(before, folded(x)) > quality(y, before) - 3


def test_the_digits_keep_their_classes() -> None:
    quantized = dsconv.quantize(dsconv.demo.load_network())
    folded = dsconv.fold_batchnorm(quantized)
    assert len(info(folded).folded) == 9 and not info(folded).not_folded
    images, labels = dsconv.demo.load_digits()
    with torch.inference_mode():
        before, after = quantized(images), folded(images)
    assert (before.argmax(1) == labels).sum() == (after.argmax(1) == labels).sum()
    assert (before.argmax(1) == after.argmax(1)).float().mean() > 0.995
    assert dsconv.summary(folded).other_bytes < dsconv.summary(quantized).other_bytes


# Which BatchNorms are folded


class Net(tnn.Module):
    """A convolution, a BatchNorm and other modules, which ``run`` calls."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.conv = tnn.Conv2d(8, 8, 3, padding=1)
        self.other = tnn.Conv2d(8, 8, 1)
        self.norm = tnn.BatchNorm2d(8)
        self.another = tnn.BatchNorm2d(8)
        self.again = self.conv
        self.plain = [self.conv, self.norm]
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2))


def fold(run: Callable[..., Any], change: Callable[[Any], Any] = lambda model: None) -> tuple[dict[str, str], str]:
    """Return what was folded of a :class:`Net`, and why ``norm`` was not; check that the outputs stay the same."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.another(m.other(m.norm(m.conv(x)))))
    quantized = dsconv.quantize(randomize(model, X), CONFIG)
    quantized.run = run
    change(quantized)
    folded = dsconv.fold_batchnorm(quantized)
    state = copy.deepcopy(quantized)
    with torch.inference_mode(), ops.simulated():
        for a, b in zip(state(X), folded(X), strict=True):
            assert quality(a, b) > 45
    return info(folded).folded, info(folded).not_folded.get("norm", "")


def both(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.norm(y), y


def several(m: Any, x: Tensor) -> Any:
    return m.norm(m.conv(x)) + m.norm(m.conv(x * 2))


def in_place(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    y.mul_(2)
    return m.norm(y)


def test_a_layer_whose_output_is_read_elsewhere_is_not_folded() -> None:
    assert fold(both) == ({}, "the output of conv is also read by the caller of the model")
    assert fold(in_place)[1] == "the output of conv is also read by mul_"
    assert fold(lambda m, x: m.norm(y := m.conv(x)) + m.another(y)) == (
        {},
        "the output of conv is also read by another (BatchNorm2d)",
    )
    assert fold(lambda m, x: m.norm(y := m.conv(x)) + m.other(y).relu())[1].endswith("read by other (DSConv2d)")


def test_what_is_no_layer_in_front_is_named() -> None:
    assert fold(lambda m, x: m.norm(m.conv(x).relu()))[1] == "it reads relu, which is not a quantized layer"
    assert fold(lambda m, x: m.conv(m.norm(x)))[1] == "it reads x, which is not a quantized layer"
    assert fold(lambda m, x: m.another(m.norm(m.conv(x)))) == ({"norm": "conv"}, "")
    assert fold(lambda m, x: m.conv(x))[1] == "forward does not call it"


def test_shared_modules_are_folded_only_where_all_their_calls_belong_together() -> None:
    assert fold(several) == ({"norm": "conv"}, "")
    assert fold(lambda m, x: m.plain[1](m.again(x))) == ({"norm": "conv"}, "")
    assert fold(lambda m, x: m.norm(m.conv(x)) + m.another(m.again(x))) == (
        {},
        "the output of conv is also read by another (BatchNorm2d)",
    )
    assert fold(lambda m, x: m.norm(m.conv(x)) + m.again(x))[0] == {}
    assert fold(lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x))) == ({}, "it reads several layers: conv, other")
    assert fold(lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))))[0] == {"norm": "conv"}


def test_a_batchnorm_that_uses_the_statistics_of_the_batch_is_not_folded() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x))

    def train(model: Any) -> None:
        model.norm.train()

    def forget(model: Any) -> None:
        model.norm = tnn.BatchNorm2d(8, track_running_stats=False).eval()

    assert fold(run, train) == ({}, "it is in training mode")
    assert fold(run, forget) == ({}, "it has no running statistics")


class Louder(tnn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_batchnorm_of_another_kind_is_not_folded() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x))

    def louder(model: Any) -> None:
        model.norm = Louder(8).eval()

    def wrong(model: Any) -> None:
        model.conv, model.norm = nn.DSLinear.from_float(tnn.Linear(6, 8)), tnn.BatchNorm2d(8).eval()

    assert fold(run, louder)[1] == "its class Louder is not known to be a plain BatchNorm"
    assert "does not belong to the output of conv, a DSLinear of 8" in fold(run, wrong)[1]


def test_what_a_hook_or_the_model_reads_directly_is_not_folded() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.conv(x))

    for hook in (
        lambda model: model.conv.register_forward_hook(lambda module, args, y: y * 2),
        lambda model: model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda model: model.norm.register_forward_hook(lambda module, args, y: y + args[0]),
    ):
        assert fold(run, hook)[1] == "a hook reads the tensor between conv and it"
    assert fold(lambda m, x: m.norm(m.conv(x)) * m.norm.weight.sum())[1] == "forward reads the tensors of norm directly"
    assert fold(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum())[1] == "forward reads the tensors of conv directly"


def test_folding_again_changes_nothing() -> None:
    quantized = dsconv.quantize(Net(lambda m, x: m.another(m.norm(m.conv(x)))).eval(), CONFIG)
    once = dsconv.fold_batchnorm(quantized)
    twice = dsconv.fold_batchnorm(once)
    assert info(twice).folded == info(once).folded == {"norm": "conv"}
    with torch.inference_mode():
        assert torch.equal(twice(X), once(X))
    assert info(dsconv.quantize(once, CONFIG)).folded == {"norm": "conv"}


class Optional(tnn.Module):
    """Module that feeds the convolution to another module if its argument is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = tnn.Conv2d(8, 8, 1), tnn.BatchNorm2d(8)

    def forward(self, x: Tensor, more: Tensor | None = None, *, twice: bool = False, sizes: Any = (1, 2)) -> Tensor:
        y = self.norm(self.conv(x))
        if twice:
            y = y * 2
        self.last = y
        return y if more is None else y + self.conv(more)


def test_arguments_that_may_be_left_out_are_left_out() -> None:
    quantized = dsconv.quantize(Optional().eval(), CONFIG)
    with untouched(quantized):
        folded = dsconv.fold_batchnorm(quantized)
    assert info(folded).folded == {"norm": "conv"} and not hasattr(folded, "last")


def test_a_model_without_batchnorm_need_not_be_followed() -> None:
    class Untraceable(tnn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    quantized = dsconv.quantize(Untraceable(tnn.Conv2d(8, 8, 1)).eval(), CONFIG)
    with torch.inference_mode():
        assert torch.equal(dsconv.fold_batchnorm(quantized)(X), quantized(X))


# Mistakes


class Decides(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = tnn.Sequential(tnn.Conv2d(8, 8, 1, bias=False), tnn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a data-dependent branch
            x = -x
        return self.part(x)


def test_a_model_that_cannot_be_followed_is_an_error_that_names_the_line() -> None:
    quantized = dsconv.quantize(Decides().eval(), CONFIG)
    with untouched(quantized), pytest.raises(ModelError) as caught:
        dsconv.fold_batchnorm(quantized)
    message = str(caught.value)
    line = Decides.forward.__code__.co_firstlineno + 1
    assert f"torch.fx cannot trace its forward at {__file__}:{line}, `if x.sum() > 0:" in message
    assert "Decides" in message and "torch.fx.wrap" in message and "\n" not in message


def test_a_forward_of_the_instance_is_an_error() -> None:
    quantized = dsconv.quantize(tnn.Sequential(tnn.Conv2d(8, 8, 1), tnn.BatchNorm2d(8)).eval(), CONFIG)
    quantized.forward = quantized[0].forward
    with pytest.raises(
        ModelError, match=r"the forward of its class was replaced.*fold the model before the replacement"
    ):
        dsconv.fold_batchnorm(quantized)


def test_a_model_in_training_mode_is_an_error_that_says_so() -> None:
    quantized = dsconv.quantize(tnn.Sequential(tnn.Conv2d(8, 8, 1), tnn.BatchNorm2d(8)), CONFIG)
    with pytest.raises(ModelError, match=r"Sequential is in training mode.*eval\(\)"):
        dsconv.fold_batchnorm(quantized)


def test_a_model_that_is_not_quantized_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"holds no quantized layer: convert it with dsconv\.quantize first"):
        dsconv.fold_batchnorm(tnn.Sequential(tnn.Conv2d(8, 8, 1), tnn.BatchNorm2d(8)).eval())
    wrong: Any = "resnet18"
    with pytest.raises(ModelError, match=r"qmodel: expected a torch\.nn\.Module, got str"):
        dsconv.fold_batchnorm(wrong)


# Files


def saved_twice(folded: tnn.Module, float_model: tnn.Module | None, x: Tensor, folder: Path) -> Path:
    """Return a file of ``folded``; check that it loads, and that the loaded network can be saved and loaded again."""
    path = folder / "folded.safetensors"
    model = folded
    for _ in range(2):
        model = dsconv.load(dsconv.save(model, path), float_model)
        with torch.inference_mode():
            assert torch.equal(model(x), folded(x))
        assert list(model.state_dict()) == list(folded.state_dict())
        assert info(model).folded and [*model.named_modules(remove_duplicate=False)][1:]
        for name, module in folded.named_modules():
            assert type(model.get_submodule(name)) is type(module)
    assert dsconv.summary(model).bytes_after == dsconv.summary(folded).bytes_after
    return path


def test_a_folded_model_is_built_from_its_file(tmp_path: Path) -> None:
    folded = dsconv.fold_batchnorm(dsconv.quantize(dsconv.zoo.build("dsconv/digits_resnet")))
    path = saved_twice(folded, None, torch.rand(2, 1, 8, 8), tmp_path)
    assert read_header(path).folded == info(folded).folded
    assert info(dsconv.load(path)).architecture == "dsconv/digits_resnet"


def test_shared_layers_and_layers_with_a_bias_survive_a_file(tmp_path: Path) -> None:
    def net() -> tnn.Module:
        torch.manual_seed(0)
        return randomize(Net(lambda m, x: m.another(m.other(m.norm(m.again(x)).relu()))), X)

    folded = dsconv.fold_batchnorm(dsconv.quantize(net(), CONFIG))
    loaded = dsconv.load(saved_twice(folded, net(), X, tmp_path), net())
    assert loaded.again is loaded.conv is loaded.plain[0] and isinstance(loaded.plain[1], tnn.Identity)


def test_a_model_of_which_a_part_was_folded_survives_a_file(tmp_path: Path) -> None:
    quantized = dsconv.quantize(randomize(Decides(), X), CONFIG)
    quantized.part = dsconv.fold_batchnorm(quantized.part)
    path = dsconv.save(quantized, tmp_path / "part.safetensors")
    assert read_header(path).folded == {"part.1": "part.0"}
    loaded = dsconv.load(path, Decides().eval())
    again = dsconv.load(dsconv.save(loaded, path), Decides().eval())
    with torch.inference_mode():
        assert torch.equal(loaded(X), quantized(X)) and torch.equal(again(X), quantized(X))


def test_a_file_that_folds_what_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    model = tnn.Sequential(tnn.Conv2d(8, 8, 1), tnn.BatchNorm2d(8), tnn.ReLU()).eval()
    path = dsconv.save(dsconv.fold_batchnorm(dsconv.quantize(model, CONFIG)), tmp_path / "net.safetensors")
    for other in (tnn.Sequential(tnn.Conv2d(8, 8, 1), tnn.ReLU()), tnn.Sequential(tnn.Conv2d(8, 8, 1))):
        with pytest.raises(FileFormatError, match="module '1': the file has it as a BatchNorm folded into '0'"):
            dsconv.load(path, other)


class NormAndAct(tnn.BatchNorm2d):
    """BatchNorm that calls further modules of its own, like timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: tnn.Module):
        super().__init__(channels)
        self.drop, self.act = tnn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Doubling(NormAndAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def with_activations(kind: type[NormAndAct] = NormAndAct) -> tnn.Module:
    torch.manual_seed(0)
    model = tnn.Sequential(
        tnn.Conv2d(8, 16, 3, bias=False), kind(16, tnn.PReLU()), tnn.Conv2d(16, 8, 1), kind(8, tnn.ReLU(inplace=True))
    )
    return randomize(model, torch.randn(8, 8, 9, 9))


def test_what_a_batchnorm_goes_on_to_stays(tmp_path: Path) -> None:
    model = with_activations()
    quantized, x = dsconv.quantize(model, CONFIG), torch.randn(2, 8, 9, 9)
    folded = dsconv.fold_batchnorm(quantized)
    assert info(folded).folded == {"1": "0", "3": "2"} and not info(folded).not_folded
    assert isinstance(folded[1].act, tnn.PReLU) and folded[1].act is not model[1].act
    again = dsconv.load(dsconv.save(folded, tmp_path / "folded.safetensors"), model)
    with torch.inference_mode():
        assert quality(quantized(x), folded(x)) > 60
        assert torch.equal(again(x), folded(x))


def test_calibration_of_what_was_folded_looks_in_front_of_the_activation() -> None:
    model, images = with_activations(), torch.randn(32, 8, 9, 9)
    folded = dsconv.fold_batchnorm(dsconv.quantize(model, CONFIG))
    plain = dsconv.calibrate(dsconv.quantize(model, CONFIG), model, images)
    calibrated = dsconv.calibrate(folded, model, images)
    with torch.inference_mode():
        expected = model(images)
        assert quality(expected, calibrated(images)) > quality(expected, plain(images)) - 1


def test_a_batchnorm_that_does_something_else_is_not_folded() -> None:
    folded = dsconv.fold_batchnorm(dsconv.quantize(with_activations(Doubling), CONFIG))
    assert not info(folded).folded
    assert info(folded).not_folded["1"] == "its class Doubling is not known to be a plain BatchNorm"


def test_networks_of_timm_are_folded() -> None:
    timm = pytest.importorskip("timm", reason="needs the extra dsconv[zoo]")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    quantized, x = dsconv.quantize(model, CONFIG), torch.randn(1, 3, 33, 36)
    assert not info(quantized).in_float
    folded = dsconv.fold_batchnorm(quantized)
    assert len(info(folded).folded) == 49 and not info(folded).not_folded
    with torch.inference_mode():
        assert quality(quantized(x), folded(x)) > 25


def test_code_may_go_over_the_chunks_of_a_tensor() -> None:
    class Split(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = tnn.Conv2d(3, 16, 1), tnn.BatchNorm2d(16), tnn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = list(self.norm(self.first(x)).chunk(2, 1))
            y.extend(part(y[-1]) for part in [self.second])
            return torch.cat(y, 1)

    quantized = dsconv.quantize(randomize(Split(), torch.randn(4, 3, 8, 8)).eval(), CONFIG)
    folded = dsconv.fold_batchnorm(quantized)
    assert model_info(folded).folded == {"norm": "first"}  # type: ignore[union-attr]
