"""The gate of a scan with one rank, for kernels that leave it to torch."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def finished(
    y: Tensor, x: Tensor, z: Tensor | None, lengths: Tensor | None, finish: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """y (b, l, 1, h, p) gated and in x's dtype, if it is to be finished; and what it was, if that is to be kept."""
    nothing = x.new_empty(0)
    if not finish:
        return y, nothing
    if z is None:
        return y.to(x.dtype), nothing
    return (y * silu(_real(z, lengths, y.dtype))).to(x.dtype), y.to(x.dtype) if keep else nothing


def gate_gradients(
    dy: Tensor, z: Tensor | None, raw: Tensor, lengths: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of the ungated y, in `dtype`, and of z (b, l, h, p) from that of the gated one."""
    if z is None:
        return dy, dy.new_empty(0)
    z_exact, dy = _real(z, lengths, dtype), dy.to(dtype)
    sigmoid = z_exact.sigmoid()
    dz = dy * raw * sigmoid * (1 + z_exact * (1 - sigmoid))
    return dy * z_exact * sigmoid, dz.squeeze(2).to(z.dtype)


def _real(z: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z (b, l, 1, h, p), 0 behind the lengths, where it may have been NaN."""
    z = z.to(dtype).contiguous().unsqueeze(2)  # slices of a projection would take torch's slow path
    if lengths is None:
        return z
    there = torch.arange(z.shape[1], device=z.device) < lengths[:, None]
    return z.where(there[..., None, None, None], 0.0)
