"""How many exponentials a GPU takes in a second: 2^x of numbers in registers, again and again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 128  # of a program, Triton's number if it is not told another; each has one number
ROUNDS = 4096


@triton.jit
def _exponentials(y, rounds, n: tl.constexpr):
    at = tl.program_id(0) * n + tl.arange(0, n)
    a = at / 1e9
    b, c, d = a + 0.25, a + 0.5, a + 0.75
    for _ in range(rounds):  # four chains, so that none waits for its own last result
        a, b, c, d = tl.exp2(-a), tl.exp2(-b), tl.exp2(-c), tl.exp2(-d)
    tl.store(y + at, a + b + c + d)


def exponentials(programs: int, rounds: int, device: torch.device) -> tuple[Tensor, int]:
    """Take them; returns what they ended in, and their number."""
    y = torch.empty(programs * THREADS, device=device)
    _exponentials[(programs,)](y, rounds, n=THREADS)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    return y, 4 * rounds * y.numel()
