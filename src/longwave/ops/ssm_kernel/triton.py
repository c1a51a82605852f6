"""Kernel generation on a GPU, portable Triton. docs/ops/ssm_kernel.md has the algebra.

Vandermonde: with t = i Q + j, exp(t a) = X_i E_j. One kernel makes a table of few powers, all straight from their
exponents. Another takes Q columns and some rows of one kernel, or sums over them, as a product of two small matrices,
whose powers are products of two of the table's. Cauchy: a program takes some nodes, or sums over them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import (
    LOG2E,
    block,
    cos_sin,
    device_of,
    expm1_near_0,
    power_of_2,
    processors_of,
    rows,
)
from longwave.ops.triton_rotation import TURNS
from longwave.ops.triton_segments import segments_of

_LN2 = tl.constexpr(0.6931471805599453)
_WHOLE = tl.constexpr(2.0**64)
_QUARTER = tl.constexpr(2.0**-30)
_FAR = tl.constexpr(1e18)  # from all poles; its square is finite


@triton.jit
def _powers(t, high, low, turns):
    """exp(t a), as real and imaginary part. Whole halvings and quarter turns are taken off without an error.

    a: its halvings in a step, as two numbers in float32, and its turns, in units of 2^-64 of one, in int64.
    """
    steps = t.to(tl.float32)
    size = steps * high
    halvings = tl.floor(size + 0.5)
    rest = (size - halvings) + (tl.fma(steps, high, -size) + steps * low)
    scale = power_of_2(halvings)
    size = scale + scale * expm1_near_0(tl.where(tl.abs(halvings) > 200.0, 0.0, rest * _LN2))
    phase = ((t * turns) >> 32).to(tl.int32)  # it wraps around: whole turns are lost
    quarter = ((phase >> 29) + 1) >> 1
    cosine, _, sine = cos_sin(quarter, (phase - (quarter << 30)).to(tl.float32) * _QUARTER)
    return size * cosine, size * sine


@triton.jit
def _table_kernel(dtA, table, n, rungs, Q: tl.constexpr, FINE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """The powers exp(t a) of a channel (2, rungs, n), from which `_ladder` makes the others.

    t = 0..FINE - 1 and its multiples below Q, then Q times the same, without an end.
    """
    channel = tl.program_id(0).to(tl.int64)
    dtA += channel * (2 * n)
    table += channel * (2 * rungs * n)
    k = tl.arange(0, BN)
    halvings = tl.load(dtA + 2 * k, mask=k < n, other=0.0).to(tl.float64) * LOG2E
    high = halvings.to(tl.float32)
    low = (halvings - high.to(tl.float64)).to(tl.float32)
    turns = tl.load(dtA + 2 * k + 1, mask=k < n, other=0.0).to(tl.float64) * TURNS
    turns = ((turns - tl.floor(turns + 0.5)) * _WHOLE).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    SHORT: tl.constexpr = FINE + Q // FINE
    place = tl.where(p < SHORT, p, p - SHORT)
    t = tl.where(place < FINE, place, (place - FINE) * FINE).to(tl.int64) * tl.where(p < SHORT, 1, Q)
    x, y = _powers(t[:, None], high[None, :], low[None, :], turns[None, :])
    at, inside = table + p[:, None] * n + k[None, :], (p < rungs)[:, None] & (k < n)[None, :]
    tl.store(at, x, mask=inside)
    tl.store(at + rungs * n, y, mask=inside)


@triton.jit
def _times(a, b, x, y):
    return a * x - b * y, a * y + b * x


@triton.jit
def _rungs(table, rungs, first, k, n, COUNT: tl.constexpr):
    at = table + (first + tl.arange(0, COUNT))[:, None] * n + k[None, :]
    x = tl.load(at, mask=(k < n)[None, :], other=0.0)
    return x, tl.load(at + rungs * n, mask=(k < n)[None, :], other=0.0)


@triton.jit
def _ladder(fine_re, fine_im, coarse_re, coarse_im):
    """The products of each coarse power with all fine ones: (count, BN)."""
    x, y = _times(coarse_re[:, None, :], coarse_im[:, None, :], fine_re[None, :, :], fine_im[None, :, :])
    COUNT: tl.constexpr = coarse_re.shape[0] * fine_re.shape[0]
    return tl.reshape(x, (COUNT, x.shape[2])), tl.reshape(y, (COUNT, x.shape[2]))


@triton.jit
def _narrow(x):
    """x rounded to the 11 bits that a matrix unit takes of a float32."""
    return ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def _large(x, y, total, PRECISION: tl.constexpr):
    """total + x y, of their leading 11 bits; of all with PRECISION "ieee"."""
    if PRECISION == "tf32":
        x, y = _narrow(x), _narrow(y)
    return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def _small(x, y, total, PRECISION: tl.constexpr):
    """total and what `_large` leaves out of x y, but for the product of both rests.

    Apart from it, because a matrix unit cuts off what does not fit into its sum, each time: small numbers go first, or
    into a sum of their own.
    """
    if PRECISION == "ieee":
        return total
    x_high, y_high = _narrow(x), _narrow(y)
    total = tl.dot(x - x_high, y_high, total, input_precision=PRECISION)
    return tl.dot(x_high, y - y_high, total, input_precision=PRECISION)


@triton.jit
def _vandermonde_kernel(
    C, table, K, e, n, l, rungs, blocks,
    Q: tl.constexpr, FINE: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What is infinite in a row or a column of the factors reaches no other of K's, so that none has to be masked."""
    program = tl.program_id(0).to(tl.int64)
    row, first = program // blocks, (program % blocks).to(tl.int32) * BI
    C += row * (2 * n)
    table += row % e * (2 * rungs * n)
    total = tl.zeros((BI, Q), tl.float32)
    for large in tl.static_range(2):
        for start in range(0, n, BN):
            k = start + tl.arange(0, BN)
            real, imag = _rungs(table, rungs, FINE + Q // FINE + FINE + first // FINE, k, n, BI // FINE)
            C_re = 2.0 * tl.load(C + 2 * k, mask=k < n, other=0.0)[None, :]
            C_im = 2.0 * tl.load(C + 2 * k + 1, mask=k < n, other=0.0)[None, :]
            real, imag = _times(C_re, C_im, real, imag)
            x, y = _rungs(table, rungs, FINE + Q // FINE, k, n, FINE)
            x, y = _ladder(x, y, real, imag)
            real, imag = _rungs(table, rungs, FINE, k, n, Q // FINE)
            z, w = _rungs(table, rungs, 0, k, n, FINE)
            z, w = _ladder(z, w, real, imag)
            if large:
                total = _large(x, tl.trans(z), total, PRECISION)
                total = _large(-y, tl.trans(w), total, PRECISION)
            else:
                total = _small(x, tl.trans(z), total, PRECISION)
                total = _small(-y, tl.trans(w), total, PRECISION)
    t = (first + tl.arange(0, BI)[:, None]) * Q + tl.arange(0, Q)[None, :]
    tl.store(K + row * l + t, total, mask=t < l, eviction_policy="evict_first")  # the tables are read once more


@triton.jit
def _moments_kernel(
    f, table, sums, later, e, n, l, rungs, per_split, splits, parts, stride_fm, stride_fe,
    WEIGHTED: tl.constexpr, Q: tl.constexpr, FINE: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over rows i of f_ij X_i, and then over the columns j. If WEIGHTED, also with each t counted t times."""
    blocks = tl.cdiv(n, BN)
    program = tl.program_id(0).to(tl.int64)
    k = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
    split = program // blocks % splits
    row = program // (blocks * splits)
    f += row // e * stride_fm + row % e * stride_fe
    table += row % e * (2 * rungs * n)
    ROWS: tl.constexpr = 4 * BN if WEIGHTED else 2 * BN
    # Rows: mode, real or imaginary part, not weighted or weighted.
    total, rest = tl.zeros((ROWS, Q), tl.float32), tl.zeros((ROWS, Q), tl.float32)
    j = tl.arange(0, Q)
    first = (split * per_split).to(tl.int32)
    x, y = _rungs(table, rungs, FINE + Q // FINE, k, n, FINE)
    for start in range(first, tl.minimum(first + per_split, tl.cdiv(l, Q)), BI):
        i = start + tl.arange(0, BI)
        t = i[:, None] * Q + j[None, :]
        values = tl.load(f + t, mask=t < l, other=0.0).to(tl.float32)
        real, imag = _rungs(table, rungs, FINE + Q // FINE + FINE + start // FINE, k, n, BI // FINE)
        real, imag = _ladder(x, y, real, imag)
        both = tl.reshape(tl.join(real, imag), (BI, 2 * BN))
        both = tl.where(i[:, None] * Q < l, both, 0.0)  # beyond they may be infinite
        if WEIGHTED:
            both = tl.reshape(tl.join(both, both * i.to(tl.float32)[:, None]), (BI, ROWS))
        total = _large(tl.trans(both), values, total, PRECISION)
        rest = _small(tl.trans(both), values, rest, PRECISION)
    total += rest
    real, imag = _rungs(table, rungs, FINE, k, n, Q // FINE)
    x, y = _rungs(table, rungs, 0, k, n, FINE)
    x, y = _ladder(x, y, real, imag)
    x, y = tl.where(j[:, None] < l, x, 0.0), tl.where(j[:, None] < l, y, 0.0)
    x, y = tl.trans(x), tl.trans(y)
    if WEIGHTED:
        total = tl.permute(tl.reshape(total, (BN, 2, 2, Q)), (0, 3, 1, 2))
        plain, weighted = tl.split(total)
        a, b = tl.split(plain)
        c, d = tl.split(weighted)
    else:
        a, b = tl.split(tl.permute(tl.reshape(total, (BN, 2, Q)), (0, 2, 1)))
    real, imag = _times(x, y, a, b)
    at = 2 * ((split * parts + row) * n + k)
    tl.store(sums + at, tl.sum(real, 1), mask=k < n)
    tl.store(sums + at + 1, tl.sum(imag, 1), mask=k < n)
    if WEIGHTED:
        number = j.to(tl.float32)[None, :]
        c, d = _times(x, y, c, d)
        tl.store(later + at, tl.sum(number * real + Q * c, 1), mask=k < n)
        tl.store(later + at + 1, tl.sum(number * imag + Q * d, 1), mask=k < n)


@triton.jit
def _reciprocals(z_re, z_im, w_re, w_im):
    """The parts of 1 / (z - w) and of 1 / (z - conj(w))."""
    x, above, below = z_re - w_re, z_im - w_im, z_im + w_im
    first, second = 1.0 / (x * x + above * above), 1.0 / (x * x + below * below)
    return x * first, -above * first, x * second, -below * second


@triton.jit
def _cauchy_kernel(v, z, w, out, m, e, n, l, blocks, groups, BM: tl.constexpr, BL: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    node = (program % blocks).to(tl.int32) * BL + tl.arange(0, BL)
    r = (program // blocks % groups).to(tl.int32) * BM + tl.arange(0, BM)
    channel = program // (blocks * groups)
    z_re = tl.load(z + 2 * node, mask=node < l, other=_FAR)
    z_im = tl.load(z + 2 * node + 1, mask=node < l, other=0.0)
    row = r.to(tl.int64) * e + channel
    real, imag = tl.zeros((BM, BL), tl.float32), tl.zeros((BM, BL), tl.float32)
    for k in range(n):
        at = w + 2 * (channel * n + k)
        x1, y1, x2, y2 = _reciprocals(z_re, z_im, tl.load(at), tl.load(at + 1))
        re = tl.load(v + 2 * (row * n + k), mask=r < m, other=0.0)[:, None]
        im = tl.load(v + 2 * (row * n + k) + 1, mask=r < m, other=0.0)[:, None]
        real += re * (x1 + x2)[None, :] - im * (y1 - y2)[None, :]
        imag += re * (y1 + y2)[None, :] + im * (x1 - x2)[None, :]
    at = out + 2 * (row[:, None] * l + node[None, :])
    inside = (r < m)[:, None] & (node < l)[None, :]
    tl.store(at, real, mask=inside)
    tl.store(at + 1, imag, mask=inside)


@triton.jit
def _cauchy_backward_kernel(dk, v, z, w, dv, dw, e, n, l, per_split, splits, parts, BN: tl.constexpr, BL: tl.constexpr):
    """Of one kernel and some modes: the gradient of v, and the kernel's part of that of w."""
    blocks = tl.cdiv(n, BN)
    program = tl.program_id(0).to(tl.int64)
    k = (program % blocks).to(tl.int32) * BN + tl.arange(0, BN)
    split = program // blocks % splits
    row = program // (blocks * splits)
    w += row % e * (2 * n)
    v += row * (2 * n)
    dk += row * (2 * l)
    in_n = k < n
    w_re = tl.load(w + 2 * k, mask=in_n, other=-_FAR)[:, None]
    w_im = tl.load(w + 2 * k + 1, mask=in_n, other=0.0)[:, None]
    re, im = tl.load(v + 2 * k, mask=in_n, other=0.0)[:, None], tl.load(v + 2 * k + 1, mask=in_n, other=0.0)[:, None]
    dv_re, dv_im = tl.zeros((BN, BL), tl.float32), tl.zeros((BN, BL), tl.float32)
    dw_re, dw_im = tl.zeros((BN, BL), tl.float32), tl.zeros((BN, BL), tl.float32)
    first = (split * per_split).to(tl.int32)
    for start in range(first, tl.minimum(first + per_split, l), BL):
        node = start + tl.arange(0, BL)
        in_l = node < l
        z_re = tl.load(z + 2 * node, mask=in_l, other=_FAR)[None, :]
        z_im = tl.load(z + 2 * node + 1, mask=in_l, other=0.0)[None, :]
        g = tl.load(dk + 2 * node, mask=in_l, other=0.0)[None, :]
        h = tl.load(dk + 2 * node + 1, mask=in_l, other=0.0)[None, :]
        x1, y1, x2, y2 = _reciprocals(z_re, z_im, w_re, w_im)
        dv_re += g * (x1 + x2) + h * (y1 + y2)
        dv_im += h * (x1 - x2) - g * (y1 - y2)
        # conj(1 / (z - w)^2) conj(v) g + conj(v) conj(g) / (z - conj(w))^2
        real, imag = re * g + im * h, re * h - im * g
        x, y = x1 * x1 - y1 * y1, 2.0 * x1 * y1
        dw_re += x * real + y * imag
        dw_im += x * imag - y * real
        real, imag = re * g - im * h, -re * h - im * g
        x, y = x2 * x2 - y2 * y2, 2.0 * x2 * y2
        dw_re += x * real - y * imag
        dw_im += x * imag + y * real
    at = 2 * ((split * parts + row) * n + k)
    tl.store(dv + at, tl.sum(dv_re, 1), mask=in_n)
    tl.store(dv + at + 1, tl.sum(dv_im, 1), mask=in_n)
    tl.store(dw + at, tl.sum(dw_re, 1), mask=in_n)
    tl.store(dw + at + 1, tl.sum(dw_im, 1), mask=in_n)


_LADDER, _SUMS_LADDER = {"Q": 128, "FINE": 16}, {"Q": 64, "FINE": 8}
_KERNEL = {"BI": 128, "BN": 16, "num_warps": 4}
_SUMS = {"BI": 32, "BN": 32, "num_warps": 4}
_NODES = 256
_PRECISION = "ieee" if torch.version.hip else "tf32"


def vandermonde(C: Tensor, dtA: Tensor, l: int) -> Tensor:
    m, e, n, _ = C.shape
    C = C.to(torch.float32).contiguous()
    K = torch.empty(m, e, l, dtype=torch.float32, device=C.device)
    blocks = triton.cdiv(l, _LADDER["Q"] * _KERNEL["BI"])
    with device_of(C):
        table = _table(dtA, l, _KERNEL["BI"], **_LADDER)
        _vandermonde_kernel[(m * e * blocks,)](
            C, table, K, e, n, l, table.shape[2], blocks, **_LADDER, **_KERNEL, PRECISION=_PRECISION
        )  # fmt: skip
    return K


def moments(f: Tensor, dtA: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    m, e, l = f.shape
    n = dtA.shape[1]
    f = rows(f)
    blocks = triton.cdiv(n, _SUMS["BN"])
    per_split, splits = _split(m * e * blocks, triton.cdiv(l, _SUMS_LADDER["Q"]), _SUMS["BI"], f)
    sums = [torch.empty(splits, m, e, n, 2, dtype=torch.float32, device=f.device) for _ in range(1 + weighted)]
    with device_of(f):
        table = _table(dtA, l, _SUMS["BI"], **_SUMS_LADDER)
        _moments_kernel[(m * e * splits * blocks,)](
            f, table, sums[0], sums[-1], e, n, l, table.shape[2], per_split, splits, m * e, *f.stride()[:2],
            WEIGHTED=weighted, **_SUMS_LADDER, **_SUMS, PRECISION=_PRECISION,
        )  # fmt: skip
    totals = [part.sum(0) if splits > 1 else part[0] for part in sums]
    return totals[0], totals[1] if weighted else f.new_empty(0, dtype=torch.float32)


def _table(dtA: Tensor, l: int, tile: int, Q: int, FINE: int) -> Tensor:
    """The powers (e, 2, rungs, n) for l tokens in rows of Q, taken `tile` at a time."""
    e, n, _ = dtA.shape
    rungs = FINE + Q // FINE + FINE + triton.cdiv(l, Q * tile) * tile // FINE
    table = torch.empty(e, 2, rungs, n, dtype=torch.float32, device=dtA.device)
    BN = block(n)
    BP = max(1, 512 // BN)
    _table_kernel[(e, triton.cdiv(rungs, BP))](
        dtA.contiguous(), table, n, rungs, Q=Q, FINE=FINE, BP=BP, BN=BN, num_warps=4
    )
    return table


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    m, e, n, _ = v.shape
    l = z.shape[0]
    v, z, w = (t.to(torch.float32).contiguous() for t in (v, z, w))
    out = torch.empty(m, e, l, 2, dtype=torch.float32, device=v.device)
    BM = min(block(m, 1), 4)
    blocks, groups = triton.cdiv(l, _NODES), triton.cdiv(m, BM)
    with device_of(v):
        _cauchy_kernel[(e * blocks * groups,)](
            v, z, w, out, m, e, n, l, blocks, groups, BM=BM, BL=_NODES, num_warps=4
        )  # fmt: skip
    return out


def cauchy_backward(dk: Tensor, v: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    m, e, n, _ = v.shape
    l = z.shape[0]
    wide = [t.to(torch.float32).contiguous() for t in (dk, v, z, w)]
    BN, BL = min(block(n, 1), 8), 128
    per_split, splits = _split(m * e * triton.cdiv(n, BN), l, BL, v)
    dv, dw = (torch.empty(splits, m, e, n, 2, dtype=torch.float32, device=v.device) for _ in range(2))
    with device_of(v):
        _cauchy_backward_kernel[(m * e * splits * triton.cdiv(n, BN),)](
            *wide, dv, dw, e, n, l, per_split, splits, m * e, BN=BN, BL=BL, num_warps=4
        )  # fmt: skip
    return dv.sum(0).to(v.dtype), dw.sum((0, 1)).to(w.dtype)


def _split(programs: int, length: int, step: int, x: Tensor) -> tuple[int, int]:
    """The size of the runs that `length` is cut into for the programs to fill the GPU, and how many they are."""
    splits = segments_of(programs, 4 * processors_of(x), length, step)
    per_split = triton.cdiv(triton.cdiv(length, splits), step) * step
    return per_split, triton.cdiv(length, per_split)
