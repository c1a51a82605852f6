"""Run the blocks of a Numba kernel on as many threads as torch uses.

The kernels are compiled with `nogil=True` and take a range of blocks. Python threads rather than Numba's own parallel
loops: they need no OpenMP or TBB at run time, may be entered from several threads at once (autograd, servers), compile
several times faster, and hand out blocks as they finish, which evens out a machine whose cores are shared.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def parallel_for(n_blocks: int, body: Callable[[int], None]) -> None:
    """Call `body(i)` for every i in range(n_blocks), on torch.get_num_threads() threads, the caller's included."""
    n_threads = min(torch.get_num_threads(), n_blocks)
    if n_threads <= 1:
        for i in range(n_blocks):
            body(i)
        return
    counter = itertools.count()  # next() on it is atomic under the GIL

    def work() -> None:
        while (i := next(counter)) < n_blocks:
            body(i)

    helpers = [_workers(n_threads - 1).submit(work) for _ in range(n_threads - 1)]
    work()
    for helper in helpers:
        helper.result()


def _workers(n: int) -> ThreadPoolExecutor:
    """A pool of at least n threads, made once and enlarged when asked for more."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < n:
            _pool, _pool_size = ThreadPoolExecutor(n, thread_name_prefix="longwave"), n
        return _pool


def _after_fork() -> None:
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
