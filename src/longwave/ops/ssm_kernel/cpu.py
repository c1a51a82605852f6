"""Kernel generation on the CPU, in parallel over channels. docs/ops/ssm_kernel.md has the algebra.

Vandermonde: with t = i q + j, exp(t a) = X_i E_j, X_i = exp(i q a) and E_j = exp(j a). Only these are computed, by
short recurrences in float64; all else is a product of two small real matrices, in which the real parts of all modes
stand before the imaginary ones. q is `_FINE`, and `_COARSE` of the X are in memory at a time.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_math import jit
from longwave.ops.numba_matmul import add_product
from longwave.ops.threads import parallel_for

_FINE = 128  # a multiple of numba_matmul.COLUMNS
_COARSE = 128
_RUN = 16  # powers by one recurrence
_CHANNELS = 4  # in a block
_NODES = 256  # of a Cauchy kernel, whose reciprocals lie in the first-level cache

# Without the options of `jit`, under which LLVM would take the terms of a rounding error together, and get 0.
_exact: Any = numba.njit(nogil=True, cache=True)


def vandermonde(C: Tensor, dtA: Tensor, l: int) -> Tensor:
    """2 Re sum_n C exp(t dtA): (m, e, l)."""
    m, e = C.shape[:2]
    dtype = state_dtype(C.dtype)
    K = torch.empty(m, e, l, dtype=dtype)
    arrays = _array(C, dtype), _array(dtA, torch.float64), K.numpy()
    _over_channels(e, lambda c0, c1: _evaluate(*arrays, c0, c1))
    return K


def moments(f: Tensor, dtA: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    """sum_t f_t exp(t dtA): (m, e, n, 2), and if `weighted` sum_t t f_t exp(t dtA) likewise, otherwise nothing."""
    m, e = f.shape[:2]
    dtype = state_dtype(f.dtype)
    sums = torch.empty(2 if weighted else 1, m, *dtA.shape, dtype=dtype)
    arrays = _array(f, dtype), _array(dtA, torch.float64), sums.numpy()
    _over_channels(e, lambda c0, c1: _accumulate(*arrays, c0, c1))
    return sums[0], sums[1].clone() if weighted else sums.new_empty(0)  # an operator's results share no memory


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    (m, e), l = v.shape[:2], z.shape[0]
    dtype = state_dtype(v.dtype)
    k = torch.empty(m, e, l, 2, dtype=dtype)
    arrays = _array(v, dtype), _array(z.t(), dtype), _array(w, dtype), k.numpy()
    _over_channels(e, lambda c0, c1: _cauchy_forward(*arrays, c0, c1))
    return k


def cauchy_backward(dk: Tensor, v: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(v.dtype)
    dv, dw = torch.empty(v.shape, dtype=dtype), torch.empty(w.shape, dtype=dtype)
    arrays = _array(dk, dtype), _array(v, dtype), _array(z.t(), dtype), _array(w, dtype), dv.numpy(), dw.numpy()
    _over_channels(w.shape[0], lambda c0, c1: _cauchy_backward(*arrays, c0, c1))
    return dv.to(v.dtype), dw.to(w.dtype)


def _array(t: Tensor, dtype: torch.dtype) -> np.ndarray:
    return t.detach().to(dtype).contiguous().numpy()


def _over_channels(e: int, body: Any) -> None:
    parallel_for(-(-e // _CHANNELS), lambda i: body(i * _CHANNELS, min((i + 1) * _CHANNELS, e)))


@jit
def _evaluate(C, modes, K, c0, c1):
    m, _, l = K.shape
    n = modes.shape[1]
    basis, rows, rest = np.empty(2 * n * _FINE, K.dtype), np.empty(_COARSE * 2 * n, K.dtype), np.empty(_FINE, K.dtype)
    powers = np.empty((4, n))
    for c in range(c0, c1):
        _fine_powers(modes[c], basis)
        starts = _starts(modes[c], l)
        for r in range(m):
            for s in range(len(starts)):
                t0 = s * _FINE * _COARSE
                for k in range(n):
                    re, im, a, b = 2 * C[r, c, k, 0], 2 * C[r, c, k, 1], starts[s, 0, k], starts[s, 1, k]
                    powers[0, k] = re * a - im * b
                    powers[1, k] = re * b + im * a
                whole = min(_COARSE, (l - t0) // _FINE)
                left = min(_FINE, l - t0 - whole * _FINE) if whole < _COARSE else 0
                _coarse_powers(modes[c], powers, whole + (left > 0), rows, 2 * n)
                out = K[r, c, t0 : t0 + whole * _FINE]
                out[:] = 0
                add_product(rows, 2 * n, 1, basis, out, whole, 2 * n, _FINE)
                if left > 0:
                    rest[:] = 0
                    add_product(rows[whole * 2 * n :], 2 * n, 1, basis, rest, 1, 2 * n, _FINE)
                    K[r, c, l - left :] = rest[:left]


@jit
def _accumulate(f, modes, sums, c0, c1):
    m, _, l = f.shape
    n, weighted = modes.shape[1], len(sums) == 2
    width = 4 * n if weighted else 2 * n
    basis, rows, rest = np.empty(2 * n * _FINE, f.dtype), np.empty(_COARSE * width, f.dtype), np.empty(_FINE, f.dtype)
    totals = np.empty(width * _FINE, f.dtype)
    powers = np.empty((4, n))
    for c in range(c0, c1):
        _fine_powers(modes[c], basis)
        starts = _starts(modes[c], l)
        for r in range(m):
            totals[:] = 0
            for s in range(len(starts)):
                t0 = s * _FINE * _COARSE
                powers[:2] = starts[s]
                whole = min(_COARSE, (l - t0) // _FINE)
                left = min(_FINE, l - t0 - whole * _FINE) if whole < _COARSE else 0
                _coarse_powers(modes[c], powers, whole + (left > 0), rows, width)
                if weighted:
                    _times_row_number(rows, s * _COARSE, whole + (left > 0), n)
                add_product(rows, 1, width, f[r, c, t0:], totals, width, whole, _FINE)
                if left > 0:
                    rest[:left] = f[r, c, l - left :]
                    rest[left:] = 0
                    add_product(rows[whole * width :], 1, width, rest, totals, width, 1, _FINE)
            for k in range(n):
                _contract(basis, totals, k, n, weighted, sums[:, r, c, k])


@jit
def _contract(basis, totals, k, n, weighted, out):
    """Sum E_j times the total of mode k over j. The total of X_i f_ij comes first, then that of i X_i f_ij."""
    re, im = basis[k * _FINE : (k + 1) * _FINE], basis[(n + k) * _FINE : (n + k + 1) * _FINE]  # im: of conj(E_j)
    a, b = totals[k * _FINE : (k + 1) * _FINE], totals[(n + k) * _FINE : (n + k + 1) * _FINE]
    x = y = x_j = y_j = 0.0
    for j in range(_FINE):
        real = np.float64(re[j]) * a[j] + np.float64(im[j]) * b[j]
        imag = np.float64(re[j]) * b[j] - np.float64(im[j]) * a[j]
        x += real
        y += imag
        x_j += j * real
        y_j += j * imag
    out[0, 0] = x
    out[0, 1] = y
    if weighted:
        a, b = totals[(2 * n + k) * _FINE :], totals[(3 * n + k) * _FINE :]
        x = y = 0.0
        for j in range(_FINE):
            x += np.float64(re[j]) * a[j] + np.float64(im[j]) * b[j]
            y += np.float64(re[j]) * b[j] - np.float64(im[j]) * a[j]
        out[1, 0] = _FINE * x + x_j
        out[1, 1] = _FINE * y + y_j


@jit
def _fine_powers(modes, basis):
    """basis[k, j] = Re exp(j a_k), basis[n+k, j] = -Im exp(j a_k), for j < _FINE."""
    n = len(modes)
    re, im = np.empty(_RUN), np.empty(_RUN)
    for k in range(n):
        step_re, step_im = _power(1.0, modes[k])
        re[0], im[0] = 1.0, 0.0
        for j in range(1, _RUN):
            re[j] = re[j - 1] * step_re - im[j - 1] * step_im
            im[j] = re[j - 1] * step_im + im[j - 1] * step_re
        jump_re, jump_im = _power(float(_RUN), modes[k])
        x, y = 1.0, 0.0
        for j0 in range(0, _FINE, _RUN):
            real = basis[k * _FINE + j0 : k * _FINE + j0 + _RUN]
            imag = basis[(n + k) * _FINE + j0 : (n + k) * _FINE + j0 + _RUN]
            for j in range(_RUN):
                real[j] = x * re[j] - y * im[j]
                imag[j] = -(x * im[j] + y * re[j])
            x, y = x * jump_re - y * jump_im, x * jump_im + y * jump_re


@jit
def _starts(modes, l):
    """(blocks, 2, n): exp(t a) at the first t of each block of _FINE * _COARSE."""
    n = len(modes)
    starts = np.empty((-(-l // (_FINE * _COARSE)), 2, n))
    for s in range(len(starts)):
        for k in range(n):
            starts[s, 0, k], starts[s, 1, k] = _power(float(s * _FINE * _COARSE), modes[k])
    return starts


@jit
def _coarse_powers(modes, powers, count, rows, width):
    """rows[i, k] = Re (p_k X_i) and rows[i, n+k] = Im (p_k X_i), where p is powers[0] and i powers[1].

    Rows are `width` apart. What is subnormal becomes 0.
    """
    n = len(modes)
    re, im, step_re, step_im = powers[0], powers[1], powers[2], powers[3]
    smallest = float(np.finfo(rows.dtype).tiny)
    for k in range(n):
        step_re[k], step_im[k] = _power(float(_FINE), modes[k])
    for i in range(count):
        real, imag = rows[i * width : i * width + n], rows[i * width + n : i * width + 2 * n]
        for k in range(n):
            x, y = re[k], im[k]
            x = 0.0 if abs(x) < smallest else x
            y = 0.0 if abs(y) < smallest else y
            real[k] = x
            imag[k] = y
            re[k] = x * step_re[k] - y * step_im[k]
            im[k] = x * step_im[k] + y * step_re[k]


@jit
def _times_row_number(rows, first, count, n):
    """The second half of each row: its first half times its number."""
    for i in range(count):
        row, weight = rows[i * 4 * n : (i + 1) * 4 * n], rows.dtype.type(first + i)
        for k in range(2 * n):
            row[2 * n + k] = weight * row[k]


@_exact
def _power(t, mode):
    """exp(t a) for a whole number t. The phase is a sum of two float64, the second of which is the first's rounding."""
    high = float(np.float32(mode[1]))  # of which t times as much is exact
    phase = t * mode[1]
    rest = (t * high - phase) + t * (mode[1] - high)
    c, s, size = math.cos(phase), math.sin(phase), math.exp(t * mode[0])
    return size * (c - rest * s), size * (s + rest * c)


@jit
def _cauchy_forward(v, z, w, out, c0, c1):
    m, _, l, _ = out.shape
    reciprocals, sums = np.empty((4, _NODES), v.dtype), np.empty((m, 2, _NODES), v.dtype)
    for c in range(c0, c1):
        for t0 in range(0, l, _NODES):
            count = min(_NODES, l - t0)
            sums[:] = 0
            for k in range(w.shape[1]):
                _reciprocals(z[0, t0 : t0 + count], z[1, t0 : t0 + count], w[c, k, 0], w[c, k, 1], reciprocals)
                x1, y1, x2, y2 = reciprocals[0], reciprocals[1], reciprocals[2], reciprocals[3]
                for r in range(m):
                    re, im, real, imag = v[r, c, k, 0], v[r, c, k, 1], sums[r, 0], sums[r, 1]
                    for t in range(count):
                        real[t] += re * (x1[t] + x2[t]) - im * (y1[t] - y2[t])
                        imag[t] += re * (y1[t] + y2[t]) + im * (x1[t] - x2[t])
            for r in range(m):
                for t in range(count):
                    out[r, c, t0 + t, 0] = sums[r, 0, t]
                    out[r, c, t0 + t, 1] = sums[r, 1, t]


@jit
def _cauchy_backward(dk, v, z, w, dv, dw, c0, c1):
    m, _, l, _ = dk.shape
    n = w.shape[1]
    reciprocals, up = np.empty((4, _NODES), v.dtype), np.empty((m, 2, _NODES), v.dtype)
    flow = np.empty((4, _NODES), v.dtype)
    dv_sums, dw_sums = np.empty((m, n, 2)), np.empty((n, 2))
    for c in range(c0, c1):
        dv_sums[:] = 0
        dw_sums[:] = 0
        for t0 in range(0, l, _NODES):
            count = min(_NODES, l - t0)
            for r in range(m):
                for t in range(count):
                    up[r, 0, t] = dk[r, c, t0 + t, 0]
                    up[r, 1, t] = dk[r, c, t0 + t, 1]
            for k in range(n):
                _reciprocals(z[0, t0 : t0 + count], z[1, t0 : t0 + count], w[c, k, 0], w[c, k, 1], reciprocals)
                flow[:] = 0
                for r in range(m):
                    _add_flow(reciprocals, up[r], v[r, c, k], count, flow, dv_sums[r, k])
                _add_square_flow(reciprocals, flow, count, dw_sums[k])
        dv[:, c] = dv_sums
        dw[c] = dw_sums


@jit
def _reciprocals(z_re, z_im, w_re, w_im, out):
    """out: the parts of 1 / (z - w) and of 1 / (z - conj(w))."""
    x1, y1, x2, y2 = out[0], out[1], out[2], out[3]
    for t in range(len(z_re)):
        x, above, below = z_re[t] - w_re, z_im[t] - w_im, z_im[t] + w_im
        first, second = 1 / (x * x + above * above), 1 / (x * x + below * below)
        x1[t] = x * first
        y1[t] = -above * first
        x2[t] = x * second
        y2[t] = -below * second


@jit
def _add_flow(reciprocals, up, v, count, flow, dv):
    """Add to dv, and to `flow` the parts of conj(v) g and of conj(v) conj(g), where g is the gradient of the kernel."""
    x1, y1, x2, y2 = reciprocals[0], reciprocals[1], reciprocals[2], reciprocals[3]
    a, b, c, d = flow[0], flow[1], flow[2], flow[3]
    g, h = up[0], up[1]
    re, im = v[0], v[1]
    dre = dim = re - re
    for t in range(count):
        dre += g[t] * (x1[t] + x2[t]) + h[t] * (y1[t] + y2[t])
        dim += h[t] * (x1[t] - x2[t]) - g[t] * (y1[t] - y2[t])
        a[t] += re * g[t] + im * h[t]
        b[t] += re * h[t] - im * g[t]
        c[t] += re * g[t] - im * h[t]
        d[t] -= re * h[t] + im * g[t]
    dv[0] += dre
    dv[1] += dim


@jit
def _add_square_flow(reciprocals, flow, count, dw):
    """dw += sum of conj(1 / (z - w)^2) conj(v) g + conj(v) conj(g) / (z - conj(w))^2."""
    x1, y1, x2, y2 = reciprocals[0], reciprocals[1], reciprocals[2], reciprocals[3]
    a, b, c, d = flow[0], flow[1], flow[2], flow[3]
    dre = dim = x1.dtype.type(0)
    for t in range(count):
        re1, im1 = x1[t] * x1[t] - y1[t] * y1[t], 2 * x1[t] * y1[t]
        re2, im2 = x2[t] * x2[t] - y2[t] * y2[t], 2 * x2[t] * y2[t]
        dre += re1 * a[t] + im1 * b[t] + re2 * c[t] - im2 * d[t]
        dim += re1 * b[t] - im1 * a[t] + re2 * d[t] + im2 * c[t]
    dw[0] += dre
    dw[1] += dim
