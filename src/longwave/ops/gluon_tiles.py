"""Tiles of tokens in shared memory: how they get there, for the Hopper forms written in Gluon."""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def zero_from(tile, count, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Zero the rows of a tile in shared memory from `count` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    value = tile.load(layout)
    tile.store(gl.where((t < count)[:, None], value, gl.zeros([ROWS, COLUMNS], value.dtype, layout)))


def for_tma(t: Tensor) -> Tensor:
    """`t`, or a copy where its address or strides are not multiples of 16 bytes."""
    aligned = t.data_ptr() % 16 == 0 and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
    return t if aligned and t.stride(-1) == 1 else t.contiguous()


def tiles(t: Tensor, tokens: int, columns: int) -> TensorDescriptor:
    """Boxes of some tokens of one head of (b, l, h, p), in a 16-bit type."""
    return TensorDescriptor.from_tensor(t, [1, tokens, 1, columns], _swizzled(tokens, columns, t.dtype))


def matrix(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of (rows, columns), as they are in memory."""
    return TensorDescriptor.from_tensor(t, [rows, columns], _plain(t.element_size()))


@functools.cache  # to make one takes three times as long as all else that a launch asks for
def _swizzled(tokens: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, tokens, 1, columns], _TYPES[dtype])


@functools.cache
def _plain(element_size: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(0, 8 * element_size, 2)
