"""Calls of the integer kernels as PyTorch operators: compilers, arguments, memory. Results: test_cpu_ops.py."""

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, same_bits, threads
from torch import Tensor

from dsconv import ops
from dsconv.config import LayerConfig
from dsconv.numerics import quantize_weight
from dsconv.ops import cpu, native, packing

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

CONV, LINEAR = torch.ops.dsconv.conv2d, torch.ops.dsconv.linear
QUANTIZE = torch.ops.dsconv.quantize_activation

SHIFT = LayerConfig(block_size=16, weight_shift=True)


def conv(groups: int = 1, filters: int = 1) -> dict[str, Any]:
    """Return all arguments of a convolution of 24 channels; depthwise if there are 24 groups."""
    torch.manual_seed(0)
    outputs = 24 * filters
    case = Case(torch.randn(2, 24, 9, 8), outputs, (3, 3), SHIFT, groups, padding=(1, 1), bias=torch.randn(outputs))
    more = {"residual": torch.randn(2, outputs, 9, 8), "activation": "leaky_relu", "alpha": 0.2}
    more |= {"gain": torch.randn(outputs), "offset": torch.randn(outputs)}
    return case.arguments() | more


def linear() -> dict[str, Any]:
    torch.manual_seed(0)
    config = LayerConfig(block_size=16)
    packed = packing.pack(*quantize_weight(torch.randn(20, 24), 4, 16), None, config, groups=1)
    settings = {"outputs": 20, "weight_bits": 4, "activation_bits": 8, "sign": "adaptive", "block_size": 16}
    more = {"bias": torch.randn(20), "residual": torch.randn(3, 20), "activation": "clamp", "beta": 6.0}
    more |= {"gain": torch.randn(20), "offset": torch.randn(20)}
    return {"x": torch.randn(3, 24), **packed._asdict(), **settings, **more}


LAYERS = {
    "convolution": (CONV, conv),
    "depthwise": (CONV, lambda: conv(groups=24)),
    "depthwise, two filters": (CONV, lambda: conv(groups=24, filters=2)),
    "linear": (LINEAR, linear),
}
each_layer = pytest.mark.parametrize(("operator", "arguments"), LAYERS.values(), ids=LAYERS)


# Compilers


@each_layer
@pytest.mark.parametrize("optional", [True, False])
def test_operator_passes_opcheck(operator: Any, arguments: Callable[[], dict[str, Any]], optional: bool) -> None:
    given = arguments()
    if not optional:
        given |= {"bias": None, "kds_shift": None}
        for name in ("residual", "activation", "alpha", "gain", "offset"):
            given.pop(name, None)
    torch.library.opcheck(operator.default, (), given)
    if given["x"].dim() == 4:
        given["x"] = given["x"].to(memory_format=torch.channels_last)
        torch.library.opcheck(operator.default, (), given)


@pytest.mark.parametrize("shape", [(2, 48), (3, 48, 5), (2, 48, 4, 3), (2, 48, 2, 2, 3), (0, 48, 5)])
@pytest.mark.parametrize(("size", "groups"), [(16, 2), (20, 3), (600, 48), (9, 1)])
def test_quantizing_passes_opcheck(shape: tuple[int, ...], size: int, groups: int) -> None:
    torch.library.opcheck(QUANTIZE.default, (torch.randn(shape), 4, size, "extra", groups))


class Layer(torch.nn.Module):
    def __init__(self, operator: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.operator, self.arguments = operator, arguments

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.operator(**self.arguments | {"x": x * 2, "residual": residual}) + 1


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_layer
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs g++"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_operator_returns_the_same_bits(
    operator: Any, arguments: Callable[[], dict[str, Any]], backend: str, last: bool
) -> None:
    given = arguments()
    x, residual = given["x"], given["residual"]
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    layer = Layer(operator, given)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert same_bits(compiled(x, residual), layer(x, residual))
    assert same_bits(compiled(x[:1], residual[:1]), layer(x[:1], residual[:1]))


@each_layer
def test_exported_operator_takes_any_batch(operator: Any, arguments: Callable[[], dict[str, Any]]) -> None:
    given = arguments()
    x, residual = given["x"], given["residual"]
    layer, batch = Layer(operator, given), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x, residual), dynamic_shapes=({0: batch}, {0: batch}))
    for n in (1, 2, 5):
        inputs = [torch.cat([value] * 5)[:n].clone() for value in (x, residual)]
        assert same_bits(program.module()(*inputs), layer(*inputs))


@each_layer
@pytest.mark.parametrize("last", [False, True])
def test_output_into_given_memory(operator: Any, arguments: Callable[[], dict[str, Any]], last: bool) -> None:
    given = arguments()
    if last and given["x"].dim() == 4:
        given["x"] = given["x"].to(memory_format=torch.channels_last)
    expected = operator(**given)
    out = torch.full_like(expected, torch.nan)
    assert operator.out(**given, out=out) is out
    assert same_bits(out, expected)
    for wrong in (out[:1], out.double(), torch.stack([out, out], -1)[..., 0], out[None]):
        with pytest.raises(ValueError, match="out: expected dense float32"):
            operator.out(**given, out=wrong)


@each_layer
def test_a_bound_call_reads_what_its_tensors_hold_by_then(
    operator: Any, arguments: Callable[[], dict[str, Any]]
) -> None:
    given = arguments()
    x, out = given["x"], operator(**given)
    call = cpu.bind(operator._qualified_op_name.removeprefix("dsconv::"), **given, out=out)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        assert call() is out
        assert same_bits(out, operator(**given))
    with pytest.raises(ValueError, match="got one that needs a copy"):
        cpu.bind("conv2d" if x.dim() == 4 else "linear", **given | {"x": torch.stack([x, x], -1)[..., 0]}, out=out)
    for wrong in (x.to("meta"), x.double(), x[None]):
        with pytest.raises(ValueError, match="expected float32 x of"):
            cpu.bind("conv2d" if x.dim() == 4 else "linear", **given | {"x": wrong}, out=out)
    with pytest.raises(ValueError, match="expected conv2d or linear, got 'conv3d'"):
        cpu.bind("conv3d", **given, out=out)  # type: ignore[arg-type]


def test_quantizing_is_exported_with_any_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return QUANTIZE(x, 4, 16, groups=2)

    x, batch = torch.randn(3, 48, 5), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: batch},))
    for n in (1, 3):
        for got, expected in zip(program.module()(x[:n].clone()), QUANTIZE(x[:n], 4, 16, groups=2), strict=True):
            assert torch.equal(got, expected)


# Arguments


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_ANYWHERE = [
    ("weight", zeros(5, dtype=torch.uint8), "weight: expected .*uint8"),
    ("weight", lambda value: value.to(torch.int8), "weight: expected .*uint8.* got torch.int8"),
    ("weight", lambda value: value[None], "weight: expected"),
    ("weight", lambda value: value.repeat_interleave(2)[::2], "weight: expected contiguous"),
    ("kds", zeros(7), "kds: expected .*float32"),
    ("kds", lambda value: value.double(), "kds: expected .*float32.* got torch.float64"),
    ("kds", lambda value: value.repeat_interleave(2)[::2], "kds: expected contiguous"),
    ("kds_shift", zeros(7), "kds_shift: expected"),
    ("bias", zeros(41), "bias: expected"),
    ("bias", lambda value: value.half(), "bias: expected .*float32.* got torch.float16"),
    ("gain", zeros(41), "gain: expected"),
    ("gain", None, "gain and offset come together"),
    ("offset", lambda value: value.double(), "offset: expected .*float32.* got torch.float64"),
    ("offset", None, "gain and offset come together"),
    ("outputs", 0, ""),
    ("outputs", -24, ""),
    ("outputs", 97, ""),
    ("weight_bits", 1, "bits"),
    ("weight_bits", 9, "bits"),
    ("weight_bits", 8, "weight: expected"),
    ("activation_bits", 1, "bits"),
    ("activation_bits", 9, "bits"),
    ("activation_bits", 0, "bits"),
    ("sign", "none", "sign: expected one of adaptive, extra, included, got 'none'"),
    ("block_size", 0, ""),
    ("block_size", -16, ""),
    ("block_size", 7, ""),
    ("block_size", 520, ""),
    ("block_size", 8, ""),
    ("activation", "softsign", f"activation: expected one of {', '.join(ops.ACTIVATIONS)}, got 'softsign'"),
    ("residual", lambda value: value[1:], "residual: expected"),
    ("residual", lambda value: value[:1], "residual: expected"),
    ("residual", lambda value: value[..., None], "residual: expected"),
    ("residual", lambda value: value.double(), "residual: expected float32.* got torch.float64"),
    ("x", lambda value: value.double(), "expected float32 x"),
    ("x", lambda value: value.half(), "expected float32 x"),
    ("x", lambda value: value.int(), "expected float32 x"),
    ("x", lambda value: value[0], "expected float32 x of . dimensions"),
    ("x", lambda value: value[None], "expected float32 x of . dimensions"),
    ("x", lambda value: value[:, :0], ""),
    ("x", lambda value: torch.cat([value, value], 1), ""),
]
BAD_CONV = [
    ("x", lambda value: value[..., :0], "smaller than the kernel|sizes"),
    ("x", lambda value: torch.cat([value, value[:, :1]], 1), ""),
    ("kernel_size", (3, -3), ""),
    ("kernel_size", (3, 0), ""),
    ("kernel_size", (3,), ""),
    ("kernel_size", (3, 3, 3), ""),
    ("kernel_size", (3, 5), ""),
    ("stride", (0, 1), ""),
    ("stride", (1, -1), ""),
    ("stride", (1,), ""),
    ("padding", (-1, 0), ""),
    ("padding", (1, 1, 1), ""),
    ("dilation", (1, 0), ""),
    ("dilation", (-1, 1), ""),
    ("groups", 0, ""),
    ("groups", -1, ""),
    ("groups", 5, ""),
    ("groups", 48, ""),
]
BAD = [("convolution", *bad) for bad in BAD_ANYWHERE + BAD_CONV]
# The packing of a depthwise weight does not depend on its bits and blocks.
BAD += [
    ("depthwise", *bad) for bad in BAD_ANYWHERE + BAD_CONV if bad[0] != "block_size" and bad[:2] != ("weight_bits", 8)
]
BAD += [("linear", *bad) for bad in BAD_ANYWHERE]


@pytest.mark.parametrize(("layer", "name", "value", "message"), BAD)
def test_arguments_that_do_not_agree_raise(layer: str, name: str, value: Any, message: str) -> None:
    operator, arguments = LAYERS[layer]
    given = arguments()
    operator(**given)
    if name == "kds_shift" and given[name] is None:
        given[name] = given["kds"]
    with pytest.raises(ValueError, match=message):
        operator(**given | {name: value(given[name]) if callable(value) else value})


def test_an_image_too_small_is_named_with_what_reads_it() -> None:
    given = conv() | {"padding": (0, 1), "dilation": (5, 1), "residual": None}
    with pytest.raises(ValueError, match=r"\(9, 8\).*\(0, 1\).*\(3, 3\).*\(5, 1\)"):
        CONV(**given)


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    [
        (zeros(2, 48), {"bits": 1}, "bits"),
        (zeros(2, 48), {"bits": 9}, "bits"),
        (zeros(2, 48), {"block_size": 0}, "block_size"),
        (zeros(2, 48), {"block_size": -16}, "block_size"),
        (zeros(2, 48), {"groups": 0}, "groups"),
        (zeros(2, 48), {"groups": -1}, "groups"),
        (zeros(2, 48), {"groups": 5}, "groups"),
        (zeros(2, 48), {"sign": "none"}, "sign"),
        (zeros(48), {}, "expected a tensor"),
        (zeros(2, 48, dtype=torch.int32), {}, "float"),
    ],
)
def test_quantizing_checks_its_arguments(x: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QUANTIZE(x, **{"bits": 4, "block_size": 16} | settings)


VQK, TAP_KDS, FLAT_KDS = zeros(4, 24, 3, 3, dtype=torch.int8), zeros(4, 2, 3, 3), zeros(4, 14)


@pytest.mark.parametrize(
    ("blocks", "vqk", "kds", "shift", "message"),
    [
        ("tap", VQK.float(), TAP_KDS, None, "vqk: expected int8, got torch.float32"),
        ("tap", VQK.to(torch.uint8), TAP_KDS, None, "vqk: expected int8, got torch.uint8"),
        ("tap", VQK + 8, TAP_KDS, None, r"vqk: expected 4-bit integers -8\.\.7, got 8\.\.8"),
        ("tap", VQK - 9, TAP_KDS, None, r"vqk: expected 4-bit integers -8\.\.7, got -9\.\.-9"),
        ("tap", VQK, FLAT_KDS, None, "kds: expected floats of shape"),
        ("tap", VQK, TAP_KDS[:3], None, "kds: expected floats of shape"),
        ("tap", VQK, TAP_KDS[:, :1], None, "kds: expected floats of shape"),
        ("tap", VQK, TAP_KDS.int(), None, "kds: expected floats of shape .* got torch.int32"),
        ("tap", VQK, TAP_KDS, FLAT_KDS, "kds_shift: expected floats of shape"),
        ("tap", VQK, TAP_KDS, TAP_KDS.int(), "kds_shift: expected floats of shape .* got torch.int32"),
        ("flat", VQK, TAP_KDS, None, "kds: expected floats of shape"),
        ("flat", VQK, FLAT_KDS[:, 1:], None, "kds: expected floats of shape"),
        ("flat", VQK, FLAT_KDS, FLAT_KDS[..., None], "kds_shift: expected floats of shape"),
    ],
)
def test_packing_checks_what_belongs_together(
    blocks: Any, vqk: Tensor, kds: Tensor, shift: Tensor | None, message: str
) -> None:
    config = LayerConfig(block_size=16, blocks=blocks)
    packing.pack(VQK, TAP_KDS if blocks == "tap" else FLAT_KDS, None, config, groups=1)
    with pytest.raises(ValueError, match=message):
        packing.pack(vqk, kds, shift, config, groups=1)


def test_cap_of_the_instruction_set_is_obeyed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSCONV_MAX_ISA", "scalar")
    assert native.isa.__wrapped__() == "scalar"
    monkeypatch.setenv("DSCONV_MAX_ISA", "mmx")
    with pytest.raises(ValueError, match="DSCONV_MAX_ISA"):
        native.isa.__wrapped__()


# Memory


def growth_in_kilobytes(warm_up: int, calls: int, call: Callable[[int], object]) -> int:
    """Return the growth of the memory of the process over a number of calls."""

    def resident() -> int:
        gc.collect()
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS:"))

    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("/proc/self/status is Linux's own")
    with threads(1):  # more threads need no additional memory, but wait for each other
        for i in range(warm_up):
            call(i)
        before = resident()
        for i in range(calls):
            call(i)
        growth = resident() - before
    return growth


@each_layer
def test_ten_thousand_calls_take_no_memory(operator: Any, arguments: Callable[[], dict[str, Any]]) -> None:
    given = arguments()
    if operator is CONV:
        given |= {"x": given["x"][:1, :, :2, :2].clone(), "residual": None}
    # An output is at least 240 bytes: a leak of all would be 2.4 MB.
    assert growth_in_kilobytes(1000, 10_000, lambda _: operator(**given)) < 1_500


def test_calls_of_changing_shapes_take_no_memory() -> None:
    layers = [conv(), conv(groups=24)]
    for given in layers:
        given["residual"] = None
    images = [torch.randn(1 + i % 3, 24, 3 + i % 17, 3 + i % 13) for i in range(200)]

    def call(i: int) -> None:
        CONV(**layers[i % 2] | {"x": images[i % 200]})

    assert growth_in_kilobytes(400, 2_000, call) < 3_000


OUT_OF_MEMORY = """
import resource, sys
import torch
from dsconv import nn
from dsconv.config import LayerConfig

torch.set_num_threads(int(sys.argv[2]))
blocks, kind = sys.argv[1].split()
more = {"pad": {"padding": 2**20, "stride": 2**20}, "limit": {"padding": 1, "stride": 2}}
make = lambda **where: nn.DSConv2d.from_float(torch.nn.Conv2d(32, 8, 3, **where), LayerConfig(blocks=blocks)).eval()
small, x = make(padding=1), torch.rand(1, 32, 8, 8)
with torch.inference_mode():
    good = small(x).clone()
    large, image = make(**more[kind]), x if kind == "pad" else torch.rand(1, 32, 1200, 1200)
    if kind == "limit":
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (40 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
    for _ in range(2):
        try:
            large(image)
            print("it ran")
        except MemoryError as error:
            print(error)
        except RuntimeError as error:  # of PyTorch, for the output
            print("the kernels need", error)
        print((small(x).numpy() == good.numpy()).all())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc/self/statm is Linux's own")
@pytest.mark.parametrize(("case", "threads"), [("tap pad", 1), ("tap limit", 2), ("flat pad", 2)])
def test_after_a_memory_error_the_next_call_is_right(case: str, threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, case, str(threads)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1::2] == ["True", "True"]
    assert all(line.startswith("the kernels need") for line in lines[::2]), lines
