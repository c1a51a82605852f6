"""Mixture of experts as a channel mixer: each token goes through the few experts that a router chooses for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, reset_children
from longwave.mixers.channel import MLP, SwiGLU
from longwave.mixers.linear import Linear
from longwave.mixers.router import ROUTERS, Router, Routing

EXPERTS: dict[str, type] = {"swiglu": SwiGLU, "mlp": MLP}


class MoE(nn.Module):
    """y = sum_{i chosen} w_i expert_i(x) + shared(x), with the chosen i and their w_i from router(x).

    Shazeer et al. 2017, arXiv:1701.06538, equations 1 to 5; the shared expert: Dai et al. 2024, arXiv:2401.06066. There
    is no capacity: every token goes through all experts chosen for it, in training and at inference. Tokens are sorted
    by expert, each expert runs once on its own, and an expert that no token chose does not run.

    With `d_latent`, the experts work on W_down x and their sum goes through W_up. Parameters: router.weight (experts,
    d), router.correction_bias (experts,) for a sigmoid router, experts.i, shared, latent_down, latent_up.

    torch.compile breaks the graph at router and experts: the experts' shapes depend on what the router chose.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`expert`, `shared`: configurations of SwiGLU or MLP; a shared expert serves every token.

        `top_k`: experts that a token goes through. `router`, with s the scores of all experts in float32:
        "softmax_topk": w = the top k of softmax(s) as they are (Jamba); "topk_softmax": the softmax of the top k of s
        (Mixtral, Granite; Qwen's renormalised softmax is the same); "sigmoid": the top k of sigmoid(s) +
        correction_bias choose, and w = `scale` sigmoid(s), divided by its sum over the chosen where `normalise`
        (DeepSeek-V3, Nemotron-H). Only the `top_groups` of `n_groups` groups of experts with the largest sum of two
        scores take part in that. `balance`: weight of the loss that evens the load out, as `longwave train` adds it.
        """

        kind: ClassVar[str] = "moe"
        n_experts: int = 8
        top_k: int = 2
        expert: SwiGLU.Config | MLP.Config = field(default_factory=SwiGLU.Config)
        shared: SwiGLU.Config | MLP.Config | None = None
        router: Literal["softmax_topk", "topk_softmax", "sigmoid"] = "topk_softmax"
        n_groups: int = 1
        top_groups: int = 1
        normalise: bool = True
        scale: float = 1.0
        d_latent: int | None = None
        balance: float = 0.01

        def __post_init__(self):
            check_positive(self, "n_experts", "top_k", "n_groups", "top_groups", "d_latent")
            if self.router not in ROUTERS:
                raise UsageError(f"moe: router must be {' or '.join(map(repr, ROUTERS))}, got {self.router!r}")
            for name, expert in (("expert", self.expert), ("shared", self.shared)):
                if not isinstance(expert, (SwiGLU.Config, MLP.Config)) and not (name == "shared" and expert is None):
                    raise UsageError(f"moe: {name} must be a SwiGLU.Config or MLP.Config, got {expert!r}")
            if self.n_experts % self.n_groups:
                raise UsageError(f"moe: n_groups={self.n_groups} must divide n_experts={self.n_experts}")
            if (self.n_groups, self.normalise, self.scale) != (1, True, 1.0) and self.router != "sigmoid":
                raise UsageError(
                    f"moe: n_groups={self.n_groups}, normalise={self.normalise} and scale={self.scale} "
                    f"are of the router 'sigmoid', not of {self.router!r}"
                )
            reachable = self.n_experts // self.n_groups * min(self.top_groups, self.n_groups)
            if self.top_groups > self.n_groups or self.top_k > reachable:
                raise UsageError(
                    f"moe: top_k={self.top_k} and top_groups={self.top_groups} must be within "
                    f"n_experts={self.n_experts} in n_groups={self.n_groups}"
                )

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model = d_model
        self.router = ROUTERS[config.router](d_model, config)
        d = config.d_latent or d_model
        self.experts = nn.ModuleList(_expert(d, config.expert) for _ in range(config.n_experts))
        self.shared = None if config.shared is None else _expert(d_model, config.shared)
        self.latent_down = Linear(d_model, d, bias=False) if config.d_latent else None
        self.latent_up = Linear(d, d_model, bias=False) if config.d_latent else None

    def reset_parameters(self) -> None:
        for child in self.children():
            reset_children(child) if child is self.experts else child.reset_parameters()  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (m, d)
        y = self._routed(tokens, tokens if self.latent_down is None else self.latent_down(tokens))
        y = (y if self.latent_up is None else self.latent_up(y)).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    @torch.compiler.disable()  # the router too, so that whoever records it sees every call
    def _routed(self, tokens: Tensor, x: Tensor) -> Tensor:
        """sum_i w_i expert_i(x) over the experts chosen by `tokens` (m, d): x (m, d or d_latent) -> the same shape."""
        chosen, weights, _ = self.router(tokens)  # (m, k)
        y = self._alone(x, chosen) if len(x) == 1 else self._sorted(x, chosen)  # (m, k, d)
        return (y * weights[..., None]).sum(1).to(y.dtype)

    def _alone(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts say of one token: nothing to sort, for decoding does this all the time."""
        return torch.stack([self.experts[i](x) for i in chosen[0].tolist()], dim=1)

    def _sorted(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts say of each token. Each expert runs once, on its tokens together."""
        k = self.config.top_k
        order = chosen.flatten().argsort(stable=True)  # (m k), by expert and then by token
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = _Permute.apply(x.repeat_interleave(k, dim=0), order, place)  # (m k, d)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        pieces = zip(self.experts, rows.split(counts), strict=True)
        y = torch.cat([expert(piece) for expert, piece in pieces if len(piece)])
        return _Permute.apply(y, place, order).view(len(x), k, -1)

    def flops(self, length: int) -> int:
        """Of the experts that work: top_k per token, and the shared one."""
        config, latent = self.config, self.config.d_latent
        first: Any = self.experts[0]
        experts = config.top_k * first.flops(length) + (self.shared.flops(length) if self.shared else 0)
        return experts + 2 * length * self.d_model * (config.n_experts + (2 * latent if latent else 0))

    @property
    def idle_parameters(self) -> int:
        """Numbers in the parameters of the experts that a token does not go through."""
        idle = self.config.n_experts - self.config.top_k
        return idle * sum(parameter.numel() for parameter in self.experts[0].parameters())


def _expert(d_model: int, config: SwiGLU.Config | MLP.Config) -> Any:
    return EXPERTS[config.kind](d_model, config)


class _Permute(torch.autograd.Function):
    """x[order], with `inverse` the inverse of `order`. The gradient is gathered too: no sums in an unsettled order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        order, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, order), None, None


class Routed(NamedTuple):
    """What one MoE layer did in one call."""

    layer: MoE
    routing: Routing


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routed]]:
    """Collect, while the block runs, how every MoE layer inside `model` routes its tokens:

        with record_routing(model) as routed:
            loss = model.loss(tokens, targets)
        (loss + balance_loss(routed)).backward()
        routed[0].routing.load()  # tokens per expert, entropy, dropped

    in the order of the calls. Nothing is kept in the model.
    """
    routed: list[Routed] = []

    def append_for(layer: MoE) -> Callable[[Router, Any, Routing], None]:
        return lambda router, inputs, routing: routed.append(Routed(layer, routing))

    layers = [module for module in model.modules() if isinstance(module, MoE)]
    hooks = [layer.router.register_forward_hook(append_for(layer)) for layer in layers]
    try:
        yield routed
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(routed: list[Routed]) -> Tensor:
    """The sum of the layers' `Routing.balance_loss`, each times its `config.balance`; 0 without MoE layers."""
    losses = [layer.config.balance * routing.balance_loss() for layer, routing in routed]
    return torch.stack(losses).sum() if losses else torch.zeros(())
