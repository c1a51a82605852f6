"""Mamba-3 (2026, arXiv:2603.15569): trapezoidal rule, rotated B and C, and several inputs and outputs per head."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype, reset_children
from longwave.mixers.linear import Linear
from longwave.mixers.norm import RMSNorm
from longwave.mixers.ssm_parameters import Float32Parameters, check_dt_range, float32_parameter, init_dt_bias
from longwave.ops.checks import state_dtype
from longwave.ops.mamba3_scan import Mamba3ScanState, mamba3_scan, mamba3_scan_step

Activation = Literal["heavy_tail", "softplus"]
ACTIVATIONS = ("heavy_tail", "softplus")


class Mamba3(Float32Parameters):
    """The Mamba-3 block:

        z, x, B, C, dt, a, trap, angles = W_in u
        B, C = RMSNorm(B), RMSNorm(C);  dt = softplus(dt + dt_bias);  trap = sigmoid(trap);  A = -max(f(a), A_floor)
        angle_t = angle_{t-1} + dt_t pi tanh(angles_t);  k_t, q_t = R(angle_t) (B_t + B_bias), R(angle_t) (C_t + C_bias)
        h_t = exp(dt_t A_t) (h_{t-1} + (1 - trap_t) dt_t x_{t-1} k_{t-1}^T) + trap_t dt_t x_t k_t^T
        out = W_out ((h_t q_t + D x_t) silu(z_t))

    With `mimo_rank` r (MIMO) there are r of B, C, k, q per head, x and z times mimo_x and mimo_z for each, and the sum
    of the outputs times mimo_o. R turns pairs of channels: neighbours, or for MIMO, as published, n / 2 apart.

    Parameters are named as in the published code: in_proj (rows z, x, B, C, dt, a, trap, angles), dt_bias (h,), B_bias
    and C_bias (h, r, n), B_norm, C_norm, D (h,), mimo_x, mimo_z, mimo_o (h, r, p), norm, out_proj. All of these
    but the projections and the norms stay in float32 under `.bfloat16()`, as there, and are not decayed. Initialised as
    there: biases, D, norms and mimo_z 1, mimo_x and mimo_o 1 / r, softplus(dt_bias) log-uniform in [dt_min, dt_max];
    the rest as nn.Linear.
    """

    float32_parameters = ("D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_inner`: inner width, None is expand d_model. `n_groups`: of the d_inner / d_head heads, sharing B and C.

        `mimo_rank`: None is one input and one output per head (SISO). `rope_fraction` of d_state is rotated.
        `A_activation`, f above: "heavy_tail", 1 + a for a >= 0 and 1 / (1 - a) below, which the published code has had
        since June 2026, or "softplus", which it had before. The weights do not tell which: it must be known.
        `norm`: RMSNorm over each head before the gate. `chunk_len`: tokens per block of the fused scan, a matter of
        speed and rounding; None leaves it to the device.
        """

        kind: ClassVar[str] = "mamba3"
        d_state: int = 128
        expand: int = 2
        d_inner: int | None = None
        d_head: int = 64
        n_groups: int = 1
        mimo_rank: int | None = None
        rope_fraction: float = 0.5
        A_activation: Activation = "heavy_tail"
        A_floor: float = 1e-4
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        dt_init_floor: float = 1e-4
        norm: bool = False
        norm_eps: float = 1e-5
        chunk_len: int | None = None

        def __post_init__(self):
            check_positive(self, "d_state", "expand", "d_inner", "d_head", "n_groups", "mimo_rank", "chunk_len")
            check_dt_range(self)
            if self.A_activation not in ACTIVATIONS:
                known = " or ".join(map(repr, ACTIVATIONS))
                raise UsageError(f"mamba3: A_activation must be {known}, got {self.A_activation!r}")
            if self.A_floor < 0:
                raise UsageError(f"mamba3: A_floor must be at least 0, got {self.A_floor}")
            if not 0 < self.rope_fraction <= 1 or self.n_angles < 1:
                raise UsageError(
                    f"mamba3: rope_fraction={self.rope_fraction} of d_state={self.d_state} must be one pair or more, "
                    "and at most all of them"
                )
            if self.mimo_rank is not None and self.d_state % 2:
                raise UsageError(f"mamba3: with mimo_rank, d_state must be even, got {self.d_state}")

        @property
        def n_angles(self) -> int:
            """Pairs of channels that are rotated."""
            return int(self.d_state * self.rope_fraction) // 2

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model, self.d_inner = d_model, config.d_inner or config.expand * d_model
        self.n_heads, self.rank = self.d_inner // config.d_head, config.mimo_rank or 1
        if self.n_heads * config.d_head != self.d_inner or self.n_heads % config.n_groups:
            raise UsageError(
                f"mamba3: d_inner={self.d_inner} must be heads of d_head={config.d_head}, "
                f"in n_groups={config.n_groups} equal groups; change one of the three"
            )
        e, h, p, n, r = self.d_inner, self.n_heads, config.d_head, config.d_state, self.rank
        d_bc = r * config.n_groups * n
        self.widths = (e, e, d_bc, d_bc, h, h, h, config.n_angles)  # z, x, B, C, dt, a, trap, angles
        self.in_proj = Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias = float32_parameter(h)
        self.B_bias = float32_parameter(h, r, n)
        self.C_bias = float32_parameter(h, r, n)
        self.B_norm = RMSNorm(n, eps=config.norm_eps)
        self.C_norm = RMSNorm(n, eps=config.norm_eps)
        for name in ("mimo_x", "mimo_z", "mimo_o"):
            self.register_parameter(name, None if config.mimo_rank is None else float32_parameter(h, r, p))
        self.D = float32_parameter(h)
        self.norm = RMSNorm(e, eps=config.norm_eps, group_size=p, norm_before_gate=True) if config.norm else None
        self.out_proj = Linear(e, d_model, bias=False)
        self.reset_parameters()

    mimo_x: nn.Parameter | None
    mimo_z: nn.Parameter | None
    mimo_o: nn.Parameter | None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_children(self)
        config = self.config
        init_dt_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        for parameter in (self.B_bias, self.C_bias, self.D, self.mimo_z):
            if parameter is not None:
                parameter.fill_(1.0)
        for parameter in (self.mimo_x, self.mimo_o):
            if parameter is not None:
                parameter.fill_(1.0 / self.rank)
        self.mark()

    def forward(
        self,
        x: Tensor,
        state: Mamba3ScanState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Mamba3ScanState]:
        z, inputs = self._scan_inputs(x)
        y, state = mamba3_scan(
            *inputs,
            **self._scan_options(z),
            initial_state=state,
            reset=reset,
            lengths=lengths,
            chunk_len=self.config.chunk_len,
        )
        return self._project_out(y, z), state

    @torch.no_grad()
    def step(self, x: Tensor, state: Mamba3ScanState) -> Tensor:
        z, inputs = self._scan_inputs(x)
        y = mamba3_scan_step(state, *inputs, **self._scan_options(z))
        return self._project_out(y, z)

    def _scan_inputs(self, u: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """z; and x (..., h, p), dt and A (..., h), B and C (..., r, g, n), trap (..., h), angles (..., s)."""
        tokens, config = u.shape[:-1], self.config
        z, x, B, C, dt, a, trap, angles = self.in_proj(u).split(self.widths, dim=-1)
        z, x = (t.view(*tokens, self.n_heads, config.d_head) for t in (z, x))
        B, C = (t.view(*tokens, self.rank, config.n_groups, config.d_state) for t in (B, C))
        dt, a, trap, angles = (t.to(state_dtype(t.dtype)) for t in (dt, a, trap, angles))
        A = -_rate(a, config.A_activation).clamp(min=config.A_floor)
        dt, angles = softplus(dt + self.dt_bias), math.pi * torch.tanh(angles)
        return z, (x, dt, A, self.B_norm(B), self.C_norm(C), torch.sigmoid(trap), angles)

    def _scan_options(self, z: Tensor) -> dict[str, Any]:
        """The scan gates and sums the ranks too, unless the norm comes before the gate."""
        options: dict[str, Any] = {
            "B_bias": self.B_bias,
            "C_bias": self.C_bias,
            "D": self.D,
            "mimo_x": self.mimo_x,
            "pairs": "adjacent" if self.config.mimo_rank is None else "halves",
        }
        return options if self.norm else options | {"z": z, "mimo_z": self.mimo_z, "mimo_o": self.mimo_o}

    def _project_out(self, y: Tensor, z: Tensor) -> Tensor:
        """From y (..., h, p), or (..., r, h, p) where the norm comes before the gate."""
        if self.norm is None:
            return self.out_proj(y.flatten(-2))
        if self.mimo_z is None or self.mimo_o is None:
            return self.out_proj(self.norm(y.flatten(-2), z.flatten(-2)))
        z = (z.unsqueeze(-3) * self.mimo_z.transpose(0, 1)).to(y.dtype)  # (..., r, h, p)
        y = self.norm(y.view(z.shape).flatten(-2), z.flatten(-2)).view(z.shape)
        y = (y * self.mimo_o.transpose(0, 1)).sum(-3).to(y.dtype)
        return self.out_proj(y.flatten(-2))

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Mamba3ScanState:
        dtype = compute_dtype(self.in_proj.weight, dtype)
        exact, device = state_dtype(dtype), device or self.D.device
        h, p, n, s, r = self.n_heads, self.config.d_head, self.config.d_state, self.config.n_angles, self.rank
        return Mamba3ScanState(
            torch.zeros(b, h, s, dtype=exact, device=device),
            torch.zeros(b, h, p, n, dtype=exact, device=device),
            torch.zeros(b, r, h, n, dtype=dtype, device=device),
            torch.zeros(b, h, p, dtype=dtype, device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        dtype = compute_dtype(self.in_proj.weight, dtype)
        e, h, n, s = self.d_inner, self.n_heads, self.config.d_state, self.config.n_angles
        return (h * s + e * n) * state_dtype(dtype).itemsize + (self.rank * h * n + e) * dtype.itemsize

    def flops(self, length: int) -> int:
        """The scan counts as its recurrence, (6 r + 1) e n + 4 r e + 4 h per token, however the fused form blocks it.

        That is the decay, two outer products into the state (4 r) and what is read from it (2 r); the two factors of x
        and D x (2); dt A, its exp, and the two weights for each head. MIMO's mimo_x and mimo_o add 3 r e.
        """
        d, e, n, h, r = self.d_model, self.d_inner, self.config.d_state, self.n_heads, self.rank
        projections = 2 * d * (self.in_proj.out_features + e)
        ranks = 0 if self.mimo_x is None else 3 * r * e
        return length * (projections + (6 * r + 1) * e * n + 4 * r * e + 4 * h + ranks)


def _rate(a: Tensor, activation: Activation) -> Tensor:
    """-A before its floor: both forms are positive and grow like a."""
    if activation == "softplus":
        return softplus(a)
    return a.clamp(min=0) + 1 / (1 - a.clamp(max=0))
