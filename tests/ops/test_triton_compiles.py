"""The Triton kernels compiled for a GPU where there is none: the interpreter lets pass what a compiler does not."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from test_ops import STATEFUL, cast, inputs, one_token, outputs, samples, tensors

AMPERE = 80
NAMES = ["causal_conv1d", "diagonal_scan", "gated_rms_norm", "mamba3_scan", "selective_scan", "ssd"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_compiles_for_ampere(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__, *NAMES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(int(launches) >= 2 for launches in done.stdout.split())  # forward and backward, at least


class NoGPU:
    """What Triton asks its driver before it launches, for a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", AMPERE, warp_size=32)


def compile_kernels(name: str) -> int:
    """Call an operator in float32, forward and backward, and its step; the number of kernels that it would launch."""
    before = len(LAUNCHES)
    module, api = (importlib.import_module(f"longwave.ops.{name}.{part}") for part in ("triton", "api"))
    for launcher in ("forward", "backward", "step"):
        if hasattr(module, launcher):
            setattr(api, f"_{launcher}", getattr(module, launcher))
    shapes = samples(name).SHAPES
    i = max(range(len(shapes)), key=lambda i: sum(value is True for value in shapes[i].values()))  # most options
    context = ("state", "reset", "lengths") if (name, i) in STATEFUL else ()
    kwargs = cast(inputs(name, i, **dict.fromkeys(context, True)), torch.float32)
    out = outputs(name, kwargs, "fused")
    torch.autograd.grad(
        out, [t for t in tensors(kwargs).values() if t.requires_grad], [torch.ones_like(o) for o in out]
    )
    if context:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("reset", "lengths")}
        token, state = one_token(cast(kwargs, torch.float32, grad=False))
        getattr(importlib.import_module(f"longwave.ops.{name}"), f"{name}_step")(state, **token)
    return len(LAUNCHES) - before


LAUNCHES = []

if __name__ == "__main__":
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        LAUNCHES.append(launch(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(NoGPU())  # pyright: ignore[reportArgumentType]
    JITFunction.run = only_compile
    print(*map(compile_kernels, sys.argv[1:]))
