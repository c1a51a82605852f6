"""Tiles of tokens in shared memory: how they get there, for the Hopper forms written in Gluon."""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int16: gl.int16}


@gluon.jit
def zero_from(tile, count, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Zero the rows of a tile in shared memory from `count` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    value = tile.load(layout)
    tile.store(gl.where((t < count)[:, None], value, gl.zeros([ROWS, COLUMNS], value.dtype, layout)))


@gluon.jit
def walk_of(h, h_per_g, segments, per_segment, chunks, l, lengths, BLOCKS: gl.constexpr, LENGTHS: gl.constexpr):
    """What the program walks: one of BLOCKS parts of a head's channels through one segment's chunks, [first, stop).

    Returns (block, b h + head, segment, row, head, group, first, stop, the row's length).
    """
    program = gl.program_id(0).to(gl.int64)
    block = (program % BLOCKS).to(gl.int32)
    bh, segment = program // BLOCKS // segments, (program // BLOCKS % segments).to(gl.int32)
    row, head = (bh // h).to(gl.int32), (bh % h).to(gl.int32)
    first = segment * per_segment
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    return block, bh, segment, row, head, head // h_per_g, first, gl.minimum(first + per_segment, chunks), end


def for_tma(t: Tensor) -> Tensor:
    """`t`, or a copy where its address or strides are not multiples of 16 bytes, or one stands for many."""
    whole = all(stride > 0 and stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
    if whole and t.data_ptr() % 16 == 0 and t.stride(-1) == 1:
        return t
    return t.clone(memory_format=torch.contiguous_format)  # the strides of single rows too


def tiles(t: Tensor, tokens: int, columns: int) -> TensorDescriptor:
    """Boxes of some tokens of one head of (b, l, h, p), in a 16-bit type."""
    return swizzled(t, (1, tokens, 1, columns))


def swizzled(t: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Boxes as matrix products take them, in a 16-bit type."""
    return TensorDescriptor.from_tensor(t, list(block), _swizzled(block, t.dtype))


def matrix(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of (rows, columns), as they are in memory."""
    return TensorDescriptor.from_tensor(t, [rows, columns], _plain(t.element_size()))


@functools.cache  # to make one takes three times as long as all else that a launch asks for
def _swizzled(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _TYPES[dtype])


@functools.cache
def _plain(element_size: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(0, 8 * element_size, 2)
