"""How long the first call of an operator takes when nothing is compiled yet."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from longwave.bench.table import number, table


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Triton keeps what it compiles in an empty folder, for as long as this lasts.

    Kernels that this process has launched before stay compiled, and those of Numba do.
    """
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before


def first_calls(results: Sequence[dict[str, Any]]) -> str:
    """A table of the seconds of each contender's first forward and backward, case by case.

    What one case has compiled the next one has, if it needs the same.
    """
    rows = {}
    for result in results:
        name = result["case"].split(",")[0]
        for who, checked in result["checked"].items():
            rows[name, who] = [f"{name}: {who}", number(checked["first_call"]), number(checked["first_backward"])]
    return table(["seconds of the first call", "forward", "backward"], list(rows.values()))
