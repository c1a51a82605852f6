"""S4 (Gu, Goel and Re 2022, arXiv:2111.00396): a state space that is diagonal plus low rank, for each channel."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from longwave.errors import UsageError
from longwave.mixers.dense_channel import DenseChannel, Token
from longwave.mixers.per_channel import PerChannelConfig, System
from longwave.mixers.s4d import check_modes
from longwave.mixers.ssm_parameters import float32_parameter
from longwave.mixers.time_invariant import SSMState
from longwave.ops.hippo import Measure, nplr
from longwave.ops.ssm_kernel import cauchy_kernel

S4State = SSMState  # ssm (b, d, n/2, 2): pairs of real and imaginary part

LEAST_RATE = 1e-4  # of decay, when a layer begins, as in S4's code


class S4(DenseChannel):
    """A state space of conjugate pairs for each channel, diagonal plus low rank (section 3), in its complex basis:

        x' = (Lambda - P P*) x + B u;  y = 2 Re(C x) + D u;  out = GLU(W gelu(y) + b)

    where Lambda = -exp(A_real) - i A_imag, and P* reaches over the pairs: P* x = 2 Re sum conj(P) x. Discretised by the
    bilinear rule, as published, or by "zoh", which is exact for an input that is held, at n^2 where the rule costs n.

    Parameters are named as in S4's code: inv_dt (d,), A_real and A_imag (n_ssm, n/2), B (n_ssm, n/2, 2), P (r, n_ssm,
    n/2, 2) and C (d, n/2, 2), complex numbers as pairs; D (d,); output_linear (2 d, d). All but the last stay in
    float32. C is the C of the equations: there is no length in the weights, and the kernel is exact at any. (The code
    learns C (I - Abar^l) for a fixed l; `longwave.hub.s4` converts.)

    Initialised as there: the NPLR form of HiPPO's matrix (`longwave.ops.hippo`), C complex normal.
    """

    float32_parameters = ("inv_dt", "A_real", "A_imag", "B", "P", "C", "D")
    slow_parameters = ("inv_dt", "A_real", "A_imag", "B", "P")

    @dataclass(frozen=True, kw_only=True)
    class Config(PerChannelConfig):
        """`d_state` is even. `init`: HiPPO's measure; "legs" has a low-rank term of rank 1, "legt" of rank 2."""

        kind: ClassVar[str] = "s4"
        init: Measure = "legs"
        discretization: Literal["bilinear", "zoh"] = "bilinear"

        def __post_init__(self):
            super().__post_init__()
            check_modes(self.kind, self.d_state)
            if self.init not in ("legs", "legt"):
                raise UsageError(f"s4: init must be 'legs' or 'legt', got {self.init!r}")
            if self.discretization not in ("bilinear", "zoh"):
                raise UsageError(f"s4: discretization must be 'bilinear' or 'zoh', got {self.discretization!r}")

        @property
        def rank(self) -> int:
            return 1 if self.init == "legs" else 2

    def __init__(self, d_model: int, config: Config | None = None):
        config = config or self.Config()
        super().__init__(d_model, config)
        n = config.d_state // 2
        self.A_real = float32_parameter(self.n_ssm, n)
        self.A_imag = float32_parameter(self.n_ssm, n)
        self.B = float32_parameter(self.n_ssm, n, 2)
        self.P = float32_parameter(config.rank, self.n_ssm, n, 2)
        self.C = float32_parameter(d_model, n, 2)
        self.state_shape = (d_model, n, 2)
        self.reset_parameters()

    def _reset_system(self) -> None:
        form, n = nplr(self.config.init, self.config.d_state), self.config.d_state // 2
        self.A_real.copy_((-form.Lambda[:n].real).clamp(min=LEAST_RATE).log())
        self.A_imag.copy_(-form.Lambda[:n].imag)
        self.B.copy_(torch.view_as_real(form.B[:n]))
        self.P.copy_(torch.view_as_real(form.P[:, None, :n].resolve_conj().contiguous()))
        self.C.normal_(std=0.5**0.5)

    def _dplr(self) -> "DPLR":
        """The system of every channel, in steps of the trained rate."""
        steps = self._wide(self.inv_dt).exp()[:, None]
        Lambda = torch.complex(-self._wide(self.A_real).exp(), -self._wide(self.A_imag))
        B, P, C = (torch.view_as_complex(self._wide(t)) for t in (self.B, self.P, self.C))
        P = torch.stack([self._per_channel(p) for p in P])
        return DPLR(steps * self._per_channel(Lambda), steps.sqrt() * P, steps * self._per_channel(B), C)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._dplr().dense()

    def _system(self, dt: float) -> System:
        system = super()._system(dt)
        return system if self.config.discretization == "zoh" else Bilinear(self._dplr().faster(dt), system)

    def _recurrence(self, dtype: torch.dtype) -> Callable[[Tensor | float], Token]:
        if self.config.discretization == "zoh":
            return super()._recurrence(dtype)
        dplr = self._dplr()
        return lambda dt: dplr.faster(dt).token(dtype)

    def flops(self, length: int) -> int:
        """The system counts as its recurrence in O(n), 22 + 16 r for each of n/2 modes of a channel.

        That is Lambda x 6, + B u 4, the inverse 6, the sum 2, 2 Re C x 4; and 4 each for P (P* x), twice. With "zoh" it
        is Abar x 2 n^2, + B u 2 n, C x 2 n.
        """
        n = self.config.d_state
        if self.config.discretization == "zoh":
            return length * self._flops(2 * n * n + 4 * n)
        return length * self._flops(n // 2 * (22 + 16 * self.config.rank))


class DPLR(NamedTuple):
    """x' = (Lambda - P P*) x + B u, y = 2 Re(C x), for each of d channels, in n/2 complex modes.

    The real form has 2 entries for a mode, Re and Im; there P P* is 2 sum_i p_i p_i^T.
    """

    Lambda: Tensor  # (..., d, n/2)
    P: Tensor  # (r, ..., d, n/2)
    B: Tensor  # (..., d, n/2)
    C: Tensor  # (d, n/2)

    def faster(self, dt: Tensor | float) -> "DPLR":
        """The system in steps of dt, a number or (...)."""
        dt = dt.to(self.C.real.dtype)[..., None, None] if isinstance(dt, Tensor) else torch.full_like(self.C.real, dt)
        P = self.P.view(len(self.P), *[1] * (dt.ndim - 2), *self.C.shape)
        return DPLR(dt * self.Lambda, dt.sqrt() * P, dt * self.B, self.C)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (d, n, n), B and C (d, n), real."""
        p, B, C = (torch.view_as_real(t).flatten(-2) for t in (self.P, self.B, 2 * self.C.conj().resolve_conj()))
        unit = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device).view(-1, *p.shape[-1:])
        turned = self.Lambda[:, None] * torch.view_as_complex(unit.view(len(unit), -1, 2))  # (d, n, n/2): its columns
        A = torch.view_as_real(turned).flatten(-2).mT
        return A - 2 * torch.einsum("rdi,rdj->dij", p, p), B, C

    def token(self, dtype: torch.dtype) -> Token:
        """The bilinear rule in O(n): x + (I - A/2)^-1 (A x + B u), the inverse by Sherman and Morrison's formula.

        As the change is computed, and not Abar x, a small step loses no digits to the 1.
        """
        narrow = torch.complex64 if dtype == torch.float32 else torch.complex128
        inverse = 1 / (1 - self.Lambda / 2)
        columns = []  # of the inverse times P, as far as the terms before reach, over 1 + P* times itself
        for i, P in enumerate(self.P):
            column = inverse * P
            for before, other in zip(columns, self.P[:i], strict=True):
                column = column - before * _inner(other, column)
            columns.append(column / (1 + _inner(P, column)))
        Lambda, inverse, B, P, *columns = (t.to(narrow) for t in (self.Lambda, inverse, self.B, self.P, *columns))
        C = self.C.to(narrow)

        def token(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            change = Lambda * z + B * u[..., None]
            for p in P:
                change = change - 2 * p * _inner(p, z)
            change = inverse * change
            for p, column in zip(P, columns, strict=True):
                change = change - column * _inner(p, change)
            z = z + change
            return torch.view_as_real(z).flatten(-2), 2 * (C * z).real.sum(-1)

        return token


def _inner(p: Tensor, z: Tensor) -> Tensor:
    """p* z over the pairs, halved: Re sum conj(p) z, (..., 1)."""
    return (p.conj() * z).real.sum(-1, keepdim=True)


class Bilinear(NamedTuple):
    """A `System`: the kernel from the poles, and what needs Abar itself from its dense form."""

    dplr: DPLR
    matrices: System

    def kernel(self, l: int) -> Tensor:
        """K_t for t < l: (d, l), in O((n + log l) l), by algorithm 1 of the paper on a smaller circle.

        The generating function sum_t K_t z^t is taken at m >= 2 l points of |z| = rho, and K_t rho^t read off by an
        inverse FFT. What lies beyond m folds back rho^m times as large, and rounding grows by rho^-l; rho balances the
        two, at 1e-11 of the largest K_t in float64. So there is no Abar^l to be taken care of, unlike at rho = 1.
        """
        Lambda, P, B, C = self.dplr
        m = _even_length(2 * l)
        rho = torch.finfo(C.real.dtype).eps ** (2 / 3 / m)
        t = torch.arange(m // 2 + 1, dtype=C.real.dtype, device=C.device)
        node = rho * torch.exp(-2j * math.pi / m * t)
        z = 2 * (1 - node) / (1 + node)
        left, right = torch.cat([B[None], P]), torch.cat([C[None], P.conj()])
        v = (left[:, None] * right).flatten(0, 1)
        k = cauchy_kernel(torch.view_as_real(v), torch.view_as_real(z), torch.view_as_real(Lambda))
        k = torch.view_as_complex(k).unflatten(0, (len(left), len(right)))
        while len(k) > 1:  # the low-rank term, one rank at a time: Woodbury's formula
            k = k[:-1, :-1] - k[:-1, -1:] * k[-1:, :-1] / (1 + k[-1, -1])
        folded = torch.fft.irfft(k[0, 0] * 2 / (1 + node), n=m)[:, :l]
        return folded * rho ** -torch.arange(l, dtype=C.real.dtype, device=C.device)

    def response(self, state: Tensor, l: int) -> Tensor:
        return self.matrices.response(state, l)

    def final_state(self, u: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
        return self.matrices.final_state(u, state, lengths)


def _even_length(l: int) -> int:
    """The least even number that is no less than l, and 4, 5, 6 or 7 times a power of 2: an FFT is fast there."""
    power = max(1 << max(l - 1, 1).bit_length() >> 3, 1)
    return next(factor * power for factor in (4, 5, 6, 7, 8) if factor * power >= l and factor * power % 2 == 0)
