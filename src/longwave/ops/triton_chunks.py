"""What the kernels that walk a sequence in chunks share, be it `ssd` or `mamba3_scan`."""

import triton
import triton.language as tl


@triton.jit
def chunk_weights(sizes, decay, document, at, row_at, t, Q: tl.constexpr, RESET: tl.constexpr):
    """Of a chunk of Q tokens, for its tokens t: their step sizes, the decay up to them in powers of 2, from the start
    (0: another document) and to the end, the number of their document; and the decay of the whole chunk, the fifth.

    `sizes` and `decay`, the sum from the chunk's start, begin at `at` for it, and `document` at `row_at`.
    """
    size, s = tl.load(sizes + at + t), tl.load(decay + at + t)
    end = tl.load(decay + at + Q - 1)
    # Of float64 sums, which float32 inputs have, these are rounded once: a GPU's own powers in float32 are not.
    from_start, to_end, whole = tl.exp2(s).to(tl.float32), tl.exp2(end - s).to(tl.float32), tl.exp2(end).to(tl.float32)
    if RESET:
        number = tl.load(document + row_at + t)
        last = tl.load(document + row_at + Q - 1)
        from_start = tl.where(number == 0, from_start, 0.0)
        to_end = tl.where(number == last, to_end, 0.0)
        whole = tl.where(last == 0, whole, 0.0)
    else:
        number = t
    return size, s, from_start, to_end, whole, number


@triton.jit
def over_ranks(u, T: tl.constexpr, RB: tl.constexpr):
    """Sums of rows (q,) or (q, m) that belong to one token."""
    if RB == 1:
        return u
    elif len(u.shape) == 1:
        return tl.sum(tl.reshape(u, (T, RB)), 1)
    else:
        return tl.sum(tl.reshape(u, (T, RB, u.shape[1])), 1)
