"""The Triton kernels under Triton's interpreter, on the CPU: the contract of test_ops.py, on small shapes.

bfloat16 is left to a GPU (`-m gpu`): the interpreter's products of it are wrong.
"""

import importlib
import importlib.util

import pytest
import torch
from test_ops import CASES, STATEFUL, cast, flattened, inputs, one_token, samples, tensors, within_budget

from longwave.ops import OPS

if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("needs Triton, and no GPU: there test_gpu.py runs the kernels themselves", allow_module_level=True)

torch.set_num_threads(1)


HAVE = {name for name in OPS if importlib.util.find_spec(f"longwave.ops.{name}.triton") is not None}
CASES = [case for case in CASES if case[0] in HAVE]


@pytest.fixture
def interpreted(monkeypatch):
    """Send an operator's calls to its Triton launchers."""

    def use(name):
        module, api = (importlib.import_module(f"longwave.ops.{name}.{part}") for part in ("triton", "api"))
        for launcher in ("forward", "backward", "step"):
            if hasattr(module, launcher):
                monkeypatch.setattr(api, f"_{launcher}", getattr(module, launcher))
        return module

    return use


def check(name, i, dtype, context):
    within_budget(name, inputs(name, i, dtype, **dict.fromkeys(context, True)), dtype)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_error_budget_with_state_reset_and_lengths(interpreted, name, i):
    interpreted(name)
    check(name, i, torch.float32, ("state", "reset", "lengths") if (name, i) in STATEFUL else ())


@pytest.mark.parametrize("name", sorted(HAVE))
def test_error_budget_in_float16(interpreted, name):
    interpreted(name)
    check(name, 0, torch.float16, ())
    check(name, 3, torch.float16, ())


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("ssd", {"_SEGMENT_CHUNKS": 1, "_SEGMENTS": 2}),
        ("mamba3_scan", {"_SEGMENT_CHUNKS": 1, "_SEGMENTS": 2, "processors_of": lambda x: 16}),
        ("selective_scan", {"_SEGMENT": 16}),
    ],
)
def test_segments_of_l_make_no_difference(interpreted, monkeypatch, name, knobs):
    """Few rows and heads: l is cut, and the pieces' states are passed on, in both directions."""
    module = interpreted(name)
    for knob, value in knobs.items():
        monkeypatch.setattr(module, knob, value)
    directions, pass_states = [], module.pass_states
    monkeypatch.setattr(
        module,
        "pass_states",
        lambda *given, reverse: directions.append(reverse) or pass_states(*given, reverse=reverse),
    )
    i = max(range(len(samples(name).SHAPES)), key=lambda i: samples(name).SHAPES[i]["l"])
    check(name, i, torch.float32, ("state", "reset", "lengths"))
    assert set(directions) == {True, False}


@pytest.mark.parametrize("name", sorted({name for name, _ in STATEFUL} & HAVE))
def test_padding_cannot_leak(interpreted, name):
    interpreted(name)
    kwargs = cast(inputs(name, 1, lengths=True, reset=True), torch.float32)
    b, l = next(iter(kwargs.values())).shape[:2]
    padding = torch.arange(l) >= kwargs["lengths"][:, None]
    poisoned = dict(kwargs)
    for key, value in tensors(kwargs).items():
        if value.shape[:2] == (b, l):
            mask = padding.view(b, l, *[1] * (value.ndim - 2))
            poisoned[key] = torch.where(mask, torch.nan, value.detach()).requires_grad_()
    y, final = OPS[name](**poisoned)
    expected_y, expected_final = OPS[name](**kwargs)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(final, expected_final, rtol=0, atol=0)
    assert (y[padding] == 0).all()
    torch.stack([out.sum() for out in flattened((y, final))]).sum().backward()
    for value in poisoned.values():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            assert torch.isfinite(value.grad).all()


@pytest.mark.parametrize(
    "name", sorted(HAVE & {"ssd", "mamba3_scan", "selective_scan", "causal_conv1d", "diagonal_scan"})
)
def test_step(interpreted, name):
    """A step equals the reference on one token, and updates the state in place."""
    module = interpreted(name)
    kwargs = inputs(name, 1, torch.float32, state=True)
    b, l = next(iter(kwargs.values())).shape[:2]
    first = {k: v[:, :1] if isinstance(v, torch.Tensor) and v.shape[:2] == (b, l) else v for k, v in kwargs.items()}
    y, final = OPS[name](**first, impl="reference")
    token, state = one_token(kwargs)
    api = importlib.import_module(f"longwave.ops.{name}.api")
    assert hasattr(module, "step")
    stepped = getattr(api, f"{name}_step")(state, **token)
    torch.testing.assert_close(stepped, y[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-6)
