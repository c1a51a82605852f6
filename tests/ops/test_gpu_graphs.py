"""On a CUDA device: one-token steps as CUDA graphs, operators as one graph of torch.compile. Run with `-m gpu`."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import cast, flattened, inputs, moved, one_token, outputs, replaced, tensors
from torch import Tensor

from longwave import LanguageModel
from longwave.mixers import Mamba, Mamba2, Mamba3
from longwave.ops import OPS
from longwave.ops.fft_conv import fft_conv_step
from longwave.ops.linear_step import linear_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # in torch.compile itself
]
STEPS = ("causal_conv1d", "diagonal_scan", "mamba3_scan", "selective_scan", "ssd")


def step_of(name: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(f"longwave.ops.{name}.api"), f"{name}_step")


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` as a CUDA graph, after it has run on another stream, as torch's documentation wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def check_replays(step: Callable[..., Tensor], state: dict[str, Tensor], token: dict[str, Any]) -> None:
    """`step(state, token)` as a graph gives what it gives by itself, whatever token and state it was made with."""
    with torch.no_grad():
        expected_state = {k: v.clone() for k, v in state.items()}
        replay = captured(lambda: step(state, token))
        g = torch.Generator("cuda").manual_seed(3)
        for k, v in expected_state.items():
            state[k].copy_(v)
        for _ in range(3):
            for v in tensors(token).values():
                v.mul_(1.0 + 0.1 * torch.rand(v.shape, generator=g, device="cuda", dtype=v.dtype))
            y = replay()
            expected = step(expected_state, token)
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            for k, v in expected_state.items():
                torch.testing.assert_close(state[k], v, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_steps_in_a_graph(name, dtype):
    token, state = one_token(moved(inputs(name, 1, dtype, state=True), "cuda"))

    def call(held: dict[str, Tensor], token: dict[str, Any]) -> Tensor:
        return step_of(name)(replaced({"state": state}, held)["state"], **token)

    check_replays(call, tensors({"state": state}), token)


def test_projection_in_a_graph():
    g = torch.Generator("cuda").manual_seed(0)
    token = {k: torch.randn(*s, generator=g, device="cuda") for k, s in (("x", (2, 8)), ("weight", (5, 8)))}
    check_replays(lambda state, token: linear_step(**token), {}, token)


def test_long_convolution_step_in_a_graph():
    g = torch.Generator("cuda").manual_seed(0)
    shapes = {"x": (2, 8), "kernel": (8, 100), "D": (8,)}
    token = {k: torch.randn(*shape, generator=g, device="cuda") for k, shape in shapes.items()}
    state = {"state": torch.randn(2, 99, 8, generator=g, device="cuda")}
    check_replays(lambda state, token: fft_conv_step(state["state"], **token), state, token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        Mamba.Config(d_state=8),
        Mamba2.Config(d_state=16, d_head=16),
        Mamba3.Config(d_state=16, d_head=16),
        Mamba3.Config(d_state=16, d_head=16, mimo_rank=2, norm=True),
    ],
    ids=["mamba", "mamba2", "mamba3", "mamba3-mimo"],
)
def test_decoding_step_of_a_model_in_a_graph(layer, dtype):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModel.Config(vocab_size=50, d_model=32, layers=(layer,) * 2)).to("cuda", dtype)
    model.requires_grad_(False)
    tokens = torch.randint(50, (3, 6), device="cuda")
    _, prompt = model(tokens)
    captured_with = prompt.clone()
    token = tokens[:, 0].clone()
    replay = captured(lambda: model.step(token, captured_with))
    state = captured_with.clone()  # what the warm-up has made of it
    for i in range(3):
        token.copy_(tokens[:, i])
        logits = replay().clone()
        torch.testing.assert_close(logits, model.step(token, state), rtol=0, atol=0)
    for ours, theirs in zip(flattened(captured_with[:2]), flattened(state[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (state.position == 10).all()


@pytest.mark.parametrize("name", OPS)
def test_compiled_as_one_graph(name):
    kwargs = moved(cast(inputs(name, 1), torch.float32), "cuda")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def compiled(**kwargs):
        return outputs(name, kwargs, "fused")

    found, eager = compiled(**kwargs), outputs(name, kwargs, "fused")
    for ours, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    leaves = list(tensors(kwargs).values())
    grads = [torch.autograd.grad(torch.stack([o.square().sum() for o in out]).sum(), leaves) for out in (found, eager)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_steps_compiled_as_one_graph(name):
    token, state = one_token(moved(inputs(name, 1, state=True), "cuda"))
    step = step_of(name)
    torch._dynamo.reset()
    copies = [
        replaced({"state": state}, {k: v.clone() for k, v in tensors({"state": state}).items()}) for _ in range(2)
    ]
    with torch.no_grad():
        ours = torch.compile(step, fullgraph=True)(copies[0]["state"], **token)
        torch.testing.assert_close(ours, step(copies[1]["state"], **token), rtol=1e-6, atol=1e-6)
    for a, b in zip(flattened(copies[0]["state"]), flattened(copies[1]["state"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
