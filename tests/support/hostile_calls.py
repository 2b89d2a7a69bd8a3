"""Call the operators, or the extension, with invalid arguments: ``hostile_calls.py KIND SEED COUNT``.

Prints the counts of outcomes; anything except a result, a ValueError or a lack of memory ends it with a traceback.
"""

import random
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case
from torch import Tensor

from dsconv.config import LayerConfig
from dsconv.names import AlgorithmChoice
from dsconv.numerics import quantize_weight
from dsconv.ops import native, packing

INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 8, 16, 24, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
MEMORY = 1 << 20  # values


def limit_memory() -> None:
    """Make allocations of gigabytes fail immediately."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))


# Operators


def conv2d(groups: int, algorithm: AlgorithmChoice = "direct") -> dict[str, Any]:
    config = LayerConfig(block_size=16, algorithm=algorithm)
    case = Case(torch.randn(2, 24, 9, 8), 24, (3, 3), config, groups, padding=(1, 1))
    more = {name: torch.randn(24) for name in ("bias", "gain", "offset")}
    return case.arguments() | more | {"residual": torch.randn(2, 24, 9, 8), "activation": "relu", "alpha": 0.1}


def linear() -> dict[str, Any]:
    vqk, kds = quantize_weight(torch.randn(24, 24), 4, 16)
    packed = packing.pack(vqk, kds, None, LayerConfig(block_size=16), 1)._asdict()
    given = {name: value for name, value in conv2d(1).items() if name not in WHERE}
    return given | packed | {"x": torch.randn(3, 24), "residual": torch.randn(3, 24)}


WHERE = ("kernel_size", "stride", "padding", "dilation", "groups", "flat", "algorithm")
OPERATORS: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
    ("conv2d", lambda: conv2d(1)),
    ("conv2d", lambda: conv2d(24)),
    ("conv2d", lambda: conv2d(1, "winograd")),
    ("linear", linear),
    (
        "quantize_activation",
        lambda: {"x": torch.randn(2, 24, 9, 8), "bits": 4, "block_size": 16, "sign": "extra", "groups": 2},
    ),
)


def another(t: Tensor) -> Tensor | None:
    """Return a tensor like ``t``, but of another kind."""
    kinds: tuple[Callable[[], Tensor | None], ...] = (
        lambda: None,
        lambda: t.to("meta"),
        lambda: torch.empty(2**40, dtype=torch.float32, device="meta"),
        lambda: t.to_sparse(),
        lambda: t.to_sparse_csr() if t.dim() == 2 else t,
        lambda: t.float().to_mkldnn(),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda: torch._neg_view(t.float()),
        lambda: t.double(),
        lambda: t.half(),
        lambda: t.int(),
        lambda: t.cfloat(),
        lambda: t.clone().requires_grad_() if t.is_floating_point() else t,
        lambda: t.sum(),
        lambda: t[None],
        lambda: t[:0],
        lambda: t[..., :0],
        lambda: t[..., ::2],
        lambda: t[:1].expand(t.shape),
        lambda: t.mT if t.dim() > 1 else t.flip(0),
        lambda: t.new_zeros((1,) * t.dim()).expand((2**12,) * t.dim()) if t.dim() < 4 else t,
        lambda: t.as_strided(t.shape, [2**40 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]),
        lambda: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    )
    return random.choice(kinds)()


def changed(value: Any) -> Any:
    match value:
        case None:
            return another(torch.randn(24))
        case Tensor():
            return another(value)
        case bool():
            return not value
        case int():
            return random.choice(INTEGERS)
        case float():
            return random.choice((float("nan"), float("inf"), -1e300, 0.0))
        case str():
            return random.choice(("", "none", "gelu", "\x00", "included", "silu", "winograd", "direct"))
    return [random.choice(INTEGERS) for _ in range(random.choice((0, 1, 2, 2, 2, 2, 3)))]


def call_operator() -> None:
    name, make = random.choice(OPERATORS)
    given = make()
    operator = getattr(torch.ops.dsconv, name)
    shape = given["x"].shape
    for changing in random.sample(list(given), random.choice((1, 1, 1, 2, 3))):
        given[changing] = changed(given[changing])
    if name != "quantize_activation" and random.random() < 0.3:
        given["out"] = random.choice((lambda: torch.zeros(shape), lambda: another(torch.zeros(shape))))()
        operator = operator.out
    with torch.inference_mode(random.random() < 0.5):
        operator(**given)


# The extension


def number() -> int:
    return random.choice(INTEGERS) if random.random() < 0.15 else random.choice((0, 1, 1, 2, 3, 4, 8, 16, 32, 64))


def numbers(count: int) -> list[int]:
    return [number() for _ in range(count)]


def sizes() -> Any:
    """Return the sizes of a convolution; most are consistent."""
    n, c, o, k, s, p = (random.choice(v) for v in ((1, 2), (8, 16, 24), (8, 24), (1, 3), (1, 2), (0, 1)))
    height, width, groups, flat = random.choice(((9, 8), (3, 3), (1, 12))), None, 1, 0
    (height, width), depthwise = height, random.random() < 0.3
    if depthwise:
        o, groups, flat = c, c, 1
    height, width = max(height, k), max(width, k)
    out = [(v + 2 * p - k) // s + 1 for v in (height, width)]
    names = (
        "images channels height width outputs out_height out_width kernel_h kernel_w stride_h stride_w pad_h pad_w "
        "dilation_h dilation_w groups block_size"
    )
    made = dict(zip(names.split(), (n, c, height, width, o, *out, k, k, s, s, p, p, 1, 1, groups, 16), strict=True))
    for _ in range(random.choice((0, 0, 1, 2))):
        made[random.choice(list(made))] = number()
    return MODULE.ConvSizes(**made, flat=bool(flat), winograd=k == 3 and random.random() < 0.3)


MODULE = native.extension()
BUFFER = torch.zeros(MEMORY, dtype=torch.float32, device="cpu")
KEPT: list[Tensor] = []


def weights(of: Any, bits: int) -> tuple[int, int, int]:
    """Return the addresses of a packed weight, KDS and terms of these sizes."""
    size, count = MODULE.packed_sizes(of, bits)
    if max(size, count) > MEMORY:
        raise ValueError("too large to be tried")
    made = [torch.zeros(size, dtype=torch.uint8), torch.ones(count), torch.ones(of.outputs + 16)]
    KEPT.extend(made)
    return tuple(t.data_ptr() for t in made)


def call_extension() -> None:
    isa = random.choice(("amx", "avx2", "scalar", "neon", "neondotprod", "avxvnni", "avx512vnni", "", "\x00"))
    zero = [0] * 8
    random.choice(
        (
            lambda: MODULE.peak_rate(isa, random.choice((-1.0, float("nan"), float("inf"), 0.0, 1e-4))),
            lambda: MODULE.packed_sizes(sizes(), number() % 2**20),
            lambda: MODULE.pack_weight(sizes(), 0, 4, 0),
            lambda: MODULE.pack_kds(sizes(), 0, 0),
            lambda: MODULE.use_pool(random.choice((-(2**31), -1, 0))),
            lambda: MODULE.quantize_activation(isa, sizes(), 0, numbers(4), 4, 0, 0, 0),
            lambda: MODULE.round_balanced(isa, numbers(4), number() % 2**20, True, 1e-4, [0], *[[0] * 3] * 3),
            lambda: MODULE.Convolution(isa, sizes(), numbers(4), numbers(4), 4, 8, 0, 0, 0.0)(*zero, 0),
            lambda: MODULE.Program.quantized_bytes(number(), number(), number(), numbers(4), True),
            lambda: MODULE.Program.__new__(MODULE.Program).bytes(1),
            lambda: MODULE.Program(isa),
            run_program,
            run_program,
            run_program,
        )
    )()


def run_program() -> None:
    """Run a program of random steps, in memory of the size that it requests."""
    program = MODULE.Program(random.choice(MODULE.isa_with_kernels()))
    ends: dict[int, int] = {}
    KEPT.clear()

    def values() -> None:
        base, offset, first = (
            random.choice((0, 0, 1, 2, number())),
            64 * (number() % 2**58),
            random.choice((0, 0, 1, number())),
        )
        c, h, w = size = random.choice(((16, 4, 4), (8, 9, 8), (24, 1, 1), (128, 1, 1), (24, 3, 3), tuple(numbers(3))))
        dense = random.random() < 0.8
        strides = [c * h * w, 1, w * c, c] if dense else numbers(4)
        if max(strides) > 2**63 - 1 or min(strides) < -(2**63):
            raise ValueError("beyond the numbers of the extension")
        program.values(base, offset, first, size, strides)
        ends[base] = max(ends.get(base, 0), offset + 4 * strides[0])

    def uses() -> tuple[Any, ...]:
        targets = [(random.choice((0, 1, 7)), random.choice((0, 8, number())))] if random.random() < 0.4 else []
        return random.choice((-1, 0, 1, 2, 3, 9)), random.choice((-1, -1, 0, 1, 5)), targets, number() % 9, 0.1

    def convolve() -> None:
        of, bits = sizes(), random.choice((2, 4, 8, 9))
        weight, kds, terms = weights(of, bits)
        which = (random.choice((-1, 0, 1, 2)), random.choice((-1, 0, 1)))
        shift = kds if of.winograd else 0
        program.convolve(of, *which, weight, kds, shift, terms, 0, 0, bits, 8, number() % 4, uses())

    def loops() -> list[tuple[int, ...]]:
        c, h, w = random.choice(((16, 4, 4), (8, 9, 8), (24, 1, 1), (24, 3, 3)))
        made = [[c, 1, 0, 0, 1, 0, 0], [h, 0, 1, 0, 0, 1, 0], [w, 0, 0, 1, 0, 0, 1]]
        for _ in range(random.choice((0, 0, 1, 2))):
            random.choice(made)[random.randrange(7)] = number()
        return [tuple(loop) for loop in made]

    def places() -> list[int]:
        return [random.choice((-1, 0, 1, 2, number())) for _ in range(random.choice((4, 3, 9, 8, number() % 16)))]

    def spans() -> list[tuple[int, int]]:
        return [(min(at, 2), at + 1) for at in places()]

    def between() -> list[tuple[int, int, float, float]]:
        return [(at, abs(at), 0.5, float("nan")) for at in places()]

    steps = (
        values,
        values,
        values,
        lambda: program.quantized(
            64 * (number() % 64), *random.choice(((16, 16, 1), (24, 16, 1), tuple(numbers(3)))),
            (*random.choice(((4, 4), (9, 8), (3, 3))), *numbers(2)), 4, 8, 0, False,
        ),
        convolve,
        convolve,
        lambda: program.join(),
        lambda: program.map(number() % 4, 0, 0, False, random.choice((-1, 0, 1)), uses()),
        lambda: program.pool(
            number() % 4,
            random.choice(((3, 3, 1, 1, 1, 1, 1, 1), (2, 2, 2, 2, 0, 0, 1, 1), tuple(numbers(8)))),
            random.random() < 0.5,
            True,
            random.choice((0, 3, number())),
            random.choice(((4, 4), (9, 8), (2, 2), tuple(numbers(2)))),
            uses(),
        ),
        lambda: program.average(number() % 4, number() % 2**20, number() % 4),
        lambda: program.flatten(number() % 4, number() % 4),
        lambda: program.rearrange(number() % 4, loops(), number() % 4),
        lambda: program.pick(number() % 4, places(), places(), 0.5, uses()),
        lambda: program.average_windows(number() % 4, spans(), spans(), random.random() < 0.5, uses()),
        lambda: program.interpolate(
            number() % 4, between(), between(), number(), random.choice((0, 1, 2, 3)), 1, uses()
        ),
    )  # fmt: skip
    taken = 0
    for step in (values, values, values, steps[3], *random.choices(steps, k=12)):
        try:
            step()
        except ValueError:
            ENDED["a step refused"] += 1
        else:
            ENDED["a step taken"] += 1
            taken += step not in (values, steps[3])
    images = random.choice((1, 1, 2, 3, number()))
    size = program.bytes(images)
    if size > 4 * MEMORY or any(end * images > 2 * MEMORY for end in ends.values()) or max(ends, default=0) > 1000:
        raise ValueError("too large to be tried")
    memory = torch.zeros(size // 4 + 16, dtype=torch.float32, device="cpu")
    bases = [random.choice((memory.data_ptr(), memory.data_ptr(), 0, 8))] + [BUFFER.data_ptr()] * max(ends, default=0)
    program.run(images, bases if random.random() < 0.9 else [], 0, random.choice((taken, taken, taken, 12)), 0)
    ENDED["a program ran"] += 1


ENDED: Counter[str] = Counter()


def main(kind: str, seed: str, count: str) -> None:
    random.seed(int(seed))
    torch.manual_seed(int(seed))
    warnings.simplefilter("ignore")
    limit_memory()
    call = call_operator if kind == "operators" else call_extension
    for _ in range(int(count)):
        try:
            call()
            ENDED["done"] += 1
        except ValueError as error:
            if not str(error) or "\n" in str(error):
                raise
            ENDED["ValueError"] += 1
        except MemoryError:
            ENDED["out of memory"] += 1
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            ENDED["out of memory"] += 1
        except TypeError:
            if kind == "operators":
                raise
            ENDED["TypeError"] += 1  # not a number of the type that the extension expects
    print(dict(ENDED))


if __name__ == "__main__":
    main(*sys.argv[1:])
