"""Take in prompts, in chunks, so that memory does not grow with their length (save where the state itself does)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longwave.errors import UsageError
from longwave.models.state import State
from longwave.models.token_model import TokenModel


def prefill(
    model: TokenModel, prompts: Sequence[Sequence[int]], state: State | None = None, *, chunk_len: int = 512
) -> tuple[Tensor, State]:
    """Feed b prompts of one token or more, of any lengths, after `state` (b rows, or one that serves them all).

    Returns the logits (b, v) after each prompt's last token and the new state; `state` itself is left as it was. Rows
    do not depend on one another. Works on `chunk_len` tokens of every prompt at a time and computes logits for the
    last token alone. No gradient. Raises UsageError for an empty prompt, a token that is not in the vocabulary, or
    a state of another number of rows.
    """
    check_prompts(model, prompts, chunk_len)
    state = _one_row_each(state, len(prompts))
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (b,)
    with torch.no_grad():
        last = None
        for start in range(0, longest, chunk_len):
            parts = [prompt[start : start + chunk_len] for prompt in prompts]
            l = max(map(len, parts))
            tokens = torch.tensor([[*part, *[0] * (l - len(part))] for part in parts], device=device)  # (b, l)
            here = (lengths - start).clamp(0, l)  # (b,) tokens of each prompt in this chunk
            padded = min(map(len, parts)) < l
            hidden, state = model.hidden(tokens, state, lengths=here if padded else None)  # (b, l, d)
            latest = hidden[torch.arange(len(prompts), device=device), (here - 1).clamp(min=0)]  # (b, d)
            last = latest if last is None else torch.where((here > 0)[:, None], latest, last)
        assert last is not None
        assert state is not None
        return model.head(last), state


def check_prompts(model: TokenModel, prompts: Sequence[Sequence[int]], chunk_len: int) -> None:
    """Raise UsageError unless every prompt holds a token, and only tokens of the vocabulary."""
    v = model.config.vocab_size
    if chunk_len < 1:
        raise UsageError(f"chunk_len must be at least 1, got {chunk_len}")
    for prompt in prompts:
        if not prompt:
            raise UsageError("an empty prompt leaves nothing to go on from; give at least one token")
        wrong = [token for token in prompt if not 0 <= token < v]
        if wrong:
            raise UsageError(f"token {wrong[0]} is not in the model's vocabulary of {v}; ids are 0 to {v - 1}")


def _one_row_each(state: State | None, b: int) -> State | None:
    rows = b if state is None else len(state.position)
    if rows == b or state is None:
        return state
    if rows == 1:
        return state.index_select([0] * b)
    raise UsageError(f"the state has {rows} rows and there are {b} prompts; give one row for each, or one for all")
