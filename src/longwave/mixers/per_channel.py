"""What lti, s4d and s4 share: a system for each channel, u_i -> y_i, then S4's mix of the channels."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, glu

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, reset_children
from longwave.mixers.linear import Linear
from longwave.mixers.ssm_parameters import float32_parameter
from longwave.mixers.time_invariant import SSMConfig, TimeInvariant, last_document
from longwave.ops.fft_conv import fft_conv


class System(Protocol):
    """A discretised system, for tokens that are evenly spaced; the term D u is left to the caller."""

    def kernel(self, l: int) -> Tensor:
        """K_t = C Abar^t Bbar for t < l: (d, l)."""
        ...

    def response(self, state: Tensor, l: int) -> Tensor:
        """C Abar^(t+1) x_0, what y_t still has of the state x_0 before the first token: (b, l, d)."""
        ...

    def final_state(self, u: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The state after u (b, l, d), or after the first lengths[i] tokens of row i."""
        ...


@dataclass(frozen=True, kw_only=True)
class PerChannelConfig(SSMConfig):
    """`n_ssm`: how many (A, B) there are, channel i having number i % n_ssm. None: one for each channel.

    `gelu`, and `glu` with its projection: leave them out to have the system alone, y = C x + D u.
    """

    n_ssm: int | None = None
    gelu: bool = True
    glu: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "n_ssm")


class PerChannel(TimeInvariant):
    """out = GLU(W gelu(y) + b), with y_i = C_i x_i + D_i u_i and x_i' = A_i x_i + B_i u_i for each channel i.

    Gu et al. 2022, arXiv:2111.00396, section 3.4. Parameters here: D (d,), inv_dt (d,) with dt = exp(inv_dt), and
    output_linear. Initialised as S4's code: D normal, dt log-uniform in [dt_min, dt_max], output_linear as nn.Linear.
    """

    def __init__(self, d_model: int, config: PerChannelConfig):
        super().__init__()
        self.config, self.d_model = config, d_model
        self.n_ssm = config.n_ssm or d_model
        if d_model % self.n_ssm:
            raise UsageError(f"{config.kind}: n_ssm={self.n_ssm} must divide d_model={d_model}")
        self.inv_dt = float32_parameter(d_model)
        self.D = float32_parameter(d_model) if config.skip else None
        self.output_linear = Linear(d_model, 2 * d_model) if config.glu else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_children(self)
        self.inv_dt.uniform_(math.log(self.config.dt_min), math.log(self.config.dt_max))
        if self.D is not None:
            self.D.normal_()
        self._reset_system()
        self.mark()

    @abstractmethod
    def _reset_system(self) -> None:
        """Draw A, B and C."""

    @abstractmethod
    def _system(self, dt: float) -> System:
        """The system discretised for tokens that last `dt`."""

    def _convolve(self, u, dt, state, reset, lengths):
        system, l = self._system(dt), u.shape[1]
        y, _ = fft_conv(u, system.kernel(l).to(u.dtype), D=self.D, reset=reset, lengths=lengths)
        if state is not None:
            left = system.response(state, l)
            y = y + (left if reset is None else torch.where(reset.cumsum(1)[..., None] == 0, left, 0.0))
        return y, system.final_state(*last_document(u, state, reset, lengths), lengths)

    def _steps(self, dt: Tensor | float, u: Tensor) -> Tensor:
        """dt, a number or one for each token, as large as u."""
        if isinstance(dt, Tensor):
            return dt.to(u.dtype)[..., None].expand_as(u)
        return u.new_full((), dt).expand_as(u)

    def _per_channel(self, parameter: Tensor) -> Tensor:
        """(n_ssm, ...) -> (d, ...)."""
        if len(parameter) == self.d_model:
            return parameter
        return parameter.repeat(self.d_model // self.n_ssm, *[1] * (parameter.ndim - 1))

    def _mix(self, y: Tensor) -> Tensor:
        y = gelu(y) if self.config.gelu else y
        return y if self.output_linear is None else glu(self.output_linear(y), dim=-1)

    def _flops(self, per_channel: int) -> int:
        """Of one token, for a system that takes `per_channel`."""
        d = self.d_model
        return d * (per_channel + 2 * self.config.skip + 4 * d * self.config.glu)
