"""Routers of a mixture of experts: which experts a token goes through, and with what weights."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from longwave.mixers.ssm_parameters import Float32Parameters, float32_parameter
from longwave.ops.checks import state_dtype


class Load(NamedTuple):
    """How the tokens of one call were spread over the experts."""

    tokens: Tensor  # (experts,) int64: how many chose each
    entropy: float  # of tokens / sum(tokens), in nats: log(experts) where all have as many, 0 where one has all
    dropped: int  # choices that no expert served: 0, there being no capacity


class Routing(NamedTuple):
    """A router's decision on m tokens. Weights and scores are float32 (float64 for float64)."""

    experts: Tensor  # (m, top_k) int64
    weights: Tensor  # (m, top_k)
    scores: Tensor  # (m, experts), summing to 1

    def load(self) -> Load:
        tokens = self._tokens()
        share = tokens / tokens.sum()
        return Load(tokens, torch.special.entr(share).sum().item(), self.experts.numel() - int(tokens.sum()))

    def balance_loss(self) -> Tensor:
        """experts * sum_i f_i P_i with f_i the share of choices that fell on expert i, P_i its mean score.

        1 where the load is even, and up to `experts`. Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, with f
        divided by top_k; transformers leaves that out.
        """
        tokens = self._tokens()
        return len(tokens) * (tokens / self.experts.numel() * self.scores.mean(0)).sum()

    def _tokens(self) -> Tensor:
        return torch.bincount(self.experts.flatten(), minlength=self.scores.shape[-1])


class Router(nn.Module, ABC):
    """x (m, d) -> Routing, from the logits W x, in float32 whatever the dtype of x and W, and under autocast too.

    `config` is an MoE.Config. Initialised as nn.Linear.
    """

    def __init__(self, d_model: int, config: Any):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, d_model))
        self._draw_weight()

    def _draw_weight(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def reset_parameters(self) -> None:
        self._draw_weight()

    def forward(self, x: Tensor) -> Routing:
        dtype = state_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self.choose(linear(x.to(dtype), self.weight.to(dtype)))

    @abstractmethod
    def choose(self, logits: Tensor) -> Routing:
        """logits (m, experts)."""


class SoftmaxTopK(Router):
    def choose(self, logits: Tensor) -> Routing:
        scores = logits.softmax(-1)
        weights, experts = scores.topk(self.config.top_k)
        return Routing(experts, weights, scores)


class TopKSoftmax(Router):
    def choose(self, logits: Tensor) -> Routing:
        top, experts = logits.topk(self.config.top_k)
        return Routing(experts, top.softmax(-1), logits.softmax(-1))


class Sigmoid(Float32Parameters, Router):
    """DeepSeek-AI 2024, arXiv:2412.19437, equations 12 to 16.

    `correction_bias` has a part in the choice only, and gets no gradient: see `correct`.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("correction_bias",)

    def __init__(self, d_model: int, config: Any):
        super().__init__(d_model, config)
        self.correction_bias = float32_parameter(config.n_experts).requires_grad_(False)
        nn.init.zeros_(self.correction_bias)
        self.mark()

    def reset_parameters(self) -> None:
        self._draw_weight()
        nn.init.zeros_(self.correction_bias)

    def choose(self, logits: Tensor) -> Routing:
        config, scores = self.config, logits.sigmoid()
        experts = self._best_groups(scores + self.correction_bias).topk(config.top_k).indices
        weights = scores.gather(-1, experts)
        if config.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, config.scale * weights, scores / (scores.sum(-1, keepdim=True) + 1e-20))

    def _best_groups(self, scores: Tensor) -> Tensor:
        """`scores`, -inf outside of the groups whose two best experts have the largest sums."""
        groups, config = scores.unflatten(-1, (self.config.n_groups, -1)), self.config
        if config.top_groups == config.n_groups:
            return scores
        best = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(config.top_groups).indices
        barred = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return groups.masked_fill(barred[..., None], -math.inf).flatten(-2)

    @torch.no_grad()
    def correct(self, tokens: Tensor, rate: float = 1e-3) -> None:
        """Move each expert's bias by `rate` against its load (experts,): Wang et al. 2024, arXiv:2408.15664."""
        tokens = tokens.to(self.correction_bias.dtype)
        self.correction_bias.add_(rate * (tokens.mean() - tokens).sign())


ROUTERS: dict[str, type[Router]] = {"softmax_topk": SoftmaxTopK, "topk_softmax": TopKSoftmax, "sigmoid": Sigmoid}
