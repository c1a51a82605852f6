"""A language model: tokens in, the next token's logits out, any pattern of layers between."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from longwave.config import from_dict, to_dict
from longwave.errors import LongwaveError, UsageError
from longwave.mixers.linear import Linear
from longwave.models.blocks import NORM_POSITIONS, NORMS, Block, Stack, check_layers, layer_configs
from longwave.models.loss import linear_cross_entropy
from longwave.models.saving import fill, open_safetensors, write_safetensors, write_text
from longwave.models.state import State, fingerprint


class LanguageModel(nn.Module):
    """Embedding, residual slots, norm, head:

        x = W_e[token];  x = x + layer_i(norm_i(x)) for each layer;  logits = W_head norm_f(x)

    with the embedding, what each layer adds, and the logits times the configuration's multipliers.

    Parameters: embedding, layers.i.norm, layers.i.mixer, norm_f, lm_head (the embedding's own weight when tied), as in
    the published Mamba checkpoints. Initialised as there and in GPT-2 (Radford et al. 2019, section 2.3): embeddings
    normal with standard deviation 0.02, weights that write into the residual stream divided by sqrt(number of slots);
    the rest as each layer has it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`layers`: one configuration per residual slot; a block of a mixer and an MLP is two of them.

        `norm_position`: where a slot's norm lies, as `Block` has it; there is a norm before the head in any case.
        `residual_fp32` keeps the residual sum in float32 beside 16-bit weights. (Under autocast it is float32 anyway.)
        """

        kind: ClassVar[str] = "language_model"
        vocab_size: int
        d_model: int
        layers: tuple[Any, ...]
        norm: Literal["rms", "layer"] = "rms"
        norm_eps: float = 1e-5
        norm_position: Literal["pre", "post", "res_post", "sandwich"] = "pre"
        tie_embeddings: bool = True
        residual_fp32: bool = False
        init_std: float = 0.02
        embedding_multiplier: float = 1.0
        residual_multiplier: float = 1.0
        logits_multiplier: float = 1.0

        def __post_init__(self):
            if self.vocab_size < 1 or self.d_model < 1:
                raise UsageError(
                    "language_model: vocab_size and d_model must be at least 1, "
                    f"got {self.vocab_size} and {self.d_model}"
                )
            for name, known in (("norm", tuple(NORMS)), ("norm_position", NORM_POSITIONS)):
                if getattr(self, name) not in known:
                    one_of = " or ".join(map(repr, known))
                    raise UsageError(f"language_model: {name} must be {one_of}, got {getattr(self, name)!r}")
            check_layers(self.layers, "language_model")

        @classmethod
        def from_dict(cls, settings: Any) -> "LanguageModel.Config":
            """The configuration that `to_dict` has written. Raises UsageError on an unknown key, naming the nearest."""
            return from_dict(cls, settings, layer_configs())

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = Stack(_block(config, layer) for layer in config.layers)
        self.norm_f = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self._start_embedding()
        self.layers.fingerprint = fingerprint(config, self)

    @property
    def fingerprint(self) -> str:
        """Names the configuration and the shapes of the parameters; states carry it."""
        return self.layers.fingerprint

    def reset_parameters(self) -> None:
        """Draw all parameters anew. Follows `to_empty` on a model made on the meta device."""
        for child in (self.lm_head, self.layers, self.norm_f):
            child.reset_parameters()
        self._start_embedding()

    def _start_embedding(self) -> None:
        nn.init.normal_(self.embedding.weight, std=self.config.init_std)
        if self.config.tie_embeddings:  # `to_empty` cuts the tie
            self.lm_head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """tokens (b, l) int64 -> logits (b, l, v) in the weights' dtype, and the state after them.

        `state=None` is a fresh sequence; a state given is left as it was. `reset` (b, l) bool: True starts a document,
        which sees nothing before it. `lengths` (b,) int64 in 0..l: tokens from lengths[i] on are padding, which changes
        nothing in row i's state and has meaningless logits. Raises ValueError for shapes that do not fit and for a
        state of another model.
        """
        hidden, after = self.hidden(tokens, state, reset=reset, lengths=lengths)
        return self.head(hidden), after

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As `forward`, but (b, l, d) before the head."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (b, l), got {tuple(tokens.shape)}; one sequence is tokens[None]")
        x, after = self.layers(self._embed(tokens), state, reset=reset, lengths=lengths)
        return self._finish(x), after

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., d) -> logits (..., v)."""
        return self.lm_head(_times(self.config.logits_multiplier, hidden))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        state: State | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross entropy in nats of targets (b, l) int64 after tokens (b, l), never holding all logits.

        A scalar, or (b, l) for reduction "none". Targets equal to `ignore_index` count nothing. Padding is not ignored
        by itself: give it that target.
        """
        hidden, _ = self.hidden(tokens, state, reset=reset, lengths=lengths)
        return linear_cross_entropy(
            self.lm_head,
            _times(self.config.logits_multiplier, hidden),
            targets,
            vocab_size=self.config.vocab_size,
            ignore_index=ignore_index,
            reduction=reduction,
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """One token per row: tokens (b,) -> logits (b, v). `state` is updated in place. No gradient.

        Layers whose state grows raise ValueError when it has no room: `state.reserve(n)` makes it.
        """
        return self.head(self._finish(self.layers.step(self._embed(tokens), state)))

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """The state of `b` fresh sequences, with room for `length` tokens. `dtype`: the compute dtype."""
        return self.layers.init_state(b, length, dtype, device or self.embedding.weight.device)

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the state of one sequence that has seen `length` tokens, int64 counters left out."""
        return self.layers.state_bytes(length, dtype)

    def flops(self, length: int) -> int:
        """Forward operations on one sequence of `length` tokens, a multiply-add being two; norms are not counted."""
        return self.layers.flops(length) + 2 * length * self.config.d_model * self.config.vocab_size

    def parameter_count(self) -> int:
        """Numbers in all parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, made if need be; each is replaced whole or not at all.

        Raises LongwaveError when they cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LongwaveError(f"cannot make the folder {folder}: {error.strerror}; name another") from error
        write_safetensors(folder / WEIGHTS, dict(self.named_parameters()), {"format": "pt"})
        write_text(folder / CONFIG, json.dumps(to_dict(self.config), indent=1) + "\n")

    @staticmethod
    def load(folder: str | Path, *, device: torch.device | str = "cpu") -> "LanguageModel":
        """The model that `save` wrote, on `device`, in the dtypes it was saved in.

        Raises UsageError for a folder without config.json or with an unknown key in it, and LongwaveError for damaged
        files and for tensors that are missing, extra or of another shape, naming ten of them.
        """
        file = Path(folder) / CONFIG
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read {file}: {error.strerror}; give a folder that model.save has written"
            ) from error
        except ValueError as error:
            raise LongwaveError(f"{file} is not JSON ({error}); copy the folder again") from error
        with torch.device("meta"):
            model = LanguageModel(LanguageModel.Config.from_dict(settings))
        stored, _ = open_safetensors(Path(folder) / WEIGHTS)
        fill(model, stored, str(Path(folder) / WEIGHTS), device)
        return model

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) if self.config.residual_fp32 else x
        return _times(self.config.embedding_multiplier, x)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm_f(x).to(self.norm_f.weight.dtype)


def _block(config: LanguageModel.Config, layer: Any) -> Block:
    return Block(
        config.d_model,
        layer,
        norm=config.norm,
        norm_eps=config.norm_eps,
        norm_position=config.norm_position,
        residual_multiplier=config.residual_multiplier,
    )


def _times(multiplier: float, x: Tensor) -> Tensor:
    return x if multiplier == 1 else multiplier * x


CONFIG = "config.json"
WEIGHTS = "model.safetensors"
