"""From a Hyena to a mixer of constant size: its filters as sums of a few damped oscillations.

Massaroli et al. 2023, arXiv:2310.18780 ("Laughing Hyena Distillery"). A filter is wanted in modal form (section 3),

    h_t ~ Re sum_{i<n} R_i p_i^t,     |p_i| < 1

It begins with the Hankel matrix S_ij = h_{i+j} (section 3.3): where that has rank r, its r leading singular vectors U
have the span of the columns (1, p, p^2, ...), so that the p are the eigenvalues of the matrix which shifts U by a row
(Kung 1978). Poles and residues are then refined together by Levenberg's and Marquardt's least squares, where the paper
follows the gradient of the same error.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longwave.errors import UsageError
from longwave.mixers.hyena import Hyena
from longwave.mixers.hyena_modal import HyenaModal

_TAPS = 4096  # of a longer filter the fit looks at so many, evenly spread
_HANKEL = 512  # rows of a Hankel matrix, and its columns
_NUMBERS = 1 << 24  # of a Jacobian in memory at once
_ITERATIONS = 80


@dataclass(frozen=True)
class Distillation:
    """How far the modal filters are from those that they stand for, over all l_max taps.

    `errors` (d,): of each filter |h - h'| / |h|, Euclidean norms; `h'` from the parameters as the mixer has them.
    """

    errors: Tensor
    l_max: int
    d_state: int

    @property
    def worst(self) -> float:
        return float(self.errors.max())

    def __str__(self) -> str:
        return (
            f"{len(self.errors)} filters of {self.l_max} taps in {self.d_state} modes: "
            f"relative error {float(self.errors.median()):.1e} in the median, "
            f"{self.worst:.1e} in the worst, channel {int(self.errors.argmax())}"
        )


@torch.no_grad()
def distill(hyena: Hyena, d_state: int, *, verbose: bool = True) -> tuple[HyenaModal, Distillation]:
    """A HyenaModal of `d_state` modes to a filter, in place of a Hyena of order 2, and the error, which is printed.

    Projections, short filter and skip are copies. State and step are of constant size, 8 d d_state bytes beside the
    window of the short filter; there is no longest document: beyond l_max the modes ring out. Time and memory are those
    of d least-squares problems of at most 4096 equations. Raises UsageError for another order, and for d_state < 1.
    """
    config = hyena.config
    if config.order != 2:
        raise UsageError(f"distill: order={config.order}; modal mixers have two gates, as Hyena of order 2 has")
    modal = HyenaModal(hyena.d_model, HyenaModal.Config(d_state=d_state, d_conv=config.d_conv)).to(
        hyena.in_proj.weight.device, hyena.in_proj.weight.dtype
    )
    (h,) = hyena.filter_fn.filters(config.l_max)  # (d, l_max)
    h = h.double().cpu()
    p, residues = fit_modes(h, d_state)
    pairs = {"poles": p, "residues": residues}
    tensors = {f"filter.{name}": torch.view_as_real(pair)[:, :, None] for name, pair in pairs.items()}
    tensors |= {"filter.D": hyena.filter_fn.bias}
    tensors |= {f"filter.short_filter_{part}": getattr(hyena.short_filter, part) for part in ("weight", "bias")}
    for theirs, ours in (("in_proj", "projections"), ("out_proj", "out_filter_dense")):
        layer = getattr(hyena, theirs)
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        tensors |= {f"{ours}.weight": layer.weight, f"{ours}.bias": bias}
    modal.load_state_dict(tensors)
    stored = (torch.view_as_complex(getattr(modal.filter, name)[:, :, 0].double().cpu()) for name in pairs)
    report = Distillation(_errors(h, *stored), config.l_max, d_state)
    if verbose:
        print(report)
    return modal, report


def fit_modes(h: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Poles and residues (d, n), complex128, of n modes that come close to the filters h (d, l), float64."""
    if n < 1:
        raise UsageError(f"fit_modes: n must be at least 1, got {n}")
    l = h.shape[1]
    t = torch.arange(0, l, -(-l // _TAPS), dtype=h.dtype, device=h.device)
    at_once = max(1, _NUMBERS // (4 * n * len(t)))
    found = [_fit(part, t, n) for part in h.split(at_once)]
    rate, residue = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rate.exp(), residue


def _fit(h: Tensor, t: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rates log p and residues, from the better of two starts: the whole filter seen coarsely, or its beginning."""
    l, samples = h.shape[1], h[:, t.long()]
    scale = samples.norm(dim=1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
    found = []
    for stride in {1, -(-l // (2 * _HANKEL))}:
        rate = _start(h[:, ::stride][:, : 2 * _HANKEL], n) / stride
        found.append(_refine(samples / scale, t, torch.complex(rate.real.clamp(max=-0.01 / l), rate.imag)))
    rates, residues, costs = (torch.stack(parts) for parts in zip(*found, strict=True))  # (starts, d, ...)
    best, channels = costs.argmin(0), torch.arange(len(h))
    return rates[best, channels], residues[best, channels] * scale


def _start(h: Tensor, n: int) -> Tensor:
    """Rates (d, n) of the n modes that are the largest in h, by Kung's method."""
    m = (h.shape[1] + 1) // 2
    r = min(2 * n, m - 1, h.shape[1] - m + 1)
    if r < 1:
        return _spread(h, n)
    S = h.unfold(1, h.shape[1] - m + 1, 1)  # (d, m, columns)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # svd_lowrank begins with random vectors; the fit is to be the same every time
        U = torch.svd_lowrank(S, q=min(r + 10, *S.shape[1:]), niter=4)[0][:, :, :r]
    p = torch.linalg.eigvals(torch.linalg.lstsq(U[:, :-1], U[:, 1:]).solution)  # (d, r), with their conjugates
    rate = torch.log(torch.where(p.abs() > 1e-6, p, 1e-6))
    rate = torch.complex(rate.real.clamp(-14.0, 0.0), rate.imag)
    t = torch.arange(h.shape[1], dtype=h.dtype, device=h.device)
    residue = _residues(h, t, torch.where(p.imag >= 0, rate, -40.0))  # a conjugate adds nothing
    size = residue.abs() * torch.exp(rate.real[..., None] * t).norm(dim=-1)
    size = torch.where(p.imag >= 0, size, -1.0)
    kept = size.argsort(dim=1, descending=True)[:, :n]
    rate = rate.gather(1, kept)
    return torch.cat([torch.complex(rate.real, rate.imag.abs()), _spread(h, n - rate.shape[1])], 1)


def _spread(h: Tensor, n: int) -> Tensor:
    """n rates of different frequencies for filters that are too short to tell them."""
    turn = math.pi * (torch.arange(n, dtype=h.dtype) + 0.5) / max(n, 1)
    return torch.complex(torch.full_like(turn, -1 / h.shape[1]), turn).expand(len(h), n)


def _basis(t: Tensor, rate: Tensor) -> Tensor:
    """e^(rate t), (d, t, n)."""
    return torch.exp(rate[:, None] * t[:, None])


def _residues(h: Tensor, t: Tensor, rate: Tensor) -> Tensor:
    """The best residues for these rates: linear least squares, held to finite size where rates coincide."""
    E = _basis(t, rate)
    J = torch.cat([E.real, -E.imag], -1)  # (d, t, 2n)
    x = _solve(J.mT @ J, (J.mT @ h[..., None])[..., 0], 1e-12)
    return torch.complex(*x.chunk(2, dim=-1))


def _solve(normal: Tensor, gradient: Tensor, damping: Tensor | float) -> Tensor:
    """(normal + damping times its diagonal)^-1 gradient."""
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    floor = 1e-14 * diagonal.amax(-1, keepdim=True) + torch.finfo(normal.dtype).tiny
    return torch.linalg.solve(normal + torch.diag_embed(damping * diagonal + floor), gradient)


def _refine(h: Tensor, t: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rates, residues and squared errors after Levenberg-Marquardt over log(-Re rate), Im rate and the residues."""
    residue = _residues(h, t, rate)
    cost = _cost(h, t, rate, residue)
    damping = torch.full_like(cost, 1e-2)
    for _ in range(_ITERATIONS):
        E = _basis(t, rate)
        slope = residue[:, None] * E * t[:, None]  # of the mode by its rate
        J = torch.cat([slope.real * rate.real[:, None], -slope.imag, E.real, -E.imag], -1)  # (d, t, 4n)
        left = h - (residue[:, None] * E).real.sum(-1)
        step = _solve(J.mT @ J, (J.mT @ left[..., None])[..., 0], damping[:, None])
        decay, turn, *parts = step.chunk(4, dim=-1)
        real = (rate.real * decay.clamp(-2.0, 2.0).exp()).clamp(-40.0, -1e-12)
        new_rate, new_residue = torch.complex(real, rate.imag + turn), residue + torch.complex(*parts)
        new_cost = _cost(h, t, new_rate, new_residue)
        better = new_cost < cost
        rate = torch.where(better[:, None], new_rate, rate)
        residue = torch.where(better[:, None], new_residue, residue)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e12)
        done = (cost - new_cost).abs() <= 1e-9 * cost
        cost = torch.where(better, new_cost, cost)
        if bool((done | (damping > 1e8)).all()):
            break
    return rate, residue, cost


def _cost(h: Tensor, t: Tensor, rate: Tensor, residue: Tensor) -> Tensor:
    """(d,) sums of squares; infinite where the numbers have run away."""
    cost = (h - (residue[:, None] * _basis(t, rate)).real.sum(-1)).square().sum(-1)
    return torch.where(cost.isfinite(), cost, math.inf)


def _errors(h: Tensor, p: Tensor, residue: Tensor) -> Tensor:
    """(d,) relative errors over all taps, some at a time."""
    squares = torch.zeros_like(h[:, 0])
    for t in torch.arange(h.shape[1], device=h.device).split(_TAPS):
        modes = (residue[:, None] * _basis(t.to(h.dtype), p.log())).real.sum(-1)
        squares += (h[:, t] - modes).square().sum(-1)
    return squares.sqrt() / h.norm(dim=1).clamp(min=torch.finfo(h.dtype).tiny)
