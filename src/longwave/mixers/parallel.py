"""Several mixers side by side on the same input, their outputs summed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.attention import Attention
from longwave.mixers.base import Mixer, mixer_class, reset_children, scaled
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.nested import reserve


class ParallelState(NamedTuple):
    parts: tuple[Any, ...]  # the state of each mixer

    def reserve(self, n: int) -> "ParallelState":
        """A copy with room for exactly `n` more tokens, in the mixers whose state grows."""
        return ParallelState(reserve(self.parts, n))


class Parallel(nn.Module):
    """Mixers side by side:

        y = sum_i out_i mixer_i(in_i x)

    As in Falcon-H1 (Zuo et al. 2025, arXiv:2507.22448, section 2), whose layers sum Mamba-2 and attention; the factors
    are its multipliers. Parameters: parts.i, each as its mixer has them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`mixers`: their configurations. `in_multipliers`, `out_multipliers`: a factor for each; None: all 1."""

        kind: ClassVar[str] = "parallel"
        mixers: tuple[Any, ...] = (Mamba2.Config(), Attention.Config())
        in_multipliers: tuple[float, ...] | None = None
        out_multipliers: tuple[float, ...] | None = None

        def __post_init__(self):
            if not isinstance(self.mixers, tuple) or not self.mixers:
                raise UsageError(f"parallel: mixers must be a tuple of at least one configuration, got {self.mixers!r}")
            for i, mixer in enumerate(self.mixers):
                mixer_class(mixer, f"parallel: mixers[{i}]")
            for name in ("in_multipliers", "out_multipliers"):
                factors = getattr(self, name)
                if factors is not None and len(factors) != len(self.mixers):
                    raise UsageError(
                        f"parallel: {name} must have a factor for each of the {len(self.mixers)} mixers, got {factors}"
                    )

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model = d_model
        ones = (1.0,) * len(config.mixers)
        self.parts = nn.ModuleList(mixer_class(mixer, "parallel")(d_model, mixer) for mixer in config.mixers)
        self.multipliers = tuple(zip(config.in_multipliers or ones, config.out_multipliers or ones, strict=True))

    def reset_parameters(self) -> None:
        reset_children(self.parts)

    def forward(
        self,
        x: Tensor,
        state: ParallelState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ParallelState]:
        before = state.parts if state else (None,) * len(self.parts)
        ys, after = [], []
        for part, (into, out), old in zip(self._mixers(), self.multipliers, before, strict=True):
            y, new = part(scaled(x, into), old, reset=reset, lengths=lengths)
            ys.append(scaled(y, out))
            after.append(new)
        return sum(ys[1:], ys[0]), ParallelState(tuple(after))

    @torch.no_grad()
    def step(self, x: Tensor, state: ParallelState) -> Tensor:
        ys = [
            scaled(part.step(scaled(x, into), old), out)
            for part, (into, out), old in zip(self._mixers(), self.multipliers, state.parts, strict=True)
        ]
        return sum(ys[1:], ys[0])

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ParallelState:
        return ParallelState(
            tuple(part.init_state(b, length=length, dtype=dtype, device=device) for part in self._mixers())
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        return sum(part.state_bytes(length, dtype) for part in self._mixers())

    def flops(self, length: int) -> int:
        return sum(part.flops(length) for part in self._mixers())

    def _mixers(self) -> Iterator[Mixer[Any]]:
        return iter(self.parts)  # pyright: ignore[reportReturnType]
