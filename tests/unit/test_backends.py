"""Selection of the backend of a layer, and a backend that a test adds to the list."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as tnn

import dsconv
from dsconv import LayerConfig, backends
from dsconv.backends import Executable, Operation, cpu, simulate
from dsconv.ops import native


class Negated:
    """A backend for linear layers of four bits that computes like the simulation and changes the sign."""

    device: str | None = "cpu"
    keeps_memory = True
    cached_bytes: int | None = cpu.cached_bytes

    def __init__(self) -> None:
        self.packed: list[Operation] = []

    def describe(self, in_integers: bool = True) -> str:
        return "negated"

    def covers(self, operation: Operation) -> str:
        return "it is a convolution" if len(operation.shape) > 2 else ""

    def pack(self, operation: Operation, vqk: Tensor, kds: Tensor, kds_shift: Tensor | None) -> Any:
        self.packed.append(operation)
        return simulate.pack(operation, vqk, kds, kds_shift)

    def run(self, operation: Operation, packed: Any, bias: Tensor | None, x: Tensor) -> Tensor:
        return -simulate.run(operation, packed, bias, x)

    def lower(self) -> Executable | None:
        return None

    constant = staticmethod(cpu.constant)
    repeated = staticmethod(cpu.repeated)


class Recorded:
    """An executable that forwards calls to another one and records them."""

    def __init__(self, executable: Executable) -> None:
        self.executable, self.asked = executable, list[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self.executable, name)


class Recorder(Negated):
    """A backend for no layer, and for whole networks."""

    def __init__(self) -> None:
        self.executables: list[Recorded] = []

    def describe(self, in_integers: bool = True) -> str:
        return "recorded" if in_integers else "recorded float32"

    def covers(self, operation: Operation) -> str:
        return "it is alone"

    def lower(self) -> Executable:
        executable = cpu.lower()
        assert executable is not None
        self.executables.append(Recorded(executable))
        return self.executables[-1]  # type: ignore[return-value]


@pytest.fixture
def negated(monkeypatch: pytest.MonkeyPatch) -> Negated:
    """Register another backend with the highest preference."""
    backend = Negated()
    monkeypatch.setattr(backends, "BACKENDS", [backend, *backends.BACKENDS])
    return backend


def network() -> tnn.Module:
    torch.manual_seed(0)
    return tnn.Sequential(tnn.Conv2d(16, 8, 3), tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(8, 4))


def test_a_new_backend_executes_what_it_covers_and_the_summary_says_so(negated: Negated) -> None:
    qnet, x = dsconv.quantize(network()), torch.randn(2, 8)
    conv, linear = dsconv.summary(qnet).layers
    assert (linear.backend, linear.backend_reason) == ("negated", None)
    assert conv.backend != "negated" and "negated" in str(dsconv.summary(qnet))
    assert negated.packed[-1] == qnet[3].operation
    with torch.inference_mode():
        y = qnet[3](x)
        with dsconv.ops.simulated():
            torch.testing.assert_close(qnet[3](x), -y)
            assert dsconv.summary(qnet).layers[1].backend_reason == "dsconv.ops.simulated() is in effect"
        assert qnet(torch.randn(2, 16, 5, 5)).shape == (2, 4)
    assert torch.equal(qnet[3](x.requires_grad_()), -y)  # which has a gradient


def test_its_weights_are_packed_anew_after_a_change(negated: Negated) -> None:
    layer, x = dsconv.nn.DSLinear.from_float(tnn.Linear(8, 4, bias=False)), torch.ones(1, 8)
    with torch.inference_mode():
        y = layer(x)
        layer.kds.mul_(2)
        with dsconv.ops.simulated():
            expected = -layer(x)
        assert torch.equal(layer(x), expected) and not torch.equal(expected, y)
        layer.to("meta")
    assert layer.backend == ("float simulation", "it is on the device meta")


def test_reasons_of_all_backends_for_the_device_are_told(negated: Negated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "covers", lambda operation: "it is too hot")
    found = backends.execution(Operation((8, 16, 3, 3), LayerConfig()))
    assert found == ("float simulation", "it is a convolution; it is too hot")
    monkeypatch.setattr(negated, "device", "cuda")
    assert backends.execution(Operation((8, 16), LayerConfig())).reason == "it is too hot"
    assert backends.execution(Operation((8, 16), LayerConfig()), "cuda:1").name == "negated"


def test_the_last_backend_covers_everything_everywhere() -> None:
    assert backends.BACKENDS[-1] is backends.SIMULATION and backends.SIMULATION.device is None
    for shape, transposed in (((8, 16), False), ((8, 16, 3, 3), True), ((8, 16, 3, 3, 3), False)):
        assert backends.SIMULATION.covers(Operation(shape, LayerConfig(activation_bits=None), transposed)) == ""


@pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")
def test_networks_are_compiled_for_the_first_backend_that_executes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    qnet, x = dsconv.quantize(network().eval()), torch.randn(2, 16, 8, 8)
    expected = dsconv.compile(qnet, x)(x)
    recorder = Recorder()
    monkeypatch.setattr(backends, "BACKENDS", [recorder, *backends.BACKENDS])
    compiled = dsconv.compile(qnet, x)
    assert torch.equal(compiled(x), expected)
    asked = {name for executable in recorder.executables for name in executable.asked}
    assert {"convolve", "quantized", "average", "run"} <= asked
    assert {step.backend for step in compiled.plan.steps} == {"recorded", "recorded float32"}


def test_no_device_but_the_cpu_executes_whole_networks() -> None:
    with pytest.raises(RuntimeError, match="the device meta"):
        backends.lowering("meta")
