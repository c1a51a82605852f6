"""A mixer in both directions, for encoders: every token sees its whole document."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.base import mixer_class, reset_children, takes_dt
from longwave.mixers.documents import mirror, without_padding
from longwave.mixers.linear import Linear
from longwave.mixers.mamba2 import Mamba2

TIED = ("in_proj", "out_proj")


class Bidirectional(nn.Module):
    """Two mixers, of which one reads each document backwards:

        sum      y = fwd(x) + flip(rev(flip(x)))
        concat   y = W_merge [fwd(x), flip(rev(flip(x)))] + b

    The sum is BiMamba (Schiff et al. 2024, arXiv:2403.03234, section 3.1), the concatenation that of bidirectional RNNs
    (Schuster and Paliwal 1997). `flip` turns round each document by itself, within its row's length.

    There is no state: the backward half begins at a document's end, so that nothing can be said of its first token
    before its last one is known. What asks for a state or a step raises UsageError.
    Parameters: fwd and rev, each as its mixer has them, and merge for "concat".
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`mixer`: that of both directions. `tied`: they share in_proj and out_proj, as BiMamba does, at half the
        parameters of these. Raises UsageError for a mixer that has neither."""

        kind: ClassVar[str] = "bidirectional"
        mixer: Any = field(default_factory=Mamba2.Config)
        combine: Literal["sum", "concat"] = "sum"
        tied: bool = False

        def __post_init__(self):
            mixer_class(self.mixer, "bidirectional: mixer")
            if self.combine not in ("sum", "concat"):
                raise UsageError(f"bidirectional: combine must be 'sum' or 'concat', got {self.combine!r}")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model = d_model
        mixer = mixer_class(config.mixer, "bidirectional: mixer")
        self.fwd, self.rev = mixer(d_model, config.mixer), mixer(d_model, config.mixer)
        self.merge = Linear(2 * d_model, d_model) if config.combine == "concat" else None
        if config.tied:
            self._tie()

    def _tie(self) -> None:
        shared = [name for name in TIED if isinstance(getattr(self.fwd, name, None), nn.Module)]
        if not shared:
            raise UsageError(
                f"bidirectional: tied=True shares {' and '.join(TIED)}, and {self.config.mixer.kind} has neither"
            )
        for name in shared:  # the module and not its weight, so that `to_empty` does not cut the tie
            setattr(self.rev, name, getattr(self.fwd, name))

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> Tensor:
        """x (b, l, d) -> the same shape.

        `reset` (b, l) bool: True starts a document, which sees none other. `lengths` (b,) int64 in 0..l: tokens from
        lengths[i] on are padding, whatever stands there; y there is finite and means nothing. `dt`: how long each token
        lasts, for mixers with a rate.
        """
        x = without_padding(x, lengths)
        b, l, _ = x.shape
        turned = None if reset is None and lengths is None else mirror(b, l, reset, lengths, x.device)
        ahead, _ = self.fwd(x, reset=reset, lengths=lengths, **({} if dt is None else {"dt": dt}))
        rate = {} if dt is None else {"dt": _turn(dt, turned)}
        back, _ = self.rev(_turn(x, turned), reset=reset, lengths=lengths, **rate)
        back = _turn(back, turned)
        return ahead + back if self.merge is None else self.merge(torch.cat([ahead, back], -1))

    @property
    def takes_dt(self) -> bool:
        return takes_dt(self.fwd)

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """0: nothing is kept."""
        return 0

    def flops(self, length: int) -> int:
        """Operations of `forward` on one sequence of `length` tokens; a multiply-add is two."""
        merge = 0 if self.merge is None else 2 * length * 2 * self.d_model * self.d_model
        return 2 * self.fwd.flops(length) + merge

    def init_state(self, b: int, **options: Any) -> NoReturn:
        refuse_state()

    def step(self, x: Tensor, state: Any) -> NoReturn:
        refuse_state()


def refuse_state() -> NoReturn:
    """Raise UsageError: there is no state, and why."""
    raise UsageError(
        "a bidirectional layer reads each sequence whole, to its end, so it has no state to go on from and no step; "
        "give the sequence in one call, or build the model without bidirectional layers"
    )


def _turn(value: Any, places: Tensor | None) -> Any:
    """value (b, l) or (b, l, d), its tokens taken from `places` (b, l), None: end to front; a number as it is."""
    if not isinstance(value, Tensor):
        return value
    if places is None:
        return value.flip(1)
    return value.take_along_dim(places if value.ndim == 2 else places[..., None], 1)
