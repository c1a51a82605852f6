"""The gated norm on a GPU: a program holds some rows, or one group of some rows, and reads each number once.

With u what the norm is given, r = (mean(u^2) + eps)^-1/2 and v the gradient of u r:

    du = r (v - u r mean(v u r))
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import device_of, processors_of, sigmoid, silu


@triton.jit
def _forward_kernel(
    x, weight, z, y, eps, count, e, stride_x, stride_z,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    groups = e // GROUP
    program = tl.program_id(0)
    group = program % groups
    row = (program // groups).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    i = tl.arange(0, BG)[None, :]
    mask = (row < count) & (i < GROUP)
    column = group * GROUP + i
    u = tl.load(x + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        gate = silu(tl.load(z + row * stride_z + column, mask=mask, other=0.0).to(tl.float32))
        if not BEFORE:
            u *= gate
    u *= tl.rsqrt(tl.sum(u * u, 1)[:, None] / GROUP + eps)
    if WEIGHT:
        u *= tl.load(weight + column, mask=i < GROUP, other=0.0).to(tl.float32)
    if GATE and BEFORE:
        u *= gate
    tl.store(y + row * e + column, u.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy, x, weight, z, dx, dweight, dz, eps, count, e, per_program, stride_y, stride_x, stride_z,
    WEIGHT: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    groups = e // GROUP
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    i = tl.arange(0, BG)[None, :]
    column = group * GROUP + i
    scale = tl.load(weight + column, mask=i < GROUP, other=0.0).to(tl.float32) if WEIGHT else 1.0
    total = tl.zeros((BR, BG), tl.float32)
    for k in tl.range(per_program, num_stages=STAGES):
        row = (part.to(tl.int64) * per_program + k) * BR + tl.arange(0, BR)[:, None]
        mask = (row < count) & (i < GROUP)
        value = tl.load(x + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * stride_y + column, mask=mask, other=0.0).to(tl.float32)
        u = value
        if GATE:
            raw = tl.load(z + row * stride_z + column, mask=mask, other=0.0).to(tl.float32)
            share = sigmoid(raw)
            gate = raw * share
            slope = share + gate * (1.0 - share)
            if not BEFORE:
                u = value * gate
        r = tl.rsqrt(tl.sum(u * u, 1)[:, None] / GROUP + eps)
        normed = u * r
        if GATE and BEFORE:
            dgate = grad * normed * scale
            grad *= gate
        total += grad * normed
        v = grad * scale
        du = r * (v - normed * (tl.sum(v * normed, 1)[:, None] / GROUP))
        if GATE and not BEFORE:
            dgate = du * value
            du *= gate
        tl.store(dx + row * e + column, du.to(dx.dtype.element_ty), mask=mask)
        if GATE:
            tl.store(dz + row * e + column, (dgate * slope).to(dz.dtype.element_ty), mask=mask)
    if WEIGHT:
        tl.store(dweight + part.to(tl.int64) * e + column, tl.sum(total, 0)[None, :], mask=i < GROUP)


_NUMBERS = 1024  # of a program at once
# Bytes of shared memory for rows that are on their way while others are worked on; AMD's has 64 KB in all.
_WAITING = 48 * 1024 if torch.version.hip else 96 * 1024


def forward(x, weight, z, eps, group_size, norm_before_gate):
    flat, gate = _rows(x), None if z is None else _rows(z)
    count, e = flat.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flags = _flags(weight, z, group_size, norm_before_gate)
    with device_of(x):
        _forward_kernel[(triton.cdiv(count, flags["BR"]) * (e // group_size),)](
            flat, weight, gate, y, eps, count, e, flat.stride(0), 0 if gate is None else gate.stride(0), **flags
        )
    return y


def backward(dy, x, weight, z, eps, group_size, norm_before_gate):
    flat, gate, grad = _rows(x), None if z is None else _rows(z), _rows(dy)
    count, e = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = x.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
    flags = _flags(weight, z, group_size, norm_before_gate)
    flags["num_warps"] = 8 if flags["BG"] >= 4096 else 4
    tiles, groups = triton.cdiv(count, flags["BR"]), e // group_size
    programs = processors_of(x) * (8 if flags["BG"] <= 1024 else 2 if flags["BG"] == 2048 else 1)
    per_program = triton.cdiv(tiles, max(1, programs // groups))  # each has a part of dweight of its own
    parts = triton.cdiv(tiles, per_program)
    dweight = torch.empty(parts, e, dtype=torch.float32, device=x.device)
    with device_of(x):
        _backward_kernel[(parts * groups,)](
            grad, flat, weight, gate, dx, dweight, dz, eps, count, e, per_program,
            grad.stride(0), flat.stride(0), 0 if gate is None else gate.stride(0),
            STAGES=1 + min(2, _WAITING // (3 * flags["BG"] * flags["BR"] * x.element_size())), **flags,
        )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else dweight.sum(0).to(weight.dtype), dz


def _rows(x: Tensor) -> Tensor:
    """(rows, e) with a contiguous last axis: a view where the leading axes allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _flags(weight: Tensor | None, z: Tensor | None, group_size: int, norm_before_gate: bool) -> dict:
    BG = triton.next_power_of_2(group_size)
    return {
        "WEIGHT": weight is not None, "GATE": z is not None, "BEFORE": norm_before_gate, "GROUP": group_size, "BG": BG,
        "BR": max(1, min(16, _NUMBERS // BG)), "num_warps": 4 if BG <= 4096 else 8,
    }  # fmt: skip
