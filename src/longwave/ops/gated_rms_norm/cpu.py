"""The gated norm on the CPU: one pass over each group to sum its squares, one to scale it; parallel over rows.

The backward recomputes the root, which costs less than reading it would.
"""

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_math import jit, sigmoid, silu
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for

_BLOCK = 1 << 16  # elements
_PLAIN, _GATE_FIRST, _NORM_FIRST = 0, 1, 2


def forward(
    x: Tensor, weight: Tensor | None, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    inputs = _inputs(x, weight, z, norm_before_gate)
    e = x.shape[-1]
    y = torch.empty(x.shape, dtype=state_dtype(x.dtype))
    y_rows = y.view(-1, e).numpy()

    def body(i: int) -> None:
        _forward_rows(*inputs, eps, group_size, y_rows, *_rows_of_block(i, y_rows))

    parallel_for(_n_blocks(y_rows), body)
    return y.to(x.dtype)


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


def _n_blocks(rows: np.ndarray) -> int:
    return -(-len(rows) // _block_rows(rows))


def _block_rows(rows: np.ndarray) -> int:
    return max(1, _BLOCK // rows.shape[1])


def _rows_of_block(i: int, rows: np.ndarray) -> tuple[int, int]:
    size = _block_rows(rows)
    return i * size, min((i + 1) * size, len(rows))


@jit
def _forward_rows(x, x_step, z, z_step, weight, mode, eps, group, y, first, end):
    e = y.shape[1]
    for row in range(first, end):
        for start in range(0, e, group):
            u, w = x[row * x_step + start : row * x_step + start + group], weight[start : start + group]
            gate, out = z[row * z_step + start : row * z_step + start + group], y[row, start : start + group]
            total = y.dtype.type(0)
            if mode == _GATE_FIRST:
                for c in range(group):
                    out[c] = u[c] * silu(gate[c])
                    total += out[c] * out[c]
            else:
                for c in range(group):
                    out[c] = u[c]
                    total += u[c] * u[c]
            root = y.dtype.type(1) / np.sqrt(total / y.dtype.type(group) + y.dtype.type(eps))
            if mode == _NORM_FIRST:
                for c in range(group):
                    out[c] = out[c] * root * w[c] * silu(gate[c])
            else:
                for c in range(group):
                    out[c] = out[c] * root * w[c]


@jit
def _backward_rows(x, x_step, z, z_step, weight, mode, eps, group, dy, dy_step, dx, dz, dweight, first, end):
    """With u = x or x silu(z), s = 1 or silu(z), r = 1 / sqrt(mean(u^2) + eps) and v = dy weight s:

    du = r (v - u r^2 mean(v u)).
    """
    e, kind = dx.shape[1], dx.dtype
    one = kind.type(1)
    inner, outer = np.ones(group, kind), np.ones(group, kind)  # silu(z) where it comes before or after the norm
    for row in range(first, end):
        for start in range(0, e, group):
            xs, w = x[row * x_step + start : row * x_step + start + group], weight[start : start + group]
            gate, dys = z[row * z_step + start : row * z_step + start + group], dy[row * dy_step + start :]
            out, dw = dx[row, start : start + group], dweight[start : start + group]
            if mode == _GATE_FIRST:
                for c in range(group):
                    inner[c] = silu(gate[c])
            if mode == _NORM_FIRST:
                for c in range(group):
                    outer[c] = silu(gate[c])
            total, along = kind.type(0), kind.type(0)
            for c in range(group):
                u = xs[c] * inner[c]
                total += u * u
                along += dys[c] * w[c] * outer[c] * u
            root = one / np.sqrt(total / kind.type(group) + kind.type(eps))
            along *= root * root / kind.type(group)
            for c in range(group):
                u = xs[c] * inner[c]
                dw[c] += dys[c] * u * root * outer[c]
                out[c] = root * (dys[c] * w[c] * outer[c] - u * along)
            if mode != _PLAIN:
                dgate = dz[row, start : start + group]
                for c in range(group):
                    s = sigmoid(gate[c])
                    slope = s * (one + gate[c] * (one - s))
                    dgate[c] = slope * xs[c] * (out[c] if mode == _GATE_FIRST else dys[c] * w[c] * root)
                    out[c] *= inner[c]
