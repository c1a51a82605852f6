"""Register an operator with torch: schema, fake kernel, and launchers that are imported when first called.

PyTorch's dispatcher is the registry: CPU tensors go to the operator's `cpu.py`. What runs depends on the device and on
`impl` alone.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from longwave.errors import LongwaveError

Impl = Literal["fused", "reference"]

_library = torch.library.Library("longwave", "FRAGMENT")
_KERNEL_DEVICES = ("cpu", "meta")


def define(schema: str, *, fake: Callable[..., Any], cpu: str) -> Callable[..., Any]:
    """Define `longwave::<schema>` and return the callable operator.

    `cpu` is 'function' in the module `cpu` beside the caller's, written 'longwave.ops.<op>.cpu:function'. `fake` gives
    empty outputs of the right shapes and dtypes, for tracing.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, _launcher(cpu), "CPU")
    torch.library.register_fake(f"longwave::{name}", fake, lib=_library)
    return getattr(torch.ops.longwave, name).default


def _launcher(path: str) -> Callable[..., Any]:
    module, function = path.split(":")

    @functools.cache
    def resolve() -> Callable[..., Any]:
        try:
            return getattr(importlib.import_module(module), function)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            raise LongwaveError(
                "Numba finds no folder to keep compiled kernels in; name one: export NUMBA_CACHE_DIR=/tmp/numba"
            ) from error

    def launch(*args: Any) -> Any:
        return resolve()(*args)

    return launch


def use_kernel(op: str, impl: str, device: torch.device) -> bool:
    """True when the registered kernel is to run, False for the reference.

    Raises ValueError for an unknown `impl`. A device without kernels takes the reference and says so once.
    """
    if impl not in ("fused", "reference"):
        raise ValueError(f"{op}: impl must be 'fused' or 'reference', got {impl!r}")
    if impl == "fused" and device.type not in _KERNEL_DEVICES:
        if not torch.compiler.is_compiling():
            _say_once(device.type)
        return False
    return impl == "fused"


@functools.cache
def _say_once(device: str) -> None:
    warnings.warn(
        f"longwave has no kernels for {device!r} yet: the reference runs there, correct but slow",
        stacklevel=4,
    )
