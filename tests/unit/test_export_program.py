"""Quantized models as programs of torch.export, in files that another process reads."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import dsconv

READER = """
import sys, dsconv, torch
program = torch.export.load(sys.argv[1])
x, y = torch.load(sys.argv[2])
assert torch.equal(program.module()(x), y)
operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
print(sorted(name for name in operators if name.startswith("dsconv")))
"""


def test_a_saved_program_returns_the_same_in_another_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1)]
    qnet = dsconv.quantize(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)).eval())
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(5, 3, 9, 9)
    with torch.no_grad():
        program = torch.export.export(qnet, (x[:2],), dynamic_shapes=({0: batch},))
        torch.save((x, qnet(x)), tmp_path / "expected.pt")
    torch.export.save(program, tmp_path / "net.pt2")
    files = [str(tmp_path / name) for name in ("net.pt2", "expected.pt")]
    done = subprocess.run([sys.executable, "-c", READER, *files], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    integers = any(layer.backend.name.startswith("integers") for layer in qnet if isinstance(layer, dsconv.nn.DSLayer))
    expected = ["dsconv.conv2d.default", "dsconv.linear.default"] if integers else []
    assert done.stdout.strip() == str(expected)
