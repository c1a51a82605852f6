"""StripedHyena's Hyena block: a gated long convolution whose filter is a sum of damped oscillations."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype, reset_children
from longwave.mixers.linear import Linear
from longwave.mixers.ssm_parameters import Float32Parameters, float32_parameter
from longwave.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from longwave.ops.checks import state_dtype
from longwave.ops.diagonal_scan import diagonal_scan, diagonal_scan_step
from longwave.ops.discretize import discretize_diagonal


class HyenaModalState(NamedTuple):
    conv: Tensor  # (b, w-1, 3d): the last inputs of the short convolution, in the compute dtype
    ssm: Tensor  # (b, d, n, 2): what each mode holds, real and imaginary part, float32


class HyenaModal(nn.Module):
    """The Hyena block in modal form:

        x2, x1, v = conv1d(W_in u)                   per head, the channels lie as [x2 | x1 | v]
        s_t = p s_{t-1} + x1_t v_t                   per channel and mode, complex
        y_t = x2_t (Re sum_n R s_t + D x1_t v_t)     that is x2 (h * (x1 v) + D x1 v), h_t = Re sum_n R p^t
        out = W_out y

    StripedHyena (Poli et al. 2023); Hyena: arXiv:2302.10866; filters in modal form: Massaroli et al. 2023,
    arXiv:2310.18780, section 3. Modes come without their conjugates. Parameters are named as in the published
    checkpoints: projections, filter.{D, short_filter_weight (3d, 1, w), short_filter_bias, poles and residues (d, n, 1,
    2), real and imaginary part}, out_filter_dense. D, poles and residues stay in float32 under `.bfloat16()`.

    Initialised as S4D-Lin under the bilinear rule, which is what the published filters were trained as: with A = -1/2 +
    i pi n, dt log-uniform in [dt_min, dt_max] and C standard complex normal, p = (1 + dt A / 2) / (1 - dt A / 2) and
    R = 2 C dt / (1 - dt A / 2). D is standard normal; the rest as nn.Linear and nn.Conv1d.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`n_heads`: groups of channels in which x2, x1 and v lie side by side; it only orders the channels.

        `d_state`: modes of each channel's filter, n. `d_conv`: width of the short convolution, w.
        """

        kind: ClassVar[str] = "hyena_modal"
        n_heads: int = 1
        d_state: int = 8
        d_conv: int = 3
        conv_bias: bool = True
        dt_min: float = 1e-3
        dt_max: float = 1e-1

        def __post_init__(self):
            check_positive(self, "n_heads", "d_state", "d_conv")
            if not 0 < self.dt_min <= self.dt_max:
                raise UsageError(f"hyena_modal: need 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model = d_model
        if d_model % config.n_heads:
            raise UsageError(f"hyena_modal: n_heads={config.n_heads} must divide d_model={d_model}")
        self.projections = Linear(d_model, 3 * d_model)
        self.filter = ModalFilter(d_model, config)
        self.out_filter_dense = Linear(d_model, d_model)

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        state: HyenaModalState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, HyenaModalState]:
        conv, ssm = state or (None, None)
        documents: dict[str, Any] = {"reset": reset, "lengths": lengths}
        z, conv = causal_conv1d(self.projections(x), *self.filter.short(), initial_state=conv, **documents)
        x2, x1, v = self._split(z)
        y, ssm = diagonal_scan(*self.filter.system(x1 * v), **self.filter.options(), initial_state=ssm, **documents)
        return self.out_filter_dense(x2 * y), HyenaModalState(conv, ssm)

    @torch.no_grad()
    def step(self, x: Tensor, state: HyenaModalState) -> Tensor:
        z = causal_conv1d_step(state.conv, self.projections(x), *self.filter.short())
        x2, x1, v = self._split(z)
        y = diagonal_scan_step(state.ssm, *self.filter.system(x1 * v), **self.filter.options())
        return self.out_filter_dense(x2 * y)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., 3d) -> x2, x1 and v (..., d)."""
        x2, x1, v = z.unflatten(-1, (self.config.n_heads, 3, -1)).unbind(-2)  # (..., h, p)
        return x2.flatten(-2), x1.flatten(-2), v.flatten(-2)

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> HyenaModalState:
        dtype = compute_dtype(self.projections.weight, dtype)
        device = device or self.filter.D.device
        d, n, w = self.d_model, self.config.d_state, self.config.d_conv
        return HyenaModalState(
            torch.zeros(b, w - 1, 3 * d, dtype=dtype, device=device),
            torch.zeros(b, d, n, 2, dtype=state_dtype(dtype), device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        dtype = compute_dtype(self.projections.weight, dtype)
        d, n, w = self.d_model, self.config.d_state, self.config.d_conv
        return 3 * d * (w - 1) * dtype.itemsize + 2 * d * n * state_dtype(dtype).itemsize

    def flops(self, length: int) -> int:
        """The recurrence counts 11 operations per mode: p s (6), x1 v added (1), Re R s summed (4); and D x1 v (2)."""
        d, n, w = self.d_model, self.config.d_state, self.config.d_conv
        return length * (2 * d * 4 * d + 2 * w * 3 * d + 11 * d * n + 2 * d)


class ModalFilter(Float32Parameters):
    """The short and the long filter of a HyenaModal."""

    float32_parameters = ("D", "poles", "residues")
    short_filter_bias: nn.Parameter | None

    def __init__(self, d_model: int, config: HyenaModal.Config):
        super().__init__()
        self.config = config
        d, n, w = d_model, config.d_state, config.d_conv
        self.D = float32_parameter(d)
        self.short_filter_weight = nn.Parameter(torch.empty(3 * d, 1, w))
        self.register_parameter("short_filter_bias", nn.Parameter(torch.empty(3 * d)) if config.conv_bias else None)
        self.poles = float32_parameter(d, n, 1, 2)
        self.residues = float32_parameter(d, n, 1, 2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config = self.config
        for short in (self.short_filter_weight, self.short_filter_bias):
            if short is not None:
                nn.init.uniform_(short, -(config.d_conv**-0.5), config.d_conv**-0.5)
        nn.init.normal_(self.D)
        dt = torch.empty_like(self.D).uniform_(math.log(config.dt_min), math.log(config.dt_max)).exp()
        A = torch.complex(torch.full_like(dt, -0.5)[:, None], math.pi * torch.arange(config.d_state).to(dt))
        C = torch.view_as_complex(nn.init.normal_(torch.empty_like(self.residues), std=0.5**0.5))[..., 0]  # (d, n)
        pole, residue = discretize_diagonal(A, 2 * C, dt[:, None], "bilinear")
        self.poles.copy_(torch.view_as_real(pole)[:, :, None])
        self.residues.copy_(torch.view_as_real(residue)[:, :, None])
        self.mark()

    def short(self) -> tuple[Tensor, Tensor | None]:
        return self.short_filter_weight.squeeze(1), self.short_filter_bias

    def system(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u, dt (1, of u's shape), A, B, C of the scan: Abar = exp(A) = p, Bbar = 1, 2 Re C s = Re R s."""
        real, imaginary = self.poles[:, :, 0].unbind(-1)  # (d, n)
        log = torch.stack([torch.hypot(real, imaginary).log(), torch.atan2(imaginary, real)], dim=-1)
        one = log.new_tensor([1.0, 0.0]).expand_as(log)
        dt = log.new_ones(()).expand(u.shape)
        return u, dt, log, one, self.residues[:, :, 0] / 2

    def options(self) -> dict[str, Any]:
        return {"method": "dirac", "D": self.D}
