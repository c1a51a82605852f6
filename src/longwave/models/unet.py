"""A U-net of blocks: tiers that see every p-th token run at a wider width, and it still steps token by token."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import UsageError
from longwave.mixers.base import compute_dtype, reset_children
from longwave.mixers.bidirectional import refuse_state
from longwave.mixers.channel import MLP
from longwave.mixers.linear import Linear
from longwave.mixers.nested import map_tensors, tensors
from longwave.models.blocks import Block
from longwave.models.rate import Alignment, joined, take
from longwave.models.state import State, entering


class PoolState(NamedTuple):
    """What lies between a tier and the one below it, which runs at a p-th of its rate."""

    window: Tensor  # (b, p-1, d) the tier's last tokens, of which the next token below is made; compute dtype
    queue: Tensor  # (b, p, d) what the last token below says of p tokens of the tier; compute dtype
    seen: Tensor  # (b,) int64: tokens of the tier in the current document


class DownPool(nn.Module):
    """p tokens of d channels become one of d_out: W [x_1 .. x_p] + b, channels first and tokens second in the sum."""

    def __init__(self, d: int, pool: int, d_out: int):
        super().__init__()
        self.linear = Linear(d * pool, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., p, d) -> (..., d_out)."""
        return self.linear(x.transpose(-1, -2).flatten(-2))


class UpPool(nn.Module):
    """One token of d_in channels becomes p of d."""

    def __init__(self, d_in: int, pool: int, d: int):
        super().__init__()
        self.pool = pool
        self.linear = Linear(d_in, d * pool)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., p, d)."""
        return self.linear(x).unflatten(-1, (-1, self.pool)).transpose(-1, -2)


class Tier(NamedTuple):
    before: Sequence[Block]
    down: DownPool
    up: UpPool
    after: Sequence[Block]


class UNet(nn.Module):
    """Tiers f_0 .. f_n, of which f_i runs at a rate p_1 p_2 .. p_i times lower (Goel et al. 2022, arXiv:2202.09729):

        f_n(x) = C(x) + x                                            the centre
        f_i(x) = U(u) + u,   u = x + shift(up(f_{i+1}(down(x))))      all others

    C and U are blocks, each a mixer's and an MLP's slot. down makes one token of p, up makes p of one, and shift delays
    them by p tokens: what a token below says is about tokens that come after all it has seen, so that the whole is
    causal and the tiers below run once every p tokens. With `unet`, blocks come before each `down` too, and a skip
    connection goes from each of them to its counterpart.

    Parameters are named as the authors' code has them: d_layers.i, c_layers.i, u_layers.i.j, pools with `linear`.
    The state counts the tokens of each document, so pieces may end anywhere and rows need not be in step.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_layers: int,
        pool: Sequence[int],
        expand: int,
        ff: int,
        unet: bool,
        mixer: Any,
        norm: str,
        norm_eps: float,
    ):
        super().__init__()
        self.pool, self.unet, self.fingerprint = tuple(pool), unet, ""
        self.widths = [d_model * expand**i for i in range(len(pool) + 1)]

        def blocks(d: int) -> list[nn.Module]:
            slots = [mixer, MLP.Config(d_inner=ff * d, approximate="none")] if ff else [mixer]
            return [Block(d, slot, norm=norm, norm_eps=norm_eps) for _ in range(n_layers) for slot in slots]

        self.d_layers, self.u_layers = nn.ModuleList(), nn.ModuleList()
        for p, d, inner in zip(self.pool, self.widths, self.widths[1:], strict=False):
            self.d_layers.extend([*(blocks(d) if unet else []), DownPool(d, p, inner)])
        self.c_layers = nn.ModuleList(blocks(self.widths[-1]))
        for p, d, inner in zip(self.pool[::-1], self.widths[-2::-1], self.widths[:0:-1], strict=True):
            self.u_layers.append(nn.ModuleList([UpPool(inner, p, d), *blocks(d)]))

    @property
    def causal(self) -> bool:
        """Whether each token sees only those before it, so that there is a state to go on from."""
        return all(block.causal for block in self._blocks())

    def reset_parameters(self) -> None:
        for block in self._blocks():
            block.reset_parameters()
        for i in range(len(self.pool)):
            reset_children(self._tier(i).down)
            reset_children(self._tier(i).up)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]:
        """x (b, l, d) -> the same shape, and the state after it. `dt`: a number, for mixers with a rate.

        Raises ValueError for a state of another model; UsageError for `reset` where a tier below holds a mixer whose
        state counts (attention), which cannot be made to forget in the middle of a group, and for `dt` (b, l).
        """
        dt = _one_rate(dt)
        if reset is not None:
            self._check_forgetful()
        if state is not None and not self.causal:
            refuse_state()
        layers, position = entering(state, self.fingerprint, self._size(0), x)
        l = x.shape[1]
        x, layers = self._run(0, x, layers, {"reset": reset, "lengths": lengths, "dt": dt})
        return x, State(layers, position + (l if lengths is None else lengths), self.fingerprint)

    def _run(self, i: int, x: Tensor, layers: tuple, options: dict[str, Any]) -> tuple[Tensor, tuple]:
        """Tier i and all below it: x (b, l, d_i) -> the same shape, and their states."""
        if i == len(self.pool):
            y, centre = _run_blocks(self.c_layers, x, layers, options)
            return y[-1] + x, centre
        tier = self._tier(i)
        first, pool, below, last = self._split(i, layers)
        ys, first = _run_blocks(tier.before, x, first, options)
        spread, pool, below = self._run_below(i, ys[-1], pool, below, options)
        u = ys[-1] + spread
        if self.unet:
            y, last = _run_blocks(tier.after, u, last, options, skips=ys[-2::-1])
            return y[-1], (*first, pool, *below, *last)
        y, last = _run_blocks(tier.after, u, last, options)
        return y[-1] + u, (*first, pool, *below, *last)

    def _run_below(
        self, i: int, x: Tensor, state: PoolState | None, layers: tuple, options: dict[str, Any]
    ) -> tuple[Tensor, PoolState, tuple]:
        """shift(up(f_{i+1}(down(x)))), and the states."""
        tier, p = self._tier(i), self.pool[i]
        b, l, _ = x.shape
        reset, lengths = options["reset"], options["lengths"]
        regular = state is None and reset is None and lengths is None
        state = state or self._init_pool(i, b, None, x.device)
        together = joined(state.window, x)  # (b, p-1+l, d)
        if regular and l < p:  # nothing below runs
            after = PoolState(_copy(together[:, l:], state.window), state.queue, state.seen + l)
            return torch.zeros_like(x), after, self._init(i + 1, b, 0, None, x.device)
        if regular:
            m = l // p
            low, layers = self._run(i + 1, tier.down(x[:, : m * p].unflatten(1, (m, p))), layers, options)
            ups = joined(state.queue[:, None], tier.up(low))  # (b, 1+m, p, d)
            after = PoolState(_copy(together[:, l:], state.window), _copy(ups[:, -1], state.queue), state.seen + l)
            return ups.flatten(1, 2)[:, :l], after, layers
        where = Alignment.of(p, l, state.seen, reset, lengths)
        groups = take(together, where.groups.flatten(1)).unflatten(1, (-1, p))  # (b, m, p, d)
        inner = {"reset": where.low_reset, "lengths": where.low_lengths, "dt": options["dt"]}
        low, layers = self._run(i + 1, tier.down(groups), layers, inner)
        ups = joined(state.queue[:, None], tier.up(low))  # (b, 1+m, p, d)
        y = take(ups.flatten(1, 2), where.sources).masked_fill(where.silent[..., None], 0)
        after = PoolState(
            take(together, where.window).to(state.window.dtype),
            ups[torch.arange(b, device=x.device), where.low_lengths].to(state.queue.dtype),
            where.seen,
        )
        return y, after, layers if where.begun is None else _fresh(layers, where.begun)

    @torch.no_grad()
    def step(self, x: Tensor, state: State, dt: Tensor | float | None = None) -> Tensor:
        """x (b, d) -> the same shape; `state` is updated in place. A tier below runs for the rows whose turn it is."""
        if not self.causal:
            refuse_state()
        x = self._step(0, x, state.layers, _one_rate(dt))
        state.position.add_(1)
        return x

    def _step(self, i: int, x: Tensor, layers: tuple, dt: float | None) -> Tensor:
        if i == len(self.pool):
            return _step_blocks(self.c_layers, x, layers, dt)[-1] + x
        tier = self._tier(i)
        first, pool, below, last = self._split(i, layers)
        ys = _step_blocks(tier.before, x, first, dt)
        u = ys[-1] + self._step_below(i, ys[-1], pool, below, dt)
        if self.unet:
            return _step_blocks(tier.after, u, last, dt, skips=ys[-2::-1])[-1]
        return _step_blocks(tier.after, u, last, dt)[-1] + u

    def _step_below(self, i: int, x: Tensor, state: PoolState, layers: tuple, dt: float | None) -> Tensor:
        tier, p = self._tier(i), self.pool[i]
        phase = state.seen % p  # (b,)
        y = state.queue[torch.arange(len(x), device=x.device), phase]
        y = y.masked_fill((state.seen < p)[:, None], 0)
        together = joined(state.window, x[:, None])  # (b, p, d)
        rows = (phase == p - 1).nonzero()[:, 0]
        if len(rows) == len(x):
            state.queue.copy_(tier.up(self._step(i + 1, tier.down(together), layers, dt)))
        elif len(rows):
            part = map_tensors(lambda t: t.index_select(0, rows), layers)
            up = tier.up(self._step(i + 1, tier.down(together[rows]), part, dt))
            for old, new in zip(tensors(layers), tensors(part), strict=True):
                old.index_copy_(0, rows, new)
            state.queue.index_copy_(0, rows, up.to(state.queue.dtype))
        state.window.copy_(together[:, 1:])
        state.seen.add_(1)
        return y

    def init_state(self, b: int, length: int, dtype: torch.dtype | None, device: torch.device | str | None) -> State:
        if not self.causal:
            refuse_state()
        layers = self._init(0, b, length, dtype, device)
        return State(layers, torch.zeros(b, dtype=torch.int64, device=device), self.fingerprint)

    def _init(self, i: int, b: int, length: int, dtype: torch.dtype | None, device: Any) -> tuple:
        def of(blocks: Sequence[Block]) -> list[Any]:
            return [
                block.mixer.init_state(b, length=length, dtype=dtype, device=device) if block.carries_state else None
                for block in blocks
            ]

        if i == len(self.pool):
            return tuple(of(self.c_layers))  # pyright: ignore[reportArgumentType]
        tier, below = self._tier(i), self._init(i + 1, b, length // self.pool[i], dtype, device)
        return (*of(tier.before), self._init_pool(i, b, dtype, device), *below, *of(tier.after))

    def _init_pool(self, i: int, b: int, dtype: torch.dtype | None, device: Any) -> PoolState:
        tier, p, d = self._tier(i), self.pool[i], self.widths[i]
        return PoolState(
            torch.zeros(b, p - 1, d, dtype=compute_dtype(tier.down.linear.weight, dtype), device=device),
            torch.zeros(b, p, d, dtype=compute_dtype(tier.up.linear.weight, dtype), device=device),
            torch.zeros(b, dtype=torch.int64, device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None) -> int:
        total = 0
        for i, blocks in enumerate(self._blocks_by_tier()):
            total += sum(block.state_bytes(length, dtype) for block in blocks)
            if i < len(self.pool):
                size = compute_dtype(self._tier(i).down.linear.weight, dtype).itemsize
                total += (2 * self.pool[i] - 1) * self.widths[i] * size
                length //= self.pool[i]
        return total

    def flops(self, length: int) -> int:
        total = 0
        for i, blocks in enumerate(self._blocks_by_tier()):
            total += sum(block.flops(length) for block in blocks)
            if i < len(self.pool):
                length //= self.pool[i]
                total += 2 * 2 * length * self.pool[i] * self.widths[i] * self.widths[i + 1]
        return total

    def _tier(self, i: int) -> Tier:
        n = len(self.d_layers) // len(self.pool)  # blocks and the pool of each tier
        *before, down = self.d_layers[i * n : (i + 1) * n]
        up, *after = self.u_layers[len(self.pool) - 1 - i]  # pyright: ignore[reportGeneralTypeIssues]
        return Tier(before, down, up, after)  # pyright: ignore[reportArgumentType]

    def _blocks_by_tier(self) -> list[list[Block]]:
        tiers = [self._tier(i) for i in range(len(self.pool))]
        return [*([*tier.before, *tier.after] for tier in tiers), list(self.c_layers)]  # pyright: ignore[reportReturnType]

    def _blocks(self) -> Iterator[Block]:
        return (block for blocks in self._blocks_by_tier() for block in blocks)

    def _size(self, i: int) -> int:
        """How many entries the states of tier i and all below it have."""
        if i == len(self.pool):
            return len(self.c_layers)
        tier = self._tier(i)
        return len(tier.before) + 1 + self._size(i + 1) + len(tier.after)

    def _split(self, i: int, layers: tuple) -> tuple[tuple, Any, tuple, tuple]:
        """The states of the blocks before the pool, of the pool, of the tiers below, and of the blocks after."""
        tier = self._tier(i)
        first, last = len(tier.before), len(layers) - len(tier.after)
        return layers[:first], layers[first], layers[first + 1 : last], layers[last:]

    def _check_forgetful(self) -> None:
        for blocks in self._blocks_by_tier()[1:]:
            for block in blocks:
                if block.carries_state and _counts(block):
                    raise UsageError(
                        f"a U-net with {block.kind} below its first tier takes no reset: where a document begins in "
                        "the middle of a group, its state would have to forget. Give each document a row of its own, "
                        "with lengths="
                    )


def _one_rate(dt: Tensor | float | None) -> float | None:
    if isinstance(dt, Tensor):
        raise UsageError(
            "a U-net takes dt as one number, its tiers running at fixed fractions of one rate; "
            f"got a tensor {tuple(dt.shape)}"
        )
    return dt


def _counts(block: Block) -> bool:
    """Whether the state holds counters, for which zeros do not mean a fresh sequence."""
    return any(not t.is_floating_point() for t in tensors(block.mixer.init_state(1, device="meta")))


def _copy(part: Tensor, like: Tensor) -> Tensor:
    """In the dtype of `like` and in memory of its own, so that a state does not keep a whole piece alive."""
    return part.to(like.dtype, copy=True)


def _fresh(layers: tuple, rows: Tensor) -> tuple:
    """States of which these rows, (b,) bool, have seen nothing."""
    return map_tensors(lambda t: t.masked_fill(rows.view(-1, *[1] * (t.ndim - 1)), 0), layers)


def _run_blocks(
    blocks: Any, x: Tensor, layers: tuple, options: dict[str, Any], skips: Sequence[Tensor] = ()
) -> tuple[list[Tensor], tuple]:
    """x and what each block makes of the one before, plus its skip where there are any; and the states."""
    ys, after = [x], []
    for k, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        y, layer = block(ys[-1], layer, **options)
        ys.append(y + skips[k] if skips else y)
        after.append(layer)
    return ys, tuple(after)


def _step_blocks(blocks: Any, x: Tensor, layers: tuple, dt: float | None, skips: Sequence[Tensor] = ()) -> list[Tensor]:
    """As `_run_blocks`, for one token."""
    ys = [x]
    for k, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        y = block.step(ys[-1], layer, dt)
        ys.append(y + skips[k] if skips else y)
    return ys
