"""Triton kernels. Arguments are pointers and sizes; :mod:`dsconv.backends.cuda.layouts` describes the layouts.

All sums within a block are integer sums, and every floating-point product and sum rounds as written: ``tl.fma`` rounds
once. Results are therefore bitwise equal to those of the CPU kernels if terms are added in the same order.
"""

import triton
import triton.language as tl

# Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
_MAGIC, _MAGIC_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
# 2 q + 1.5 * 2^24 has the integer nearest to q in the lowest bits of its word, which is the second number for 0.
_DOUBLE_MAGIC, _MAGIC_WORD = tl.constexpr(25165824.0), tl.constexpr(0x4BC00000)
_SMALLEST_BITS = tl.constexpr((127 - 100) << 23)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FFFFFFF)


# Sizes for which kernels are not specialized.
_ANY_SIZE = (
    *(
        "P",
        "pixels",
        "height",
        "width",
        "out_height",
        "out_width",
        "KH",
        "KW",
        "stride_h",
        "stride_w",
        "pad_h",
        "pad_w",
    ),
    *("dilation_h", "dilation_w", "taps", "terms", "blocks", "q_block", "divisor"),
)


# Activations, in the order of operations of csrc/kernels/activation.h. Comparisons propagate NaN.


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _power_of_two(n):
    """Return float32 2^n for -126 <= n <= 127."""
    return _float((n + 127) << 23)


@triton.jit
def _fma(a, b, c):
    """Return ``a * b + c`` rounded once; ``b`` and ``c`` may be numbers."""
    return tl.fma(a, tl.zeros_like(a) + b, tl.zeros_like(a) + c)


@triton.jit
def _exponential_parts(v, LEAST: tl.constexpr):
    v = tl.where(v > 89.0, 89.0, v)
    v = tl.where(v < LEAST, LEAST, v)
    shifted = _fma(v, 1.44269504, _MAGIC)
    whole = shifted - _MAGIC
    r = _fma(whole, -1.42860677e-6, _fma(whole, -0.693145752, v))
    p = _fma(r, 0.0013820138, 0.008368686)
    p = _fma(p, r, 0.041668274)
    p = _fma(p, r, 0.16666521)
    p = _fma(p, r, 0.49999994)
    p = _fma(p, r, 1.0)
    return r, p, _bits(shifted) - _MAGIC_BITS


@triton.jit
def _exponential(v):
    r, p, n = _exponential_parts(v, -105.0)
    half = n >> 1
    return _fma(p, r, 1.0) * _power_of_two(half) * _power_of_two(n - half)


@triton.jit
def _exponential_minus_one(v):
    v = tl.where(v < -30.0, -30.0, v)
    r, p, n = _exponential_parts(v, -105.0)
    power = _power_of_two(n)
    return _fma(p * r, power, power - 1.0)


@triton.jit
def _gated(v, u):
    r, p, n = _exponential_parts(-u, -87.0)
    return tl.div_rn(tl.zeros_like(u) + v, _fma(_fma(p, r, 1.0), _power_of_two(n), 1.0))


@triton.jit
def _magnitude(v):
    return _float(_bits(v) & 0x7FFFFFFF)


@triton.jit
def _activated(v, KIND: tl.constexpr, alpha, beta):
    if KIND == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "clamp":
        v = tl.where(v < alpha, alpha, v)
        v = tl.where(v > beta, beta, v)
    elif KIND == "leaky_relu":
        v = tl.where(v > 0.0, v, v * alpha)
    elif KIND == "hardswish" or KIND == "hardsigmoid":
        gate = v + 3.0
        gate = tl.where(gate < 0.0, 0.0, gate)
        gate = tl.where(gate > 6.0, 6.0, gate)
        gate = v * gate if KIND == "hardswish" else gate
        v = tl.div_rn(gate, tl.zeros_like(v) + 6.0)
    elif KIND == "silu":
        v = _gated(v, v)
    elif KIND == "sigmoid":
        v = _gated(1.0, v)
    elif KIND == "elu":
        v = tl.where(v < 0.0, _exponential_minus_one(v) * alpha, v)
    elif KIND == "exp":
        v = _exponential(v)
    elif KIND == "gelu":
        square = v * v
        square = tl.where(square > 30.25, 30.25, square)
        p = _fma(square, 3.622851e-9, -2.674956e-7)
        p = _fma(p, square, 7.94975e-6)
        p = _fma(p, square, -1.1058257e-4)
        p = _fma(p, square, -6.582739e-5)
        p = _fma(p, square, 0.07266777)
        p = _fma(p, square, 1.5957689)
        v = _gated(v, v * p)
    elif KIND == "gelu_tanh":
        v = _gated(v, v * _fma(v * v, 0.07135481, 1.5957691))
    elif KIND == "mish":
        e = _exponential(tl.where(v > 20.0, 20.0, v))
        n = e * (e + 2.0)
        v = v * tl.div_rn(n, n + 2.0)
    elif KIND == "softplus":
        t = _exponential(-_magnitude(v))
        s = tl.div_rn(t, 2.0 + t)
        square = s * s
        p = _fma(square, 0.28026363, 0.27998665)
        p = _fma(p, square, 0.40021735)
        p = _fma(p, square, 0.6666641)
        p = _fma(p, square, 2.0)
        v = tl.fma(s, p, tl.where(v < 0.0, 0.0, v))
    elif KIND == "tanh":
        less = _exponential_minus_one(_magnitude(v) * -2.0)
        v = _float(_bits(_magnitude(tl.div_rn(less, 2.0 + less))) | (_bits(v) & -2147483648))
    return v


# Block floating point


@triton.jit
def _factor_and_scale(largest, m):
    """Return 2^(1 - e), twice the factor of values, which could be subnormal, and 2^e; 0 and NaN if there is none."""
    exponent = largest & _INFINITY_BITS
    used = (largest >= _SMALLEST_BITS) & (largest < _INFINITY_BITS)
    factor = tl.where(used, _float(((254 + m) << 23) - exponent), 0.0)
    finite = tl.where(used, _float(exponent + ((1 - m) << 23)), 1.0)
    nan = _float(tl.full(largest.shape, _NAN_BITS, tl.int32))
    return factor, tl.where(largest >= _INFINITY_BITS, nan, finite)


@triton.jit
def _store_blocks(
    x, m_ptr, s_ptr, t_ptr, rows, live, column, end, block, pixels, row_bytes,
    BITS: tl.constexpr, SIGN: tl.constexpr, SHIFT: tl.constexpr, POSITIVE: tl.constexpr,
):  # fmt: skip
    """Quantize x (blocks, channels, rows) and store it from a column and a block on, up to a column ``end``.

    ``live`` marks existing rows. If a block is not finite, its scale is NaN, and its mantissas are arbitrary.
    """
    bits = _bits(x)
    # As integers: NaN is above all other values. Without negative values, no sign has to be removed.
    largest = tl.max(bits if POSITIVE else bits & 0x7FFFFFFF, axis=1)
    ADAPTS: tl.constexpr = BITS < 8 and SIGN == "adaptive" and not POSITIVE
    M: tl.constexpr = BITS - 1 if BITS == 8 or SIGN == "included" else BITS
    m = tl.zeros((x.shape[0], x.shape[2]), tl.int32) + M
    if ADAPTS:  # signed zero is the least integer: one above it, it is the largest
        m = m - (tl.min(bits - 1, axis=1) < -1).to(tl.int32)
    factor, scale = _factor_and_scale(largest, m)
    word = _bits(_fma(x, factor[:, None, :], _DOUBLE_MAGIC))
    limit = ((1 << m) - 1)[:, None, :] if ADAPTS else (1 << M) - 1
    word = tl.minimum(word, _MAGIC_WORD + limit)
    if SIGN == "extra":
        word = tl.maximum(word, _MAGIC_WORD - limit)
    b = tl.arange(0, x.shape[0])
    at = column + b[:, None] * x.shape[1] + tl.arange(0, x.shape[1])[None, :]
    where = m_ptr + rows[None, None, :] * row_bytes + at[:, :, None]
    tl.store(where, word.to(tl.int8), mask=live[None, None, :] & (at < end)[:, :, None])
    where = (block + b)[:, None] * pixels + rows[None, :]
    keep = live[None, :] & (column + b * x.shape[1] < end)[:, None]
    tl.store(s_ptr + where, scale, mask=keep)
    if SHIFT:
        total = tl.sum(word - _MAGIC_WORD, axis=1)
        tl.store(t_ptr + where, total.to(tl.float32) * scale, mask=keep)


@triton.jit
def _finish(
    acc, residual, r, o, live, there, bias_ptr, gain_ptr, offset_ptr, y_ptr, qm_ptr, qs_ptr, qt_ptr, P, y_stride,
    q_row_bytes, q_column, q_end, q_block, alpha, beta,
    BIAS: tl.constexpr, BATCHNORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE: tl.constexpr,
    QBLOCK: tl.constexpr, QBITS: tl.constexpr, QSIGN: tl.constexpr, QSHIFT: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Convert sums (outputs, pixels) to outputs, and store these, quantize them, or both.

    residual is added if there is one; r are the pixels and o the outputs, live and there mark the existing ones (all
    outputs, unless RAGGED).
    """
    keep = there[:, None] & live[None, :]
    if BIAS:
        acc = acc + tl.load(bias_ptr + o, mask=there, other=0.0)[:, None]
    if BATCHNORM:
        gain = tl.load(gain_ptr + o, mask=there, other=0.0)
        offset = tl.load(offset_ptr + o, mask=there, other=0.0)
        acc = tl.fma(acc, gain[:, None].broadcast_to(acc.shape), offset[:, None].broadcast_to(acc.shape))
    if RESIDUAL:
        acc = acc + residual
    acc = _activated(acc, ACTIVATION, alpha, beta)
    if STORE:
        tl.store(y_ptr + r[None, :] * y_stride + o[:, None], acc, mask=keep)
    if QBITS:
        if RAGGED:
            acc = tl.where(there[:, None], acc, 0.0)
        values = tl.reshape(acc, (acc.shape[0] // QBLOCK, QBLOCK, acc.shape[1]))
        _store_blocks(
            values, qm_ptr, qs_ptr, qt_ptr, r, live, q_column, q_end, q_block, P, q_row_bytes, QBITS, QSIGN, QSHIFT,
            ACTIVATION == "relu",
        )  # fmt: skip


# Convolutions


@triton.jit
def _nibbles(p, ASM: tl.constexpr):
    """Return both four-bit integers of a byte, times 16, so that no sign extension is needed."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=r,=r,r", [p], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    return (p << 4).to(tl.int8), (p & -16).to(tl.int8)


@triton.jit
def _add_block(
    acc, q, i, b, tap, offset, place, corners, limits, inside_bits, x_ptr, s_ptr, t_ptr, k_ptr, h_ptr, base, o, j,
    pixels,
    row_bytes, outputs,
    BLOCK: tl.constexpr, NIBBLES: tl.constexpr, SCALES: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Add a block of a tap: weights q (outputs, channels) are the left operand, which stays in registers."""
    pixel = base + offset
    if SMALL:
        at = corners + place
        inside = ((at | (limits - at)) & -2147450880) == 0  # signs of row, column, and their distances to the limits
    else:
        inside = ((inside_bits >> tap) & 1) != 0
    x = tl.load(x_ptr + pixel[None, :] * row_bytes + (b * BLOCK + j)[:, None], mask=inside[None, :], other=0)
    inside = ((inside_bits >> tap) & 1) != 0
    scale = tl.load(s_ptr + b * pixels + pixel, mask=inside, other=0.0)
    if SCALES == "halves":
        both = tl.load(k_ptr + i * outputs + o)
        kds = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        kds = tl.load(k_ptr + i * outputs + o)
    if NIBBLES:
        kds = kds * 0.0625
    total = tl.dot(q, x, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
    acc = tl.fma(kds[:, None].broadcast_to(acc.shape), total, acc)
    if SCALES != "plain":
        if SCALES == "halves":
            shift = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            shift = tl.load(h_ptr + i * outputs + o)
        term = tl.load(t_ptr + b * pixels + pixel, mask=inside, other=0.0)
        acc = tl.fma(shift[:, None].broadcast_to(acc.shape), term[None, :].broadcast_to(acc.shape), acc)
    return acc


@triton.jit
def _next(b, tap, kw, offset, place, first, last, KW, line, dilation_h, column):
    """Return the next block, which may be the first one of the next tap."""
    b += 1
    wraps = (b == last).to(tl.int32)
    kw += wraps
    ends = (kw == KW).to(tl.int32)
    offset += wraps * column + ends * (line - KW * column)
    place += wraps * column + ends * ((dilation_h << 16) - KW * column)
    return b - wraps * (last - first), tap + wraps, kw * (1 - ends), offset, place


@triton.jit(do_not_specialize=_ANY_SIZE)
def convolve(
    x_ptr, s_ptr, t_ptr, w_ptr, k_ptr, h_ptr, bias_ptr, gain_ptr, offset_ptr, r_ptr, y_ptr, qm_ptr, qs_ptr, qt_ptr,
    P, pixels, height, width, out_height, out_width, row_bytes, blocks, outputs, group_rows, group_outputs,
    KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, taps, terms,
    r_stride, y_stride, q_row_bytes, q_column, q_block, q_end, alpha, beta,
    BLOCK: tl.constexpr, NIBBLES: tl.constexpr, SCALES: tl.constexpr, LOOP: tl.constexpr, ODD: tl.constexpr,
    ONE_TAP: tl.constexpr,
    DENSE: tl.constexpr, SMALL: tl.constexpr,
    BIAS: tl.constexpr, BATCHNORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE: tl.constexpr,
    QBLOCK: tl.constexpr, QBITS: tl.constexpr, QSIGN: tl.constexpr, QSHIFT: tl.constexpr,
    RAGGED: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr, TILE_P: tl.constexpr, TILE_O: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = outputs // TILE_O
    po = pid % tiles  # neighbours read the same pixels
    r = (pid // tiles) * TILE_P + tl.arange(0, TILE_P)
    if WIDE:
        r = r.to(tl.int64)
    live = r < P
    # A bit per tap. Triton keeps results of a loop in one layout: the one in which scales are loaded fastest.
    inside_bits = tl.zeros((TILE_P,), tl.int32)
    limits = (height - 1) * 65536 + width - 1
    if DENSE:
        base = r
        corners = tl.where(live, 0, -(1 << 30))
        limits = 0
        for tap in range(taps):
            inside_bits |= live.to(tl.int32) << tap
    else:
        at = r % (out_height * out_width)
        ih0 = (at // out_width) * stride_h - pad_h
        iw0 = (at % out_width) * stride_w - pad_w
        base = r // (out_height * out_width) * (height * width) + ih0 * width + iw0
        # Row and column in one number, so that one comparison tells whether both are inside.
        corners = tl.where(live, (ih0 * 65536 + iw0).to(tl.int32), -(1 << 30))
        for tap in range(taps):
            ih = ih0 + (tap // KW) * dilation_h
            iw = iw0 + (tap % KW) * dilation_w
            inside = live & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            inside_bits |= inside.to(tl.int32) << tap
    line = dilation_h * width
    o = po * TILE_O + tl.arange(0, TILE_O)
    group = po * TILE_O // group_rows
    first = group * blocks
    j = tl.arange(0, BLOCK)
    there = o - group * group_rows < group_outputs
    channel = o - group * (group_rows - group_outputs)
    acc = tl.zeros((TILE_O, TILE_P), tl.float32)
    where = r_ptr + r[None, :] * r_stride + channel[:, None]
    residual = acc
    if RESIDUAL and not LOOP:  # loaded while the only term is; a loop needs the registers
        residual = tl.load(where, mask=there[:, None] & live[None, :], other=0.0)
    b = first
    tap = 0
    kw = 0
    offset = 0
    place = 0
    if NIBBLES:
        for i in tl.range(0, terms // 2 if LOOP else 0, num_stages=STAGES):
            p = tl.load(w_ptr + (i * outputs + o)[:, None] * BLOCK + j[None, :])
            q0, q1 = _nibbles(p, ASM)
            if ONE_TAP:
                b = first + 2 * i
            acc = _add_block(acc, q0, 2 * i, b, tap, offset, place, corners, limits, inside_bits, x_ptr, s_ptr,
            t_ptr, k_ptr,
            h_ptr, base, o, j, pixels,
                             row_bytes, outputs, BLOCK, True, SCALES, SMALL)  # fmt: skip
            if ONE_TAP:
                b = first + 2 * i + 1
            else:
                b, tap, kw, offset, place = _next(
                    b, tap, kw, offset, place, first, first + blocks, KW, line, dilation_h, dilation_w
                )
            acc = _add_block(acc, q1, 2 * i + 1, b, tap, offset, place, corners, limits, inside_bits, x_ptr, s_ptr,
            t_ptr,
            k_ptr, h_ptr, base, o, j,
            pixels,
                             row_bytes, outputs, BLOCK, True, SCALES, SMALL)  # fmt: skip
            if not ONE_TAP:
                b, tap, kw, offset, place = _next(
                    b, tap, kw, offset, place, first, first + blocks, KW, line, dilation_h, dilation_w
                )
        if ODD:
            p = tl.load(w_ptr + (terms // 2 * outputs + o)[:, None] * BLOCK + j[None, :])
            q0, q1 = _nibbles(p, ASM)
            if ONE_TAP:
                b = first + terms - 1
            acc = _add_block(acc, q0, terms - 1, b, tap, offset, place, corners, limits, inside_bits, x_ptr, s_ptr,
            t_ptr,
            k_ptr, h_ptr, base, o, j,
            pixels,
                             row_bytes, outputs, BLOCK, True, SCALES, SMALL)  # fmt: skip
    else:
        for i in tl.range(0, terms, num_stages=STAGES):
            q = tl.load(w_ptr + (i * outputs + o)[:, None] * BLOCK + j[None, :])
            if ONE_TAP:
                b = first + i
            acc = _add_block(acc, q, i, b, tap, offset, place, corners, limits, inside_bits, x_ptr, s_ptr, t_ptr, k_ptr,
            h_ptr, base, o, j, pixels,
                             row_bytes, outputs, BLOCK, False, SCALES, SMALL)  # fmt: skip
            if not ONE_TAP:
                b, tap, kw, offset, place = _next(
                    b, tap, kw, offset, place, first, first + blocks, KW, line, dilation_h, dilation_w
                )
    if RESIDUAL and LOOP:
        residual = tl.load(where, mask=there[:, None] & live[None, :], other=0.0)
    _finish(acc, residual, r, channel, live, there, bias_ptr, gain_ptr, offset_ptr, y_ptr, qm_ptr, qs_ptr, qt_ptr, P,
    y_stride,
            q_row_bytes, q_column + po * TILE_O, q_end, q_block + po * (TILE_O // QBLOCK), alpha, beta, BIAS,
            BATCHNORM, RESIDUAL,
            ACTIVATION, STORE, QBLOCK, QBITS, QSIGN, QSHIFT, RAGGED)  # fmt: skip


@triton.jit(do_not_specialize=_ANY_SIZE)
def depthwise(
    x_ptr, w_ptr, k_ptr, bias_ptr, gain_ptr, offset_ptr, r_ptr, y_ptr, qm_ptr, qs_ptr, qt_ptr,
    P, height, width, out_height, out_width, x_stride, channels, KH, KW, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, r_stride, y_stride, q_row_bytes, q_column, q_block, q_end, alpha, beta,
    MULTIPLIER: tl.constexpr,
    BIAS: tl.constexpr, BATCHNORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, STORE: tl.constexpr,
    QBLOCK: tl.constexpr, QBITS: tl.constexpr, QSIGN: tl.constexpr, QSHIFT: tl.constexpr,
    WIDE: tl.constexpr, TILE_P: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    """Convolve float32 activations depthwise: products are added tap by tap, from 0 on, each rounded once."""
    r = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    if WIDE:
        r = r.to(tl.int64)
    live = r < P
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    there = o < channels
    at = r % (out_height * out_width)
    ih0 = (at // out_width) * stride_h - pad_h
    iw0 = (at % out_width) * stride_w - pad_w
    image = r // (out_height * out_width) * (height * width)
    acc = tl.zeros((TILE_O, TILE_P), tl.float32)
    for kh in range(KH):
        ih = ih0 + kh * dilation_h
        for kw in range(KW):
            iw = iw0 + kw * dilation_w
            inside = live & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            pixel = image + ih * width + iw
            where = x_ptr + pixel[None, :] * x_stride + (o // MULTIPLIER)[:, None]
            x = tl.load(where, mask=inside[None, :] & there[:, None], other=0.0)
            w = tl.load(w_ptr + (kh * KW + kw) * channels + o, mask=there, other=0.0)
            # Taps in the padding have no effect if weights are finite.
            acc = tl.fma(x, w[:, None].broadcast_to(acc.shape), acc)
    acc = acc * tl.load(k_ptr + o, mask=there, other=0.0)[:, None]
    residual = acc
    if RESIDUAL:
        where = r_ptr + r[None, :] * r_stride + o[:, None]
        residual = tl.load(where, mask=there[:, None] & live[None, :], other=0.0)
    _finish(acc, residual, r, o, live, there, bias_ptr, gain_ptr, offset_ptr, y_ptr, qm_ptr, qs_ptr, qt_ptr, P,
    y_stride,
            q_row_bytes, q_column + tl.program_id(1) * TILE_O, q_end,
            q_block + tl.program_id(1) * (TILE_O // QBLOCK), alpha, beta,
            BIAS, BATCHNORM, RESIDUAL, ACTIVATION, STORE, QBLOCK, QBITS, QSIGN, QSHIFT, True)  # fmt: skip


# Operations between layers


@triton.jit(do_not_specialize=_ANY_SIZE)
def quantize(
    x_ptr, qm_ptr, qs_ptr, qt_ptr, P, pixels, width, channels, size, group_blocks, image_stride, channel_stride,
    row_stride,
    pixel_stride, q_row_bytes, q_column, q_block,
    QBLOCK: tl.constexpr, QBITS: tl.constexpr, QSIGN: tl.constexpr, QSHIFT: tl.constexpr, WIDE: tl.constexpr,
    TILE_P: tl.constexpr,
):  # fmt: skip
    """Quantize float32 images, `pixels` each, with any strides; a program handles one block of some pixels."""
    r = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    if WIDE:
        r = r.to(tl.int64)
    live = r < P
    block = tl.program_id(1)
    j = tl.arange(0, QBLOCK)
    within = block % group_blocks * size + j
    c = block // group_blocks * channels + within
    if WIDE:
        c = c.to(tl.int64)
    there = (j < size) & (within < channels)
    at = r % pixels
    place = r // pixels * image_stride + at // width * row_stride + at % width * pixel_stride
    # In the same order as in quantize_windows.
    x = tl.load(x_ptr + place[:, None] + c[None, :] * channel_stride, mask=there[None, :] & live[:, None], other=0.0)
    values = tl.reshape(tl.trans(x.to(tl.float32)), (1, QBLOCK, TILE_P))
    _store_blocks(values, qm_ptr, qs_ptr, qt_ptr, r, live, q_column + block * QBLOCK, q_row_bytes, q_block + block, P,
                  q_row_bytes, QBITS, QSIGN, QSHIFT, False)  # fmt: skip


@triton.jit(do_not_specialize=_ANY_SIZE)
def quantize_windows(
    x_ptr, table_ptr, qm_ptr, qs_ptr, qt_ptr, P, height, width, out_height, out_width, stride_h, stride_w, pad_h, pad_w,
    image_stride, row_stride, pixel_stride, q_row_bytes,
    QBLOCK: tl.constexpr, QBITS: tl.constexpr, QSIGN: tl.constexpr, QSHIFT: tl.constexpr,
    WIDE: tl.constexpr, SMALL: tl.constexpr, TILE_P: tl.constexpr,
):  # fmt: skip
    """Quantize the input window of each output as a pixel of many channels.

    The table has the offset of each of these: values, rows and columns from the first value of a window.
    """
    r = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    if WIDE:
        r = r.to(tl.int64)
    live = r < P
    block = tl.program_id(1)
    k = table_ptr + (block * QBLOCK + tl.arange(0, QBLOCK)) * 3
    offset, down, right = tl.load(k), tl.load(k + 1), tl.load(k + 2)
    at = r % (out_height * out_width)
    ih0 = (at // out_width) * stride_h - pad_h
    iw0 = (at % out_width) * stride_w - pad_w
    # Pixels come first: without contiguous values, Triton lets neighbouring threads load along the first dimension.
    if SMALL:  # as in _add_block
        corners = tl.where(live, (ih0 * 65536 + iw0).to(tl.int32), -(1 << 30))
        place = corners[:, None] + (down * 65536 + right)[None, :]
        inside = ((place | ((height - 1) * 65536 + width - 1 - place)) & -2147450880) == 0
    else:
        rows, columns = ih0[:, None] + down[None, :], iw0[:, None] + right[None, :]
        inside = live[:, None] & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        inside = inside & (down >= 0)[None, :]  # padding of a block
    first = r // (out_height * out_width) * image_stride + ih0 * row_stride + iw0 * pixel_stride
    x = tl.load(x_ptr + first[:, None] + offset[None, :], mask=inside, other=0.0)
    values = tl.reshape(tl.trans(x.to(tl.float32)), (1, QBLOCK, TILE_P))
    _store_blocks(values, qm_ptr, qs_ptr, qt_ptr, r, live, block * QBLOCK, q_row_bytes, block, P, q_row_bytes, QBITS,
                  QSIGN, QSHIFT, False)  # fmt: skip


@triton.jit(do_not_specialize=_ANY_SIZE)
def pool(
    x_ptr, y_ptr, qm_ptr, qs_ptr, qt_ptr, P, height, width, out_height, out_width, x_stride, channels, KH, KW,
    stride_h, stride_w,
    pad_h, pad_w, dilation_h, dilation_w, divisor, y_stride, q_row_bytes, q_column, q_block, q_end, alpha, beta,
    AVERAGE: tl.constexpr, ACTIVATION: tl.constexpr, STORE: tl.constexpr,
    QBLOCK: tl.constexpr, QBITS: tl.constexpr, QSIGN: tl.constexpr, QSHIFT: tl.constexpr,
    WIDE: tl.constexpr, TILE_P: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    """Compute maxima or averages over windows; divisor of averages, 0: the pixels in a window, -1: zeros count."""
    r = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    if WIDE:
        r = r.to(tl.int64)
    live = r < P
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    there = o < channels
    at = r % (out_height * out_width)
    ih0 = (at // out_width) * stride_h - pad_h
    iw0 = (at % out_width) * stride_w - pad_w
    image = r // (out_height * out_width) * (height * width)
    acc = tl.full((TILE_O, TILE_P), 0.0 if AVERAGE else float("-inf"), tl.float32)
    count = tl.zeros((TILE_P,), tl.int32)
    for kh in range(KH):
        ih = ih0 + kh * dilation_h
        for kw in range(KW):
            iw = iw0 + kw * dilation_w
            inside = live & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
            where = x_ptr + (image + ih * width + iw)[None, :] * x_stride + o[:, None]
            x = tl.load(where, mask=inside[None, :] & there[:, None], other=0.0 if AVERAGE else float("-inf"))
            if AVERAGE:
                acc = acc + x
                zeros = (ih < height + pad_h) & (iw < width + pad_w)
                count += (inside | ((divisor < 0) & zeros)).to(tl.int32)
            else:
                acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)
    if AVERAGE:
        count = tl.where(divisor > 0, divisor, tl.maximum(count, 1))
        acc = tl.div_rn(acc, count.to(tl.float32)[None, :].broadcast_to(acc.shape))
    _finish(acc, acc, r, o, live, there, x_ptr, x_ptr, x_ptr, y_ptr, qm_ptr, qs_ptr, qt_ptr, P, y_stride,
            q_row_bytes, q_column + tl.program_id(1) * TILE_O, q_end,
            q_block + tl.program_id(1) * (TILE_O // QBLOCK), alpha, beta,
            False, False, False, ACTIVATION, STORE, QBLOCK, QBITS, QSIGN, QSHIFT, True)  # fmt: skip


@triton.jit
def change(
    x_ptr, b_ptr, c_ptr, y_ptr, P, pixels, channels, x_stride, b_pixel, b_image, b_channel, y_stride, alpha, beta,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr,
    TILE_P: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    """Apply one operation of :data:`dsconv.ops.OPERATIONS` to every value, perhaps in place.

    The operand b is a number, alpha; per-channel constants; or a tensor.
    """
    r = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    if WIDE:
        r = r.to(tl.int64)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    keep = (o < channels)[:, None] & (r < P)[None, :]
    x = tl.load(x_ptr + r[None, :] * x_stride + o[:, None], mask=keep, other=0.0)
    b = tl.zeros_like(x) + alpha
    if OPERAND:
        place = r // pixels * b_image + r % pixels * b_pixel
        b = tl.load(b_ptr + place[None, :] + o[:, None] * b_channel, mask=keep, other=1.0)
    if KIND == "activate":
        x = _activated(x, ACTIVATION, alpha, beta)
    elif KIND == "add":
        x = x + b
    elif KIND == "subtract":
        x = x - b
    elif KIND == "subtract_from":
        x = b - x
    elif KIND == "multiply":
        x = x * b
    elif KIND == "divide":
        x = tl.div_rn(x, b)
    elif KIND == "divide_by":
        x = tl.div_rn(b, x)
    elif KIND == "scale":
        c = tl.load(c_ptr + o, mask=o < channels, other=0.0)
        x = tl.fma(x, b, c[:, None].broadcast_to(x.shape))
    elif KIND == "slope":
        x = tl.where(x > 0.0, x, x * b)
    tl.store(y_ptr + r[None, :] * y_stride + o[:, None], x, mask=keep)
