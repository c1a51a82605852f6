"""S4D (Gu et al. 2022, arXiv:2206.11893): a diagonal complex state space for each channel."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from longwave.errors import UsageError
from longwave.mixers.per_channel import PerChannel, PerChannelConfig, System
from longwave.mixers.ssm_parameters import float32_parameter
from longwave.mixers.time_invariant import SSMState
from longwave.ops.checks import wide_dtype
from longwave.ops.diagonal_scan import diagonal_scan, diagonal_scan_step
from longwave.ops.discretize import Method, discretize_diagonal
from longwave.ops.hippo import nplr
from longwave.ops.ssm_kernel import vandermonde_kernel, vandermonde_state

S4DState = SSMState  # ssm (b, d, n/2, 2): pairs of real and imaginary part

Init = Literal["lin", "inv", "legs", "real"]


class S4D(PerChannel):
    """A diagonal state space for each channel (sections 3 and 4), with n/2 modes and their conjugates:

        x' = A x + B u;  y = 2 Re(C x) + D u;  out = GLU(W gelu(y) + b)      A = -exp(A_real) - i A_imag

    Parameters are named as in S4's code: inv_dt (d,), A_real and A_imag (n_ssm, n/2), B (n_ssm, n/2, 2) and
    C (d, n/2, 2), complex numbers as pairs; D (d,); output_linear (2 d, d). All but the last stay in float32.
    Initialised as there, by `init`, with n the number of a mode and N = d_state:

        lin    A = -1/2 + i pi n                                 B = 1
        inv    A = -1/2 + i N/pi (N / (2 n + 1) - 1)             B = 1
        real   A = -(n + 1)                                      B = 1
        legs   A and B of HiPPO-LegS without its low-rank term

    and C complex normal. Real parts stay negative whatever is learned, so that no state ever grows.
    """

    float32_parameters = ("inv_dt", "A_real", "A_imag", "B", "C", "D")
    slow_parameters = ("inv_dt", "A_real", "A_imag", "B")

    @dataclass(frozen=True, kw_only=True)
    class Config(PerChannelConfig):
        """`d_state` is even. `discretization`: "zoh", exact for an input that is held, or "bilinear", as in S4."""

        kind: ClassVar[str] = "s4d"
        init: Init = "lin"
        discretization: Literal["zoh", "bilinear"] = "zoh"

        def __post_init__(self):
            super().__post_init__()
            check_modes(self.kind, self.d_state)
            if self.init not in ("lin", "inv", "legs", "real"):
                raise UsageError(f"s4d: init must be 'lin', 'inv', 'legs' or 'real', got {self.init!r}")
            if self.discretization not in ("zoh", "bilinear"):
                raise UsageError(f"s4d: discretization must be 'zoh' or 'bilinear', got {self.discretization!r}")

    def __init__(self, d_model: int, config: Config | None = None):
        config = config or self.Config()
        super().__init__(d_model, config)
        n = config.d_state // 2
        self.A_real = float32_parameter(self.n_ssm, n)
        self.A_imag = float32_parameter(self.n_ssm, n)
        self.B = float32_parameter(self.n_ssm, n, 2)
        self.C = float32_parameter(d_model, n, 2)
        self.state_shape = (d_model, n, 2)
        self.reset_parameters()

    def _reset_system(self) -> None:
        A, B = initial_modes(self.config.init, self.config.d_state)
        self.A_real.copy_((-A.real).log())
        self.A_imag.copy_(-A.imag)
        self.B.copy_(torch.view_as_real(B))
        self.C.normal_(std=0.5**0.5)

    def _modes(self, dt: float = 1.0) -> tuple[Tensor, Tensor]:
        """dt A and dt B of every channel, as pairs (d, n/2, 2) in `wide_dtype`."""
        wide = wide_dtype(self.C.device)
        A = torch.stack([-self.A_real.to(wide).exp(), -self.A_imag.to(wide)], dim=-1)
        steps = dt * self.inv_dt.to(wide).exp()[:, None, None]
        return steps * self._per_channel(A), steps * self._per_channel(self.B)

    def _system(self, dt: float) -> System:
        return DiagonalSystem.of(*self._modes(dt), self.C, self.config.discretization)

    def _scan(self, u, dt, state, reset, lengths):
        A, B = (t.to(u.dtype) for t in self._modes())
        steps, method = self._steps(dt, u), self.config.discretization
        documents: dict[str, Any] = {"initial_state": state, "reset": reset, "lengths": lengths}
        return diagonal_scan(u, steps, A, B, self.C, D=self.D, method=method, **documents)

    def _token(self, u, state, dt):
        A, B = (t.to(u.dtype) for t in self._modes())
        steps = self._steps(dt, u)
        return diagonal_scan_step(state, u, steps, A, B, self.C, D=self.D, method=self.config.discretization)

    def flops(self, length: int) -> int:
        """The system counts as its recurrence: for each of n/2 modes of a channel Abar x 6, + B u 4, 2 Re C x 4."""
        return length * self._flops(7 * self.config.d_state)


class DiagonalSystem(NamedTuple):
    """A `System` of n modes per channel, as pairs."""

    Bbar: Tensor  # (d, n, 2)
    C: Tensor  # (d, n, 2)
    dtA: Tensor  # (d, n, 2), in `wide_dtype`: the logarithm of Abar

    @classmethod
    def of(cls, A: Tensor, B: Tensor, C: Tensor, method: Method) -> "DiagonalSystem":
        """A, B (d, n, 2), in units of a step, in `wide_dtype`; C (d, n, 2)."""
        A, B = torch.view_as_complex(A), torch.view_as_complex(B)
        Abar, Bbar = discretize_diagonal(A, B, 1.0, method)
        dtA = A if method == "zoh" else Abar.log()
        return cls(torch.view_as_real(Bbar).to(C.dtype), C, torch.view_as_real(dtA))

    def kernel(self, l: int) -> Tensor:
        return vandermonde_kernel(times(self.C, self.Bbar)[None], self.dtA, l)[0]

    def response(self, state: Tensor, l: int) -> Tensor:
        Abar = torch.view_as_real(torch.view_as_complex(self.dtA).exp()).to(self.C.dtype)
        first = times(self.C, Abar)
        return vandermonde_kernel(times(first, state), self.dtA, l).transpose(1, 2)

    def final_state(self, u: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
        return vandermonde_state(u, self.Bbar, self.dtA, initial_state=state, lengths=lengths)


def initial_modes(init: Init, d_state: int) -> tuple[Tensor, Tensor]:
    """A and B (d_state / 2,) complex128, by the table in `S4D`; imaginary parts of A are not positive."""
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    if init == "legs":
        form = nplr("legs", d_state)
        return form.Lambda[: len(n)], form.B[: len(n)]
    rates = n + 1 if init == "real" else torch.full_like(n, 0.5)
    frequencies = {"lin": math.pi * n, "inv": d_state / math.pi * (d_state / (2 * n + 1) - 1), "real": 0 * n}[init]
    return torch.complex(-rates, -frequencies), torch.ones_like(n, dtype=torch.complex128)


def check_modes(kind: str, d_state: int) -> None:
    if d_state % 2:
        raise UsageError(f"{kind}: d_state must be even, for conjugate pairs, got {d_state}")


def times(x: Tensor, y: Tensor) -> Tensor:
    """The product of complex numbers that are given as pairs."""
    return torch.view_as_real(torch.view_as_complex(x.contiguous()) * torch.view_as_complex(y.contiguous()))
