"""Does memory grow while a model decodes?"""

import torch

from longwave.models.token_model import TokenModel
from longwave.tasks.progress import ProgressLine
from longwave.training.memory import held

START = 100  # tokens after which growth counts


@torch.inference_mode()
def decode_memory(model: TokenModel, prompt: list[int], n: int) -> dict:
    """Bytes of the state and of the process after START and after `n` greedy tokens, and the growth between.

    On a GPU the process counts for its tensors there.
    """
    device = next(model.parameters()).device
    hidden, state = model.hidden(torch.tensor([prompt], device=device))
    logits = model.head(hidden[:, -1])  # (1, v)
    at_start = 0
    with ProgressLine("decode memory", n) as progress:
        for i in range(n):
            if i == START:
                at_start = held(device)
            logits = model.step(logits.argmax(-1), state)
            progress.add(1)
    at_end = held(device)
    return {
        "tokens": n,
        "state_bytes": state.nbytes,
        "state_bytes_expected": model.state_bytes(len(prompt) + n),
        "process_bytes_at_100": at_start,
        "process_bytes_at_end": at_end,
        "growth": at_end - at_start,
    }
