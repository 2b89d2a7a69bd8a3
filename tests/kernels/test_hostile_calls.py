"""Operators and extension with arbitrary arguments: they compute a result or raise an error of one sentence."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, conv_sizes, same_bits
from torch import Tensor

from dsconv.config import LayerConfig
from dsconv.ops import cpu, native

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension dsconv._C is not built")

SCRIPT = Path(__file__).parents[1] / "support" / "hostile_calls.py"
CONV = torch.ops.dsconv.conv2d


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc/self/statm is Linux's own")
@pytest.mark.parametrize(("kind", "count"), [("operators", 500), ("extension", 3000)])
def test_no_call_ends_the_process(kind: str, count: int) -> None:
    done = subprocess.run([sys.executable, SCRIPT, kind, "0", str(count)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "done" in done.stdout and "ValueError" in done.stdout


def arguments(**changed: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    case = Case(torch.randn(2, 24, 9, 8), 24, (3, 3), LayerConfig(block_size=16), padding=(1, 1), bias=torch.randn(24))
    return case.arguments() | changed


# Devices and layouts


TENSORS = ("x", "weight", "kds", "bias", "residual", "out")


@pytest.mark.parametrize("name", TENSORS)
def test_one_tensor_on_another_device_is_refused_and_nothing_uninitialised_returned(name: str) -> None:
    y = CONV(**arguments())
    given = arguments(residual=torch.zeros_like(y), out=torch.zeros_like(y))
    with pytest.raises(ValueError, match=r"dsconv::conv2d: .* on meta|expected all tensors on cpu"):
        CONV.out(**given | {name: given[name].to("meta")})
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    assert CONV.out(**on_meta).is_meta
    with pytest.raises(ValueError, match="expected all tensors on"):
        CONV.out(**on_meta | {name: given[name]})


@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "quantized", "none"])
@pytest.mark.parametrize("name", ["x", "weight", "kds"])
def test_tensors_without_plain_memory_are_refused(name: str, kind: str) -> None:
    value = arguments()[name]
    made = {
        "sparse": lambda: value.to_sparse(),
        "mkldnn": lambda: value.float().to_mkldnn(),
        "quantized": lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        "none": lambda: None,
    }[kind]()
    with pytest.raises(ValueError, match=f"dsconv::conv2d: .*{name}"):
        CONV(**arguments(**{name: made}))


def test_a_lazily_negated_tensor_is_read_as_what_it_stands_for() -> None:
    given = arguments()
    assert same_bits(CONV(**given | {"x": torch._neg_view(given["x"])}), CONV(**given | {"x": -given["x"]}))
    with pytest.raises(ValueError, match="expected tensors without a pending negation"):
        cpu.bind("conv2d", **given | {"x": torch._neg_view(given["x"])}, out=CONV(**given))


def test_an_output_that_is_read_as_well_is_refused() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        CONV.out(**given, out=given["x"])
    shared = torch.zeros(2 * given["x"].numel() + 8)
    x = shared[: given["x"].numel()].view(given["x"].shape).copy_(given["x"])
    beside = shared[x.numel() :][: x.numel()].view(x.shape)
    assert same_bits(CONV.out(**given | {"x": x}, out=beside), CONV(**given))
    residual = torch.randn_like(x)
    expected = CONV(**given, residual=residual)
    assert same_bits(CONV.out(**given, residual=residual, out=residual), expected)  # the sum may replace it in place
    moved = shared[8:][: x.numel()].view(x.shape)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        CONV.out(**given, residual=moved, out=shared[: x.numel()].view(x.shape))


def test_other_devices_and_compilers_get_the_same_errors() -> None:
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments().items()}
    for changed, message in (
        ({"stride": [0, 1]}, "stride: expected two whole numbers of at least 1"),
        ({"dilation": [1, 0]}, "dilation: expected two whole numbers of at least 1"),
        ({"padding": [-1, 0]}, "padding: expected two whole numbers of at least 0"),
        ({"padding": [2**62, 0]}, "padding: expected"),
        ({"kernel_size": [3]}, "kernel_size: expected two whole numbers"),
        ({"kernel_size": [12, 3]}, "smaller than the kernel"),
        ({"groups": 0}, "groups: expected a divisor"),
        ({"groups": 5}, "groups: expected a divisor"),
        ({"outputs": -24}, "groups: expected a divisor"),
        ({"weight_bits": 2**40}, "weight_bits: expected 2 to 8"),
        ({"activation_bits": 9}, "activation_bits: expected 2 to 8"),
        ({"sign": "none"}, "sign: expected one of"),
        ({"activation": "cube"}, "activation: expected one of"),
        ({"x": torch.zeros(2, 24, 9, 8, dtype=torch.float64, device="meta")}, "expected float32 x"),
    ):
        for given in (meta, arguments()):
            with pytest.raises(ValueError, match=message):
                CONV(**given | changed)
    for changed in ({"groups": 0}, {"groups": 5}, {"bits": 9}, {"block_size": 0}, {"sign": "none"}):
        for x in (torch.zeros(2, 24), torch.zeros(2, 24, device="meta")):
            with pytest.raises(ValueError, match=next(iter(changed))):
                torch.ops.dsconv.quantize_activation(x, **{"bits": 4, "block_size": 16} | changed)


# The extension


def pixels(module: Any) -> Any:
    """Return the sizes of a 1x1 convolution."""
    return conv_sizes(module, kernel_h=1, kernel_w=1, pad_h=0, pad_w=0)


def unpadded(module: Any) -> Any:
    """Return the sizes of a 3x3 convolution without padding."""
    return conv_sizes(module, pad_h=0, pad_w=0, out_height=2, out_width=2)


def extension_calls() -> dict[str, tuple[Callable[[Any], object], str]]:
    dense, size = (256, 1, 64, 16), (16, 4, 4)
    grid = (4, 4, 1, 1)

    def program(module: Any) -> Any:
        made = module.Program("scalar")
        made.values(1, 0, 0, size, dense)
        made.values(2, 0, 0, size, dense)
        made.quantized(1024, 16, 16, 1, grid, 4, 4, 0, False)
        return made

    def run(module: Any, *bases: int, images: int = 1) -> None:
        made = program(module)
        made.map(0, [(0, 1, 0.0, 0.0, -1, 0, 0)], (1, -1, [], 0, 0.0, 0.0))
        made.run(images, bases, 0, 1, 0)

    def pool(module: Any, *window: int, size: tuple[int, int] = (4, 4)) -> None:
        program(module).pool(0, window, False, False, 0, size, (1, -1, [], 0, 0.0, 0.0))

    uses = (1, -1, [], 0, 0.0, 0.0)
    return {
        "a peak rate of no time": (lambda m: m.peak_rate("scalar", float("nan")), "seconds"),
        "a peak rate without end": (lambda m: m.peak_rate("scalar", float("inf")), "seconds"),
        "no threads": (lambda m: m.use_pool(0), "threads"),
        "strides whose product overflows": (
            lambda m: m.Program("scalar").values(0, 0, 0, (2**30, 2**30, 2**30), (2**37, 2**34, 2**34, 2**34)),
            "beyond its memory",
        ),
        "a place that overflows": (lambda m: m.Program("scalar").values(0, 0, 2**63 - 1, size, dense), "beyond"),
        "a base without end": (lambda m: m.Program("scalar").values(2**31 - 1, 0, 0, size, dense), "values"),
        "blocks of nothing": (lambda m: m.Program.quantized_bytes(16, 0, 1, grid, False), "quantized"),
        "a target far away": (
            lambda m: program(m).map(0, [], (-1, -1, [(0, 2**63 - 16)], 0, 0.0, 0.0)),
            "targets",
        ),
        "more images than memory": (lambda m: program(m).bytes(2**62), "images"),
        "fewer than no images": (lambda m: program(m).bytes(-1), "images"),
        "a run of more images than memory": (lambda m: run(m, 0, 64, 64, images=2**60), "images"),
        "a run without memory": (lambda m: run(m, 0, 0, 0), "expected the address"),
        "a run in memory that is not aligned": (lambda m: run(m, 8, 64, 64), "aligned"),
        "a pool beyond its image": (lambda m: pool(m, 3, 3, 9, 9, 1, 1, 1, 1), "pool"),
        "a pool of too many": (lambda m: pool(m, 2**31 - 1, 2**31 - 1, 1, 1, 1, 1, 1, 1), "pool"),
        "weights at no address": (
            lambda m: program(m).convolve(conv_sizes(m), -1, 0, 0, 64, 0, 0, 0, 0, 4, 4, 0, uses),
            "weight",
        ),
        "an input at no address": (
            lambda m: m.Convolution("scalar", conv_sizes(m), dense, dense, 4, 4, 0, 0, 0.0, 0.0)(
                0, 64, 64, 0, 0, 0, 0, 0, 64
            ),
            "input",
        ),
        "KDS at no address": (
            lambda m: m.Convolution("scalar", conv_sizes(m), dense, dense, 4, 4, 0, 0, 0.0, 0.0)(
                64, 64, 0, 0, 0, 0, 0, 0, 64
            ),
            "kds",
        ),
        "an output at no address": (
            lambda m: m.Convolution("scalar", conv_sizes(m), dense, dense, 4, 4, 0, 0, 0.0, 0.0)(
                64, 64, 64, 0, 0, 0, 0, 0, 0
            ),
            "output",
        ),
        "KDS of a program at no address": (
            lambda m: program(m).convolve(conv_sizes(m), -1, 0, 64, 0, 0, 0, 0, 0, 4, 4, 0, uses),
            "kds",
        ),
        "mantissas of a convolution that is not 1x1": (
            lambda m: m.quantize_activation(
                "scalar", conv_sizes(m, pad_h=0, pad_w=0, out_height=2, out_width=2), 0, dense, 4, 0, 0, 0
            ),
            "1x1",
        ),
        "mantissas at no address": (
            lambda m: m.quantize_activation("scalar", pixels(m), 64, dense, 4, 0, 0, 64),
            "mantissa",
        ),
        "exponents at no address": (
            lambda m: m.quantize_activation("scalar", pixels(m), 64, dense, 4, 0, 64, 0),
            "exponent",
        ),
        "kinds that share rows unevenly": (
            lambda m: m.round_balanced("scalar", (1, 1, 3, 2), 4, False, 1e-4, [0], *[[0] * 3] * 3),
            "sizes do not agree",
        ),
        "negative strides": (
            lambda m: m.Convolution("scalar", conv_sizes(m), (-256, 1, 64, 16), dense, 4, 4, 0, 0, 0.0, 0.0),
            "strides",
        ),
        "output strides that the kernels do not know": (
            lambda m: m.Convolution("scalar", conv_sizes(m), dense, (512, 2, 128, 32), 4, 4, 0, 0, 0.0, 0.0),
            "output_strides",
        ),
        "sizes that do not agree": (lambda m: conv_sizes(m, out_width=5), "do not agree"),
        "sizes that overflow": (lambda m: conv_sizes(m, images=2**40), "do not agree"),
        "nothing to pack": (lambda m: m.pack_weight(conv_sizes(m), 0, 4, 0), "vqk|packed"),
    }


@pytest.mark.parametrize(("call", "message"), extension_calls().values(), ids=extension_calls())
def test_the_extension_refuses(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(native.extension())
    assert "\n" not in str(error.value)


def test_sizes_are_named_and_fixed() -> None:
    module = native.extension()
    made = conv_sizes(module)
    assert (made.channels, made.pad_h, made.flat) == (16, 1, False)
    assert made == conv_sizes(module) != conv_sizes(module, dilation_h=2, out_height=2) and hash(made) == hash(
        conv_sizes(module)
    )
    with pytest.raises(AttributeError):
        made.channels = 8
    for wrong in ({"rows": 1}, {"channels": "16"}, {"channels": 2**64}):
        with pytest.raises(TypeError):
            conv_sizes(module, **wrong)


def test_kernels_that_the_processor_lacks_are_refused() -> None:
    module = native.extension()
    names = {"scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon", "neondotprod", "mmx", ""}
    whole, dense = conv_sizes(module), (256, 1, 64, 16)
    for name in names - set(module.isa_with_kernels()):
        for call in (
            lambda name=name: module.peak_rate(name, 0.01),
            lambda name=name: module.Program(name),
            lambda name=name: module.Convolution(name, whole, dense, dense, 4, 4, 0, 0, 0.0, 0.0),
        ):
            with pytest.raises(ValueError, match="isa: "):
                call()
