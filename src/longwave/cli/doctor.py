"""`longwave doctor`: what this machine has, what longwave uses of it, and whether every kernel is right."""

import importlib
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from longwave.cli.options import make_app, print_json
from longwave.errors import LongwaveError
from longwave.ops import OPS

PACKAGES = ("longwave", "torch", "numpy", "numba", "safetensors", "tokenizers", "cyclopts", "triton", "transformers")
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "bf16")

app = make_app("doctor", ("longwave doctor", "longwave doctor --json"))


@app.default
def doctor(*, json: bool = False) -> None:
    """Print versions, processors and the forms in use; check each operator's kernel against its reference.

    Exit status 1 when a kernel is wrong.

    Parameters
    ----------
    json
        One line of JSON.
    """
    facts = machine()
    checks = {name: check(name) for name in OPS}
    wrong = [name for name, result in checks.items() if not result["ok"]]
    if json:
        print_json(facts | {"kernels": checks})
    else:
        for key, value in facts.items():
            print(f"{key:<12}{value}")
        print()
        for name, result in checks.items():
            verdict = "ok" if result["ok"] else f"WRONG: error {result['error']:.2e}, allowed {result['allowed']:.2e}"
            print(f"{name:<16}{verdict:<8}  first call {result['seconds']:.2f} s")
        for line in advice():
            print(f"\n{line}")
    if wrong:
        raise LongwaveError(f"wrong kernels: {', '.join(wrong)}; pass impl='reference' and report this machine")


def machine() -> dict[str, str]:
    """Versions, devices and instruction sets."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if _version(name))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "packages": versions,
        "cpu": f"{_cpu_name()}; {torch.get_num_threads()} threads; {', '.join(_units()) or 'no vector units known'}",
        "gpu": ", ".join(gpus) or "none",
        "kernels": "Numba on the CPU" + ("; the reference, slow, on the GPU" if gpus else ""),
    }


def check(name: str) -> dict:
    """The kernel's error on its sample inputs against float64, beside twice that of the reference in float32."""
    samples = importlib.import_module(f"longwave.ops.{name}.samples")
    inputs = samples.make(samples.SHAPES[1], torch.float32)
    started = time.perf_counter()
    kernel = _outputs(name, inputs, "fused")
    seconds = time.perf_counter() - started
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    truth = _outputs(name, double, "reference")
    same = _outputs(name, inputs, "reference")
    error = _distance(kernel, truth)
    allowed = 2 * _distance(same, truth) + torch.finfo(torch.float32).eps * sum(t.norm().item() for t in truth)
    return {"ok": error <= allowed, "error": error, "allowed": allowed, "seconds": seconds}


def advice() -> list[str]:
    """What would make this machine faster, each with the command that does it."""
    lines = []
    if not torch.cuda.is_available() and Path("/dev/nvidia0").exists():
        lines.append("There is an NVIDIA GPU but this torch cannot use it: install torch's CUDA build (pytorch.org).")
    return lines


def _outputs(name: str, inputs: dict, impl: str) -> list[torch.Tensor]:
    with torch.no_grad():
        found = OPS[name](**inputs, impl=impl)
    return [t.double() for t in (found if isinstance(found, tuple) else (found,))]


def _distance(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return sum((a - b).norm().item() for a, b in zip(found, truth, strict=True))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _units() -> list[str]:
    flags = f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split()
    return [unit for unit in UNITS if unit in flags]
