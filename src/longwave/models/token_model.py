"""What models of tokens share: tokens in, the next token's logits out, whatever lies between."""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from longwave.mixers.moe import MoE
from longwave.mixers.norm import RMSNorm
from longwave.models.blocks import LayerNorm
from longwave.models.layered import Layered
from longwave.models.loss import linear_cross_entropy
from longwave.models.saving import load_model, save_model
from longwave.models.state import State


class TokenModel(Layered):
    """logits = lm_head norm_f(layers(embedding[token])), with the call, the loss, the state and the folder around it.

    A subclass has a Config and makes the four parts; LanguageModel and SaShiMi are such.
    """

    Config: ClassVar[type]
    config: Any
    embedding: nn.Embedding
    norm_f: RMSNorm | LayerNorm
    lm_head: nn.Linear

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]:
        """tokens (b, l) int64 -> logits (b, l, v) in the weights' dtype, and the state after them.

        `state=None` is a fresh sequence; a state given is left as it was. `reset` (b, l) bool: True starts a document,
        which sees nothing before it. `lengths` (b,) int64 in 0..l: tokens from lengths[i] on are padding, which changes
        nothing in row i's state and has meaningless logits. `dt`: how long each token lasts, for mixers with a rate.
        Raises ValueError for shapes that do not fit and for a state of another model, UsageError for `dt` where a
        mixer has no rate.
        """
        hidden, after = self.hidden(tokens, state, reset=reset, lengths=lengths, dt=dt)
        return self.head(hidden), after

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]:
        """As `forward`, but (b, l, d) before the head."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (b, l), got {tuple(tokens.shape)}; one sequence is tokens[None]")
        x, after = self.layers(self._embed(tokens), state, reset=reset, lengths=lengths, dt=dt)
        return self._finish(x), after

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., d) -> logits (..., v)."""
        return self.lm_head(self._to_head(hidden))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        state: State | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross entropy in nats of targets (b, l) int64 after tokens (b, l), never holding all logits.

        A scalar, or (b, l) for reduction "none". Targets equal to `ignore_index` count nothing. Padding is not ignored
        by itself: give it that target.
        """
        hidden, _ = self.hidden(tokens, state, reset=reset, lengths=lengths, dt=dt)
        return linear_cross_entropy(
            self.lm_head,
            self._to_head(hidden),
            targets,
            vocab_size=self.config.vocab_size,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State, dt: Tensor | float | None = None) -> Tensor:
        """One token per row: tokens (b,) -> logits (b, v). `state` is updated in place. No gradient.

        Layers whose state grows raise ValueError when it has no room: `state.reserve(n)` makes it.
        """
        return self.head(self.hidden_step(tokens, state, dt))

    @torch.no_grad()
    def hidden_step(self, tokens: Tensor, state: State, dt: Tensor | float | None = None) -> Tensor:
        """As `step`, but (b, d) before the head."""
        return self._finish(self.layers.step(self._embed(tokens), state, dt))

    def flops(self, length: int) -> int:
        """Forward operations on one sequence of `length` tokens, a multiply-add being two; norms are not counted."""
        return self.layers.flops(length) + 2 * length * self.config.d_model * self.config.vocab_size

    def parameter_count(self) -> int:
        """Numbers in all parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def active_parameter_count(self) -> int:
        """As `parameter_count`, without the experts that a token does not go through."""
        idle = sum(module.idle_parameters for module in self.modules() if isinstance(module, MoE))
        return self.parameter_count() - idle

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, made if need be; each is replaced whole or not at all.

        Raises LongwaveError when they cannot be written.
        """
        save_model(self, folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """The model that `save` wrote, on `device`, in the dtypes it was saved in.

        Raises UsageError for a folder without config.json or with an unknown key in it, and LongwaveError for damaged
        files and for tensors that are missing, extra or of another shape, naming ten of them.
        """
        return load_model(lambda settings: cls(cls.Config.from_dict(settings)), folder, device)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm_f(x)

    def _to_head(self, hidden: Tensor) -> Tensor:
        return hidden
