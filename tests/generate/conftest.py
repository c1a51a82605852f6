"""Two models to generate from: one that says what it is told to, and a small real one."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from longwave.generate.text_model import TextModel
from longwave.mixers.attention import Attention
from longwave.mixers.channel import SwiGLU
from longwave.mixers.mamba2 import Mamba2
from longwave.models.language_model import LanguageModel
from longwave.models.state import State
from longwave.tasks.tokenizer import ByteTokenizer

torch.set_num_threads(1)


class ScriptModel(nn.Module):
    """Says token number n of a script once it has seen n tokens: logits 0 save for that one's, which is 9.

    What it has seen makes no difference. Its state is the number of tokens; `steps` counts calls of `step`.
    """

    causal = True

    def __init__(self, script: list[int], vocab_size: int = 257):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.fingerprint = "script"
        self.script = nn.Parameter(torch.tensor(script).double(), requires_grad=False)
        self.steps = 0

    def hidden(self, tokens: Tensor, state: State | None = None, *, reset=None, lengths=None) -> tuple[Tensor, State]:
        b, l = tokens.shape
        seen = torch.zeros(b, dtype=torch.int64) if state is None else state.position
        hidden = (seen[:, None] + torch.arange(1, l + 1))[..., None].double()  # (b, l, 1)
        return hidden, State((), seen + (l if lengths is None else lengths), "script")

    def step(self, tokens: Tensor, state: State) -> Tensor:
        self.steps += 1
        state.position.add_(1)
        return self.head(state.position[:, None].double())

    def head(self, hidden: Tensor) -> Tensor:
        n = hidden[..., 0].long().clamp(max=len(self.script) - 1)
        return 9.0 * nn.functional.one_hot(self.script[n].long(), self.config.vocab_size).float()


@pytest.fixture(scope="session")
def scripted() -> Callable[..., TextModel]:
    """scripted(text): a model of bytes that says `text` (str, bytes or ids) after a prompt of one token."""

    def make(text: str | bytes | list[int], **options) -> TextModel:
        ids = list(text.encode() if isinstance(text, str) else text)
        return TextModel(ScriptModel([0, *ids], **options), ByteTokenizer())  # pyright: ignore[reportArgumentType]

    return make


def _tiny_model(vocab_size: int = 257, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Mamba-2, attention and an MLP, with random weights large enough that the next token depends on those before."""
    torch.manual_seed(0)
    mamba2 = Mamba2.Config(d_state=8, d_head=8)
    attention = Attention.Config(n_heads=2)
    config = LanguageModel.Config(
        vocab_size=vocab_size, d_model=16, layers=(mamba2, attention, SwiGLU.Config(), mamba2)
    )
    model = LanguageModel(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LanguageModel]:
    """tiny_model(vocab_size, dtype): a small hybrid."""
    return _tiny_model


@pytest.fixture(scope="session")
def tiny() -> TextModel:
    """A small hybrid over bytes in float64, so that no rounding decides a token."""
    return TextModel(_tiny_model(), ByteTokenizer())
