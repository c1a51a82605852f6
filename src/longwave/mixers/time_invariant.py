"""What lti, s4d, s4 and s5 share: one continuous system x' = A x + B u, y = C x + D u, seen in three ways that agree.

    convolution   the whole sequence at once, every token dt apart: for training
    recurrent     one token after the other: for streaming, and for documents packed into a row
    continuous    each token with its own duration: for irregular stamps

The state is what the system is in after the last token, so that any view goes on where any other stopped.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype
from longwave.mixers.ssm_parameters import Float32Parameters
from longwave.ops.checks import check_documents, check_shape, state_dtype

LR_SCALE = 0.25  # 0.001 beside 0.004, in most of S4's published configurations


class SSMState(NamedTuple):
    ssm: Tensor  # the system's state x; real, or pairs of real and imaginary part; float32


@dataclass(frozen=True, kw_only=True)
class SSMConfig:
    """`d_state`: entries of x, where a complex number and its conjugate are two. `skip`: the term D u.

    dt begins log-uniform in [dt_min, dt_max].
    """

    kind: ClassVar[str]
    d_state: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    skip: bool = True

    def __post_init__(self):
        check_positive(self, "d_state")
        if not 0 < self.dt_min <= self.dt_max:
            raise UsageError(f"{self.kind}: need 0 < dt_min <= dt_max, got dt_min={self.dt_min}, dt_max={self.dt_max}")


class TimeInvariant(Float32Parameters, ABC):
    """The three views, `forward` that chooses among them, and `step`; a mixer adds its system.

    `dt` counts in the steps the mixer was trained on: None is 1; 0.5 is the same signal sampled twice as often; a
    tensor (b, l) is the time that each token lasts, up to its own stamp. Parameters of the system stay in float32 when
    the module is cast to 16 bits, and the system is computed in float32 at least, whatever autocast says.
    """

    slow_parameters: ClassVar[tuple[str, ...]] = ()
    scans: ClassVar[Literal["never", "packed", "always"]] = "packed"  # when `forward` prefers `recurrent`
    state_shape: tuple[int, ...]  # of one sequence
    config: Any
    C: nn.Parameter

    def mark(self) -> None:
        """No weight decay, and `_lr_scale` for optimisers that give these parameters a smaller learning rate."""
        for name in self.slow_parameters:
            parameter = getattr(self, name)
            parameter._no_weight_decay, parameter._lr_scale = True, LR_SCALE

    def forward(
        self,
        x: Tensor,
        state: SSMState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, SSMState]:
        """`continuous` for a tensor dt, otherwise `convolution` or `recurrent`, whichever is faster: see `scans`."""
        if isinstance(dt, Tensor):
            return self.continuous(x, dt, state, reset=reset, lengths=lengths)
        recurrent = self.scans == "always" or (self.scans == "packed" and reset is not None)
        view = self.recurrent if recurrent else self.convolution
        return view(x, state, reset=reset, lengths=lengths, dt=dt)

    def convolution(
        self,
        x: Tensor,
        state: SSMState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: float | None = None,
    ) -> tuple[Tensor, SSMState]:
        """The convolution of x with the system's kernel, plus what is left of `state`; and the true state after it."""
        return self._run(self._convolve, x, self._rate(dt), state, reset, lengths)

    def recurrent(
        self,
        x: Tensor,
        state: SSMState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: float | None = None,
    ) -> tuple[Tensor, SSMState]:
        """x_t = Abar x_{t-1} + Bbar u_t and y_t = C x_t + D u_t, from the first token to the last."""
        return self._run(self._scan, x, self._rate(dt), state, reset, lengths)

    def continuous(
        self,
        x: Tensor,
        dt: Tensor,
        state: SSMState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, SSMState]:
        """The recurrence with dt (b, l): token t holds for the time dt_t before its stamp, at which y_t is read."""
        check_shape(self.config.kind, "dt", dt, tuple(x.shape[:2]), "(b, l)")
        return self._run(self._scan, x, dt, state, reset, lengths)

    @torch.no_grad()
    def step(self, x: Tensor, state: SSMState, dt: Tensor | float = 1.0) -> Tensor:
        """One token: x (b, d) -> y (b, d), the state in place. `dt`, how long it lasts: a number, or (b,)."""
        if isinstance(dt, Tensor):
            check_shape(self.config.kind, "dt", dt, (len(x),), "(b,)")
        else:
            dt = self._rate(dt)
        with torch.autocast(x.device.type, enabled=False):
            y = self._token(x.to(state_dtype(x.dtype)), state.ssm, dt)
        return self._mix(y.to(x.dtype))

    def _run(
        self,
        view: Callable[..., tuple[Tensor, Tensor]],
        x: Tensor,
        dt: Tensor | float,
        state: SSMState | None,
        reset: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, SSMState]:
        check_documents(self.config.kind, reset, lengths, x.shape[0], x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            y, after = view(x.to(state_dtype(x.dtype)), dt, state and state.ssm, reset, lengths)
        return self._mix(y.to(x.dtype)), SSMState(after)

    @abstractmethod
    def _convolve(
        self, u: Tensor, dt: float, state: Tensor | None, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """u (b, l, d), in the state's dtype -> y (b, l, d) and the state after it."""

    @abstractmethod
    def _scan(
        self, u: Tensor, dt: Tensor | float, state: Tensor | None, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `_convolve`, token by token; dt a number or (b, l)."""

    @abstractmethod
    def _token(self, u: Tensor, state: Tensor, dt: Tensor | float) -> Tensor:
        """u (b, d) -> y (b, d), `state` in place; dt a number or (b,)."""

    @abstractmethod
    def _mix(self, y: Tensor) -> Tensor:
        """What follows the system, (..., d) -> (..., d)."""

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SSMState:
        dtype = state_dtype(compute_dtype(self.C, dtype))
        return SSMState(torch.zeros(b, *self.state_shape, dtype=dtype, device=device or self.C.device))

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        return math.prod(self.state_shape) * state_dtype(compute_dtype(self.C, dtype)).itemsize

    def _rate(self, dt: float | None) -> float:
        dt = 1.0 if dt is None else dt
        if not dt > 0:
            raise ValueError(f"{self.config.kind}: dt must be positive, got {dt}; 0.5 is twice the trained rate")
        return dt


def last_document(
    u: Tensor, state: Tensor | None, reset: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """u (b, l, d) and the state before it, with zeros for all that the state after it knows nothing of."""
    if reset is None:
        return u, state
    document = reset.cumsum(1)  # (b, l)
    if lengths is None:
        last = document[:, -1:]
    else:
        last = document.gather(1, (lengths - 1).clamp(min=0)[:, None]) * (lengths > 0)[:, None]
    u = torch.where((document == last)[..., None], u, 0.0)
    if state is not None:
        state = torch.where(last.view(-1, *[1] * (state.ndim - 1)) == 0, state, 0.0)
    return u, state
