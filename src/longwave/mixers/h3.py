"""H3 (Fu, Dao et al. 2023, arXiv:2212.14052): linear attention whose sum over the past is two state space models."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype, reset_children
from longwave.mixers.linear import Linear
from longwave.mixers.ssm_parameters import Float32Parameters, float32_parameter
from longwave.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from longwave.ops.checks import state_dtype
from longwave.ops.diagonal_scan import diagonal_scan, diagonal_scan_step


class H3State(NamedTuple):
    conv: Tensor  # (b, n-1, d): the last keys, which the shift SSM sees, in the compute dtype
    ssm: Tensor  # (b, d p, n/2, 2): the diagonal SSM of each product of key and value, complex as pairs, float32


class H3(Float32Parameters):
    """The H3 layer (section 3.1 and algorithm 1), in h heads of p channels:

        q, k, v = W_q u, W_k u, W_v u
        k = shift(k) + D_k k             per channel: shift(k)_t = sum_{j<n} (sum_m B_m C_{m+j}) k_{t-j}
        S = diag(k v^T) + D k v^T        per head, each of the p p products: S4D with A = -exp(inv_A_real) + i A_imag
        out = W_o [q^T S]

    Parameters are named as in the published code: q_proj, k_proj, v_proj, ssm_k_kernel.kernel.{B (d, n), C (1, d, n)},
    ssm_k_D (d,), kernel.kernel.{C (1, h, n/2, 2), log_dt (h,), B (h, n/2, 2), inv_A_real and A_imag (h, n/2)}, D (h,),
    output_linear. All but the projections stay in float32 under `.bfloat16()`. The input of output_linear holds channel
    i of head j at i h + j, as in that code. (Its fused kernel has j p + i. All published models have p = 1.)

    Initialised as there: the shift's B the first unit vector, its C uniform within n^-1/2; A = -1/2 + i pi n, B = 1, C
    standard complex normal, dt log-uniform in [dt_min, dt_max]; D and ssm_k_D standard normal; the rest as nn.Linear.
    """

    float32_parameters = ("ssm_k_D", "D")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_state`: taps of the shift SSM, and n of the diagonal one: n/2 conjugate pairs. `d_head`: p.

        `discretization`: of the diagonal SSM.
        """

        kind: ClassVar[str] = "h3"
        d_state: int = 64
        d_head: int = 1
        dt_min: float = 1e-3
        dt_max: float = 1e-1
        discretization: Literal["bilinear", "zoh"] = "bilinear"

        def __post_init__(self):
            check_positive(self, "d_state", "d_head")
            if self.d_state % 2:
                raise UsageError(f"h3: d_state must be even, its modes being conjugate pairs, got {self.d_state}")
            if not 0 < self.dt_min <= self.dt_max:
                raise UsageError(f"h3: need 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
            if self.discretization not in ("bilinear", "zoh"):
                raise UsageError(f"h3: discretization must be 'bilinear' or 'zoh', got {self.discretization!r}")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model, self.n_heads = d_model, d_model // config.d_head
        if d_model % config.d_head:
            raise UsageError(f"h3: d_head={config.d_head} must divide d_model={d_model}")
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.ssm_k_kernel = Named(ShiftKernel(d_model, config.d_state))
        self.ssm_k_D = float32_parameter(d_model)
        self.kernel = Named(DiagonalKernel(self.n_heads, config))
        self.D = float32_parameter(self.n_heads)
        self.output_linear = Linear(d_model, d_model)
        self._reset_D()

    def reset_parameters(self) -> None:
        reset_children(self)
        self._reset_D()

    def _reset_D(self) -> None:
        nn.init.normal_(self.ssm_k_D)
        nn.init.normal_(self.D)
        self.mark()

    def forward(
        self,
        x: Tensor,
        state: H3State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, H3State]:
        conv, ssm = state or (None, None)
        documents: dict[str, Any] = {"reset": reset, "lengths": lengths}
        k, conv = causal_conv1d(self.k_proj(x), self._taps(), initial_state=conv, **documents)
        y, ssm = diagonal_scan(*self._system(k, self.v_proj(x)), **self._options(), initial_state=ssm, **documents)
        return self._read(self.q_proj(x), y), H3State(conv, ssm)

    @torch.no_grad()
    def step(self, x: Tensor, state: H3State) -> Tensor:
        k = causal_conv1d_step(state.conv, self.k_proj(x), self._taps())
        y = diagonal_scan_step(state.ssm, *self._system(k, self.v_proj(x)), **self._options())
        return self._read(self.q_proj(x), y)

    def _taps(self) -> Tensor:
        """The shift SSM and D_k as one short convolution, (d, n): the last tap meets the present token."""
        taps = self.ssm_k_kernel.kernel.taps().flip(-1)
        return torch.cat([taps[:, :-1], taps[:, -1:] + self.ssm_k_D[:, None]], dim=-1)

    def _system(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u = k v^T (..., h p p), dt of that shape, A, B, C (h p p, n/2, 2) of the scan."""
        heads = (self.n_heads, self.config.d_head)
        u = k.unflatten(-1, heads)[..., None] * v.unflatten(-1, heads)[..., None, :]  # (..., h, p, p)
        dt, A, B, C = map(self._for_all_products, self.kernel.kernel.system())
        u = u.flatten(-3)
        return u, dt.expand(u.shape), A, B, C

    def _options(self) -> dict[str, Any]:
        return {"method": self.config.discretization, "D": self._for_all_products(self.D)}

    def _for_all_products(self, of_heads: Tensor) -> Tensor:
        """(h, ...) -> (h p p, ...): what the products of a head share."""
        p = self.config.d_head
        return of_heads if p == 1 else of_heads.repeat_interleave(p * p, dim=0)

    def _read(self, q: Tensor, y: Tensor) -> Tensor:
        """q^T S of each head, and the output projection."""
        h, p = self.n_heads, self.config.d_head
        y = (q.unflatten(-1, (h, p, 1)) * y.unflatten(-1, (h, p, p))).sum(-2)  # (..., h, p)
        return self.output_linear(y.transpose(-1, -2).flatten(-2))

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> H3State:
        dtype = compute_dtype(self.q_proj.weight, dtype)
        device = device or self.D.device
        d, n, p = self.d_model, self.config.d_state, self.config.d_head
        return H3State(
            torch.zeros(b, n - 1, d, dtype=dtype, device=device),
            torch.zeros(b, d * p, n // 2, 2, dtype=state_dtype(dtype), device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        dtype = compute_dtype(self.q_proj.weight, dtype)
        d, n, p = self.d_model, self.config.d_state, self.config.d_head
        return (n - 1) * d * dtype.itemsize + d * p * n * state_dtype(dtype).itemsize

    def flops(self, length: int) -> int:
        """The diagonal SSM counts 14 operations per mode, Abar h (6), Bbar u added (4), Re C h summed (4); D u 2."""
        d, n, p = self.d_model, self.config.d_state, self.config.d_head
        return length * (2 * 4 * d * d + 2 * n * d + d * p * (14 * n // 2 + 2))


class Named(nn.Module):
    """A layer under the name `kernel`, as the published code has it."""

    def __init__(self, kernel: Any):
        super().__init__()
        self.kernel = kernel

    def reset_parameters(self) -> None:
        self.kernel.reset_parameters()


class ShiftKernel(Float32Parameters):
    """The SSM whose state is its last n inputs: x_t = S x_{t-1} + B u_t, y_t = C x_t, S a shift by one."""

    float32_parameters = ("B", "C")

    def __init__(self, d_model: int, d_state: int):
        super().__init__()
        self.B = float32_parameter(d_model, d_state)
        self.C = float32_parameter(1, d_model, d_state)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        n = self.B.shape[-1]
        self.B.zero_()[:, 0] = 1
        nn.init.uniform_(self.C, -(n**-0.5), n**-0.5)
        self.mark()

    def taps(self) -> Tensor:
        """Its convolution kernel (d, n): tap j, sum_m B_m C_{m+j}, meets the input j tokens back."""
        n = self.B.shape[-1]
        B, C = torch.fft.rfft(self.B, n=2 * n), torch.fft.rfft(self.C[0], n=2 * n)
        return torch.fft.irfft(B.conj() * C, n=2 * n)[:, :n]


class DiagonalKernel(Float32Parameters):
    """The parameters of S4D, one system for each head."""

    float32_parameters = ("C", "log_dt", "B", "inv_A_real", "A_imag")

    def __init__(self, n_heads: int, config: H3.Config):
        super().__init__()
        self.config = config
        h, n = n_heads, config.d_state // 2
        self.C = float32_parameter(1, h, n, 2)
        self.log_dt = float32_parameter(h)
        self.B = float32_parameter(h, n, 2)
        self.inv_A_real = float32_parameter(h, n)
        self.A_imag = float32_parameter(h, n)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.C, std=0.5**0.5)
        self.log_dt.uniform_(math.log(self.config.dt_min), math.log(self.config.dt_max))
        self.B.copy_(torch.tensor([1.0, 0.0]))
        self.inv_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[1]))
        self.mark()

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (h,); A, B, C (h, n/2, 2)."""
        A = torch.stack([-self.inv_A_real.exp(), self.A_imag], dim=-1)
        return self.log_dt.exp(), A, self.B, self.C[0]
