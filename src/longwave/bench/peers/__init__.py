"""The libraries that the benchmarks run, longwave among them: one module each, behind one small protocol.

In the model benchmark every one reads the same checkpoint, a folder of transformers' `mamba` or `mamba2`.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Peer(Protocol):
    """A model of one library in one precision, one sequence at a time. Logits are (v,) float32, on the CPU."""

    def prefill(self, tokens: list[int]) -> Tensor:
        """The logits after `tokens`, a fresh sequence, by the library's fastest way to take them in."""
        ...

    def begin(self, tokens: list[int]) -> Tensor:
        """As `prefill`, and `step` goes on from here."""
        ...

    def step(self, token: int) -> Tensor:
        """The logits after one token more."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Trainable(Protocol):
    """A model that a peer can train."""

    def train_step(self, tokens: Tensor, targets: Tensor) -> float:
        """Forward and backward of the mean cross entropy of (b, l), which it returns. Gradients stay until the next
        call.
        """
        ...

    def update(self) -> None:
        """Clip the gradients and let AdamW change the weights: the same functions for all."""
        ...

    def gradient_norm(self) -> float:
        """Of all gradients together, after `train_step`."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Place(NamedTuple):
    """Where a model is to run."""

    device: torch.device
    n_threads: int


class Source(NamedTuple):
    """Where a peer comes from: `module` has `open_peer(folder, precision, place)`, and `open_trainable` likewise.

    `formats` are those that it runs, `inference` and `training` the precisions that are timed, on `devices`. One
    without formats has operators only.
    """

    module: str
    install: str
    formats: tuple[str, ...] = ()
    inference: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)


class PeerMissing(Exception):
    """A peer cannot run here; the text says why, and how to get it."""


AUTOCAST = "bfloat16 autocast"
OURS = "longwave"
SOURCES = {
    OURS: Source("ours", "", ("mamba", "mamba2"), ("float32", "bfloat16"), ("float32", AUTOCAST), ("cpu", "cuda")),
    "transformers": Source(
        "transformers",
        "pip install transformers",
        ("mamba", "mamba2"),
        ("float32", "bfloat16"),
        ("float32", AUTOCAST),
    ),
    "mambapy": Source("mambapy", "pip install mambapy", ("mamba",), ("float32",), ("float32",)),
    "llama.cpp": Source("llama_cpp", "pip install llama-cpp-python gguf", ("mamba", "mamba2"), ("f32", "bf16", "q8_0")),
    "mamba_ssm": Source(
        "mamba_ssm",
        "pip install mamba-ssm causal-conv1d",
        ("mamba", "mamba2"),
        training=(AUTOCAST,),
        devices=("cuda",),
    ),
    "causal_conv1d": Source("causal_conv1d", "pip install causal-conv1d"),
    "fla": Source("fla", "pip install fla-core"),
}


def peers_on(device: torch.device) -> tuple[str, ...]:
    """The sources beside longwave that have models for a device."""
    return tuple(name for name, source in SOURCES.items() if source.formats and device.type in source.devices)[1:]


def open_peer(source: str, folder: Path, format: str, precision: str, place: Place) -> Peer:
    """The peer for inference. Raises PeerMissing where it is not installed or cannot run the model."""
    return _module_for(source, format, place).open_peer(folder, precision, place)


def open_trainable(source: str, folder: Path, format: str, precision: str, place: Place) -> Trainable:
    """The peer for training. Raises PeerMissing where it is not installed or cannot run the model."""
    return _module_for(source, format, place).open_trainable(folder, precision, place)


def peer_module(source: str) -> ModuleType:
    """The module of a peer. Raises PeerMissing, with the line that installs it, where it is not installed."""
    module, install, *_ = SOURCES[source]
    try:
        return importlib.import_module(f"longwave.bench.peers.{module}")
    except (ImportError, OSError, RuntimeError) as error:  # a shared library that does not load raises the latter two
        raise PeerMissing(f"{install}   ({' '.join(str(error).split())})") from error


def _module_for(source: str, format: str, place: Place) -> ModuleType:
    if format not in SOURCES[source].formats or place.device.type not in SOURCES[source].devices:
        raise PeerMissing(f"its {format} does not run on {place.device.type}")
    return peer_module(source)
