"""Register an operator with torch: schema, fake kernel, and launchers that are imported when first called.

PyTorch's dispatcher is the registry: CPU tensors go to the operator's `cpu.py`, CUDA tensors to its `triton.py`. What
runs depends on the device, on float64 (which GPU kernels leave to the reference) and on `impl` alone.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from longwave.errors import LongwaveError

Impl = Literal["fused", "reference"]

_library = torch.library.Library("longwave", "FRAGMENT")
_on_cuda: set[str] = set()
_hopper_forms: list[str] = []

NO_TRITON = "the GPU kernels need Triton, which torch's CUDA builds for Linux bring along: pip install triton"
GLUON_TESTED = (3, 6), (3, 6)
"""The first and the last version of Triton that the Hopper forms have been tested with."""


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: str,
    cuda: str | None = None,
    hopper: str | None = None,
    step: bool = False,
) -> Callable[..., Any]:
    """Define `longwave::<schema>` and return the callable operator.

    `cpu` is 'function' in the module `cpu` beside the caller's, written 'longwave.ops.<op>.cpu:function', and `cuda`
    likewise in `triton`; `hopper` takes its place on a GPU of compute capability 9 (see `on_hopper`). `fake` gives
    empty outputs of the right shapes and dtypes, for tracing. `step`: a one-token operator, called so often that plain
    tensors go to its launcher directly: the dispatcher takes longer than some of these kernels.
    """
    name = schema.split("(", 1)[0]
    launchers = {"cpu": _launcher(cpu)}
    if cuda is not None:
        launchers["cuda"] = _launcher(cuda) if hopper is None else _by_capability(cuda, hopper)
        _on_cuda.add(name.removesuffix("_forward"))
    _library.define(schema)
    for device, launch in launchers.items():
        _library.impl(name, launch, device.upper())
    if hopper is not None:
        _hopper_forms.append(name)
    torch.library.register_fake(f"longwave::{name}", fake, lib=_library)
    operator = getattr(torch.ops.longwave, name).default
    return _past_the_dispatcher(operator, launchers) if step else operator


def _past_the_dispatcher(operator: Callable[..., Any], launchers: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Call the device's launcher where nothing could ask the dispatcher for more: no tracing, mode, tensor subclass."""

    def call(first: Tensor, *rest: Any) -> Any:
        if torch.compiler.is_compiling() or type(first) is not Tensor or _n_modes():
            return operator(first, *rest)
        return launchers.get(first.device.type, operator)(first, *rest)

    return call


_n_modes = torch._C._len_torch_dispatch_stack


def _launcher(path: str) -> Callable[..., Any]:
    module, function = path.split(":")

    @functools.cache
    def resolve() -> Callable[..., Any]:
        try:
            return getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise LongwaveError(NO_TRITON) from error
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            raise LongwaveError(
                "Numba finds no folder to keep compiled kernels in; name one: export NUMBA_CACHE_DIR=~/.numba"
            ) from error

    def launch(*args: Any) -> Any:
        return resolve()(*args)

    return launch


def _by_capability(cuda: str, hopper: str) -> Callable[..., Any]:
    portable, special = _launcher(cuda), _launcher(hopper)

    def launch(first: Tensor, *rest: Any) -> Any:
        return (special if on_hopper(first.device) else portable)(first, *rest)

    return launch


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Do the Hopper forms run there? They are written in Gluon, which changes between versions of Triton."""
    return torch.cuda.get_device_capability(device)[0] == 9 and GLUON_TESTED[0] <= _triton_version() <= GLUON_TESTED[1]


def _triton_version() -> tuple[int, ...]:
    try:
        import triton
    except ModuleNotFoundError as error:
        raise LongwaveError(NO_TRITON) from error
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def gpu_forms(device: torch.device) -> str:
    """Which forms of the operators run on a CUDA device, in words."""
    forms = ", ".join(_hopper_forms)
    if on_hopper(device):
        return f"Triton on the GPU, Gluon for {forms}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "Triton on the GPU"
    first, last = (".".join(map(str, version)) for version in GLUON_TESTED)
    return f"Triton on the GPU, {forms} too: their Hopper forms are tested with Triton {first} to {last}"


def has_gpu_kernel(op: str) -> bool:
    """Whether the operator or step is registered for CUDA devices."""
    return op in _on_cuda


def kernels_launched(op: str) -> set[tuple[str, str]]:
    """The GPU kernels of an operator that this process has launched: each one's form, Triton or Gluon, and name."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.startswith(f"longwave.ops.{op}."):
            form = "Gluon" if name.rpartition(".")[2].startswith("hopper") else "Triton"
            own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == name}
            found |= {(form, key) for key, kernel in own.items() if _is_compiled(kernel)}
    return found


def _is_compiled(kernel: Any) -> bool:
    """Triton keeps what it has compiled for each device, or read from its cache, beside the function."""
    return any(compiled for compiled, *_ in getattr(kernel, "device_caches", {}).values())


def use_kernel(op: str, impl: str, x: Tensor) -> bool:
    """True when the registered kernel is to run on `x`, False for the reference.

    Raises ValueError for an unknown `impl`. A device without kernels takes the reference and says so once; float64 on a
    GPU, whose kernels compute in float32, takes it in silence.
    """
    if impl not in ("fused", "reference"):
        raise ValueError(f"{op}: impl must be 'fused' or 'reference', got {impl!r}")
    device = x.device.type
    if impl == "reference" or device in ("cpu", "meta"):
        return impl == "fused"
    if device == "cuda" and op in _on_cuda:
        return x.dtype != torch.float64
    if not torch.compiler.is_compiling():
        _say_once(op, device)
    return False


@functools.cache
def _say_once(op: str, device: str) -> None:
    warnings.warn(
        f"longwave has no {op} kernel for {device!r} yet: the reference runs there, correct but slow",
        stacklevel=4,
    )
