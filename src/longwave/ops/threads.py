"""Run the blocks of a Numba kernel on as many threads as torch uses: on torch's own, where it has GNU OpenMP.

The kernels are compiled with `nogil=True` and take a range of blocks. Not Numba's own parallel loops: they need a
second OpenMP or TBB at run time, may not be entered from several threads at once (autograd, servers), and compile
several times slower. Blocks are handed out as they finish, which evens out a machine whose cores are shared. torch's
threads go on spinning for a while after a matrix product; a second set of threads would share the cores with them.
"""

import ctypes
import functools
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

    start = start_region()
    if start is None:
        helpers = [_workers(n_threads - 1).submit(work) for _ in range(n_threads - 1)]
        work()
        for helper in helpers:
            helper.result()
    else:
        _on_torchs_threads(start, work, n_threads)


def _on_torchs_threads(start: Callable[..., None], work: Callable[[], None], n_threads: int) -> None:
    """Call `work` in a parallel region; an exception of any thread is raised here."""
    errors: list[BaseException] = []

    def body(_: int | None) -> None:
        try:
            work()
        except BaseException as error:  # nothing may be raised through C
            errors.append(error)

    start(ctypes.cast(_BODY(body), ctypes.c_void_p), None, n_threads, 0)
    if errors:
        raise errors[0]


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def start_region() -> Callable[..., None] | None:
    """GNU OpenMP's entry point in the library that torch loaded, or None where torch uses another."""
    try:
        start = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


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
