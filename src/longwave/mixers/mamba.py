"""Mamba (Gu and Dao 2023, arXiv:2312.00752): a gated block around a selective scan."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype, reset_children
from longwave.mixers.linear import Linear, project
from longwave.mixers.norm import RMSNorm
from longwave.mixers.ssm_parameters import Float32Parameters, check_dt_range, float32_parameter, init_dt_bias
from longwave.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from longwave.ops.checks import state_dtype
from longwave.ops.selective_scan import selective_scan, selective_scan_step


class MambaState(NamedTuple):
    conv: Tensor  # (b, w-1, e): the last inputs of the short convolution, in the compute dtype
    ssm: Tensor  # (b, e, n), float32


class DtProjection(Float32Parameters, Linear):
    """W of dt = softplus(W u + bias). The bias is added in float32 inside the scan, not here.

    It is about -5 where W u is small, so that rounding their sum to bfloat16 would move dt by a percent.
    """

    float32_parameters = ("bias",)

    def __init__(self, rank: int, e: int):
        super().__init__(rank, e)
        self.bias = float32_parameter(e)

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, None)


class Mamba(Float32Parameters):
    """The Mamba block (section 3.4 and figure 3):

        x, z = W_in u
        x = silu(conv1d(x))
        dt, B, C = W_x x;  dt = softplus(W_dt dt + b_dt)
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t      A = -exp(A_log), per channel and state
        out = W_out (y silu(z))

    Parameters are named as in the published checkpoints: in_proj (rows x, z), conv1d, x_proj (rows dt, B, C), dt_proj,
    A_log (e, n), D (e,), out_proj; with learned inner norms, dt_layernorm, b_layernorm and c_layernorm. A_log, D and
    dt_proj.bias stay in float32 under `.bfloat16()`. Initialised as the paper, section 3.6: A_n = -n (S4D-real), D = 1,
    softplus(b_dt) log-uniform in [dt_min, dt_max], W_dt uniform in +-rank^-1/2; the rest as nn.Linear and nn.Conv1d.
    """

    float32_parameters = ("A_log", "D")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_inner`: inner width, None: expand d_model. `dt_rank`: "auto" is ceil(d_model / 16).

        `inner_norm`: RMSNorm on dt (before its projection), B and C: None (Mamba), "weightless" (Falcon-Mamba) or
        "learned" (Jamba). `bias` is that of in_proj and out_proj.
        """

        kind: ClassVar[str] = "mamba"
        d_state: int = 16
        d_conv: int = 4
        expand: int = 2
        d_inner: int | None = None
        dt_rank: int | Literal["auto"] = "auto"
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        dt_init_floor: float = 1e-4
        inner_norm: Literal["weightless", "learned"] | None = None
        inner_norm_eps: float = 1e-6
        bias: bool = False
        conv_bias: bool = True

        def __post_init__(self):
            check_positive(self, "d_state", "d_conv", "expand")
            check_dt_range(self)
            if self.inner_norm not in (None, "weightless", "learned"):
                raise UsageError(f"mamba: inner_norm must be None, 'weightless' or 'learned', got {self.inner_norm!r}")
            if self.dt_rank != "auto" and (not isinstance(self.dt_rank, int) or self.dt_rank < 1):
                raise UsageError(f"mamba: dt_rank must be 'auto' or at least 1, got {self.dt_rank!r}")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model, self.d_inner = d_model, config.d_inner or config.expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if config.dt_rank == "auto" else config.dt_rank
        e, n, w = self.d_inner, config.d_state, config.d_conv
        self.in_proj = Linear(d_model, 2 * e, bias=config.bias)
        self.conv1d = nn.Conv1d(e, e, w, groups=e, padding=w - 1, bias=config.conv_bias)
        self.x_proj = Linear(e, self.dt_rank + 2 * n, bias=False)
        self.dt_proj = DtProjection(self.dt_rank, e)
        self.A_log = float32_parameter(e, n)
        self.D = float32_parameter(e)
        self.out_proj = Linear(e, d_model, bias=config.bias)
        if config.inner_norm:
            norm = {"eps": config.inner_norm_eps, "weighted": config.inner_norm == "learned"}
            self.dt_layernorm = RMSNorm(self.dt_rank, **norm)
            self.b_layernorm = RMSNorm(n, **norm)
            self.c_layernorm = RMSNorm(n, **norm)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_children(self)
        config = self.config
        init_dt_bias(self.dt_proj.bias, config.dt_min, config.dt_max, config.dt_init_floor)
        n = torch.arange(1, config.d_state + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        self.A_log.copy_(n.log().expand_as(self.A_log))
        self.D.fill_(1.0)
        self.mark()
        self.dt_proj.mark()

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        conv, ssm = state or (None, None)
        documents: dict[str, Any] = {"reset": reset, "lengths": lengths}
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e)
        x, conv = causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", initial_state=conv, **documents
        )
        dt, B, C = self._select(x)
        A = -torch.exp(self.A_log)
        bias = self.dt_proj.bias
        y, ssm = selective_scan(
            x, dt, A, B, C, D=self.D, z=z, dt_bias=bias, dt_softplus=True, initial_state=ssm, **documents
        )
        return self.out_proj(y), MambaState(conv, ssm)

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaState) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, e)
        x = causal_conv1d_step(state.conv, x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        dt, B, C = self._select(x)
        y = selective_scan_step(
            state.ssm, x, dt, self.A_log, B, C, D=self.D, z=z, dt_bias=self.dt_proj.bias, dt_softplus=True, log_A=True
        )
        return self.out_proj(y)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each token chooses: dt (..., e), before its bias and softplus, B and C (..., n)."""
        n = self.config.d_state
        dt, B, C = self.x_proj(x).split((self.dt_rank, n, n), dim=-1)
        if self.config.inner_norm:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return self.dt_proj(dt), B, C

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MambaState:
        dtype = compute_dtype(self.in_proj.weight, dtype)
        device = device or self.A_log.device
        e, n, w = self.d_inner, self.config.d_state, self.config.d_conv
        return MambaState(
            torch.zeros(b, w - 1, e, dtype=dtype, device=device),
            torch.zeros(b, e, n, dtype=state_dtype(dtype), device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        dtype = compute_dtype(self.in_proj.weight, dtype)
        e, n, w = self.d_inner, self.config.d_state, self.config.d_conv
        return e * (w - 1) * dtype.itemsize + e * n * state_dtype(dtype).itemsize

    def flops(self, length: int) -> int:
        """The scan counts 7 e n + 3 e per token: dt A, exp, dt x, times B, into the state (2), out of it (2), D (2)."""
        d, e, n, r = self.d_model, self.d_inner, self.config.d_state, self.dt_rank
        projections = 2 * (d * 2 * e + e * (r + 2 * n) + r * e + e * d)
        return length * (projections + 2 * self.config.d_conv * e + 7 * e * n + 3 * e)
