"""Files whose tables hold together and whose checksums are right, of networks that cannot be: they are refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsconv
from dsconv.compilation.program import Axis
from dsconv.compilation.saving import schema, writing
from dsconv.ops import native

runtime = pytest.importorskip("dsconv_runtime")
pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")


class Steps(nn.Module):
    """A layer of as many outputs as its image has rows, a sum, a concatenation and a rearrangement."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = (nn.Conv2d(n, 16, 1) for n in (3, 16, 32))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.first(x))
        both = torch.cat([self.other(x) + x, x], 1)
        return self.last(both), F.channel_shuffle(both, 4)


Change = Callable[[schema.Network], None]


@pytest.fixture(scope="module")
def fast() -> Any:
    torch.manual_seed(0)
    return dsconv.compile(dsconv.quantize(Steps().eval()), torch.zeros(1, 3, 16, 16, dtype=torch.float32))


@pytest.fixture
def opened(fast: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], Any]:
    """A function that opens a file in which something was changed."""

    def open_changed(change: Change) -> Any:
        def encoded(network: Any, identifier: bytes) -> bytes:
            for program in network.programs:
                for name in ("steps", "sizes", "outputs", "float_tensors"):
                    setattr(program, name, list(getattr(program, name)))
            change(network)
            return encoded_before(network, identifier)

        encoded_before = writing.encoded
        monkeypatch.setattr(writing, "encoded", encoded)
        fast.save(tmp_path / "net.dsconv", other_sizes=False)
        return runtime.Network(tmp_path / "net.dsconv")

    return open_changed


def steps_of(network: schema.Network, kind: type) -> list[Any]:
    return [step.operation for step in network.programs[0].steps if isinstance(step.operation, kind)]


def swap_steps(network: schema.Network) -> None:
    steps: Any = network.programs[0].steps
    steps[0], steps[1] = steps[1], steps[0]


def add_later_sum(network: schema.Network) -> None:
    program = network.programs[0]
    written = [step.uses.values for step in program.steps if step.uses is not None and step.uses.values >= 0]
    first: Any = program.steps[0].uses
    first.residual = written[-1]


def double_axis(network: schema.Network) -> None:
    port: Any = next(port for port in network.programs[0].outputs if len(port.axes) == 3)
    port.axes = [Axis.ROWS, *port.axes[1:]]  # of which there are as many as channels


def write_twice(network: schema.Network) -> None:
    for operation in steps_of(network, schema.Rearrange):
        (loop,) = [loop for loop in operation.loops if loop.written_channels == 4]
        loop.written_channels = 3


def too_many_sizes(network: schema.Network) -> None:
    program: Any = network.programs[0]
    program.sizes = [schema.Size([schema.Shape([3, 16, 16])])] * (1 << 18)


def same_names(network: schema.Network) -> None:
    network.outputs = ["y", "y"]


def no_json(network: schema.Network) -> None:
    network.preprocess = "{mean: 0}"


def list_in_json(network: schema.Network) -> None:
    network.preprocess = "[0.5]"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (swap_steps, "read before a step makes it"),
        (add_later_sum, "read before a step makes it"),
        (double_axis, "an input or output has a dimension twice"),
        (write_twice, "loops that write every value"),
        (too_many_sizes, "programs for too many sizes"),
        (same_names, "two inputs or two outputs have one name"),
        (no_json, r"net\.dsconv: the file is damaged: its names are no UTF-8, or its preprocessing is no JSON"),
        (list_in_json, "expected an object of JSON"),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)
def test_what_no_network_has_is_refused(change: Change, told: str, opened: Callable[[Change], Any]) -> None:
    with pytest.raises(runtime.FileFormatError, match=told):
        opened(change)


def test_without_a_change_the_file_is_opened(opened: Callable[[Change], Any], fast: Any) -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float32)
    for made, expected in zip(opened(lambda _: None)(x.numpy()).values(), fast(x), strict=True):
        assert np.array_equal(made, expected.numpy())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe: expected a regular file"):
        runtime.Network(tmp_path / "pipe")
