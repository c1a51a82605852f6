"""Heads: from a sequence to a class, a class or number for each token, a vector, or a shorter sequence of labels."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss, dropout, normalize

from longwave.config import from_dict, nearest
from longwave.errors import UsageError
from longwave.mixers.base import check_positive, reset_children
from longwave.mixers.documents import apart, padding, without_padding
from longwave.mixers.linear import Linear
from longwave.models.blocks import layer_configs
from longwave.models.features import Features
from longwave.models.language_model import LanguageModel
from longwave.models.loss import squared_error, wide
from longwave.models.saving import Stored, fill, load_model, read_settings, save_model
from longwave.models.state import State

Pooling = Literal["mean", "last", "max", "first"]
POOLINGS = ("mean", "last", "max", "first")
IGNORE = -100

Encoder = LanguageModel | Features
BACKBONES: dict[str, type[Encoder]] = {"language_model": LanguageModel, "features": Features}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """`encoder`: LanguageModel.Config for tokens, Features.Config for vectors. `dropout` falls on what it gives."""

    kind: ClassVar[str]
    encoder: Any
    dropout: float = 0.0

    def __post_init__(self):
        if getattr(self.encoder, "kind", None) not in BACKBONES or isinstance(self.encoder, type):
            raise UsageError(
                f"{self.kind}: encoder must be LanguageModel.Config(...) or Features.Config(...), got {self.encoder!r}"
            )
        if not 0 <= self.dropout <= 1:
            raise UsageError(f"{self.kind}: dropout must lie in 0..1, got {self.dropout}")
        check_positive(self, *(name for name in ("n_classes", "n_targets", "n_labels") if hasattr(self, name)))
        if getattr(self, "pooling", "mean") not in POOLINGS:
            raise UsageError(f"{self.kind}: pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def from_dict(cls, settings: Any) -> Self:
        """The configuration that `to_dict` has written. Raises UsageError on an unknown key, naming the nearest."""
        encoders = {kind: encoder.Config for kind, encoder in BACKBONES.items()}
        return from_dict(cls, settings, layer_configs() | encoders)


class _Headed(nn.Module):
    """An encoder and a linear layer on it, with their folder. Parameters: encoder, head."""

    Config: ClassVar[type[HeadConfig]]
    encoder: Encoder
    head: nn.Module

    def __init__(self, config: Any):
        super().__init__()
        self.config, encoder = config, config.encoder
        if isinstance(encoder, LanguageModel.Config):  # its own head is not used, and thus takes no parameters
            self.encoder = LanguageModel(dataclasses.replace(encoder, tie_embeddings=True))
        else:
            self.encoder = Features(encoder)
        self.head = self._make_head(encoder.d_model)

    def _make_head(self, d_model: int) -> nn.Module:
        return Linear(d_model, self.config.n_outputs)

    @classmethod
    def from_backbone(cls, model: Encoder, **options: Any) -> Self:
        """A new head over a copy of `model`'s embedding or projection, layers and last norm, in their dtypes.

        `options` are the settings of this head's Config save `encoder`:
        SequenceClassifier.from_backbone(longwave.load(folder).model, n_classes=3). Raises UsageError as Config does.
        """
        made = cls(cls.Config(encoder=model.config, **options))
        kept = dict(made.encoder.named_parameters())
        stored = {
            name: Stored(tuple(parameter.shape), parameter.detach)
            for name, parameter in model.named_parameters()
            if name in kept
        }
        device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        fill(made.encoder, stored, "the backbone", device)
        made.head.to(device, dtype)
        return made

    def reset_parameters(self) -> None:
        """Draw all parameters anew. Follows `to_empty` on a module made on the meta device."""
        reset_children(self)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`. Raises LongwaveError when they cannot be written."""
        save_model(self, folder)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """What `save` wrote. Raises as LanguageModel.load."""
        return load_model(lambda settings: cls(cls.Config.from_dict(settings)), folder, device)

    def _read_out(self, hidden: Tensor) -> Tensor:
        return self.head(dropout(hidden, self.config.dropout, self.training))


class _Pooled(_Headed):
    """One answer for each sequence; with `reset`, for each document, in reading order."""

    def pooled(
        self,
        x: Tensor,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> Tensor:
        """x (b, l) tokens or (b, l, d_input) -> (n, d_model), with n = b rows, or as many documents as there are.

        Padding (`lengths`) takes no part, whatever stands there; a sequence of length 0 gives zeros.
        """
        hidden, _ = self.encoder.hidden(x, reset=reset, lengths=lengths, dt=dt)
        if reset is not None:
            hidden, lengths = apart(hidden, reset, lengths)
        return pool(hidden, self.config.pooling, lengths)

    def forward(
        self,
        x: Tensor,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> Tensor:
        """As `pooled`, then through the head: (n, outputs)."""
        return self._read_out(self.pooled(x, reset=reset, lengths=lengths, dt=dt))


class _PerToken(_Headed):
    """One answer for each token. A causal encoder streams: `state` goes in and out, and `step` takes one token."""

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]:
        """x (b, l) tokens or (b, l, d_input) -> (b, l, outputs) and the state after them, as the encoder's."""
        hidden, state = self.encoder.hidden(x, state, reset=reset, lengths=lengths, dt=dt)
        return self._read_out(hidden), state

    @torch.no_grad()
    def step(self, x: Tensor, state: State, dt: Tensor | float | None = None) -> Tensor:
        """One token per row: x (b,) or (b, d_input) -> (b, outputs). `state` is updated in place. No gradient."""
        return self.head(self.encoder.hidden_step(x, state, dt))

    def init_state(self, b: int, **options: Any) -> State:
        """The state of `b` fresh sequences. Options as for the encoder's."""
        return self.encoder.init_state(b, **options)

    @property
    def fingerprint(self) -> str:
        return self.encoder.fingerprint


class SequenceClassifier(_Pooled):
    """softmax(W pool(encoder(x)) + b): one class for each sequence."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        kind: ClassVar[str] = "sequence_classifier"
        n_classes: int
        pooling: Pooling = "mean"

        @property
        def n_outputs(self) -> int:
            return self.n_classes

    def loss(self, x: Tensor, targets: Tensor, *, ignore_index: int = IGNORE, **given: Any) -> Tensor:
        """Mean cross entropy in nats with targets (n,) int64; those equal to `ignore_index` count nothing."""
        return cross_entropy(wide(self(x, **given)), targets, ignore_index=ignore_index)


class Regressor(_Pooled):
    """W pool(encoder(x)) + b: `n_targets` numbers for each sequence."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        kind: ClassVar[str] = "regressor"
        n_targets: int = 1
        pooling: Pooling = "mean"

        @property
        def n_outputs(self) -> int:
            return self.n_targets

    def loss(self, x: Tensor, targets: Tensor, **given: Any) -> Tensor:
        """Mean squared error with targets (n, n_targets); a NaN among them is a target that is missing."""
        return squared_error(self(x, **given), targets)


class Embedder(_Pooled):
    """A vector for each sequence: W pool(encoder(x)) + b, or the pooled vector itself, of length 1 with `normalize`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        """`d_embedding`: width of the vectors. None: that of the encoder, without a projection."""

        kind: ClassVar[str] = "embedder"
        d_embedding: int | None = None
        pooling: Pooling = "mean"
        normalize: bool = True

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "d_embedding")

    def _make_head(self, d_model: int) -> nn.Module:
        width = self.config.d_embedding
        return _NoHead() if width is None else Linear(d_model, width)

    def _read_out(self, hidden: Tensor) -> Tensor:
        vectors = super()._read_out(hidden)
        return normalize(vectors, dim=-1) if self.config.normalize else vectors


class TokenClassifier(_PerToken):
    """softmax(W encoder(x)_t + b): a class for each token."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        kind: ClassVar[str] = "token_classifier"
        n_classes: int

        @property
        def n_outputs(self) -> int:
            return self.n_classes

    def loss(self, x: Tensor, targets: Tensor, *, ignore_index: int = IGNORE, **given: Any) -> Tensor:
        """Mean cross entropy in nats with targets (b, l) int64; `ignore_index` and padding count nothing."""
        if given.get("lengths") is not None:
            targets = targets.masked_fill(padding(targets.shape[1], given["lengths"]), ignore_index)
        logits, _ = self(x, **given)
        return cross_entropy(wide(logits).flatten(0, 1), targets.flatten(), ignore_index=ignore_index)


class TokenRegressor(_PerToken):
    """W encoder(x)_t + b: `n_targets` numbers for each token, as in filtering and forecasting."""

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        kind: ClassVar[str] = "token_regressor"
        n_targets: int = 1

        @property
        def n_outputs(self) -> int:
            return self.n_targets

    def loss(self, x: Tensor, targets: Tensor, **given: Any) -> Tensor:
        """Mean squared error with targets (b, l, n_targets); padding, and a NaN among them, counts nothing."""
        if given.get("lengths") is not None:
            targets = targets.masked_fill(padding(targets.shape[1], given["lengths"])[..., None], torch.nan)
        return squared_error(self(x, **given)[0], targets)


class CTC(_PerToken):
    """Connectionist temporal classification (Graves et al. 2006): labels in order, without their times.

    Each token has logits of `n_labels` labels, 1 to n_labels, and of the blank, 0; a sequence of labels is as likely as
    all the ways together in which tokens can spell it, repeats merged and blanks dropped.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(HeadConfig):
        kind: ClassVar[str] = "ctc"
        n_labels: int

        @property
        def n_outputs(self) -> int:
            return self.n_labels + 1

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        label_lengths: Tensor,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
        zero_infinity: bool = False,
    ) -> Tensor:
        """Mean over sequences of nats per label: labels (n, s) int64 in 1..n_labels, padded; label_lengths (n,).

        n is the rows of x or, with `reset`, its documents in reading order. A sequence with fewer tokens than its
        labels and repeats need has an infinite loss, which `zero_infinity` leaves out.
        """
        scores, lengths = self._scores(x, reset=reset, lengths=lengths, dt=dt)
        log_probs = wide(scores).log_softmax(-1).transpose(0, 1)  # (l, n, v)
        return ctc_loss(log_probs, labels, lengths, label_lengths, zero_infinity=zero_infinity)

    @torch.no_grad()
    def decode(
        self,
        x: Tensor,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> list[list[int]]:
        """The labels of the likeliest way through each sequence (greedy): best label per token, merged, no blanks."""
        scores, lengths = self._scores(x, reset=reset, lengths=lengths, dt=dt)
        best = [row[:n] for row, n in zip(scores.argmax(-1).tolist(), lengths.tolist(), strict=True)]
        return [
            [label for label, before in zip(row, [0, *row], strict=False) if label not in (0, before)] for row in best
        ]

    def _scores(
        self, x: Tensor, *, reset: Tensor | None, lengths: Tensor | None, dt: Tensor | float | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (n, l, v) of rows or documents, and their lengths (n,)."""
        scores, _ = self(x, reset=reset, lengths=lengths, dt=dt)
        if reset is not None:
            return apart(scores, reset, lengths)
        return scores, torch.full((len(scores),), scores.shape[1]) if lengths is None else lengths


HEADS: dict[str, type[_Headed]] = {
    head.Config.kind: head for head in (SequenceClassifier, Regressor, Embedder, TokenClassifier, TokenRegressor, CTC)
}


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> Any:
    """The encoder with its head that `save` wrote, of any kind. Raises UsageError for a folder that holds none."""
    settings = read_settings(folder)
    kind = settings.get("kind") if isinstance(settings, Mapping) else None
    if kind not in HEADS:
        raise UsageError(f"{folder} holds no head, but {kind!r}.{nearest(str(kind), HEADS)}")
    return HEADS[kind].load(folder, device=device)


def pool(hidden: Tensor, pooling: Pooling, lengths: Tensor | None = None) -> Tensor:
    """hidden (n, l, d) -> (n, d): of the first lengths[i] tokens of row i their mean, maximum, last or first.

    Summed in float32 at least; zeros for a row of length 0.
    """
    if lengths is None:
        lengths = torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
    empty = (lengths == 0)[:, None]
    if pooling == "mean":
        total = wide(without_padding(hidden, lengths)).sum(1)
        return (total / lengths.clamp(min=1)[:, None]).to(hidden.dtype)
    if pooling == "max":
        chosen = hidden.masked_fill(padding(hidden.shape[1], lengths)[..., None], -torch.inf).amax(1)
    else:
        place = torch.zeros_like(lengths) if pooling == "first" else (lengths - 1).clamp(min=0)
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), place]
    return chosen.masked_fill(empty, 0)


class _NoHead(nn.Identity):
    """In place of a projection."""

    def reset_parameters(self) -> None:
        pass
