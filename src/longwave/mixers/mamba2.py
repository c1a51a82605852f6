"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): a gated block around state space duality."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype, reset_children
from longwave.mixers.linear import Linear
from longwave.mixers.norm import RMSNorm
from longwave.mixers.ssm_parameters import Float32Parameters, check_dt_range, float32_parameter, init_dt_bias
from longwave.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from longwave.ops.checks import state_dtype
from longwave.ops.ssd import ssd, ssd_step


class Mamba2State(NamedTuple):
    conv: Tensor  # (b, w-1, e + 2 g n): the last inputs of the short convolution, in the compute dtype
    ssm: Tensor  # (b, h, p, n), float32


class Mamba2(Float32Parameters):
    """The Mamba-2 block (section 7.1 and figure 6):

        z, x, B, C, dt = W_in u
        x, B, C = silu(conv1d([x, B, C]))
        dt = clamp(softplus(dt + dt_bias), dt_limit)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t      A = -exp(A_log), per head
        out = W_out RMSNorm(y silu(z))

    Parameters are named as in the published checkpoints: in_proj (rows z, x, B, C, dt), conv1d, A_log (h,), D (h,) or
    (h p,), dt_bias (h,), norm, out_proj. A_log, D and dt_bias stay in float32 under `.bfloat16()`. Initialised as the
    paper's code: -A uniform in [1, 16], D = 1, softplus(dt_bias) log-uniform in [dt_min, dt_max], norm 1; the rest as
    nn.Linear and nn.Conv1d.
    """

    float32_parameters = ("A_log", "D", "dt_bias")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_inner`: inner width, None is expand d_model. `n_groups`: of the d_inner / d_head heads, sharing B and C.

        -A begins in [A_min, A_max]. `D_per_channel`: D (h p,) in place of (h,). The norm runs over d_inner / n_groups
        channels, on y silu(z), or on y alone with `norm_before_gate`; without `norm`, out = W_out (y silu(z)). `bias`
        is that of in_proj and out_proj. `in_multipliers`: factors of z, x, B, C and dt as in_proj gives them.
        `chunk_len`: tokens per block of the fused scan, a matter of speed and rounding; None leaves it to the device.
        """

        kind: ClassVar[str] = "mamba2"
        d_state: int = 128
        d_conv: int = 4
        expand: int = 2
        d_inner: int | None = None
        d_head: int = 64
        n_groups: int = 1
        chunk_len: int | None = None
        A_min: float = 1.0
        A_max: float = 16.0
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        dt_init_floor: float = 1e-4
        dt_limit: tuple[float, float] = (0.0, math.inf)
        in_multipliers: tuple[float, float, float, float, float] | None = None
        D_per_channel: bool = False
        norm: bool = True
        norm_before_gate: bool = False
        norm_eps: float = 1e-5
        bias: bool = False
        conv_bias: bool = True

        def __post_init__(self):
            check_positive(self, "d_state", "d_conv", "expand", "d_inner", "d_head", "n_groups", "chunk_len")
            check_dt_range(self)
            if not 0 < self.A_min <= self.A_max:
                raise UsageError(f"mamba2: need 0 < A_min <= A_max, got A_min={self.A_min}, A_max={self.A_max}")
            if len(self.dt_limit) != 2 or not self.dt_limit[0] <= self.dt_limit[1]:
                raise UsageError(f"mamba2: dt_limit must be (low, high) with low <= high, got {self.dt_limit}")
            if self.in_multipliers is not None and len(self.in_multipliers) != 5:
                raise UsageError(f"mamba2: in_multipliers are those of z, x, B, C and dt, got {self.in_multipliers}")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model, self.d_inner = d_model, config.d_inner or config.expand * d_model
        self.n_heads = self.d_inner // config.d_head
        if self.n_heads * config.d_head != self.d_inner or self.n_heads % config.n_groups:
            raise UsageError(
                f"mamba2: d_inner={self.d_inner} must be heads of d_head={config.d_head}, "
                f"in n_groups={config.n_groups} equal groups; change one of the three"
            )
        self.d_bc = config.n_groups * config.d_state
        e, h, w = self.d_inner, self.n_heads, config.d_conv
        d_conv_channels = e + 2 * self.d_bc
        self.in_proj = Linear(d_model, e + d_conv_channels + h, bias=config.bias)
        self.conv1d = nn.Conv1d(
            d_conv_channels, d_conv_channels, w, groups=d_conv_channels, padding=w - 1, bias=config.conv_bias
        )
        self.dt_bias = float32_parameter(h)
        self.A_log = float32_parameter(h)
        self.D = float32_parameter(e if config.D_per_channel else h)
        group_size, before = e // config.n_groups, config.norm_before_gate
        norm = RMSNorm(e, eps=config.norm_eps, group_size=group_size, norm_before_gate=before) if config.norm else None
        self.norm = norm
        self.out_proj = Linear(e, d_model, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_children(self)
        config = self.config
        init_dt_bias(self.dt_bias, config.dt_min, config.dt_max, config.dt_init_floor)
        self.A_log.uniform_(config.A_min, config.A_max).log_()
        self.D.fill_(1.0)
        self.mark()

    def forward(
        self,
        x: Tensor,
        state: Mamba2State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Mamba2State]:
        conv, ssm = state or (None, None)
        documents: dict[str, Any] = {"reset": reset, "lengths": lengths}
        z, xBC, dt = self._project(x)
        xBC, conv = causal_conv1d(
            xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu", initial_state=conv, **documents
        )
        y, ssm = ssd(
            *self._scan_inputs(xBC, dt),
            **self._scan_options(),
            chunk_len=self.config.chunk_len,
            initial_state=ssm,
            **documents,
        )
        return self._finish(y, z), Mamba2State(conv, ssm)

    @torch.no_grad()
    def step(self, x: Tensor, state: Mamba2State) -> Tensor:
        z, xBC, dt = self._project(x)
        xBC = causal_conv1d_step(state.conv, xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        y = ssd_step(state.ssm, *self._scan_inputs(xBC, dt), **self._scan_options())
        return self._finish(y, z)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., e), [x, B, C] (..., e + 2 g n), dt (..., h)."""
        zxBCdt = self.in_proj(x)
        if self.config.in_multipliers is not None:
            widths = (self.d_inner, self.d_inner, self.d_bc, self.d_bc, self.n_heads)
            factors = [zxBCdt.new_full((w,), f) for w, f in zip(widths, self.config.in_multipliers, strict=True)]
            zxBCdt = zxBCdt * torch.cat(factors)
        return zxBCdt.split((self.d_inner, self.conv1d.in_channels, self.n_heads), dim=-1)

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        """y (..., h, p), z (..., e) -> (..., d)."""
        y = y.flatten(-2)
        return self.out_proj(y * silu(z) if self.norm is None else self.norm(y, z))

    def _scan_inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (..., h, p), dt (..., h), A (h,), B and C (..., g, n)."""
        tokens, config = xBC.shape[:-1], self.config
        x, B, C = xBC.split((self.d_inner, self.d_bc, self.d_bc), dim=-1)
        return (
            x.view(*tokens, self.n_heads, config.d_head),
            dt,
            -torch.exp(self.A_log),
            B.view(*tokens, config.n_groups, config.d_state),
            C.view(*tokens, config.n_groups, config.d_state),
        )

    def _scan_options(self) -> dict[str, Any]:
        D = self.D.view(self.n_heads, -1) if self.config.D_per_channel else self.D
        return {"D": D, "dt_bias": self.dt_bias, "dt_softplus": True, "dt_limit": self.config.dt_limit}

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Mamba2State:
        dtype = compute_dtype(self.in_proj.weight, dtype)
        device = device or self.A_log.device
        h, p, n = self.n_heads, self.config.d_head, self.config.d_state
        return Mamba2State(
            torch.zeros(b, self.config.d_conv - 1, self.conv1d.in_channels, dtype=dtype, device=device),
            torch.zeros(b, h, p, n, dtype=state_dtype(dtype), device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        dtype = compute_dtype(self.in_proj.weight, dtype)
        window = self.conv1d.in_channels * (self.config.d_conv - 1)
        return window * dtype.itemsize + self.d_inner * self.config.d_state * state_dtype(dtype).itemsize

    def flops(self, length: int) -> int:
        """The scan counts as its recurrence, 5 e n + 3 e + 2 h per token, however the fused form blocks it.

        That is dt x, times B, into the state (2), out of it (2), D x (2); and dt A with its exp for each head.
        """
        d, e, n, h = self.d_model, self.d_inner, self.config.d_state, self.n_heads
        projections = 2 * d * (self.in_proj.out_features + e)
        return length * (projections + 2 * self.config.d_conv * self.conv1d.in_channels + 5 * e * n + 3 * e + 2 * h)
