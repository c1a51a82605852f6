"""The gated norm on the CPU: one pass over each group to sum its squares, one to scale it; parallel over rows.

The backward recomputes the root, which costs less than reading it would.
"""

import functools
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_math import jit, silu, silu_slope
from longwave.ops.openmp import carray, next_ticket, pointer, region, run
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for

_FORWARD_BLOCK = 1 << 15  # elements, for which another thread is worth starting
_BACKWARD_BLOCK = 1 << 16  # elements that share a sum for the weight
_PLAIN, _GATE_FIRST, _NORM_FIRST = 0, 1, 2


def forward(
    x: Tensor, weight: Tensor | None, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    e, dtype = x.shape[-1], state_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=dtype)
    # The kernel gets addresses only, so these names keep the tensors alive; 0 stands for what is absent.
    x_rows, x_step = _rows(x, dtype)
    z_rows, z_step = (None, 0) if z is None else _rows(z, dtype)
    scale = None if weight is None else _rows(weight, dtype)[0]
    (eps_bits,) = struct.unpack("q", struct.pack("d", eps))
    words = [x.numel() // e, e, group_size, norm_before_gate, eps_bits, x_step, z_step]
    words += [0 if t is None else t.data_ptr() for t in (x_rows, z_rows, scale, y)]
    run(_forward_kernel(dtype), words, n_blocks=max(1, x.numel() // _FORWARD_BLOCK))
    return y if dtype is x.dtype else y.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _inputs(x, weight, z, norm_before_gate)
    e, dtype = x.shape[-1], state_dtype(x.dtype)
    dy_flat, (dy_step,) = flat(dy.reshape(-1, e).to(dtype))
    dx = torch.empty(x.shape, dtype=dtype)
    dz = torch.empty(0 if z is None else x.shape, dtype=dtype)
    dx_rows, dz_rows = dx.view(-1, e).numpy(), dz.view(-1, e).numpy()
    dweights = torch.zeros(_n_blocks(dx_rows), e, dtype=dtype)  # one row per block, summed in a fixed order
    partial = dweights.numpy()

    def body(i: int) -> None:
        rows = _rows_of_block(i, dx_rows)
        _backward_rows(*inputs, eps, group_size, dy_flat, dy_step, dx_rows, dz_rows, partial[i], *rows)

    parallel_for(len(partial), body)
    dweight = x.new_empty(0) if weight is None else dweights.sum(0).to(weight.dtype)
    return dx.to(x.dtype), dweight, dz.to(x.dtype if z is None else z.dtype)


def _inputs(x: Tensor, weight: Tensor | None, z: Tensor | None, norm_before_gate: bool) -> tuple:
    """x, its row stride, z, its row stride, weight, mode."""
    e, dtype = x.shape[-1], state_dtype(x.dtype)
    x_flat, (x_step,) = flat(x.reshape(-1, e).to(dtype))
    z_flat, (z_step,) = (x_flat, (x_step,)) if z is None else flat(z.reshape(-1, e).to(dtype))
    scale = torch.ones(e, dtype=dtype) if weight is None else weight.detach().to(dtype).contiguous()
    mode = _PLAIN if z is None else _NORM_FIRST if norm_before_gate else _GATE_FIRST
    return x_flat, x_step, z_flat, z_step, scale.numpy(), mode


def _rows(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """`t` in `dtype` as rows that are contiguous, and the step from row to row."""
    if t.dtype is not dtype:  # even a `to` that does nothing costs 1 us
        t = t.to(dtype)
    if t.is_contiguous():
        return t, t.shape[-1]
    t = t.reshape(-1, t.shape[-1])
    t = t if t.stride(1) == 1 else t.contiguous()
    return t, t.stride(0)


def _n_blocks(rows: np.ndarray) -> int:
    return -(-len(rows) // _block_rows(rows))


def _block_rows(rows: np.ndarray) -> int:
    return max(1, _BACKWARD_BLOCK // rows.shape[1])


def _rows_of_block(i: int, rows: np.ndarray) -> tuple[int, int]:
    size = _block_rows(rows)
    return i * size, min((i + 1) * size, len(rows))


@functools.cache
def _forward_kernel(dtype: torch.dtype) -> Any:
    """The parallel region of `forward`: threads draw rows."""
    scalar, size = (np.float64, 8) if dtype == torch.float64 else (np.float32, 4)

    @region
    def kernel(words):
        _, rows, e, group, norm_first, _, x_step, z_step, x, z, weight, y = carray(words, 12, np.int64)
        eps = scalar(carray(words, 6, np.float64)[5])
        row = next_ticket(words)
        while row < rows:
            for start in range(0, e, group):
                u = carray(pointer(x + (row * x_step + start) * size), group, scalar)
                out = carray(pointer(y + (row * e + start) * size), group, scalar)
                if z:
                    gate = carray(pointer(z + (row * z_step + start) * size), group, scalar)
                    if norm_first:
                        _normalise(u, eps, out)
                        for c in range(group):
                            out[c] *= silu(gate[c])
                    else:
                        for c in range(group):
                            out[c] = u[c] * silu(gate[c])
                        _normalise(out, eps, out)
                else:
                    _normalise(u, eps, out)
                if weight:
                    w = carray(pointer(weight + start * size), group, scalar)
                    for c in range(group):
                        out[c] *= w[c]
            row = next_ticket(words)

    return kernel


@jit
def _normalise(u, eps, out):
    kind = u.dtype.type
    total = kind(0)
    for c in range(len(u)):
        total += u[c] * u[c]
    root = kind(1) / np.sqrt(total / kind(len(u)) + eps)
    for c in range(len(u)):
        out[c] = u[c] * root


@jit
def _backward_rows(x, x_step, z, z_step, weight, mode, eps, group, dy, dy_step, dx, dz, dweight, first, end):
    """With u = x or x silu(z), r = 1 / sqrt(mean(u^2) + eps) and v = dy weight or dy weight silu(z):

    du = r (v - u r^2 mean(v u)).
    """
    e, kind = dx.shape[1], dx.dtype
    one = kind.type(1)
    u, v, open_gate = np.empty(group, kind), np.empty(group, kind), np.empty(group, kind)
    for row in range(first, end):
        for start in range(0, e, group):
            xs, w = x[row * x_step + start : row * x_step + start + group], weight[start : start + group]
            gate, dys = z[row * z_step + start : row * z_step + start + group], dy[row * dy_step + start :]
            out, dw = dx[row, start : start + group], dweight[start : start + group]
            if mode == _PLAIN:
                u[:], v[:] = xs, w
            else:
                for c in range(group):
                    open_gate[c] = silu(gate[c])
                for c in range(group):
                    u[c] = xs[c] * open_gate[c] if mode == _GATE_FIRST else xs[c]
                    v[c] = w[c] if mode == _GATE_FIRST else w[c] * open_gate[c]
            total, along = kind.type(0), kind.type(0)
            for c in range(group):
                v[c] *= dys[c]
                total += u[c] * u[c]
                along += v[c] * u[c]
            root = one / np.sqrt(total / kind.type(group) + kind.type(eps))
            along *= root * root / kind.type(group)
            for c in range(group):
                out[c] = root * (v[c] - u[c] * along)
            if mode == _NORM_FIRST:
                for c in range(group):
                    dw[c] += dys[c] * root * u[c] * open_gate[c]
            else:
                for c in range(group):
                    dw[c] += dys[c] * root * u[c]
            if mode != _PLAIN:
                _gate_gradients(xs, gate, open_gate, dys, w, root, mode, out, dz[row, start : start + group])


@jit
def _gate_gradients(x, gate, open_gate, dy, w, root, mode, out, dgate):
    """dz from the slope of silu(z); with the gate first, `out` holds d(x silu(z)) and becomes dx."""
    for c in range(len(out)):
        dgate[c] = silu_slope(gate[c]) * x[c]
    if mode == _GATE_FIRST:
        for c in range(len(out)):
            dgate[c] *= out[c]
            out[c] *= open_gate[c]
    else:
        for c in range(len(out)):
            dgate[c] *= dy[c] * w[c] * root
