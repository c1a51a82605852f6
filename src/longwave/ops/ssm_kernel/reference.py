"""The definitions, all terms of each sum at once.

    K_t = 2 Re sum_n C_n exp(t a_n)                       Gu et al. 2022, arXiv:2206.11893 (S4D), section 3.2
    S_n = sum_t f_t exp(t a_n)                            its transpose
    k_i = sum_n v_n / (z_i - w_n) + conj(v_n) / (z_i - conj(w_n))
                                                          Gu et al. 2022, arXiv:2111.00396 (S4), algorithm 1

Complex numbers come and go as pairs of reals. Exponentials are taken in float64 and rounded: in float32, t a_n of 1e5
radians would be off by 0.01.
"""

import torch
from torch import Tensor

from longwave.ops.checks import state_dtype


def vandermonde_kernel(C: Tensor, dtA: Tensor, l: int) -> Tensor:
    """C (m, e, n, 2), dtA (e, n, 2) -> (m, e, l)."""
    C = torch.view_as_complex(C.to(state_dtype(C.dtype)))
    return 2 * torch.einsum("men,enl->mel", C, _exponentials(dtA, l).to(C.dtype)).real


def moments(f: Tensor, dtA: Tensor) -> Tensor:
    """f (m, e, l), dtA (e, n, 2) -> (m, e, n, 2)."""
    powers = torch.view_as_real(_exponentials(dtA, f.shape[-1])).to(state_dtype(f.dtype))
    return torch.einsum("mel,enlp->menp", f.to(powers.dtype), powers)


def cauchy_kernel(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """v (m, e, n, 2), z (l, 2), w (e, n, 2) -> (m, e, l, 2)."""
    dtype = state_dtype(v.dtype)
    v, z, w = (torch.view_as_complex(t.to(dtype).contiguous()) for t in (v, z, w))
    above, below = 1 / (z - w[..., None]), 1 / (z - w.conj()[..., None])  # (e, n, l)
    return torch.view_as_real(torch.einsum("men,enl->mel", v, above) + torch.einsum("men,enl->mel", v.conj(), below))


def _exponentials(dtA: Tensor, l: int) -> Tensor:
    """exp(t dtA) for t = 0..l-1: (e, n, l) complex."""
    wide = torch.float32 if dtA.device.type == "mps" else torch.float64  # which has no float64
    t = torch.arange(l, device=dtA.device, dtype=wide)
    return torch.exp(torch.view_as_complex(dtA.to(wide).contiguous())[..., None] * t)
