"""The number formats that the accuracy benchmark compares with."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baselines", REPOSITORY / "benchmarks" / "baselines.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["baselines"] = module
    spec.loader.exec_module(module)
    return module


def nearest(x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    grid = torch.tensor(sorted({sign * level for level in levels for sign in (-1, 1)}))
    return (x.unsqueeze(-1) - grid).abs().amin(-1)


def test_e2m1_takes_the_nearest_level(baselines: ModuleType) -> None:
    x = torch.linspace(-8, 8, 4001)
    missed = (x - baselines.e2m1(x)).abs()
    assert torch.allclose(missed, nearest(x, [0, 0.5, 1, 1.5, 2, 3, 4, 6]), atol=1e-6)


@pytest.mark.parametrize(("name", "worst"), [("MXINT8", 2**-6), ("MXINT4", 2**-2), ("MXFP4", 2**-1), ("NVFP4", 0.24)])
def test_error_of_a_block_is_within_its_largest_step(baselines: ModuleType, name: str, worst: float) -> None:
    """Check errors relative to the block's power of two, or to its largest value: half a step, or saturation."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=False)
    baseline = next(b for b in baselines.baselines() if b.name == name)
    rounded = baseline.make(nn.Sequential(layer), torch.empty(0))[0].layer.weight
    blocks = (layer.weight - rounded).view(8, -1, baseline.block)
    largest = layer.weight.view(8, -1, baseline.block).abs().amax(-1, keepdim=True)
    unit = largest if name == "NVFP4" else torch.exp2(largest.log2().floor())
    assert 0 < (blocks.abs() / unit).max() <= worst + 1e-6
    assert baseline.sizes(layer)["effective_bits"] == baseline.bits + 8 / baseline.block


@pytest.mark.parametrize("channels", [3, 40])
def test_all_formats_keep_the_shape_of_a_convolution_and_get_near_it(baselines: ModuleType, channels: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU()).eval()
    x = torch.randn(2, channels, 9, 7)
    with torch.no_grad():
        y = network(x)
        for baseline in baselines.baselines()[1:]:
            error = (baseline.make(network, x)(x) - y).square().mean() / y.square().mean()
            assert 0 < error < (1e-3 if baseline.bits == 8 else 0.1), baseline.name
