import pytest
import torch

from longwave.mixers import GRU, LSTM, MLP, Attention, Mamba, Mamba2, Parallel, Shared, SwiGLU
from longwave.models.language_model import LanguageModel

MAMBA = Mamba.Config(d_state=4)
MAMBA2 = Mamba2.Config(d_state=8, d_head=16)
ATTENTION = Attention.Config(n_heads=4, n_kv_heads=2)
WINDOWED = Attention.Config(n_heads=2, window=5, rotary=0.5)
SWIGLU = SwiGLU.Config(d_inner=48)
MLP_ = MLP.Config(d_inner=40)
SHARED = Shared.Config(mixer=MAMBA2, attention=Attention.Config(n_heads=4), d_inner=24, rank=3, attention_adapters=True)
PATTERNS = {
    "mamba": (MAMBA, MAMBA),
    "mamba2": (MAMBA2, MAMBA2),
    "transformer": (ATTENTION, SWIGLU, WINDOWED, MLP_),
    "rnn": (LSTM.Config(), GRU.Config(d_hidden=24)),
    "nested": (Parallel.Config(mixers=(MAMBA2, WINDOWED)), SHARED, SWIGLU, SHARED),
    "hybrid": (MAMBA, SWIGLU, WINDOWED, MLP_, MAMBA2, GRU.Config(), ATTENTION),
}


FOR_ONE_GRAPH = (SWIGLU, WINDOWED, MAMBA2)


def make_model(pattern: str = "hybrid", **options) -> LanguageModel:
    """A tiny model whose parameters are all off their initial values, so that none is a 0 or a 1 by accident."""
    config = LanguageModel.Config(
        **{"vocab_size": 61, "d_model": 32, "layers": PATTERNS.get(pattern, FOR_ONE_GRAPH)} | options
    )
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are tiny: a second thread only waits."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(params=PATTERNS)
def model(request) -> LanguageModel:
    return make_model(request.param)


@pytest.fixture
def build():
    return make_model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
