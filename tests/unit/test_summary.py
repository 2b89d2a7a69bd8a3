"""The summary: sizes and bits against the tensors of the layers, and its printed form."""

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn as tnn
from torch.nn.utils import parametrizations

import dsconv
from dsconv.conversion import LayerSummary
from dsconv.numerics import packed_bytes
from dsconv.ops import native

needs_extension = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


def model() -> tnn.Sequential:
    torch.manual_seed(0)
    return tnn.Sequential(
        tnn.Conv2d(3, 8, 3, bias=False),
        tnn.BatchNorm2d(8),
        tnn.Conv2d(8, 8, 3, groups=8),
        tnn.Conv2d(8, 70, 1),
        tnn.Conv2d(70, 5, 1),
        tnn.Flatten(),
        tnn.Linear(5, 4),
    )


def row(name: str, config: dsconv.QuantConfig) -> LayerSummary:
    return {row.name: row for row in dsconv.summary(dsconv.quantize(model(), config)).layers}[name]


@pytest.fixture
def scalar(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use only the instruction set that every machine has."""
    monkeypatch.setenv("DSCONV_MAX_ISA", "scalar")
    native.isa.cache_clear()
    yield
    native.isa.cache_clear()


@pytest.mark.usefixtures("scalar")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("kds_dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
@pytest.mark.parametrize("shift", [False, True])
def test_bits_and_bytes_of_a_layer(bits: int, kds_dtype: str, size: int, shift: bool) -> None:
    found = row("4", dsconv.QuantConfig(weight_bits=bits, kds_dtype=kds_dtype, weight_shift=shift))
    scales = 5 * 3 * (2 if shift else 1)
    assert found.shape == (5, 70, 1, 1) and found.kind == "DSConv2d"
    assert found.bytes_before == 4 * 350
    assert found.bytes_after == packed_bytes(350, bits) + scales * size
    assert found.effective_bits == found.bytes_after * 8 / 350
    assert found.quantized and found.reason is None
    assert found.backend == ("integers (scalar)" if native.extension() else "float simulation")
    assert found.backend_reason == (None if native.extension() else "the extension dsconv._C is not built")


@pytest.mark.parametrize(
    ("block_size", "kds_dtype", "shift", "effective"),
    [
        (32, "float32", False, 5.0),
        (32, "float16", False, 4.5),
        (64, "float32", False, 4.5),
        (64, "float16", False, 4.25),
        (64, "float16", True, 4.5),
    ],
)
def test_effective_bits_of_full_blocks_are_as_published(
    block_size: int, kds_dtype: str, shift: bool, effective: float
) -> None:
    config = dsconv.QuantConfig(block_size=block_size, kds_dtype=kds_dtype, weight_shift=shift, first_layer=None)
    found = dsconv.summary(dsconv.quantize(tnn.Conv2d(64, 8, 3), config))
    assert found.layers[0].effective_bits == found.effective_bits == effective


def test_settings_are_those_of_the_layers() -> None:
    config = dsconv.QuantConfig.preset("default", linear="float")
    first, depthwise, general, linear = (row(name, config) for name in ("0", "2", "3", "6"))
    assert (first.weight_bits, first.activation_bits, first.blocks, first.kds_dtype) == (8, 8, "flat", "float32")
    assert (depthwise.block_size, depthwise.shape) == (9, (8, 1, 3, 3))
    assert (general.weight_bits, general.block_size, general.weight_shift, general.kds_dtype) == (
        4,
        64,
        True,
        "float16",
    )
    assert general.weight_sqnr_db > 15
    assert linear.reason == "the config leaves it in float"
    assert linear.weight_bits is linear.activation_sign is linear.block_size is linear.weight_sqnr_db is None
    assert linear.effective_bits == 32 and linear.backend == "PyTorch float"
    weights_only = row("3", dsconv.QuantConfig(activation_bits=None))
    assert weights_only.activation_bits is None and weights_only.activation_sign is None


def test_totals_count_every_byte_once() -> None:
    net = model()
    net.append(net[6])
    net.append(tnn.Embedding(3, 7))
    net.append(tnn.Linear(7, 3, bias=False))
    net[9].weight = net[8].weight
    before = sum(t.numel() * t.element_size() for t in net.state_dict().values()) - 4 * (20 + 4 + 21)
    found = dsconv.summary(dsconv.quantize(net, dsconv.QuantConfig(linear="float")))
    assert found.bytes_before == before
    assert found.other_bytes == before - 4 * (216 + 72 + 560 + 350 + 20 + 21)
    assert found.bytes_after == sum(layer.bytes_after for layer in found.layers) + found.other_bytes
    assert [layer.name for layer in found.layers] == ["0", "2", "3", "4", "6", "8.weight", "9"]
    quantized = [layer for layer in found.layers if layer.quantized]
    weights = 216 + 72 + 560 + 350
    assert found.effective_bits_quantized == sum(layer.bytes_after for layer in quantized) * 8 / weights
    assert found.effective_bits == sum(layer.bytes_after for layer in found.layers) * 8 / (weights + 20 + 21)


def test_buffers_that_are_not_saved_do_not_count() -> None:
    net = tnn.Sequential(tnn.Conv2d(3, 4, 3))
    size = dsconv.summary(net).bytes_before
    net.register_buffer("scratch", torch.zeros(1000), persistent=False)
    assert dsconv.summary(net).bytes_before == size


def test_a_normalized_layer_that_stays_in_float_is_listed() -> None:
    net = tnn.Sequential(tnn.Conv2d(3, 4, 3), parametrizations.weight_norm(tnn.Linear(6, 5)))
    found = dsconv.summary(dsconv.quantize(net, dsconv.QuantConfig(linear="float")))
    rows = [layer for layer in found.layers if layer.name == "1"]
    assert rows and all(layer.reason == "the config leaves it in float" for layer in rows)
    assert found.bytes_before == sum(p.numel() * 4 for p in net.parameters())


def test_a_float_model_has_a_summary_too() -> None:
    found = dsconv.summary(model())
    assert [layer.name for layer in found.layers] == ["0", "2", "3", "4", "6"]
    assert {layer.reason for layer in found.layers} == {"not converted"}
    assert found.bytes_before == found.bytes_after and found.effective_bits == 32


def test_half_precision_weights_count_what_they_take() -> None:
    found = dsconv.summary(model().half())
    assert found.layers[0].effective_bits == 16 and found.layers[0].bytes_after == 2 * 216


def test_the_dictionary_is_plain_data() -> None:
    found = dsconv.summary(dsconv.quantize(model(), "paper"))
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["layers"]) == 5 and data["layers"][3]["name"] == "4"
    assert data["layers"][4]["reason"] == "the config leaves it in float"
    assert data["bytes_after"] == found.bytes_after and data["effective_bits"] == found.effective_bits


def test_the_table_shows_every_layer_and_its_reason() -> None:
    text = " ".join(str(dsconv.summary(dsconv.quantize(model(), "paper"))).split())
    assert "8x1x3x3" in text and "the config leaves it in float" in text
    assert "4 layers quantized, 1 in float" in text and "In float, the config leaves it in float: 6." in text


@needs_extension
def test_the_table_says_what_executes_the_layers_and_why_not_integers(scalar: None) -> None:
    config = dsconv.QuantConfig.preset("paper", overrides={"4": {"block_size": 12}})
    text = " ".join(str(dsconv.summary(dsconv.quantize(model(), config))).split())
    assert "Executed in inference by: float simulation, integers (scalar)." in text
    assert "By float simulation, its input stays float: 0." in text
    assert "By float simulation, its blocks of 12 are not a multiple of 8 of at most 512: 4." in text
    with dsconv.ops.simulated():
        found = dsconv.summary(dsconv.quantize(model(), config))
    assert found.backends == ("float simulation",)
    assert {layer.backend_reason for layer in found.layers[:4]} == {"dsconv.ops.simulated() is in effect"}


@needs_extension
def test_a_layer_elsewhere_is_not_said_to_run_in_integers() -> None:
    found = dsconv.summary(dsconv.quantize(model()).to("meta"))
    assert {(layer.backend, layer.backend_reason) for layer in found.layers} == {
        ("float simulation", "it is on the device meta")
    }


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    net = tnn.ModuleDict({"[red]": tnn.Conv2d(3, 4, 3)})
    assert "[red]" in str(dsconv.summary(dsconv.quantize(net)))
