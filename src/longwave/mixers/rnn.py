"""Recurrent baselines on torch's own kernels: LSTM and GRU."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from longwave.mixers.base import check_positive, reset_children
from longwave.mixers.linear import Linear
from longwave.ops.checks import state_dtype


class LSTMState(NamedTuple):
    h: Tensor  # (b, d_hidden), float32
    c: Tensor  # (b, d_hidden), float32


class GRUState(NamedTuple):
    h: Tensor  # (b, d_hidden), float32


@dataclass(frozen=True, kw_only=True)
class RNNConfig:
    """`d_hidden`: width of the state. None: d_model, and no output projection."""

    kind: ClassVar[str]
    d_hidden: int | None = None
    bias: bool = True

    def __post_init__(self):
        check_positive(self, "d_hidden")


class _RNN(nn.Module, ABC):
    """What LSTM and GRU share: weights named and drawn as nn.LSTM's and nn.GRU's, one layer, one direction.

    A batch without `reset` and `lengths` is one call of torch's sequence kernel. With them, each document becomes a row
    of a PackedSequence, so that the kernel sees whole documents still; that depends on the values, so torch.compile
    breaks its graph there. Under autocast the kernel's dtype is torch's choice, as in nn.LSTM.
    """

    n_gates: ClassVar[int]
    State: ClassVar[type[LSTMState] | type[GRUState]]
    Config: ClassVar[type[RNNConfig]]

    def __init__(self, d_model: int, config: RNNConfig | None = None):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model, self.d_hidden = d_model, config.d_hidden or d_model
        rows = self.n_gates * self.d_hidden
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, d_model))
        self.weight_hh_l0 = nn.Parameter(torch.empty(rows, self.d_hidden))
        if config.bias:
            self.bias_ih_l0 = nn.Parameter(torch.empty(rows))
            self.bias_hh_l0 = nn.Parameter(torch.empty(rows))
        self.out_proj = Linear(self.d_hidden, d_model, bias=False) if config.d_hidden else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_children(self)
        for weight in self._weights():
            nn.init.uniform_(weight, -(self.d_hidden**-0.5), self.d_hidden**-0.5)

    def forward(self, x: Tensor, state=None, *, reset: Tensor | None = None, lengths: Tensor | None = None):
        state = self.init_state(len(x), device=x.device) if state is None else state
        u, h0 = x.to(self.weight_ih_l0.dtype), [t.to(self.weight_ih_l0.dtype) for t in state]
        if reset is None and lengths is None:
            y, *hidden = self._kernel(u, [t[None] for t in h0], True)
            final = [t[0] for t in hidden]
        else:
            y, final = self._documents(u, h0, reset, lengths)
        y = y.to(x.dtype)
        final = [t.to(s.dtype) for t, s in zip(final, state, strict=True)]
        return (y if self.out_proj is None else self.out_proj(y)), self.State(*final)

    @torch.no_grad()
    def step(self, x: Tensor, state) -> Tensor:
        weight = self.weight_ih_l0
        hidden = self._cell(x.to(weight.dtype), *(t.to(weight.dtype) for t in state))
        for old, new in zip(state, hidden, strict=True):
            old.copy_(new)
        y = hidden[0].to(x.dtype)
        return y if self.out_proj is None else self.out_proj(y)

    def _documents(
        self, x: Tensor, h0: list[Tensor], reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """y (b, l, d_hidden) and the final state, from one packed call with a row for each document."""
        b, l, _ = x.shape
        time = torch.arange(l, device=x.device).expand(b, l)
        reset = torch.zeros_like(time, dtype=torch.bool) if reset is None else reset
        lengths = time.new_full((b,), l) if lengths is None else lengths
        begins = reset | (time == 0)
        position = time - torch.where(begins, time, 0).cummax(1).values  # (b, l), in the document
        document = begins.flatten().cumsum(0).view(b, l) - 1  # (b, l)
        token = (time < lengths[:, None]).flatten().nonzero()[:, 0]  # of the b * l, those that are no padding
        if not len(token):
            return x.new_zeros(b, l, self.d_hidden), h0

        sizes = document.flatten()[token].bincount(minlength=int(begins.sum()))
        longest_first = sizes.argsort(descending=True, stable=True)
        rank = longest_first.argsort()[document]  # (b, l): which row of the pack a token is in
        order = token[(position * len(sizes) + rank).flatten()[token].argsort()]  # by position, then by row
        per_position = position.flatten()[token].bincount().cpu()
        rows = longest_first[: int(per_position[0])]  # the documents that have tokens

        fresh = begins & (reset | (time > 0))
        owner = begins.flatten().nonzero()[:, 0][rows]  # the first token of each document
        continues = ~fresh.flatten()[owner, None]
        initial = [(t[owner // l] * continues)[None] for t in h0]
        packed, *hidden = self._kernel(x.flatten(0, 1)[order], initial, per_position)

        y = packed.new_zeros(b * l, self.d_hidden).index_copy(0, order, packed).view(b, l, -1)
        last = rank.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0].clamp(max=len(rows) - 1)
        final = [torch.where(lengths[:, None] > 0, t[0, last], old) for t, old in zip(hidden, h0, strict=True)]
        return y, final

    @abstractmethod
    def _kernel(self, x: Tensor, h0: list[Tensor], layout: Tensor | bool) -> tuple[Tensor, ...]:
        """torch's sequence kernel. `layout`: the batch size at each position of a packed x, or True: x is (b, l, d)."""

    @abstractmethod
    def _cell(self, x: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        """torch's kernel of one token."""

    def _weights(self) -> list[Tensor]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return [getattr(self, name) for name in names[: 4 if self.config.bias else 2]]

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        weight = self.weight_ih_l0
        shape, dtype = (b, self.d_hidden), state_dtype(dtype or weight.dtype)
        return self.State(
            *(torch.zeros(shape, dtype=dtype, device=device or weight.device) for _ in self.State._fields)
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        return len(self.State._fields) * self.d_hidden * state_dtype(dtype or self.weight_ih_l0.dtype).itemsize

    def flops(self, length: int) -> int:
        d, e = self.d_model, self.d_hidden
        return length * 2 * (self.n_gates * e * (d + e) + (0 if self.out_proj is None else e * d))


class LSTM(_RNN):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000), as in nn.LSTM:

        i, f, o = sigmoid(W x + U h + b);  g = tanh(W_g x + U_g h + b_g)
        c = f c + i g;  y = h = o tanh(c)

    Weights have nn.LSTM's names, so that its state dict loads; out_proj if `d_hidden` is given.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RNNConfig):
        kind: ClassVar[str] = "lstm"

    n_gates = 4
    State = LSTMState

    def _kernel(self, x, h0, layout):
        if isinstance(layout, Tensor):
            return torch.lstm(x, layout, h0, self._weights(), self.config.bias, 1, 0.0, self.training, False)
        return torch.lstm(x, h0, self._weights(), self.config.bias, 1, 0.0, self.training, False, layout)

    def _cell(self, x, *hidden):
        return torch.lstm_cell(x, hidden, *self._weights())


class GRU(_RNN):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), in nn.GRU's form, which resets after the product:

        r, z = sigmoid(W x + U h + b);  n = tanh(W_n x + b_n + r (U_n h + b_hn))
        y = h = (1 - z) n + z h

    Weights have nn.GRU's names, so that its state dict loads; out_proj if `d_hidden` is given.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RNNConfig):
        kind: ClassVar[str] = "gru"

    n_gates = 3
    State = GRUState

    def _kernel(self, x, h0, layout):
        if isinstance(layout, Tensor):
            return torch.gru(x, layout, h0[0], self._weights(), self.config.bias, 1, 0.0, self.training, False)
        return torch.gru(x, h0[0], self._weights(), self.config.bias, 1, 0.0, self.training, False, layout)

    def _cell(self, x, *hidden):
        return (torch.gru_cell(x, *hidden, *self._weights()),)
