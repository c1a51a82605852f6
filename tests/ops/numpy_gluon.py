"""Gluon's kernels run by numpy, one program after the other, for machines without a GPU: Triton interprets Triton only.

What a program computes is checked, and that it reads and writes inside of its tensors; layouts are not looked at.
"""

from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch


class Array(np.ndarray):
    """A tensor of a program."""

    def to(self, dtype: Any) -> "Array":
        return self

    def permute(self, order: list[int]) -> "Array":
        return np.transpose(self, order)

    def split(self) -> tuple["Array", "Array"]:
        return self[..., 0], self[..., 1]

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)


class Scalar(int):
    """A whole number of a program."""

    def to(self, dtype: Any) -> "Scalar":
        return self


def _closed(method: Any) -> Any:
    def apply(*values: Any) -> Any:
        result = method(*values)
        return result if result is NotImplemented else Scalar(result)

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "neg"):
    setattr(Scalar, f"__{_name}__", _closed(getattr(int, f"__{_name}__")))


class Pointer:
    """Places in a tensor's memory."""

    def __init__(self, memory: np.ndarray, at: Any):
        self.memory, self.at, self.dtype = memory, at, SimpleNamespace(element_ty=None)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.at + offset)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        at, mask = np.broadcast_arrays(self.at, True if mask is None else mask)
        assert ((at[mask] >= 0) & (at[mask] < self.memory.size)).all(), "outside of the tensor"
        return at, mask


def _array(values: Any) -> Array:
    return np.asarray(values).view(Array)


def _load(pointer: Pointer, mask: Any = None, other: float = 0.0, cache_modifier: str = "") -> Any:
    at, mask = pointer.places(mask)
    values = np.full(at.shape, other, pointer.memory.dtype)
    values[mask] = pointer.memory[at[mask]]
    return _array(values) if values.ndim else Scalar(values) if values.dtype.kind == "i" else values[()]


def _store(pointer: Pointer, values: Any, mask: Any = None) -> None:
    at, mask = pointer.places(mask)
    pointer.memory[at[mask]] = np.broadcast_to(values, at.shape)[mask]


def _atomic_add(pointer: Pointer, value: int, sem: str) -> int:
    pointer.memory[pointer.at] += value
    return int(pointer.memory[pointer.at]) - value


def _where(condition: Any, one: Any, other: Any) -> Any:
    return _array(np.where(condition, one, other)) if np.ndim(condition) else one if condition else other


_program = 0
_gl = SimpleNamespace(
    float32=None, int64=None, int32=None, int1=bool, constexpr=int,
    program_id=lambda axis: Scalar(_program), num_warps=lambda: 4, thread_barrier=lambda: None,
    static_range=range, cdiv=lambda a, b: Scalar(-(-a // b)), where=_where,
    minimum=lambda a, b: Scalar(min(a, b)), maximum=lambda a, b: Scalar(max(a, b)),
    arange=lambda start, stop, layout: _array(np.arange(start, stop)),
    zeros=lambda shape, dtype, layout: _array(np.zeros(shape)),
    full=lambda shape, value, dtype, layout: _array(np.full(shape, value)),
    join=lambda a, b: _array(np.stack([a, b], -1)), sum=lambda x, axis: _array(x.sum(axis)),
    load=_load, store=_store, atomic_add=_atomic_add,
    convert_layout=lambda x, layout, assert_trivial=False: x,
    BlockedLayout=lambda *_: None, SliceLayout=lambda *_: None, DistributedLinearLayout=lambda *_: None,
)  # fmt: skip


class _Kernel:
    def __init__(self, function: FunctionType):
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, maxnreg: int = 0, **constants: Any) -> None:
            global _program
            for _program in range(grid[0]):
                self.function(*map(_argument, args), **constants)

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        storage = value.detach().untyped_storage()
        memory = torch.empty(0, dtype=value.dtype).set_(storage, 0, (storage.nbytes() // value.element_size(),))
        return Pointer(memory.numpy(), value.storage_offset())
    return Scalar(value) if isinstance(value, int) else value


def kernels(*modules: ModuleType, **replaced: Any) -> list[dict[str, _Kernel]]:
    """For each module its kernels, to be launched as Triton's are. `replaced`: device functions to put in place."""
    worlds = {module.__name__: vars(module) | {"gl": _gl} for module in modules}
    for world in worlds.values():
        for name, value in list(world.items()):
            function = getattr(value, "fn", None)
            if name in replaced:
                world[name] = replaced[name]
            elif isinstance(function, FunctionType) and function.__module__ in worlds:
                world[name] = FunctionType(function.__code__, worlds[function.__module__], name)
        world["range"] = lambda *bounds: [Scalar(k) for k in range(*bounds)]
    return [
        {name: _Kernel(value) for name, value in world.items() if name.endswith("_kernel")} for world in worlds.values()
    ]
