"""The machine and the versions that figures belong to."""

import subprocess
from importlib import metadata
from pathlib import Path

import torch

import longwave
from longwave.ops.register import gpu_forms
from longwave.training.environment import environment

PACKAGES = ("triton", "transformers", "mambapy", "llama-cpp-python", "mamba-ssm", "causal-conv1d", "fla-core")


def machine(device: torch.device) -> dict[str, str]:
    """Processor, threads, system, device, versions, and the commit if longwave runs from a git checkout."""
    facts = environment(device)
    if device.type == "cuda":
        facts |= {"cuda": str(torch.version.cuda), "forms": gpu_forms(device)}
    facts |= {name: version for name in PACKAGES if (version := _version(name))}
    commit = _commit(Path(longwave.__file__).parent)
    return facts | ({"commit": commit} if commit else {})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The checked-out commit, with "-dirty" after changes; None unless git tracks the files in `folder`."""
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
