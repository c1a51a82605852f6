"""Splitting a linear recurrence along l on a GPU: what each segment makes of nothing, then what each is given."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pass_kernel(
    ends, total, initial, begins, final, segments, cells,
    REVERSE: tl.constexpr, INITIAL: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = cell < cells
    state = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        state = tl.load(initial + row * cells + cell, mask=inside, other=0.0)
    for k in range(segments):
        at = row * segments + (segments - 1 - k if REVERSE else k)
        tl.store(begins + at * cells + cell, state, mask=inside)
        decay = tl.load(total + at * cells + cell, mask=inside, other=0.0) if EACH else tl.load(total + at)
        state = state * decay + tl.load(ends + at * cells + cell, mask=inside, other=0.0)
    tl.store(final + row * cells + cell, state, mask=inside)


def segments_of(programs: int, wanted: int, length: int, least: int, *, pays: int = 2) -> int:
    """Into how many segments of at least `least` steps to cut `length`, so that `programs` become `wanted`.

    One, if fewer than `pays` would come of it: the inputs are read a second time.
    """
    segments = min(wanted // programs, length // least)
    return segments if segments >= pays else 1


def splits_of(heads: int, programs: int, wanted: int) -> int:
    """In how many parts to take `heads`, for `programs` to become `wanted`: the least divisor that does, or all."""
    return next((k for k in range(1, heads + 1) if heads % k == 0 and programs * k >= wanted), heads)


def pass_states(ends: Tensor, total: Tensor, initial: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states that segments are given, of the shape of `ends` (rows, segments, ...), and the last one (rows, ...).

    Segment k makes total_k h + ends_k of h; `total` has the shape of `ends`, or (rows, segments). All in float32.
    `reverse`: the last segment comes first.
    """
    segments, cells = ends.shape[1], ends[0, 0].numel()
    begins, final = torch.empty_like(ends), ends.new_empty(ends.shape[0], *ends.shape[2:])
    _pass_kernel[(ends.shape[0], triton.cdiv(cells, 1024))](
        ends, total, initial, begins, final, segments, cells,
        REVERSE=reverse, INITIAL=initial is not None, EACH=total.ndim > 2, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return begins, final
