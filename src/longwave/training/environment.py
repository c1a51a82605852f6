"""Where a run took place and how to repeat it."""

import importlib.metadata
import itertools
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
    """The command that started this process, without --resume."""
    program, *words = sys.argv
    kept = [
        word
        for previous, word in itertools.pairwise(["", *words])
        if "--resume" not in (previous, word) and not word.startswith("--resume=")
    ]
    return shlex.join(["longwave", *kept] if _is_longwave(program) else ["python", program, *kept])


def how_to_resume() -> str:
    """The command, or for a program of the user's own the setting, that goes on with this run."""
    return f"{command()} --resume auto" if _is_longwave(sys.argv[0]) else 'the same configuration and resume="auto"'


def _is_longwave(program: str) -> bool:
    return Path(program).stem == "longwave" or Path(program).parts[-2:] == ("longwave", "__main__.py")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
