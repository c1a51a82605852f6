"""Hyena (Poli et al. 2023, arXiv:2302.10866): long convolutions with implicit filters, between gates."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, compute_dtype, reset_children
from longwave.mixers.hyena_filter import HyenaFilter
from longwave.mixers.linear import Linear
from longwave.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from longwave.ops.fft_conv import fft_conv, fft_conv_step


class HyenaState(NamedTuple):
    """What the convolutions have taken in of the current document, from its start on; zeros behind that."""

    conv: Tensor  # (b, w-1, (order+1) d): the last inputs of the short convolution
    history: Tensor  # (b, capacity, (order-1) d): the inputs of the long ones
    length: Tensor  # (b,) int64: tokens of the current document

    @property
    def capacity(self) -> int:
        return self.history.shape[1]

    def reserve(self, n: int) -> "HyenaState":
        """The same tokens with room for exactly `n` more, in new memory. `reserve(0)` drops unused room."""
        capacity = int(self.length.max()) + n if len(self.length) else self.capacity
        history = pad(self.history, (0, 0, 0, max(0, capacity - self.capacity)))[:, :capacity].clone()
        return HyenaState(self.conv.clone(), history, self.length.clone())


class Hyena(nn.Module):
    """The Hyena operator (definition 3.1 and algorithms 1 to 3):

        x_0, ..., x_{n-1}, v = conv1d(W_in u)                          n = order
        v = h_o * (x_i v) + D_o x_i v       for i = n-1, ..., 1 and o = 0, 1, ...; * is the causal convolution
        out = W_out (x_0 v)

    with filters h_o, one per channel, from `HyenaFilter`. They end after l_max tokens, and so does what Hyena can take
    in: a document of more tokens raises ValueError that names l_max. A step costs as much as the tokens seen, and the
    state grows with them; `hyena_distill` makes a mixer of constant size of it.

    Parameters are named as in the published code: in_proj (rows x_0, ..., v), short_filter, filter_fn.{bias,
    pos_emb.{z, t}, implicit_filter, modulation.deltas}, out_proj. The filters' parameters stay in float32 under
    `.bfloat16()`, and so does their computation under autocast. Initialised as there: D standard normal, the rest as
    nn.Linear, nn.Conv1d and `HyenaFilter`. With order > 2, channels o d to (o+1) d of filter_fn are those of filter o,
    as in the standalone version of that code.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`l_max`: taps of a filter, and tokens of the longest document. `order`: gates. `d_conv`: short filter's taps.

        Of the filters: `d_filter` is the width of their MLP, `n_inner` its hidden layers after the first, `d_position`
        the width of its input, odd: time and (d_position - 1) / 2 frequencies; `frequency` is that of its sines at the
        start. Their envelope falls to `decay_target` after a share of l_max that runs from `slow_decay` in the first
        channel to `fast_decay` in the last, and never below `shift`.
        """

        kind: ClassVar[str] = "hyena"
        l_max: int = 1024
        order: int = 2
        d_conv: int = 3
        d_filter: int = 64
        d_position: int = 3
        n_inner: int = 2
        frequency: float = 1.0
        fast_decay: float = 0.3
        slow_decay: float = 1.5
        decay_target: float = 1e-2
        shift: float = 0.0
        bias: bool = True

        def __post_init__(self):
            check_positive(self, "l_max", "order", "d_conv", "d_filter", "d_position")
            if self.order < 2:
                raise UsageError(f"hyena: order must be at least 2, got {self.order}")
            if self.d_position < 3 or self.d_position % 2 == 0:
                raise UsageError(f"hyena: d_position must be odd and at least 3, got {self.d_position}")
            if self.n_inner < 0:
                raise UsageError(f"hyena: n_inner must be at least 0, got {self.n_inner}")
            if not (0 < self.decay_target < 1 and self.fast_decay > 0 and self.slow_decay > 0):
                raise UsageError(
                    "hyena: need 0 < decay_target < 1, fast_decay > 0 and slow_decay > 0, "
                    f"got {self.decay_target}, {self.fast_decay} and {self.slow_decay}"
                )

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model = d_model
        channels = (config.order + 1) * d_model
        self.in_proj = Linear(d_model, channels, bias=config.bias)
        self.short_filter = nn.Conv1d(
            channels, channels, config.d_conv, groups=channels, padding=config.d_conv - 1, bias=True
        )
        self.filter_fn = HyenaFilter((config.order - 1) * d_model, config)
        self.out_proj = Linear(d_model, d_model, bias=config.bias)

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        state: HyenaState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, HyenaState]:
        """Raises ValueError for a document of more than l_max tokens."""
        b, l, _ = x.shape
        old = self.init_state(b, device=x.device) if state is None else state
        z, conv = causal_conv1d(self.in_proj(x), *self._short(), initial_state=old.conv, reset=reset, lengths=lengths)
        rows = _Rows(old, l, reset, lengths)
        l_max = self.config.l_max
        if old.capacity + l > l_max:
            _check_length(rows.longest(), l_max)
        *gates, v = z.split(self.d_model, dim=-1)
        kernels, skips = self.filter_fn.filters(min(old.capacity + l, l_max)), self.filter_fn.skips()
        histories = old.history.to(z.dtype).split(self.d_model, dim=-1)
        after = []
        for gate, kernel, D, history in zip(reversed(gates[1:]), kernels, skips, histories, strict=True):
            inputs = rows.extend(history, v * gate)  # (b, capacity + l, d)
            y, _ = fft_conv(inputs, kernel, D=D, reset=rows.reset, lengths=rows.lengths)
            v = rows.new(y)
            after.append(inputs)
        history = rows.last_documents(torch.cat(after, -1), min(l_max, old.capacity + l))
        return self.out_proj(v * gates[0]), HyenaState(conv, history, rows.final_length)

    @torch.no_grad()
    def step(self, x: Tensor, state: HyenaState) -> Tensor:
        """Raises ValueError when the state has no room, which `state.reserve(n)` makes, and after l_max tokens."""
        _check_room(state, self.config.l_max)
        *gates, v = causal_conv1d_step(state.conv, self.in_proj(x), *self._short()).split(self.d_model, dim=-1)
        kernels, skips = self.filter_fn.filters(self.config.l_max), self.filter_fn.skips()
        histories = state.history.split(self.d_model, dim=-1)
        for gate, kernel, D, history in zip(reversed(gates[1:]), kernels, skips, histories, strict=True):
            v = fft_conv_step(history, v * gate, kernel, D=D, length=state.length)
        state.length.add_(1)
        return self.out_proj(v * gates[0])

    def _short(self) -> tuple[Tensor, Tensor | None]:
        return self.short_filter.weight.squeeze(1), self.short_filter.bias

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> HyenaState:
        dtype = compute_dtype(self.in_proj.weight, dtype)
        device = device or self.in_proj.weight.device
        d, order, room = self.d_model, self.config.order, min(length, self.config.l_max)
        return HyenaState(
            torch.zeros(b, self.config.d_conv - 1, (order + 1) * d, dtype=dtype, device=device),
            torch.zeros(b, room, (order - 1) * d, dtype=dtype, device=device),
            torch.zeros(b, dtype=torch.int64, device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Of a sequence that is one document; after a reset the state holds no more than the new one."""
        order, itemsize = self.config.order, compute_dtype(self.in_proj.weight, dtype).itemsize
        room = min(length, self.config.l_max)
        return self.d_model * itemsize * ((order - 1) * room + (order + 1) * (self.config.d_conv - 1))

    def flops(self, length: int) -> int:
        """A long convolution counts as three real FFTs of length 2 l, 5 l log2 2 l each, and their product, 6 l.

        The filters are generated once for all sequences of a call, and counted here as if for one.
        """
        d, order = self.d_model, self.config.order
        projections = 2 * d * (order + 2) * d + 2 * self.config.d_conv * (order + 1) * d
        convolution = round(15 * length * math.log2(2 * length)) + 6 * length
        return length * projections + (order - 1) * d * convolution + self.filter_fn.flops(length)


class _Rows:
    """Each row's history and its new tokens side by side: where row i holds n of the former, the latter begin at n."""

    def __init__(self, old: HyenaState, l: int, reset: Tensor | None, lengths: Tensor | None):
        self.capacity, self.l = old.capacity, l
        self.place = old.length[:, None] + torch.arange(l, device=old.length.device)  # (b, l)
        self.start = torch.zeros_like(self.place)  # of each new token's document
        if reset is not None:
            self.start = torch.where(reset, self.place, 0).cummax(1).values
        self.count = torch.full_like(old.length, l) if lengths is None else lengths
        end = old.length + self.count
        last = (self.count - 1).clamp(min=0)[:, None]
        self.final_start = torch.where(self.count > 0, self.start.gather(1, last)[:, 0], 0)
        self.final_length = end - self.final_start
        self.plain = self.capacity == 0 and reset is None and lengths is None
        self.reset = reset
        if reset is not None and self.capacity:
            self.reset = reset.new_zeros(len(reset), self.capacity + l).scatter(1, self.place, reset)
        self.lengths = lengths if self.capacity == 0 else end

    def longest(self) -> Tensor:
        """Tokens of the longest document that ends among the new tokens."""
        real = torch.arange(self.l, device=self.place.device) < self.count[:, None]
        return torch.where(real, self.place - self.start + 1, 0).amax()

    def extend(self, history: Tensor, new: Tensor) -> Tensor:
        """(b, capacity, d) and (b, l, d) -> (b, capacity + l, d)"""
        if self.capacity == 0:
            return new
        return pad(history, (0, 0, 0, self.l)).scatter(1, self._index(new), new)

    def new(self, y: Tensor) -> Tensor:
        """(b, capacity + l, d) -> what stands at the new tokens, (b, l, d)"""
        return y if self.capacity == 0 else y.gather(1, self._index(y))

    def last_documents(self, inputs: Tensor, capacity: int) -> Tensor:
        """(b, capacity, ...): each row's last document from its start on, zeros behind it."""
        if self.plain:
            return inputs[:, :capacity]
        slot = torch.arange(capacity, device=inputs.device)
        source = (self.final_start[:, None] + slot).clamp(max=inputs.shape[1] - 1)
        held = slot < self.final_length[:, None]
        return torch.where(held[..., None], inputs.gather(1, source[..., None].expand(-1, -1, inputs.shape[2])), 0)

    def _index(self, like: Tensor) -> Tensor:
        return self.place[..., None].expand(-1, -1, like.shape[-1])


def _check_length(longest: Tensor, l_max: int) -> None:
    """Values are read on the CPU only."""
    way_out = f"more than l_max={l_max}, for which its filters are made; reset the state, or train with a larger l_max"
    if longest.device.type != "cpu" or torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(longest <= l_max, f"hyena: a document has {way_out}")
    elif int(longest) > l_max:
        raise ValueError(f"hyena: a document has {int(longest)} tokens, {way_out}")


def _check_room(state: HyenaState, l_max: int) -> None:
    """For one more token."""
    if state.capacity > l_max:
        _check_length(state.length.amax() + 1, l_max)
    if state.length.device.type != "cpu" or torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg((state.length < state.capacity).all(), NO_ROOM)
    elif (longest := int(state.length.max())) >= state.capacity:
        _check_length(state.length.amax() + 1, l_max)
        raise ValueError(f"{NO_ROOM}; it holds {longest} tokens in {state.capacity} slots")


NO_ROOM = "hyena: the state has no room for another token; call state.reserve(n) first"
