"""What the trapezoidal rule does at the ends of a sequence, and its step sizes' gradients: small, the same everywhere.

As in `mamba3_scan`: gamma_j = trap_j dt_j, early_j = (1 - trap_j) dt_j, w_j = gamma_j + early_{j+1}.
"""

import torch
from torch import Tensor


class Trapezoid:
    """dt, A and trap (b, l, h) in the accumulation dtype, 0 behind the lengths, where they may have been NaN."""

    def __init__(self, dt: Tensor, A: Tensor, trap: Tensor, reset: Tensor | None, lengths: Tensor | None, dtype):
        self.lengths, self.dtype = lengths, dtype
        self.dt, self.A, self.trap = (self.exact(t) for t in (dt, A, trap))
        self.follows = None if reset is None else ~reset[..., None]  # the token before, or the initial state
        if lengths is not None:
            there = (torch.arange(dt.shape[1], device=dt.device) < lengths[:, None])[..., None]
            self.follows = there if self.follows is None else self.follows & there
            self.dt, self.A, self.trap = (t.where(there, 0.0) for t in (self.dt, self.A, self.trap))

    def exact(self, t: Tensor) -> Tensor:
        return t.detach().to(self.dtype)

    def early(self, first: bool = False) -> Tensor:
        """How much the token before counts (b, l, h), or for the first token only (b, h)."""
        at = (slice(None), 0) if first else ()
        early = (1 - self.trap[at]) * self.dt[at]
        return early if self.follows is None else early.where(self.follows[at], 0.0)

    def entry(self, ssm: Tensor, k: Tensor, v: Tensor, mimo_x: Tensor) -> Tensor:
        """The state (b, h, p, n) before the first token, with what that takes from the token before it."""
        outer = torch.einsum("bhp,hrp,brhn->bhpn", self.exact(v), mimo_x, self.exact(k))
        return (self.exact(ssm) + self.early(first=True)[..., None, None] * outer).contiguous()

    def last(self, x: Tensor, v: Tensor) -> Tensor:
        """x (b, h, p) of the last token, v in rows without one."""
        if self.lengths is None:
            return x[:, -1].clone()
        return torch.where((self.lengths > 0)[:, None, None], x[self.last_tokens()], v.to(x.dtype))

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """Row and place of each row's last token; place 0 where there is none."""
        assert self.lengths is not None
        return torch.arange(len(self.lengths), device=self.lengths.device), (self.lengths - 1).clamp(min=0)

    def entry_gradients(self, dstate, k, v, mimo_x, dk, dv, dx):
        """Gradients of k, v, the first `early` and mimo_x through `entry` and, in rows without a token, from dk and dv.

        Elsewhere dv belongs to the last token: it is added to dx.
        """
        k, v, dk, dv = (self.exact(t) for t in (k, v, dk, dv))
        if self.lengths is None:
            dx[:, -1] += dv
            dk, dv = torch.zeros_like(dk), torch.zeros_like(dv)
        else:
            empty = (self.lengths == 0)[:, None, None]
            dx[self.last_tokens()] += dv.where(~empty, 0.0)
            dk, dv = dk.where(empty[..., None], 0.0), dv.where(empty, 0.0)
        first = self.early(first=True)
        read = torch.einsum("bhpn,brhn->bhrp", dstate, k)
        dfirst = (read * mimo_x * v[:, :, None]).sum((2, 3))
        read = read * first[..., None, None]
        written = torch.einsum("bh,bhpn,bhp,hrp->brhn", first, dstate, v, mimo_x)
        return dk + written, dv + (read * mimo_x).sum(2), dfirst, (read * v[:, :, None]).sum(0)

    def size_gradients(self, ddt, ddtA, dgamma, dweight, dfirst):
        """Gradients of dt, A and trap from those of dt (by way of the angles), dt A, gamma, w and the first `early`."""
        dearly = torch.cat([dfirst[:, None], dweight[:, :-1]], dim=1)
        if self.follows is not None:
            dearly = dearly.where(self.follows, 0.0)
        dgamma = dgamma + dweight
        ddt = ddt + self.A * ddtA + self.trap * dgamma + (1 - self.trap) * dearly
        return ddt, self.dt * ddtA, self.dt * (dgamma - dearly)
