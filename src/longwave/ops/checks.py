"""Argument checks shared by the operators. Errors name the operator, the argument, what it got and what it needs."""

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], axes: str) -> None:
    """Raise ValueError unless `tensor` is None or has `shape`; `axes` is the shape in letters, such as '(b, l, e)'."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{op}: {name} must be {axes} = {shape}, got {tuple(tensor.shape)}")


def check_documents(op: str, reset: Tensor | None, lengths: Tensor | None, b: int, l: int) -> None:
    """Check `reset` (b, l) bool and `lengths` (b,) int64. Values of lengths are the caller's promise (0..l)."""
    check_shape(op, "reset", reset, (b, l), "(b, l)")
    check_shape(op, "lengths", lengths, (b,), "(b,)")
    if reset is not None and reset.dtype != torch.bool:
        raise TypeError(f"{op}: reset must be bool, got {reset.dtype}; pass reset.bool()")
    if lengths is not None and lengths.dtype != torch.int64:
        raise TypeError(f"{op}: lengths must be int64, got {lengths.dtype}; pass lengths.long()")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and accumulation: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, for the few numbers in which rounding would grow with the length; float32 on mps, which has no more."""
    return torch.float32 if device.type == "mps" else torch.float64
