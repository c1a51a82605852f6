"""What importing costs and needs, each in a fresh process."""

import subprocess
import sys

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def python(code: str, blocked: tuple[str, ...] = ()) -> str:
    code = BLOCK.format(blocked=set(blocked)) + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_no_torch():
    assert python("import longwave; print('torch' in sys.modules)", ("torch", "numpy")) == "False"


def test_the_verbs_need_no_torch():
    out = python("from longwave.cli import run; print(run([]), 'torch' in sys.modules)", ("torch", "cyclopts", "numpy"))
    assert out.endswith("0 False")


def test_models_run_without_triton_and_transformers():
    code = """
import torch, longwave
from longwave.mixers.mamba2 import Mamba2
config = longwave.LanguageModel.Config(vocab_size=16, d_model=16, layers=(Mamba2.Config(d_head=8, d_state=8),))
logits, state = longwave.LanguageModel(config)(torch.zeros(1, 5, dtype=torch.long))
print(tuple(logits.shape), torch.cuda.is_initialized())
"""
    assert python(code, ("triton", "transformers", "cyclopts", "tokenizers")) == "(1, 5, 16) False"


def test_reference_runs_without_numba():
    code = """
import torch
from longwave.ops import OPS
from importlib import import_module
for name, op in OPS.items():
    samples = import_module(f"longwave.ops.{name}.samples")
    op(**samples.make(samples.SHAPES[0], torch.float32), impl="reference")
print("ok")
"""
    assert python(code, ("triton", "numba", "llvmlite")) == "ok"


def test_public_names_resolve():
    code = "import longwave; print(all(callable(getattr(longwave, name)) for name in longwave.__all__))"
    assert python(code) == "True"
    code = "import longwave.training.loop, longwave; print(callable(longwave.train))"
    assert python(code) == "True"


def test_unknown_name_says_what_there_is():
    code = "import longwave\ntry: longwave.lod\nexcept AttributeError as e: print(e)"
    assert "'lod'" in python(code)
    assert "load" in python(code)
