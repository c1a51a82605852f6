"""Memory that this process holds, and the most it held, measured."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def held(device: torch.device) -> int:
    """Bytes held now: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if _STATUS.exists() else peak(device)


def peak(device: torch.device) -> int:
    """The most bytes held since `reset_peak`, or since the process began where the system cannot reset it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Give unused memory back to the system and begin to measure the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what is freed, which would hide a peak
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    """A size of /proc/self/status, which is in kB, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
