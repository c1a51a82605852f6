"""`longwave doctor`: what this machine has, what longwave uses of it, and whether every kernel is right."""

import importlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from longwave.cli.kernel_check import Check, check_kernels
from longwave.cli.options import make_app, print_json
from longwave.errors import LongwaveError
from longwave.ops.openmp import threads_in_use
from longwave.ops.register import gpu_forms
from longwave.tasks.packing import cache_folder
from longwave.training.environment import environment

PACKAGES = ("torch", "numpy", "numba", "safetensors", "tokenizers", "cyclopts", "triton", "transformers")
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "bf16")
FEW_GB = 5.0
IMPORTS = """
from time import perf_counter as now
started = now()
import torch
after_torch = now()
import longwave
for name in longwave.__all__:
    getattr(longwave, name)
print(f"torch {after_torch - started:.1f} s, longwave {now() - after_torch:.1f} s more")
"""

app = make_app("doctor", ("longwave doctor", "longwave doctor --json"))


@app.default
def doctor(*, json: bool = False) -> None:
    """Print versions, processors and the forms in use; check each operator's kernel against its reference.

    On a GPU, with its gradients, and each row names the form that ran there: Gluon, Triton, or torch's own functions.
    Exit status 1 when a kernel is wrong.

    Parameters
    ----------
    json
        One line of JSON.
    """
    facts = machine()
    if not json:
        print("\n".join(f"{key:<12}{value}" for key, value in facts.items()) + "\n", flush=True)
    checks = {}
    for where in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        checks[where] = []
        for check in check_kernels(torch.device(where)):
            checks[where].append(check)
            if not json:
                print(_row(check), flush=True)
    hints = advice()
    if json:
        found = {where: {c.name: vars(c) | {"ok": c.ok} for c in those} for where, those in checks.items()}
        print_json(facts | {"kernels": found["cpu"], "gpu_kernels": found.get("cuda", {}), "advice": hints})
    else:
        print("".join(f"\n{hint}" for hint in hints), end="\n" if hints else "")
    if wrong := [f"{check.name} in {check.form}" for those in checks.values() for check in those if not check.ok]:
        raise LongwaveError(f"wrong kernels: {', '.join(wrong)}; pass impl='reference' and report this machine")


def machine() -> dict[str, str]:
    """Versions, devices and instruction sets, and where things are kept."""
    about = environment(torch.device("cpu"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cache = cache_folder(None)
    return {
        "python": f"{about['python']} on {about['system']}",
        "packages": ", ".join([f"longwave {about['longwave']}", *filter(None, map(_version, PACKAGES))]),
        "import": subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True).stdout.strip(),
        "cpu": f"{about['processor']}; {about['threads']}; {', '.join(_units()) or 'no vector units known'}",
        "gpu": ", ".join(gpus) or "none",
        "forms": "Numba on the CPU" + (f"; {gpu_forms(torch.device('cuda', 0))}" if gpus else ""),
        "threads": f"{torch.get_num_threads()}, {threads_in_use()}",
        "compiled": f"kept in {_numba_cache() or 'nowhere, so they cannot run'}",
        "text cache": f"{cache}, {_free_gb(cache):.1f} GB free",
    }


def advice() -> list[str]:
    """What would make this machine better, each with the command that does it."""
    lines = []
    if not torch.cuda.is_available() and Path("/dev/nvidia0").exists():
        lines.append("There is an NVIDIA GPU that this torch cannot use: pip install --force-reinstall torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" in os.environ and torch.get_num_threads() < cores:
        lines.append(f"{torch.get_num_threads()} threads for {cores} cores: unset OMP_NUM_THREADS")
    if _free_gb(cache_folder(None)) < FEW_GB:
        lines.append("Little room for tokenised text: export LONGWAVE_CACHE=/a/folder/with/room")
    return lines


def _row(check: Check) -> str:
    verdict = "ok" if check.ok else f"WRONG: {check.worst}: error {check.error:.2e}, allowed {check.allowed:.2e}"
    return f"{check.name:<21}{check.form:<18}{verdict:<6}first call {check.seconds:.2f} s"


def _numba_cache() -> str | None:
    """Where Numba keeps compiled kernels; None if there is no folder that it may write to: then it refuses to work."""
    try:
        kernels = vars(importlib.import_module("longwave.ops.causal_conv1d.cpu")).values()
    except RuntimeError:
        return None
    return next((str(kernel.stats.cache_path) for kernel in kernels if hasattr(kernel, "stats")), None)


def _free_gb(folder: Path) -> float:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free / 1e9


def _version(package: str) -> str | None:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return None


def _units() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [unit for unit in UNITS if unit in flags]
