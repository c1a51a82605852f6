"""Evenly spaced tokens through a dense state space, by few matrix products: kernel, response to a state, final state.

    x_t = Abar x_{t-1} + Bbar u_t,  y_t = C x_t        for each of d channels

All rest on Krylov sequences v, Abar v, Abar^2 v, ... built by doubling: with the first m of them, Abar^m gives the next
m. A sequence of l is the product of two of sqrt(l), so that no Abar^t is stored for every t.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from longwave.ops.ssm_kernel.api import newest_first


class DenseSystem(NamedTuple):
    """Abar (d, n, n), Bbar and C (d, n), in float64: a rounding error in Abar would be raised to the l-th power."""

    Abar: Tensor
    Bbar: Tensor
    C: Tensor

    def kernel(self, l: int) -> Tensor:
        """K_t = C Abar^t Bbar for t < l: (d, l), in float64."""
        q = _block(l)
        reached, power = krylov(self.Abar, self.Bbar, q)  # (d, q, n)
        read, _ = krylov(power.mT, self.C, -(-l // q))  # (d, l / q, n)
        return (read @ reached.mT).flatten(1)[:, :l]

    def response(self, state: Tensor, l: int) -> Tensor:
        """C Abar^(t+1) x_0 for x_0 = state (b, d, n): (b, l, d), in its dtype."""
        q = _block(l)
        read, power = krylov(self.Abar.mT, (self.C[:, None] @ self.Abar)[:, 0], q)  # (d, q, n)
        states, _ = krylov(power.mT, state, -(-l // q))  # (b, d, l / q, n)
        return (states @ read.mT.to(state.dtype)).flatten(2)[..., :l].transpose(1, 2)

    def final_state(self, u: Tensor, state: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """The state (b, d, n) after u (b, l, d), or after the first lengths[i] tokens of row i, in u's dtype."""
        b, l, d = u.shape
        q = _block(l)
        reached, power = krylov(self.Abar, self.Bbar, q)
        ages = pad(newest_first(u, lengths), (0, -l % q)).view(b, d, -1, q)
        sums = ages @ reached.to(u.dtype)  # (b, d, l / q, n), newest block first
        while sums.shape[2] > 1:
            sums = pad(sums, (0, 0, 0, sums.shape[2] % 2))
            sums = sums[:, :, 0::2] + sums[:, :, 1::2] @ power.mT.to(u.dtype)
            power = power @ power
        final = sums[:, :, 0]
        return final if state is None else final + self._after(state, l, lengths)

    def _after(self, state: Tensor, l: int, lengths: Tensor | None) -> Tensor:
        """Abar^l x_0, or Abar^lengths[i] x_0 for row i: (b, d, n)."""
        power, x = self.Abar, state[:, :, None]  # (b, d, 1, n)
        for bit in range(l.bit_length()):
            if bit:
                power = power @ power
            if lengths is not None:
                x = torch.where((lengths >> bit & 1).bool()[:, None, None, None], x @ power.mT.to(x.dtype), x)
            elif l >> bit & 1:
                x = x @ power.mT.to(x.dtype)
        return x[:, :, 0]


def krylov(M: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """v, M v, ..., M^(count-1) v for v (..., n) -> (..., count, n) in v's dtype; and M^m, m the power of 2 >= count."""
    rows = v[..., None, :]
    while rows.shape[-2] < count:
        rows = torch.cat([rows, rows @ M.mT.to(v.dtype)], dim=-2)
        M = M @ M
    return rows[..., :count, :], M


def _block(l: int) -> int:
    """The power of 2 nearest above sqrt(l)."""
    return 1 << (l.bit_length() + 1) // 2
