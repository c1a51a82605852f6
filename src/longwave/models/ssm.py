"""A stack of state space layers with the call of nn.GRU."""

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.mixers import ENCODERS, MIXERS, Bidirectional
from longwave.models.blocks import check_layers
from longwave.models.features import Features
from longwave.models.state import State


class SSM(Features):
    """`y, state = ssm(x, state)`, in place of `y, h = gru(x, h)`:

        x = W_in x + b_in (if the sizes differ);  x = x + mixer_i(RMSNorm(x)) for each layer;  y = RMSNorm(x)

    input_size, hidden_size, num_layers, batch_first, dropout: as nn.GRU's; dropout falls on every layer's output but
    the last one's. `mixer`: the kind of layer ("mamba2", "s4d", "attention", "gru", ...: MIXERS lists them) with its
    defaults, or its configuration, such as Mamba2.Config(d_state=64, d_head=16).

    `bidirectional`: every layer sees its whole sequence, x = x + mixer(x) + flip(reverse_mixer(flip(x))). Unlike
    nn.GRU's, y keeps hidden_size channels, not twice as many: each layer puts both directions into the one residual
    stream, position by position. A bidirectional SSM has no state to go on from, nor steps; the state that `forward`
    returns then counts tokens alone and is refused as an input.
    mixer=Bidirectional.Config(...) has more options.

    Raises UsageError for a kind that does not exist and for sizes that do not fit.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        mixer: Any = "mamba2",
        dropout: float = 0.0,
        bidirectional: bool = False,
    ):
        if min(input_size, hidden_size, num_layers) < 1 or not 0 <= dropout <= 1:
            raise UsageError(
                "SSM: input_size, hidden_size and num_layers must be at least 1 and dropout in 0..1, "
                f"got {input_size}, {hidden_size}, {num_layers} and {dropout}"
            )
        layer = _mixer_config(mixer)
        if bidirectional:
            layer = Bidirectional.Config(mixer=layer)
        super().__init__(
            Features.Config(d_input=input_size, d_model=hidden_size, layers=(layer,) * num_layers, dropout=dropout)
        )
        self.input_size, self.hidden_size, self.batch_first = input_size, hidden_size, batch_first

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]:
        """x (l, b, input_size), or (b, l, input_size) with batch_first, or one sequence (l, input_size).

        Returns y, with hidden_size in place of input_size, and the state after x. `state=None` is a fresh sequence; a
        state given is left as it was, and gradients flow through it. `reset`, bool, of x's shape without the last axis:
        True starts a document there. `lengths` (b,) int64: tokens from lengths[i] on are padding of row i. `dt`: how
        long each token lasts in steps of training, for mixers with a rate ("s4", "s4d", "s5", "lti"): a number, or of
        reset's shape where tokens come at irregular times. Raises ValueError for shapes that do not fit, UsageError for
        a PackedSequence and for `dt` where the mixer has no rate.
        """
        if isinstance(x, PackedSequence):
            raise UsageError(
                "SSM takes no PackedSequence; pass x and lengths=, as pad_packed_sequence(packed) gives them"
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"SSM: x must have 2 or 3 axes, the last of input_size={self.input_size}, got {tuple(x.shape)}"
            )
        unbatched = x.ndim == 2
        x, reset, dt = (self._rows_first(value, unbatched) for value in (x, reset, dt))
        y, after = self.hidden(x, state, reset=reset, lengths=lengths, dt=dt)  # (b, l, d)
        if unbatched:
            return y[0], after
        return y if self.batch_first else y.transpose(0, 1), after

    def _rows_first(self, value: Any, unbatched: bool) -> Any:
        """A tensor with the batch as its first axis and time as its second; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if unbatched:
            return value[None]
        return value if self.batch_first else value.transpose(0, 1)


def _mixer_config(mixer: Any) -> Any:
    layers = MIXERS | ENCODERS
    if isinstance(mixer, str):
        if mixer not in layers:
            raise UsageError(f"SSM: unknown mixer {mixer!r}.{nearest(mixer, layers)}")
        return layers[mixer].Config()
    check_layers((mixer,), "SSM")
    if mixer.kind not in layers:
        raise UsageError(f"SSM: {mixer.kind!r} is no mixer.{nearest(mixer.kind, layers)}")
    return mixer
