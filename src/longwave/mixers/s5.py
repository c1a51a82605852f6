"""S5 (Smith, Warrington and Linderman 2023, arXiv:2208.04933): one diagonal state space for all channels together."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, reset_children
from longwave.mixers.linear import Linear
from longwave.mixers.ssm_parameters import float32_parameter
from longwave.mixers.time_invariant import SSMConfig, SSMState, TimeInvariant
from longwave.ops.checks import wide_dtype
from longwave.ops.diagonal_scan import diagonal_scan, diagonal_scan_step
from longwave.ops.discretize import discretize_diagonal
from longwave.ops.fft_conv import fft_conv
from longwave.ops.hippo import nplr
from longwave.ops.ssm_kernel import vandermonde_kernel

S5State = SSMState  # ssm (b, p, 2): pairs of real and imaginary part

Activation = Literal["full_glu", "half_glu1", "half_glu2", "gelu"]
SLOWEST = -1e-4  # what `clip_eigs` leaves of real parts that are larger
TRUNCATED = 0.87962566103423978  # standard deviation of a normal that is cut at 2


class S5(TimeInvariant):
    """One diagonal state space with d inputs and d outputs (section 3), its states found by a scan:

        x' = Lambda x + B u;  y = 2 Re(C x) + D u        Lambda = Lambda_re + i Lambda_im (p,), B (p, d), C (d, p)
        full_glu    out = (W_1 g + b_1) sigmoid(W_2 g + b_2),  g = gelu(y)
        half_glu1   out = g sigmoid(W_2 g + b_2)
        half_glu2   out = y sigmoid(W_2 g + b_2)
        gelu        out = g;                                   None: out = y

    with p = d_state / 2 modes that stand for their conjugates too; or, without `conj_sym`, p = d_state modes and
    y = Re(C x) + D u. A mode has its own step, exp(log_step). gelu is by tanh, as in JAX. Norm and residual are the
    block's.

    Parameters are named as in S5's code: Lambda_re and Lambda_im (p,), B (p, d, 2) and C (d, p, 2), complex numbers as
    pairs, D (d,), log_step (p, 1), out1, out2. All but the last two stay in float32. Initialised as there: Lambda is
    that of HiPPO-LegS without its low-rank term, in `n_blocks` equal blocks; B and C are real and complex normal of
    variance 1 / d_state, cut at two deviations, in its eigenbasis; D normal; steps log-uniform in [dt_min, dt_max].
    """

    float32_parameters = ("Lambda_re", "Lambda_im", "B", "C", "D", "log_step")
    slow_parameters = ("Lambda_re", "Lambda_im", "B", "log_step")
    scans = "always"

    @dataclass(frozen=True, kw_only=True)
    class Config(SSMConfig):
        """`clip_eigs` holds Re Lambda at -1e-4 or below, which keeps the state from growing on long sequences."""

        kind: ClassVar[str] = "s5"
        n_blocks: int = 1
        conj_sym: bool = True
        clip_eigs: bool = False
        discretization: Literal["zoh", "bilinear"] = "zoh"
        activation: Activation | None = "half_glu1"

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_blocks")
            if self.d_state % (self.n_blocks * (2 if self.conj_sym else 1)):
                what = "equal blocks of conjugate pairs" if self.conj_sym else "equal blocks"
                raise UsageError(f"s5: d_state={self.d_state} must be n_blocks={self.n_blocks} {what}")
            if self.discretization not in ("zoh", "bilinear"):
                raise UsageError(f"s5: discretization must be 'zoh' or 'bilinear', got {self.discretization!r}")
            if self.activation not in ("full_glu", "half_glu1", "half_glu2", "gelu", None):
                known = "'full_glu', 'half_glu1', 'half_glu2', 'gelu' or None"
                raise UsageError(f"s5: activation must be {known}, got {self.activation!r}")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model = d_model
        p = config.d_state // 2 if config.conj_sym else config.d_state
        self.Lambda_re = float32_parameter(p)
        self.Lambda_im = float32_parameter(p)
        self.B = float32_parameter(p, d_model, 2)
        self.C = float32_parameter(d_model, p, 2)
        self.D = float32_parameter(d_model) if config.skip else None
        self.log_step = float32_parameter(p, 1)
        gated = config.activation in ("full_glu", "half_glu1", "half_glu2")
        self.out1 = Linear(d_model, d_model) if config.activation == "full_glu" else None
        self.out2 = Linear(d_model, d_model) if gated else None
        self.state_shape = (p, 2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_children(self)
        config, (p, d) = self.config, self.B.shape[:2]
        form, size = nplr("legs", config.d_state // config.n_blocks), p // config.n_blocks
        Lambda, V = form.Lambda[:size].repeat(config.n_blocks), torch.block_diag(*[form.V[:, :size]] * config.n_blocks)
        V = V.to(self.B.device, torch.promote_types(self.B.dtype, torch.complex64))  # (d_state, p)
        self.Lambda_re.copy_(Lambda.real)
        self.Lambda_im.copy_(Lambda.imag)
        B = self._normal(config.d_state, d)
        C = self._normal(d, config.d_state, 2)
        self.B.copy_(torch.view_as_real(V.mH @ B.to(V.dtype)))
        self.C.copy_(torch.view_as_real(torch.view_as_complex(C) @ V))
        if self.D is not None:
            self.D.normal_()
        self.log_step.uniform_(math.log(config.dt_min), math.log(config.dt_max))
        self.mark()

    def _normal(self, *shape: int) -> Tensor:
        std = self.config.d_state**-0.5 / TRUNCATED
        empty = torch.empty(shape, dtype=self.B.dtype, device=self.B.device)
        return torch.nn.init.trunc_normal_(empty, std=std, a=-2 * std, b=2 * std)

    def _modes(self) -> tuple[Tensor, Tensor]:
        """dt Lambda (1, p, 2) in `wide_dtype`, and dt (p, 1), of the trained rate."""
        wide = wide_dtype(self.C.device)
        real = self.Lambda_re.clamp(max=SLOWEST) if self.config.clip_eigs else self.Lambda_re
        steps = self.log_step.to(wide).exp()
        return (steps * torch.stack([real, self.Lambda_im], dim=-1).to(wide))[None], steps

    def _enter(self, u: Tensor, steps: Tensor) -> Tensor:
        """dt B u: (..., d) -> (..., 1, p, 2)."""
        B = (steps[..., None].to(u.dtype) * self.B.to(u.dtype)).transpose(1, 2).flatten(0, 1)  # (2 p, d)
        return linear(u, B).unflatten(-1, (1, -1, 2))

    def _leave(self, x: Tensor, u: Tensor) -> Tensor:
        """2 Re(C x) + D u: (..., p, 2) -> (..., d)."""
        scale = 2.0 if self.config.conj_sym else 1.0
        C = self.C.to(u.dtype) * u.new_tensor([scale, -scale])
        y = linear(x.flatten(-2), C.flatten(-2))
        return y if self.D is None else y + self.D * u

    def _scan(self, u, dt, state, reset, lengths):
        A, steps = self._modes()
        v = self._enter(u, steps)  # (b, l, 1, p, 2)
        dt = (dt.to(u.dtype)[..., None] if isinstance(dt, Tensor) else u.new_full((), dt)).expand(*u.shape[:2], 1)
        x, after = diagonal_scan(
            v,
            dt,
            A.to(u.dtype),
            method=self.config.discretization,
            initial_state=None if state is None else state[:, None],
            reset=reset,
            lengths=lengths,
        )
        return self._leave(x[:, :, 0], u), after[:, 0]

    def _convolve(self, u, dt, state, reset, lengths):
        """Each mode convolves what enters it with Abar^t."""
        A, steps = self._modes()
        A = torch.view_as_complex(A[0])
        Abar, Bbar = discretize_diagonal(A, torch.ones_like(A), dt, self.config.discretization)
        v = torch.view_as_complex(self._enter(u, steps)[..., 0, :, :].contiguous())
        v = v * Bbar.to(v.dtype)
        kernel = _powers(Abar.log(), u.shape[1]).to(u.dtype)  # (2, p, l)
        parts = torch.cat([v.real, v.imag, v.real, v.imag], dim=-1)  # (b, l, 4 p)
        rr, ri, ir, ii = fft_conv(parts, kernel.repeat_interleave(2, 0).flatten(0, 1), reset=reset)[0].chunk(4, -1)
        x = torch.complex(rr - ii, ri + ir)  # (b, l, p)
        if state is not None:
            start = torch.view_as_complex(state.to(u.dtype).contiguous()) * Abar.to(x.dtype)
            left = start[:, None] * torch.view_as_complex(kernel.permute(2, 1, 0).contiguous())
            x = x + (left if reset is None else torch.where(reset.cumsum(1)[..., None] == 0, left, 0.0))
        x = torch.view_as_real(x)
        return self._leave(x, u), _last(x, state, lengths)

    def _token(self, u, state, dt):
        A, steps = self._modes()
        v = self._enter(u, steps)
        dt = dt.to(u.dtype)[:, None] if isinstance(dt, Tensor) else u.new_full((len(u), 1), dt)
        x = diagonal_scan_step(state[:, None], v, dt, A.to(u.dtype), method=self.config.discretization)
        return self._leave(x[:, 0], u)

    def _mix(self, y: Tensor) -> Tensor:
        if self.config.activation is None:
            return y
        g = gelu(y, approximate="tanh")
        if self.out2 is None:
            return g
        gate = torch.sigmoid(self.out2(g))
        if self.out1 is not None:
            return self.out1(g) * gate
        return (g if self.config.activation == "half_glu1" else y) * gate

    def flops(self, length: int) -> int:
        """The system: B u 4 d p, C x 4 d p, and for each of p modes Abar x + Bbar v 14."""
        p, d = self.B.shape[:2]
        mixes = (self.out1 is not None) + (self.out2 is not None)
        return length * (8 * d * p + 14 * p + 2 * d * self.config.skip + 2 * d * d * mixes)


def _powers(logarithm: Tensor, l: int) -> Tensor:
    """Re and Im of exp(t logarithm) for t < l: (p,) -> (2, p, l)."""
    halves = logarithm.new_tensor([0.5, -0.5j])[:, None, None].expand(2, len(logarithm), 1)  # 2 Re(. z) is Re z, Im z
    return vandermonde_kernel(torch.view_as_real(halves.contiguous()), torch.view_as_real(logarithm[:, None]), l)


def _last(x: Tensor, state: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last of the states x (b, l, p, 2), or number lengths[i] - 1 of row i, or what was before the first."""
    if lengths is None:
        return x[:, -1]
    final = x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]
    return torch.where((lengths > 0)[:, None, None], final, 0.0 if state is None else state.to(x.dtype))
