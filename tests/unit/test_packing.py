"""The dense bit stream of integers, against one written bit by bit in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsconv.numerics import pack, packed_bytes, unpack

BITS = range(2, 9)


@st.composite
def integers(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(2, 8))
    half = 1 << (bits - 1)
    return bits, draw(st.lists(st.integers(-half, half - 1), max_size=70))


def stream(values: list[int], bits: int) -> list[int]:
    """Return the bytes of the stream: value i + 2^(bits-1) from bit i * bits on, least significant bit first."""
    ones = [((value + (1 << (bits - 1))) >> j) & 1 for value in values for j in range(bits)]
    ones += [0] * (-len(ones) % 8)
    return [sum(bit << j for j, bit in enumerate(ones[at : at + 8])) for at in range(0, len(ones), 8)]


@given(integers())
def test_bytes_are_those_of_the_specified_stream(case: tuple[int, list[int]]) -> None:
    bits, values = case
    packed = pack(torch.tensor(values, dtype=torch.int8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == stream(values, bits)
    assert len(packed) == packed_bytes(len(values), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", range(71))
def test_round_trip_of_every_length(bits: int, count: int) -> None:
    half = 1 << (bits - 1)
    q = torch.randint(-half, half, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(count))
    packed = pack(q, bits)
    assert packed.shape == (-(-count * bits // 8),)
    assert torch.equal(unpack(packed, bits, (count,)), q)


@pytest.mark.parametrize("bits", BITS)
def test_all_values_of_a_width(bits: int) -> None:
    half = 1 << (bits - 1)
    q = torch.arange(-half, half).to(torch.int8)
    assert torch.equal(unpack(pack(q, bits), bits, q.shape), q)


def test_shape_and_memory_layout() -> None:
    q = torch.randint(-4, 4, (3, 5, 2), dtype=torch.int8)
    assert torch.equal(unpack(pack(q, 3), 3, (3, 5, 2)), q)
    assert torch.equal(pack(q.transpose(0, 2), 3), pack(q.transpose(0, 2).contiguous(), 3))
    assert unpack(pack(q[:0], 3), 3, (0, 5, 2)).shape == (0, 5, 2)


def test_the_packed_size_is_the_width() -> None:
    assert [packed_bytes(64, bits) for bits in BITS] == [16, 24, 32, 40, 48, 56, 64]


@pytest.mark.parametrize(("bits", "value"), [(2, 2), (2, -3), (4, 8), (4, -9), (7, 64), (7, -128)])
def test_a_value_that_does_not_fit_is_an_error(bits: int, value: int) -> None:
    half = 1 << (bits - 1)
    with pytest.raises(ValueError, match=rf"q: expected values in -{half}..{half - 1}, got .*{value}"):
        pack(torch.tensor([0, value], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", [1, 9, 0, 4.0, True])
def test_a_width_out_of_range_is_an_error(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits: expected a whole number in 2..8"):
        pack(torch.zeros(1, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=r"bits: expected a whole number in 2..8"):
        unpack(torch.zeros(1, dtype=torch.uint8), bits, (1,))


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(6, dtype=torch.uint8),
        torch.zeros(5, dtype=torch.int8),
        torch.zeros(5, 1, dtype=torch.uint8),
    ],
)
def test_unpacking_the_wrong_length_or_dtype_is_an_error(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"packed: expected uint8 \(5,\) for 10 integers of 4 bits"):
        unpack(packed, 4, (10,))
