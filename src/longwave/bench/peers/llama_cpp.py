"""llama.cpp, through llama-cpp-python's C interface: no tokenizer and no sampler in the way."""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from torch import Tensor

from longwave.bench.peers import PeerMissing, Place
from longwave.bench.peers.gguf_file import write_gguf
from longwave.errors import LongwaveError

_BATCH = 2048  # tokens given to one call


def open_peer(folder: Path, precision: str, place: Place) -> "LlamaCpp":
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.gguf"
        write_gguf(folder, path, precision)
        if precision == "q8_0":
            _try_in_another_process(path, place.n_threads)
        return LlamaCpp(path, place.n_threads)


class LlamaCpp:
    """A GGUF model with one sequence. `n_threads` for both prefill and decode; logits for the last token alone."""

    def __init__(self, path: Path, n_threads: int):
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        model_options = llama_cpp.llama_model_default_params()
        model_options.use_mmap = False
        model_options.n_gpu_layers = 0
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), model_options)
        if not self._model:
            raise LongwaveError(f"llama.cpp could not load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 0, _BATCH, 512
        options.n_threads = options.n_threads_batch = n_threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise LongwaveError(f"llama.cpp could not make room to run {path}")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        vocabulary: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def prefill(self, tokens: list[int]) -> Tensor:
        llama_cpp.llama_memory_clear(self._memory, True)
        return self._feed(tokens)

    begin = prefill

    def step(self, token: int) -> Tensor:
        return self._feed([token])

    def _feed(self, tokens: list[int]) -> Tensor:
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            array = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(part)))
            if status:
                raise LongwaveError(f"llama.cpp could not decode {len(part)} tokens: status {status}")
        logits: Any = llama_cpp.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self._vocab_size,)).copy())

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


@llama_cpp.llama_log_callback
def _silent(level, text, data):
    pass


def _try_in_another_process(path: Path, n_threads: int) -> None:
    """Some builds crash on quantised models, which would take the whole benchmark with them."""
    code = (
        "import sys; from pathlib import Path; from longwave.bench.peers.llama_cpp import LlamaCpp;"
        "peer = LlamaCpp(Path(sys.argv[1]), int(sys.argv[2])); peer.prefill([1] * 64); peer.step(1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(n_threads)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise PeerMissing(f"it ends with status {done.returncode} in a trial run{': ' + said[-1] if said else ''}")
