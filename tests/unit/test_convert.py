"""Conversion: every layer is found, replaced everywhere it is used, or left in float with a reason."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import dsconv
from dsconv import nn
from dsconv.conversion import model_info
from dsconv.errors import ConfigError, DSConvError, ModelError
from dsconv.io.checkpoint import read_tensors

CONFIG = dsconv.QuantConfig(block_size=8)


class Net(tnn.Module):
    """Network with a first layer, a depthwise one, a shared one, one in a plain list and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = tnn.Conv2d(3, 16, 3, padding=1)
        self.norm = tnn.BatchNorm2d(16)
        self.depthwise = tnn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.shared = tnn.Conv2d(16, 16, 1)
        self.again = self.shared
        self.plain = [self.shared, self.norm]
        self.fc = tnn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.stem(x)).relu())
        x = self.again(self.plain[0](x)).relu()
        return self.fc(x.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_original_is_left_as_it_is() -> None:
    model = net().train()
    state, modules = copy.deepcopy(model.state_dict()), [*model.named_modules()]
    attributes = set(vars(model))
    quantized = dsconv.quantize(model, CONFIG)
    with torch.no_grad():
        for value in quantized.state_dict().values():
            value.zero_()
    assert [*model.named_modules()] == modules and set(vars(model)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert quantized.training and quantized.stem.training


def test_outputs_of_the_original_keep_every_bit() -> None:
    model = net()
    before = model(IMAGES)
    dsconv.quantize(model, CONFIG)
    assert torch.equal(model(IMAGES), before)


def test_a_shared_layer_stays_one_layer_wherever_it_is_referred_to() -> None:
    model = net()
    quantized = dsconv.quantize(model, CONFIG)
    assert isinstance(quantized.shared, nn.DSConv2d)
    assert quantized.shared is quantized.again is quantized.plain[0]
    assert quantized.plain[1] is quantized.norm and quantized.norm is not model.norm
    with torch.no_grad():
        assert not torch.equal(quantized(IMAGES), model(IMAGES))


def test_first_last_depthwise_and_linear_layers_follow_their_settings() -> None:
    config = dsconv.QuantConfig(
        weight_bits=3,
        first_layer={"weight_bits": 8, "blocks": "flat"},
        depthwise={"weight_bits": 7, "blocks": "flat"},
        linear={"weight_bits": 5},
        last_layer={"activation_bits": 6},
    )
    quantized = dsconv.quantize(net(), config)
    assert (quantized.stem.config.weight_bits, quantized.stem.config.blocks) == (8, "flat")
    assert (quantized.depthwise.config.weight_bits, quantized.depthwise.config.block_size) == (7, 9)
    assert quantized.depthwise.kds.shape == (16, 1)
    assert quantized.shared.config.weight_bits == 3
    assert (quantized.fc.config.weight_bits, quantized.fc.config.activation_bits) == (5, 6)


def test_files_whose_config_has_small_layers_are_not_for_older_versions(tmp_path: Path) -> None:
    for settings, version in ((None, "2"), ({"weight_bits": 8}, "4")):
        config = {"small_layers": settings, "depthwise": None}
        path = dsconv.save(dsconv.quantize(net(), config), tmp_path / "net.safetensors")
        entries, _ = read_tensors(path, "dsconv", "file", "write it again")
        assert entries["format_version"] == version and ("small_layers" in entries["config"]) == (version == "4")
        assert model_info(dsconv.load(path, net())).config.small_layers == settings


@pytest.mark.parametrize("normalize", [lambda layer: layer, weight_norm, parametrizations.weight_norm])
def test_layers_of_few_weights_follow_their_settings(normalize: Any) -> None:
    large, at_most, above = tnn.Linear(508, 100), normalize(tnn.Linear(10, 10)), normalize(tnn.Linear(10, 11))
    unknown = tnn.LazyLinear(7)
    model = tnn.ModuleList([tnn.Linear(30, 10, bias=False), large, at_most, above, unknown])
    # A 512th of 51,310 weights is 100.2.
    config = dsconv.QuantConfig(small_layers={"weight_bits": 7})
    for quantized in (dsconv.quantize(model, config), dsconv.quantize(dsconv.quantize(model, config), config)):
        assert [layer.config.weight_bits for layer in quantized[:4]] == [4, 4, 7, 4]


def test_an_override_reaches_a_shared_layer_by_any_of_its_names() -> None:
    for name in ("shared", "again"):
        quantized = dsconv.quantize(net(), dsconv.QuantConfig(overrides={name: {"weight_bits": 2}}))
        assert quantized.shared.config.weight_bits == 2


def test_an_override_that_matches_nothing_is_an_error_that_lists_the_layers() -> None:
    with pytest.raises(ConfigError, match=r"overrides: 'layer9\.\*' matches no convolution or linear layer.*stem"):
        dsconv.quantize(net(), dsconv.QuantConfig(overrides={"layer9.*": "float"}))


def test_a_root_module_that_is_a_layer_itself() -> None:
    for layer, quantized in ((tnn.Conv2d(3, 4, 3), nn.DSConv2d), (tnn.Linear(8, 4), nn.DSLinear)):
        made = dsconv.quantize(layer, CONFIG)
        assert isinstance(made, quantized)
        assert [row.name for row in dsconv.summary(made).layers] == [""]


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
@pytest.mark.parametrize("what", ["weight", "spectral"])
def test_a_normalized_weight_is_resolved(kind: str, what: str) -> None:
    torch.manual_seed(0)
    layer = tnn.Conv2d(8, 6, 3)
    normalize: Any = {
        ("hook", "weight"): weight_norm,
        ("hook", "spectral"): spectral_norm,
        ("parametrization", "weight"): parametrizations.weight_norm,
        ("parametrization", "spectral"): parametrizations.spectral_norm,
    }[kind, what]
    model = tnn.Sequential(normalize(layer), tnn.ReLU()).eval()
    with torch.no_grad():
        # The hook has not run since the parameters changed.
        for parameter in model.parameters():
            parameter.mul_(1.5)
    state = copy.deepcopy(model.state_dict())
    quantized = dsconv.quantize(model, CONFIG)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(torch.randn(1, 8, 5, 5))
    expected = nn.DSConv2d.from_float(layer, CONFIG.layer(first=True), weight=layer.weight)
    assert torch.equal(quantized[0].vqk, expected.vqk) and torch.equal(quantized[0].kds, expected.kds)
    assert not any("weight_g" in name or "parametrizations" in name for name, _ in quantized.named_parameters())
    assert quantized(torch.randn(1, 8, 5, 5)).shape == (1, 6, 3, 3)


def test_a_pruned_weight_is_resolved() -> None:
    layer = tnn.Conv2d(8, 6, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.2)
    quantized = dsconv.quantize(layer, CONFIG)
    assert (quantized.vqk == 0).float().mean() >= 0.5
    assert torch.equal(quantized.vqk, nn.DSConv2d.from_float(layer, CONFIG.layer(first=True)).vqk)
    prune.l1_unstructured(layer, "bias", 2)
    assert int((dsconv.quantize(layer, CONFIG).bias == 0).sum()) == 2


class Standardized(tnn.Conv2d):
    """Layer that computes its weight when it is called."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Counting(Standardized):
    """Layer that changes its state at every run."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Scaling(tnn.Conv2d):
    """Layer that computes more than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_subclass_that_computes_its_weight_is_resolved() -> None:
    layer = Standardized(8, 6, 3)
    quantized = dsconv.quantize(layer, CONFIG)
    weight = layer.weight.detach()
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    assert torch.equal(quantized.vqk, nn.DSConv2d.from_float(layer, CONFIG.layer(first=True), weight=weight).vqk)


def test_finding_the_weight_of_a_subclass_has_no_side_effects() -> None:
    layer = Counting(8, 6, 3)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    dsconv.quantize(layer, CONFIG)
    assert layer.calls == 0 and not seen


@pytest.mark.parametrize("subclass", [Scaling])
def test_a_subclass_that_does_more_is_left_in_float_with_the_reason(subclass: type[tnn.Conv2d]) -> None:
    model = tnn.Sequential(subclass(8, 6, 3), tnn.Conv2d(6, 8, 1))
    quantized = dsconv.quantize(model, CONFIG)
    assert type(quantized[0]) is subclass
    row = dsconv.summary(quantized).layers[0]
    assert row.name == "0" and not row.quantized and "Scaling has a forward of its own" in row.reason


def test_timm_layers() -> None:
    layers = pytest.importorskip("timm.layers", reason="needs the extra dsconv[zoo]")
    model = tnn.Sequential(layers.ScaledStdConv2d(8, 6, 3), layers.StdConv2d(6, 6, 3), layers.Conv2dSame(6, 4, 3, 2))
    quantized = dsconv.quantize(model, CONFIG)
    assert all(isinstance(layer, nn.DSConv2d) for layer in quantized)
    x = torch.randn(1, 8, 11, 12)
    eight = dsconv.quantize(model, dsconv.QuantConfig(weight_bits=8, activation_bits=None, first_layer=None))
    with torch.no_grad():
        assert (eight(x) - model(x)).norm() < 0.02 * model(x).norm()


class Attention(tnn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = tnn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = tnn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x)[0])


def test_a_layer_whose_weight_is_read_directly_is_left_in_float_with_the_reason() -> None:
    quantized = dsconv.quantize(Attention(), CONFIG)
    rows = {row.name: row for row in dsconv.summary(quantized).layers}
    assert "MultiheadAttention" in rows["attention.out_proj"].reason
    assert rows["attention.in_proj_weight"].reason
    assert rows["fc"].quantized
    assert quantized(torch.randn(2, 3, 16)).shape == (2, 3, 16)


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_runs_after_conversion(training: bool) -> None:
    layer = tnn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = tnn.Sequential(tnn.TransformerEncoder(layer, 2), tnn.Linear(16, 4)).train(training)
    quantized = dsconv.quantize(model, CONFIG)
    with torch.no_grad():
        assert quantized(torch.randn(2, 3, 16)).shape == (2, 3, 4)
    reasons = {row.name: row.reason for row in dsconv.summary(quantized).layers}
    assert "TransformerEncoderLayer" in reasons["0.layers.0.linear1"] and reasons["1"] is None


def test_what_is_quantized_already_stays_as_it_is() -> None:
    once = dsconv.quantize(net(), CONFIG)
    twice = dsconv.quantize(once, dsconv.QuantConfig(weight_bits=2))
    assert torch.equal(twice(IMAGES), once(IMAGES))
    assert twice.shared is not once.shared and twice.shared.config.weight_bits == 4
    half = net()
    half.fc = nn.DSLinear.from_float(half.fc, CONFIG.layer(kind="linear"))
    mixed = dsconv.quantize(half, "paper")
    assert isinstance(mixed.fc, nn.DSLinear) and isinstance(mixed.stem, nn.DSConv2d)


def test_a_lazy_layer_is_left_alone_until_it_has_a_size() -> None:
    model = tnn.Sequential(tnn.Conv2d(3, 8, 3), tnn.LazyConv2d(4, 1), tnn.LazyLinear(2))
    quantized = dsconv.quantize(model, CONFIG)
    assert isinstance(quantized[0], nn.DSConv2d)
    reasons = model_info(quantized).in_float
    assert "run the model once before converting it" in reasons["1"] and "run the model once" in reasons["2"]
    assert {row.name for row in dsconv.summary(quantized).layers if not row.quantized} == {"1", "2"}
    model(torch.randn(1, 3, 6, 6))
    assert all(isinstance(layer, nn.DSLayer) for layer in dsconv.quantize(model, CONFIG))


def test_a_model_with_nothing_to_quantize_is_an_error() -> None:
    for model in (tnn.ReLU(), tnn.Sequential(tnn.BatchNorm2d(3)), tnn.Sequential()):
        with pytest.raises(ModelError, match="has no convolution or linear layer to quantize"):
            dsconv.quantize(model)
    with pytest.raises(ModelError, match=r"no layer can be quantized \(0: the config leaves it in float\)"):
        dsconv.quantize(tnn.Sequential(tnn.Linear(4, 4)), "paper")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_names_its_layer(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model.depthwise.weight[3, 0, 1, 1] = bad
    with pytest.raises(ModelError, match="layer 'depthwise': w: expected finite values, got 1 NaN or infinite of 144"):
        dsconv.quantize(model, CONFIG)


@pytest.mark.parametrize("wrong", [None, "resnet18", {"a": 1}, torch.zeros(3), tnn.Conv2d])
def test_something_else_than_a_model_is_an_error(wrong: Any) -> None:
    with pytest.raises(ModelError, match=r"model: expected a torch.nn.Module, got"):
        dsconv.quantize(wrong)


def test_a_scripted_model_is_an_error() -> None:
    with pytest.raises(ModelError, match="TorchScript"):
        dsconv.quantize(torch.jit.script(tnn.Sequential(tnn.Conv2d(3, 4, 3))))


@pytest.mark.parametrize("config", [4, ["paper"], "papper", {"weight_bits": 1}])
def test_an_unusable_config_is_an_error_of_one_paragraph(config: Any) -> None:
    with pytest.raises(DSConvError) as caught:
        dsconv.quantize(net(), config)
    assert "\n" not in str(caught.value)


def test_weights_on_the_meta_device_are_left_with_the_reason() -> None:
    model = tnn.Sequential(tnn.Conv2d(3, 4, 3), tnn.Conv2d(4, 4, 3, device="meta"))
    quantized = dsconv.quantize(model, CONFIG)
    assert "meta device" in dsconv.summary(quantized).layers[1].reason


def test_hooks_of_the_user_go_on_being_called() -> None:
    model, seen = net(), []

    def before(module: tnn.Module, args: tuple[Tensor]) -> None:
        seen.append(("before", type(module)))

    def before_all(module: tnn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        seen.append(("before_all", type(module)))

    def after(module: tnn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append(("after", type(module)))
        return output + 1

    def after_all(module: tnn.Module, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append(("after_all", type(module)))

    model.fc.register_forward_pre_hook(before)
    model.fc.register_forward_pre_hook(before_all, with_kwargs=True)
    model.fc.register_forward_hook(after)
    model.fc.register_forward_hook(after_all, with_kwargs=True)
    quantized = dsconv.quantize(model, CONFIG)
    y = quantized(IMAGES)
    assert seen == [(name, nn.DSLinear) for name in ("before", "before_all", "after", "after_all")]
    quantized.fc._forward_hooks.clear()
    torch.testing.assert_close(y, quantized(IMAGES) + 1)


class Recording(tnn.Module):
    """Module that stores the output of its own layer, by hooks that are bound to it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = tnn.Conv2d(3, 8, 3)
        self.seen: list[Tensor] = []
        self.conv.register_forward_hook(self.record)
        self.conv.register_forward_hook(functools.partial(self.record_as, "again"))

    def record(self, module: tnn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.seen.append(output)

    def record_as(self, name: str, module: tnn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_hooks_that_belong_to_the_model_belong_to_its_copy() -> None:
    model = Recording()
    quantized = dsconv.quantize(model, CONFIG)
    quantized(IMAGES)
    assert len(quantized.seen) == 2 and not model.seen


def test_flags_of_the_bias_are_kept() -> None:
    model = net()
    model.stem.bias.requires_grad_(False)
    quantized = dsconv.quantize(model, CONFIG)
    assert not quantized.stem.bias.requires_grad and quantized.fc.bias.requires_grad
    assert torch.equal(quantized.stem.bias, model.stem.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precision(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    quantized = dsconv.quantize(model, CONFIG)
    assert quantized.fc.bias.dtype == dtype and quantized.norm.weight.dtype == dtype
    y = quantized(IMAGES.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), dsconv.quantize(model.float(), CONFIG)(IMAGES), rtol=0.1, atol=0.1)


class Everything(tnn.Module):
    """Weights of all kinds, at all levels of nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv3 = tnn.Conv1d(4, 4, 3), tnn.Conv3d(4, 4, 1)
        self.up = tnn.ModuleList([tnn.ConvTranspose1d(4, 4, 2), tnn.ConvTranspose2d(4, 4, 2)])
        self.deep = tnn.ModuleDict({"up": tnn.Sequential(tnn.ConvTranspose3d(4, 4, 2))})
        self.embedding, self.lstm = tnn.Embedding(5, 4), tnn.LSTM(4, 4)
        self.bilinear = tnn.Bilinear(4, 4, 2)
        self.table = tnn.Parameter(torch.zeros(3, 4))
        self.normalized = parametrizations.weight_norm(tnn.Linear(4, 4))
        self.old = weight_norm(tnn.Linear(4, 4))
        self.orthogonal = parametrizations.orthogonal(tnn.Linear(4, 4))
        self.scaling = Scaling(4, 4, 1)
        self.tied = tnn.Linear(4, 5)
        self.tied.weight = self.embedding.weight


@pytest.mark.parametrize(
    "config", [CONFIG, dsconv.QuantConfig(linear="float"), dsconv.QuantConfig(overrides={"*": "float", "conv1": {}})]
)
def test_nothing_is_skipped_silently(config: dsconv.QuantConfig) -> None:
    model = Everything()
    quantized = dsconv.quantize(model, config)
    found = dsconv.summary(quantized)
    rows = (*found.layers, *found.parameters)
    names = [row.name for row in rows]
    for name, module in model.named_modules():
        if isinstance(module, (tnn.modules.conv._ConvNd, tnn.Linear)):
            assert name in names, name
    for row in rows:
        if not row.quantized:
            assert len(row.reason) > 10
    weights = {id(p): p for p in quantized.parameters() if p.dim() > 1}
    assert sum(row.bytes_after for row in rows if not row.quantized) == sum(p.nbytes for p in weights.values())
    for name in ("embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "bilinear.weight", "table"):
        assert name in names
    assert all(isinstance(m, nn.DSLayer) for m in (quantized.conv1,))


def test_every_type_of_layer_is_converted() -> None:
    quantized = dsconv.quantize(Everything(), CONFIG)
    types = {
        name: type(module).__name__ for name, module in quantized.named_modules() if isinstance(module, nn.DSLayer)
    }
    assert types == {
        "conv1": "DSConv1d",
        "conv3": "DSConv3d",
        "up.0": "DSConvTranspose1d",
        "up.1": "DSConvTranspose2d",
        "deep.up.0": "DSConvTranspose3d",
        "normalized": "DSLinear",
        "old": "DSLinear",
        "orthogonal": "DSLinear",
        "tied": "DSLinear",
    }
    assert not any(parametrize.is_parametrized(module) for module in quantized.modules())
