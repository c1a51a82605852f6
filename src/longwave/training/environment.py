"""Where a run took place and how to repeat it."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from longwave import __version__


def environment(device: torch.device) -> dict[str, str]:
    """Versions, system and hardware, as shown in the report."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "numba")}
    return {
        "longwave": __version__,
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def command() -> str:
    """The command that started this process, without --resume, for the report and for the advice after Ctrl-C."""
    arguments = sys.argv[1:]
    kept = [
        word
        for previous, word in zip(["", *arguments], arguments, strict=False)
        if previous != "--resume" and word != "--resume" and not word.startswith("--resume=")
    ]
    program = Path(sys.argv[0])
    is_own = program.stem == "longwave" or program.parent.name in ("longwave", "cli")
    return shlex.join(["longwave", *kept] if is_own else ["python", sys.argv[0], *kept])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
