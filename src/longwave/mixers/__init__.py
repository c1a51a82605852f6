"""Layers (b, l, d) -> (b, l, d): mixers mix along time and carry a state, channel mixers treat each token alone.

Encoder layers mix along time too, and need the sequence whole: no state. Callers are layers around a mixer that call
on weights which other layers have too.
"""

from longwave.mixers.attention import Attention
from longwave.mixers.bidirectional import Bidirectional
from longwave.mixers.channel import MLP, SwiGLU
from longwave.mixers.h3 import H3
from longwave.mixers.hyena import Hyena
from longwave.mixers.hyena_modal import HyenaModal
from longwave.mixers.lti import LTI
from longwave.mixers.mamba import Mamba
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.mamba3 import Mamba3
from longwave.mixers.moe import MoE
from longwave.mixers.parallel import Parallel
from longwave.mixers.rnn import GRU, LSTM
from longwave.mixers.s4 import S4
from longwave.mixers.s4d import S4D
from longwave.mixers.s5 import S5
from longwave.mixers.shared import Shared

MIXERS: dict[str, type] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "h3": H3,
    "hyena": Hyena,
    "hyena_modal": HyenaModal,
    "lti": LTI,
    "s4": S4,
    "s4d": S4D,
    "s5": S5,
    "attention": Attention,
    "lstm": LSTM,
    "gru": GRU,
    "parallel": Parallel,
}
CHANNELS: dict[str, type] = {
    "mlp": MLP,
    "swiglu": SwiGLU,
    "moe": MoE,
}
ENCODERS: dict[str, type] = {
    "bidirectional": Bidirectional,
}
CALLERS: dict[str, type] = {
    "shared": Shared,
}
