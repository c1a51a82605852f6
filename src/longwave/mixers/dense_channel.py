"""What lti and s4 share: a dense real system for each channel, of which S4 knows a shorter form."""

from abc import abstractmethod
from collections.abc import Callable
from itertools import repeat

import torch
from torch import Tensor

from longwave.mixers.per_channel import PerChannel, System
from longwave.ops.checks import wide_dtype
from longwave.ops.dense_ssm import DenseSystem
from longwave.ops.discretize import discretize

Token = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # state (b, d, n), u (b, d) -> the state after u, and C x


class DenseChannel(PerChannel):
    """x' = A x + B u, y = C x + D u with A (n, n) real, for each channel.

    `recurrent` and `continuous` go from token to token in Python, which costs a few operations for each. Packed
    documents are therefore convolved.
    """

    scans = "never"

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (d, n, n), B and C (d, n) in `wide_dtype`, in steps of the trained rate: dt is multiplied into A and B."""

    def _system(self, dt: float) -> System:
        A, B, C = self.dense()
        return DenseSystem(*discretize(A, B, dt, self.config.discretization), C)

    def _recurrence(self, dtype: torch.dtype) -> Callable[[Tensor | float], Token]:
        """For tokens that last dt, a number or (b,): the recurrence, in `dtype`."""
        A, B, C = self.dense()
        one, C = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), C.to(dtype)

        def at(dt: Tensor | float) -> Token:
            steps = dt.to(A.dtype)[:, None] if isinstance(dt, Tensor) else dt
            Abar, Bbar = discretize(A, B, steps, self.config.discretization)
            change, reach = (Abar - one).to(dtype), Bbar.to(dtype)

            def token(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
                # Not Abar x: a small step loses no digits to the 1.
                x = x + (change @ x[..., None])[..., 0] + reach * u[..., None]
                return x, (x * C).sum(-1)

            return token

        return at

    def _convolve(self, u, dt, state, reset, lengths):
        y, after = super()._convolve(u, dt, None if state is None else state.flatten(2), reset, lengths)
        return y, after.view(-1, *self.state_shape)

    def _scan(self, u, dt, state, reset, lengths):
        wide = self._wide(u)  # which costs little beside the calls, and leaves no rounding to add up
        zeros = wide.new_zeros(len(u), *self.state_shape)
        x = (zeros if state is None else self._wide(state)).flatten(2)
        at, ys = self._recurrence(wide.dtype), []
        tokens = map(at, dt.unbind(1)) if isinstance(dt, Tensor) else repeat(at(dt))
        for t, (u_t, token) in enumerate(zip(wide.unbind(1), tokens, strict=False)):
            before = x if reset is None else torch.where(reset[:, t, None, None], 0.0, x)
            after, y = token(before, u_t)
            x = after if lengths is None else torch.where((t < lengths)[:, None, None], after, x)
            ys.append(y)
        y = torch.stack(ys, 1).to(u.dtype)
        return self._skip(y, u), x.view(-1, *self.state_shape).to(u.dtype)

    def _token(self, u, state, dt):
        after, y = self._recurrence(u.dtype)(dt)(state.flatten(2), u)
        state.copy_(after.view_as(state))
        return self._skip(y, u)

    def _skip(self, y: Tensor, u: Tensor) -> Tensor:
        return y if self.D is None else y + self.D * u

    def _times_steps(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """dt A and dt B of every channel, from A (n_ssm, n, n) and B (n_ssm, n)."""
        steps = self.inv_dt.to(A.dtype).exp()
        return steps[:, None, None] * self._per_channel(A), steps[:, None] * self._per_channel(B)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(wide_dtype(tensor.device))
