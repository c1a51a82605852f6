"""Run a small kernel on torch's own OpenMP threads, for calls too short for anything slower to start.

A parallel region of the OpenMP library that torch has loaded starts in about 2 us on threads that are awake already,
where handing work to Python threads takes about 50. The kernel is a Numba `cfunc` of one pointer, to int64 words:
word 0 is a ticket counter from which each thread draws blocks until there are none left (`next_ticket`), the rest are
addresses and sizes (`pointer` turns an address into something `numba.carray` takes).
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from longwave.ops.numba_math import OPTIONS
from longwave.ops.threads import parallel_for, start_region


def region(function: Callable[..., Any]) -> Any:
    """Compile `function(words)`, the body of a parallel region, as a C callback."""
    return numba.cfunc(types.void(types.voidptr), cache=True, **OPTIONS)(function)


def run(kernel: Any, words: list[int], n_blocks: int) -> None:
    """Call the compiled `kernel` with `words` behind a ticket counter at 0, on at most `n_blocks` threads."""
    memory = (ctypes.c_int64 * (1 + len(words)))(0, *words)
    n_threads = min(torch.get_num_threads(), n_blocks)
    start = start_region()
    if n_threads == 1:
        kernel.ctypes(ctypes.addressof(memory))
    elif start is None:
        parallel_for(n_threads, lambda i: kernel.ctypes(ctypes.addressof(memory)))
    else:
        start(kernel.address, ctypes.addressof(memory), n_threads, 0)


def threads_in_use() -> str:
    """Whose threads kernels run on, in words."""
    return "Python's" if start_region() is None else "torch's OpenMP"


# Their own types describe what they are outside a kernel, not inside.
_intrinsic: Any = intrinsic
carray: Any = numba.carray  # pyright: ignore[reportPrivateImportUsage]


@_intrinsic
def pointer(typingctx, address):
    """An int64 address as a void pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@_intrinsic
def next_ticket(typingctx, words):
    """Draw from the counter that the void pointer `words` points at: 0, 1, 2, ... over all threads."""

    def generate(context, builder, signature, args):
        counter = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), generate
