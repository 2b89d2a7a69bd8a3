"""Statistics that calibration collects for a layer, against the outputs of the layer."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv.calibration.collect import (
    as_rows,
    blocks_of,
    count_places,
    from_rows,
    inputs_at,
    outputs_at,
    places,
)
from dsconv.nn import DSLayer

LAYERS: list[tuple[tnn.Module, dict[str, Any], tuple[int, ...]]] = [
    (tnn.Conv2d(40, 6, 3, padding=1), {}, (3, 40, 7, 6)),
    (tnn.Conv2d(40, 6, 3, padding=1), {"weight_shift": True, "block_size": 16}, (3, 40, 7, 6)),
    (tnn.Conv2d(40, 6, 3, padding=1), {"activation_bits": None}, (3, 40, 7, 6)),
    (tnn.Conv2d(3, 6, 5, stride=2, padding=2), {"blocks": "flat"}, (3, 3, 9, 9)),
    (tnn.Conv2d(24, 12, 3, groups=3, dilation=2, stride=2), {"block_size": 6}, (2, 24, 11, 11)),
    (tnn.Conv2d(24, 12, 3, groups=3), {"blocks": "flat", "activation_sign": "included"}, (2, 24, 6, 6)),
    (tnn.Conv2d(8, 16, 3, groups=8, padding="same"), {"blocks": "flat", "block_size": 9}, (2, 8, 6, 6)),
    (tnn.Conv2d(20, 6, 4, padding="same", padding_mode="reflect"), {"activation_sign": "extra"}, (2, 20, 6, 7)),
    (tnn.Conv2d(33, 5, 1), {"kds_dtype": "float16"}, (2, 33, 4, 4)),
    (tnn.Conv1d(33, 5, 3, padding=1), {}, (2, 33, 9)),
    (tnn.Conv3d(9, 5, 3, padding=1), {}, (2, 9, 4, 5, 3)),
    (tnn.ConvTranspose2d(34, 6, 3, stride=2, padding=1, output_padding=1), {}, (2, 34, 4, 5)),
    (tnn.ConvTranspose2d(12, 6, 4, stride=3, groups=2, dilation=2, padding=7), {"block_size": 4}, (2, 12, 6, 5)),
    (tnn.ConvTranspose1d(34, 6, 5, stride=2), {}, (2, 34, 6)),
    (tnn.Linear(70, 5), {}, (3, 70)),
    (tnn.Linear(70, 5), {"weight_shift": True}, (3, 4, 70)),
]


@pytest.fixture(params=LAYERS, ids=lambda case: f"{type(case[0]).__name__}-{case[1]}-{case[2]}")
def case(request: pytest.FixtureRequest) -> tuple[DSLayer, Tensor]:
    torch.manual_seed(0)
    layer, settings, shape = request.param
    config = dsconv.LayerConfig(**{"weight_bits": 4, "activation_bits": 4, "block_size": 32, **settings})
    quantized = {type(layer): getattr(dsconv.nn, f"DS{type(layer).__name__}")}[type(layer)]
    return quantized.from_float(layer, config), torch.randn(shape)


@torch.no_grad()
def test_inputs_and_rows_of_a_layer_multiply_to_its_output(case: tuple[DSLayer, Tensor]) -> None:
    layer, x = case
    with dsconv.ops.simulated():
        y = layer(x)
    total = count_places(layer, y)
    where = places(total, 2 * total // 3, torch.Generator().manual_seed(1))
    assert len(where) < total
    weight = as_rows(layer, layer.conv_weight())
    expected = outputs_at(layer, y, where)
    seen = 0
    for read, part in inputs_at(layer, x, y.shape, where):
        assert read.shape == (
            layer.groups,
            part.stop - part.start if part.stop < total else read.shape[1],
            weight.shape[2],
        )
        got = (read @ weight.mT).transpose(0, 1).flatten(1) + layer.bias
        torch.testing.assert_close(got, expected[part], rtol=1e-4, atol=1e-4)
        seen += len(got)
    assert seen == len(where)


def test_rows_become_the_layer_again(case: tuple[DSLayer, Tensor]) -> None:
    layer, _ = case
    for value in filter(lambda value: value is not None, (layer.vqk, layer.kds, layer.kds_shift)):
        rows = as_rows(layer, value)
        assert rows.shape[:2] == (layer.groups, len(layer.vqk) // layer.groups)
        assert torch.equal(from_rows(layer, rows, value.shape), value)
    blocks = blocks_of(layer)
    spread = blocks.spread(as_rows(layer, layer.kds).float()) * as_rows(layer, layer.vqk)
    if layer.kds_shift is not None:
        spread += blocks.spread(as_rows(layer, layer.kds_shift).float())
    torch.testing.assert_close(spread, as_rows(layer, layer.conv_weight()))
