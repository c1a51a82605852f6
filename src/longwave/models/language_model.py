"""A language model: tokens in, the next token's logits out, any pattern of layers between."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from longwave.config import from_dict
from longwave.errors import UsageError
from longwave.mixers.base import scaled
from longwave.mixers.linear import Linear
from longwave.models.blocks import NORMS, Block, Stack, check_layers, check_norm, layer_configs, make_block
from longwave.models.state import fingerprint
from longwave.models.token_model import TokenModel


class LanguageModel(TokenModel):
    """Embedding, residual slots, norm, head:

        x = W_e[token];  x = x + layer_i(norm_i(x)) for each layer;  logits = W_head norm_f(x)

    with the embedding, what each layer adds, and the logits times the configuration's multipliers.

    Parameters: embedding, layers.i.norm, layers.i.mixer, norm_f, lm_head (the embedding's own weight when tied), as in
    the published Mamba checkpoints. Initialised as there and in GPT-2 (Radford et al. 2019, section 2.3): embeddings
    normal with standard deviation 0.02, weights that write into the residual stream divided by sqrt(number of slots);
    the rest as each layer has it.
    """

    layers: Stack  # pyright: ignore[reportIncompatibleVariableOverride]

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
        norm: Literal["rms", "layer", "rms_outer_eps"] = "rms"
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
            check_norm(self)
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

    def reset_parameters(self) -> None:
        """Draw all parameters anew. Follows `to_empty` on a model made on the meta device."""
        for child in (self.lm_head, self.layers, self.norm_f):
            child.reset_parameters()
        self._start_embedding()

    def _start_embedding(self) -> None:
        nn.init.normal_(self.embedding.weight, std=self.config.init_std)
        if self.config.tie_embeddings:  # `to_empty` cuts the tie
            self.lm_head.weight = self.embedding.weight

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) if self.config.residual_fp32 else x
        return scaled(x, self.config.embedding_multiplier)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm_f(x).to(self.embedding.weight.dtype)

    def _to_head(self, hidden: Tensor) -> Tensor:
        return scaled(hidden, self.config.logits_multiplier)


def _block(config: LanguageModel.Config, layer: Any) -> Block:
    return make_block(
        config.d_model,
        layer,
        norm=config.norm,
        norm_eps=config.norm_eps,
        norm_position=config.norm_position,
        residual_multiplier=config.residual_multiplier,
    )
