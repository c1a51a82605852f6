"""Hyena's implicit filters: an MLP with sines, of the position, under an exponential envelope."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longwave.mixers.base import reset_children
from longwave.mixers.ssm_parameters import Float32Parameters, float32_parameter


class HyenaFilter(Float32Parameters):
    """e filters of up to l_max taps, in float32 (section 3.3 and appendix D.3 of arXiv:2302.10866):

        h_t = MLP(z_t) (exp(-tau_t |delta|) + shift),      tau_t = t / (l_max - 1)
        MLP = W sin(f (W_n ... sin(f (W_0 z + b_0)) ... + b_n))

    where z_t = [tau_t, cos(2 pi k_i t / l_max), -sin(2 pi k_i t / l_max)] at first and is learned, and f is one vector,
    shared by all sines. delta runs evenly from log(decay_target) / slow_decay to log(decay_target) / fast_decay.
    `config` is `Hyena.Config`, which explains the settings.
    """

    float32_parameters = ("bias",)

    def __init__(self, e: int, config: Any):
        super().__init__()
        self.config, self.e = config, e
        self.bias = float32_parameter(e)  # D, the skip
        self.pos_emb = Positions(config)
        self.implicit_filter = SineMLP(config.d_position, config.d_filter, e, config.n_inner, config.frequency)
        self.modulation = Modulation(e, config)
        self._made: tuple[Any, tuple[Tensor, ...]] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_children(self)
        nn.init.normal_(self.bias)
        self.mark()

    def filters(self, l: int) -> tuple[Tensor, ...]:
        """For each convolution its first `l` taps (d, l), whose transpose is contiguous.

        Without a gradient all l_max taps are made at once and kept until a parameter changes; changes through `.data`
        go unseen.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._make(l)
        key = [(p, p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]
        if self._made is None or not _same(self._made[0], key):
            self._made = key, self._make(self.config.l_max)
        return tuple(kernel[:, :l] for kernel in self._made[1])

    def skips(self) -> tuple[Tensor, ...]:
        """For each convolution D (d,)."""
        return self.bias.chunk(self.config.order - 1)

    def _make(self, l: int) -> tuple[Tensor, ...]:
        with torch.autocast(self.bias.device.type, enabled=False):  # 8 bits are not enough to tell positions apart
            z, tau = self.pos_emb.z[0, :l], self.pos_emb.t[0, :l]
            h = self.modulation(tau, self.implicit_filter(z))  # (l, e)
        return tuple(part.contiguous().t() for part in h.chunk(self.config.order - 1, dim=1))

    def flops(self, length: int) -> int:
        return length * sum(2 * layer.weight.numel() for layer in self.implicit_filter.layers())

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_made": None}  # copies and pickles make their own


def _same(key: list[Any], other: list[Any]) -> bool:
    """Are these the same parameters (by identity), at the same place in memory, in the same versions?"""
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(key, other, strict=True))


class Positions(Float32Parameters):
    """z (1, l_max, d_position), and the time t (1, l_max, 1) from 0 to 1, which is not learned."""

    float32_parameters = ("z", "t")

    def __init__(self, config: Any):
        super().__init__()
        self.z = float32_parameter(1, config.l_max, config.d_position)
        self.t = float32_parameter(1, config.l_max, 1).requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        l, n = self.z.shape[1], (self.z.shape[2] - 1) // 2
        time = torch.linspace(0, 1, l, dtype=torch.float64)[:, None]
        turns = torch.linspace(1e-4, n - 1, n, dtype=torch.float64) * (2 * math.pi / l) * torch.arange(l)[:, None]
        self.t.copy_(time[None])
        self.z.copy_(torch.cat([time, turns.cos(), -turns.sin()], dim=1)[None])
        self.mark()


class Modulation(Float32Parameters):
    """The envelope. Its rates `deltas` (1, 1, e) are negative and not learned."""

    float32_parameters = ("deltas",)

    def __init__(self, e: int, config: Any):
        super().__init__()
        self.config = config
        self.deltas = float32_parameter(1, 1, e).requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        end = math.log(self.config.decay_target)
        slow, fast = end / self.config.slow_decay, end / self.config.fast_decay
        self.deltas.copy_(torch.linspace(slow, fast, self.deltas.shape[2]))
        self.mark()

    def forward(self, tau: Tensor, h: Tensor) -> Tensor:
        """tau (l, 1), h (l, e)"""
        return h * (torch.exp(-tau * self.deltas[0].abs()) + self.config.shift)


class Float32Linear(Float32Parameters, nn.Linear):
    """nn.Linear that stays in float32."""

    float32_parameters = ("weight", "bias")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.mark()


class Sine(Float32Parameters):
    """sin(f x), f (1, d_filter)."""

    float32_parameters = ("freq",)

    def __init__(self, d: int, frequency: float):
        super().__init__()
        self.frequency = frequency
        self.freq = float32_parameter(1, d)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.freq.fill_(self.frequency)
        self.mark()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class SineMLP(nn.Module):
    """Linear layers number 0, 2, 4, ..., the last without bias, and between them one sine, number 1."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, n_inner: int, frequency: float):
        super().__init__()
        self.add_module("0", Float32Linear(d_in, d_hidden))
        self.add_module("1", Sine(d_hidden, frequency))
        for i in range(n_inner):
            self.add_module(f"{2 + 2 * i}", Float32Linear(d_hidden, d_hidden))
        self.add_module(f"{2 + 2 * n_inner}", Float32Linear(d_hidden, d_out, bias=False))

    def reset_parameters(self) -> None:
        reset_children(self)

    def layers(self) -> Iterator[Float32Linear]:
        return (child for child in self.children() if isinstance(child, Float32Linear))

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers()
        sine = self.get_submodule("1")
        for layer in inner:
            x = sine(layer(x))
        return last(x)
