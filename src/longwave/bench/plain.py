"""The operators as one writes them in plain torch, for the kernels to be timed beside.

Each takes the keyword arguments of the operator, those that its benchmark uses, and returns y.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fft import irfft, rfft
from torch.nn.functional import conv1d, rms_norm, silu, softplus

from longwave.bench.calls import Adapted
from longwave.ops.mamba3_scan import Mamba3ScanState


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any) -> Tensor:
    """A loop over time, with what can be done outside of it done there.

    Tokens are taken out by `unbind`: the backward of an index fills a tensor of the whole sequence for each token.
    """
    b, _, e = x.shape
    state = x.new_zeros(b, e, A.shape[1])
    ys = []
    for dt_t, dtx_t, B_t, C_t in zip(*(t.unbind(1) for t in (dt, dt * x, B, C)), strict=True):
        state = torch.exp(dt_t[..., None] * A) * state + dtx_t[..., None] * B_t[:, None, :]  # (b, e, n)
        ys.append((state @ C_t[..., None])[..., 0])  # (b, e)
    return torch.stack(ys, dim=1) + D * x


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    e, w = weight.shape
    y = conv1d(x.transpose(1, 2), weight[:, None], bias, padding=w - 1, groups=e)[..., : x.shape[1]]  # (b, e, l)
    return silu(y).transpose(1, 2)


def fft_conv(x: Tensor, kernel: Tensor, D: Tensor, transpose: bool = False, **_: Any) -> Tensor:
    """`transpose`: torch's FFT runs along contiguous rows, at the price of turning x round."""
    l, time = x.shape[1], -1 if transpose else 1
    rows = x.transpose(1, 2).contiguous() if transpose else x
    filters = rfft(kernel, 2 * l)
    product = rfft(rows, 2 * l, dim=time) * (filters if transpose else filters.T)
    y = irfft(product, 2 * l, dim=time).narrow(time, 0, l)
    return (y.transpose(1, 2) if transpose else y) + D * x


def _fft_conv_rows(x: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
    l = x.shape[-1]
    y = irfft(rfft(x.float(), 2 * l) * rfft(kernel, 2 * l), 2 * l)[..., :l]
    return (y + D[:, None] * x).to(x.dtype).transpose(1, 2)


FFT_CONV_ROWS = Adapted(
    lambda x, kernel, D, **_: {"x": x.transpose(1, 2).contiguous(), "kernel": kernel, "D": D}, _fft_conv_rows
)
"""With channels first, which torch's FFT likes best, and in float32, which it has."""


def diagonal_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **_: Any) -> Tensor:
    """Its zero-order hold, as a loop over time in complex numbers."""
    A, B, C = (torch.view_as_complex(t) for t in (A, B, C))
    state, ys = torch.zeros_like(A).expand(len(u), *A.shape), []
    for u_t, dt_t in zip(u.unbind(1), dt.unbind(1), strict=True):
        decay = torch.exp(dt_t[..., None] * A)  # (b, e, n)
        state = decay * state + (decay - 1) / A * B * u_t[..., None]
        ys.append(2 * (state * C).real.sum(-1))
    return torch.stack(ys, dim=1) + D * u


def diagonal_scan_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **_: Any
) -> Tensor:
    A, B, C, h = (torch.view_as_complex(t) for t in (A, B, C, state))
    decay = torch.exp(dt[..., None] * A)
    h.mul_(decay).add_((decay - 1) / A * B * u[..., None])
    return 2 * (h * C).real.sum(-1) + D * u


def vandermonde_kernel(C: Tensor, dtA: Tensor, l: int) -> Tensor:
    """The product as it is written, for 32 channels at a time: all exponentials of 1024 would take 4 GB."""
    t, weights, modes = torch.arange(l, device=C.device), torch.view_as_complex(C), torch.view_as_complex(dtA)
    blocks = zip(weights.split(32, 1), modes.split(32), strict=True)
    return torch.cat([2 * torch.einsum("men,enl->mel", c, torch.exp(a[..., None] * t)).real for c, a in blocks], dim=1)


def factored_vandermonde_kernel(C: Tensor, dtA: Tensor, l: int) -> Tensor:
    """With t = 128 i + j: exponentials of 128 i and of j alone, and a batched product."""
    weights, modes = torch.view_as_complex(C), torch.view_as_complex(dtA)[..., None]
    blocks, inner = (torch.arange(n, device=C.device) for n in (-(-l // 128), 128))
    coarse, fine = torch.exp(128 * modes * blocks), torch.exp(modes * inner)
    K = 2 * torch.einsum("meni,enj->meij", weights[..., None] * coarse, fine).real
    return K.flatten(2)[..., :l]


def gated_rms_norm(x: Tensor, weight: Tensor, z: Tensor, eps: float, **_: Any) -> Tensor:
    return rms_norm(x * silu(z), (x.shape[-1],), weight.to(x.dtype), eps)


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    **_: Any,
) -> Tensor:
    dt = softplus(dt + dt_bias)
    state.mul_(torch.exp(dt[..., None] * A)).add_((dt * x)[..., None] * B[:, None, :])  # (b, e, n)
    return ((state @ C[..., None])[..., 0] + D * x) * silu(z)


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, **_: Any
) -> Tensor:
    """For one group of B and C."""
    dt = softplus(dt + dt_bias)  # (b, h)
    state.mul_(torch.exp(dt * A)[..., None, None]).add_((dt[..., None] * x)[..., None] * B[:, :, None, :])
    return (state @ C[..., None])[..., 0] + D[:, None] * x


def mamba3_scan_step(
    state: Mamba3ScanState,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    z: Tensor,
    **_: Any,
) -> Tensor:
    """For one rank, and one group of B and C."""
    angle, ssm, k, v = state
    angle.add_(dt[..., None] * angles[:, None])  # (b, h, s)
    angle.sub_(2 * math.pi * torch.round(angle / (2 * math.pi)))
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(u: Tensor) -> Tensor:
        pairs = torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous())  # (b, h, n / 2)
        s = angle.shape[-1]
        pairs = torch.cat([pairs[..., :s] * turn, pairs[..., s:]], dim=-1)
        return torch.view_as_real(pairs).flatten(-2)

    k_now, q = rotated(B[:, 0] + B_bias[:, 0]), rotated(C[:, 0] + C_bias[:, 0])  # (b, h, n)
    early, late = ((1 - trap) * dt)[..., None] * v, (trap * dt)[..., None] * x  # (b, h, p)
    decay = torch.exp(dt * A)[..., None, None]
    ssm.add_(early[..., None] * k[:, 0, :, None]).mul_(decay).add_(late[..., None] * k_now[:, :, None])
    k.copy_(k_now[:, None])
    v.copy_(x)
    return ((ssm @ q[..., None])[..., 0] + D[:, None] * x) * silu(z)


def causal_conv1d_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    window = torch.cat((state, x[:, None]), dim=1)  # (b, w, e)
    state.copy_(window[:, 1:])
    return silu((window * weight.T).sum(1) + bias)
