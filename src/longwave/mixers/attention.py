"""Softmax attention over a ring of keys and values: grouped-query, rotary, sliding window."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype, reset_children, scaled
from longwave.mixers.linear import Linear
from longwave.ops.checks import state_dtype

UNLIMITED = torch.iinfo(torch.int64).max


class AttentionState(NamedTuple):
    """Keys and values of the tokens seen. Token number i, counted from the first of all, sits in slot i % capacity."""

    k: Tensor  # (b, capacity, h_kv, p), rotated
    v: Tensor  # (b, capacity, h_kv, p)
    length: Tensor  # (b,) int64: tokens seen
    start: Tensor  # (b,) int64: number of the current document's first token
    window: Tensor  # (b,) int64: slots that a row can ever use, so that the ring can be resized without its mixer

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def reserve(self, n: int) -> "AttentionState":
        """The same tokens with room for exactly `n` more, in new memory. `reserve(0)` drops unused room."""
        if not len(self.length):
            return self
        capacity = min(int(self.window.max()), int(self.length.max()) + n)
        nothing = self.k[:, :0]
        return _append(self, nothing, nothing, torch.zeros_like(self.length), self.start, capacity)


class Attention(nn.Module):
    """Causal multi-head attention:

        q, k, v = W_q x, W_k x, W_v x;  q and k turned by their position in the document
        out = W_o [softmax(scale q_i k_j^T) v_j]      j in the same document, i - window < j <= i

    Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023, arXiv:2305.13245, head i reading keys
    and values i // (h / h_kv); rotary embedding: Su et al. 2021, arXiv:2104.09864, with dimension i paired to i + r / 2
    of the first r, as in the published checkpoints. Parameters: q_proj, k_proj, v_proj, o_proj; drawn as nn.Linear.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Heads: `n_heads` of `d_head`; one left None follows from d_model, both None give heads of 64.

        `n_kv_heads`: None is n_heads, 1 is multi-query. `rotary`: share of a head's dimensions that is turned, 0 to 1.
        `rotary_scaling`: positions are divided by it (Chen et al. 2023, arXiv:2306.15595) to reach beyond training.
        `window`: tokens that a query sees, itself included; None: all. `scale`: None is d_head^-1/2. `key_multiplier`:
        a factor of k, so of all scores (Falcon-H1).
        """

        kind: ClassVar[str] = "attention"
        n_heads: int | None = None
        n_kv_heads: int | None = None
        d_head: int | None = None
        rotary: float = 1.0
        rotary_base: float = 10_000.0
        rotary_scaling: float = 1.0
        window: int | None = None
        scale: float | None = None
        key_multiplier: float = 1.0
        qkv_bias: bool = False
        out_bias: bool = False

        def __post_init__(self):
            check_positive(self, "n_heads", "n_kv_heads", "d_head", "window")
            if not 0 <= self.rotary <= 1:
                raise UsageError(f"attention: rotary is a share between 0 and 1, got {self.rotary}")
            if not self.rotary_scaling > 0:
                raise UsageError(f"attention: rotary_scaling must be positive, got {self.rotary_scaling}")

    def __init__(self, d_model: int, config: Config | None = None, *, d_out: int | None = None):
        """`d_out`: channels of the output, None: d_model."""
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model, self.d_out = d_model, d_out or d_model
        self.n_heads, self.d_head = _heads(d_model, config)
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise UsageError(f"attention: n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        self.d_rotary = int(self.d_head * config.rotary)
        if self.d_rotary % 2:
            raise UsageError(
                f"attention: rotary={config.rotary} x d_head={self.d_head} = {self.d_rotary} dimensions; make it even"
            )
        self.window = config.window or UNLIMITED
        h, h_kv, p = self.n_heads, self.n_kv_heads, self.d_head
        self.q_proj = Linear(d_model, h * p, bias=config.qkv_bias)
        self.k_proj = Linear(d_model, h_kv * p, bias=config.qkv_bias)
        self.v_proj = Linear(d_model, h_kv * p, bias=config.qkv_bias)
        self.o_proj = Linear(h * p, self.d_out, bias=config.out_bias)

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """The state has `l` slots more than the one given, up to the window; `AttentionState.reserve` changes that."""
        b, l, _ = x.shape
        old = self.init_state(b, device=x.device) if state is None else state
        number = old.length[:, None] + torch.arange(l, device=x.device)  # (b, l), counted from the first token of all
        start = old.start[:, None].expand(b, l)
        if reset is not None:
            start = torch.where(reset, number, start).cummax(1).values
        q, k, v = self._project(x, number - start)

        if old.capacity == 0 and reset is None and l <= self.window:
            y = self._attend(q, k, v, None)
        else:
            held = _slots(old.length, old.capacity)  # (b, capacity)
            keys = torch.cat([held, number], dim=1)[:, None]  # (b, 1, capacity + l)
            first = torch.maximum(start, number - (self.window - 1))  # (b, l)
            seen = (first[..., None] <= keys) & (keys <= number[..., None])  # (b, l, capacity + l)
            all_k, all_v = torch.cat([old.k.to(k.dtype), k], dim=1), torch.cat([old.v.to(v.dtype), v], dim=1)
            y = self._attend(q, all_k, all_v, seen)

        new = torch.full_like(old.length, l) if lengths is None else lengths
        last = (new - 1).clamp(min=0)[:, None]
        final_start = torch.where(new > 0, start.gather(1, last)[:, 0], old.start)
        capacity = min(self.window, old.capacity + l)
        if old.capacity == 0 and lengths is None and capacity == l:
            return self.o_proj(y), AttentionState(k, v, old.length + new, final_start, old.window)
        return self.o_proj(y), _append(old, k, v, new, final_start, capacity)

    @torch.no_grad()
    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """Raises ValueError when the state has no room: `state.reserve(n)` makes it."""
        number = state.length[:, None]  # (b, 1)
        q, k, v = self._project(x, number - state.start[:, None])
        filled = self._filled(state)
        rows = torch.arange(len(x), device=x.device)
        slot = state.length % state.capacity
        state.k[rows, slot] = k[:, 0].to(state.k.dtype)
        state.v[rows, slot] = v[:, 0].to(state.v.dtype)
        state.length.add_(1)

        first = torch.maximum(state.start, state.length - self.window)[:, None]
        seen = _slots(state.length, state.capacity)[:, :filled] >= first  # (b, filled)
        y = self._attend(q.to(state.k.dtype), state.k[:, :filled], state.v[:, :filled], seen[:, None])
        return self.o_proj(y[:, 0].to(x.dtype))

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, l, d), or (b, d) for one token: q (b, l, h, p), k and v (b, l, h_kv, p), at `position` (b, l)."""
        b, l = position.shape
        q = self.q_proj(x).view(b, l, self.n_heads, self.d_head)
        k = scaled(self.k_proj(x), self.config.key_multiplier).view(b, l, self.n_kv_heads, self.d_head)
        v = self.v_proj(x).view(b, l, self.n_kv_heads, self.d_head)
        if self.d_rotary:
            rate = self.config.rotary_base, self.config.rotary_scaling
            turn = _angles(position, self.d_rotary, *rate, state_dtype(q.dtype))
            q, k = _rotate(q, turn), _rotate(k, turn)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """`seen` (b, l, keys): which keys each query sees; None: those up to itself, one key to a query."""
        y = scaled_dot_product_attention(
            q.transpose(1, 2),  # (b, h, l, p)
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if seen is None else seen[:, None],
            is_causal=seen is None,
            scale=self.config.scale,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return y.transpose(1, 2).flatten(2)  # (b, l, h p)

    def _filled(self, state: AttentionState) -> int:
        """Slots to look at once the next token is in; raises if it has none. Counters are read on the CPU only."""
        if state.capacity == self.window:
            return state.capacity
        if state.length.device.type != "cpu" or torch.compiler.is_compiling():
            torch.ops.aten._assert_async.msg((state.length < state.capacity).all(), NO_ROOM)
            return state.capacity
        longest = int(state.length.max())
        if longest >= state.capacity:
            raise ValueError(f"{NO_ROOM}; it holds {longest} tokens in {state.capacity} slots")
        return longest + 1

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionState:
        weight = self.k_proj.weight
        device = device or weight.device
        shape = (b, min(length, self.window), self.n_kv_heads, self.d_head)
        k, v = (torch.zeros(shape, dtype=compute_dtype(weight, dtype), device=device) for _ in range(2))
        length_, start = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(2))
        return AttentionState(k, v, length_, start, torch.full_like(start, self.window))

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        itemsize = compute_dtype(self.k_proj.weight, dtype).itemsize
        return 2 * self.n_kv_heads * self.d_head * min(length, self.window) * itemsize

    def flops(self, length: int) -> int:
        """Scores and values count for the pairs that are seen: 4 h p each."""
        full = min(length, self.window)
        pairs = full * (full + 1) // 2 + (length - full) * full
        projections = (
            2 * (self.d_model * (self.n_heads + 2 * self.n_kv_heads) + self.d_out * self.n_heads) * self.d_head
        )
        return length * projections + 4 * self.n_heads * self.d_head * pairs


NO_ROOM = "attention: the state has no room for another token; call state.reserve(n) first"


def _heads(d_model: int, config: Attention.Config) -> tuple[int, int]:
    """(n_heads, d_head), what is left open following from d_model."""
    n_heads, d_head = config.n_heads, config.d_head
    if n_heads and d_head:
        return n_heads, d_head
    divisor = n_heads or d_head or 64
    if d_model % divisor:
        name = "n_heads" if n_heads else "d_head"
        raise UsageError(f"attention: d_model={d_model} is not a multiple of {name}={divisor}; set n_heads and d_head")
    return (n_heads, d_model // n_heads) if n_heads else (d_model // divisor, divisor)


def _angles(position: Tensor, r: int, base: float, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (b, l, 1, r / 2) of position / scaling * base^(-2i/r).

    Made on each call: a buffer of frequencies would be lost on the meta device and rounded by `.bfloat16()`.
    """
    i = torch.arange(0, r, 2, dtype=dtype, device=position.device)
    angle = position[..., None, None] * (torch.exp(i * (-math.log(base) / r)) / scaling)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + r / 2) of the first r dimensions of x (b, l, h, p), in float32."""
    cos, sin = turn
    half = cos.shape[-1]
    u, v, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat([u * cos - v * sin, v * cos + u * sin, rest], dim=-1).to(x.dtype)


def _slots(length: Tensor, capacity: int) -> Tensor:
    """The number of the token in each slot (b, capacity) of a ring that has seen `length` (b,); negative if empty."""
    last = length[:, None] - 1
    return last - (last - torch.arange(capacity, device=length.device)) % capacity


def _append(old: AttentionState, k: Tensor, v: Tensor, new: Tensor, start: Tensor, capacity: int) -> AttentionState:
    """The ring with `capacity` slots after row i has taken the first new[i] of k and v (b, l, h_kv, p)."""
    length = old.length + new
    number = _slots(length, capacity)  # (b, capacity)
    taken = number - old.length[:, None]  # its index among the new tokens, if not negative
    source = torch.where(taken >= 0, old.capacity + taken, number % max(old.capacity, 1))
    empty = old.capacity + k.shape[1]
    source = torch.where(number < 0, empty, source)[..., None, None]

    def gather(held: Tensor, added: Tensor) -> Tensor:
        zero = added.new_zeros(len(added), 1, *added.shape[2:])
        tokens = torch.cat([held.to(added.dtype), added, zero], dim=1)
        return tokens.gather(1, source.expand(-1, -1, *tokens.shape[2:]))

    return AttentionState(gather(old.k, k), gather(old.v, v), length, start, old.window)
