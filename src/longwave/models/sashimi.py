"""SaShiMi: an autoregressive model of long signals, such as raw audio, as a U-net of state space blocks."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from longwave.config import from_dict, to_dict
from longwave.errors import UsageError
from longwave.mixers import ENCODERS, MIXERS
from longwave.mixers.linear import Linear
from longwave.mixers.s4 import S4
from longwave.models.blocks import LayerNorm, check_layers, layer_configs
from longwave.models.state import fingerprint
from longwave.models.token_model import TokenModel
from longwave.models.unet import UNet


class SaShiMi(TokenModel):
    """logits = lm_head norm_f(UNet(embedding[sample])): the next sample of a signal quantised to `vocab_size` levels.

    Goel et al. 2022, arXiv:2202.09729; `UNet` has its equations. It has the call, the loss, the state and the folder of
    LanguageModel, so whatever generates, scores or trains with one does so with the other. Its tiers run every sample,
    every pool[0]-th, every pool[0] pool[1]-th, ...; the state is constant, and pieces may end at any sample.
    Parameters: embedding, layers.{d_layers, c_layers, u_layers}, norm_f, lm_head. The embedding begins normal with
    standard deviation d_model^-1/2, all else as its layer has it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_model`: width of the first tier; each of `pool` divides the rate by itself and multiplies the width by
        `expand`. `n_layers`: blocks in each tier, each a slot with `mixer` and, unless ff = 0, one with a GELU MLP of
        ff times the width. `unet`: blocks before each pool too."""

        kind: ClassVar[str] = "sashimi"
        tie_embeddings: ClassVar[bool] = False
        vocab_size: int = 256
        d_model: int = 64
        n_layers: int = 8
        pool: tuple[int, ...] = (4, 4)
        expand: int = 2
        ff: int = 2
        unet: bool = False
        mixer: Any = field(default_factory=S4.Config)
        norm_eps: float = 1e-5

        def __post_init__(self):
            for name in ("vocab_size", "d_model", "n_layers", "expand"):
                if getattr(self, name) < 1:
                    raise UsageError(f"sashimi: {name} must be at least 1, got {getattr(self, name)}")
            if not isinstance(self.pool, tuple) or not self.pool or min(self.pool) < 2:
                raise UsageError(f"sashimi: pool must be a tuple of factors of at least 2, got {self.pool!r}")
            if self.ff < 0:
                raise UsageError(f"sashimi: ff must be at least 1, or 0 for no MLP, got {self.ff}")
            check_layers((self.mixer,), "sashimi")
            if self.mixer.kind not in MIXERS | ENCODERS:
                raise UsageError(f"sashimi: mixer is {self.mixer.kind!r}, which does not mix along time")

        @property
        def layers(self) -> tuple[Any, ...]:
            """The mixers of all blocks: of the tiers on the way down, of the centre, of the tiers on the way up."""
            tiers = len(self.pool) * (2 if self.unet else 1) + 1
            return (self.mixer,) * (tiers * self.n_layers)

        @classmethod
        def from_dict(cls, settings: Any) -> "SaShiMi.Config":
            """The configuration that `to_dict` has written. Raises UsageError on an unknown key, naming the nearest."""
            return from_dict(cls, settings, layer_configs())

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = UNet(
            config.d_model,
            n_layers=config.n_layers,
            pool=config.pool,
            expand=config.expand,
            ff=config.ff,
            unet=config.unet,
            mixer=config.mixer,
            norm="layer",
            norm_eps=config.norm_eps,
        )
        self.norm_f = LayerNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        self._start_embedding()
        self.layers.fingerprint = fingerprint(to_dict(config) | {"layers": to_dict(config.layers)}, self)

    @property
    def samples_per_token(self) -> int:
        """How many samples pass while the centre makes one step."""
        return math.prod(self.config.pool)

    def reset_parameters(self) -> None:
        """Draw all parameters anew. Follows `to_empty` on a model made on the meta device."""
        for child in (self.layers, self.norm_f, self.lm_head):
            child.reset_parameters()
        self._start_embedding()

    def _start_embedding(self) -> None:
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)
