"""The CPU form."""

import torch
from torch import Tensor

from longwave.ops.ssd import reference


def forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    y, final = reference.ssd(
        x, dt, A, B, C, D, dt_bias, dt_softplus, (low, high), initial_state, reset, lengths
    )
    return y.contiguous(), final.contiguous()


def backward(
    dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len
):
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        x, dt, A, B, C, D, dt_bias, state = leaves
        out = reference.ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, (low, high), state, reset, lengths)
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], (dy, dfinal)))
    return tuple(dy.new_empty(0) if t is None else next(grads).contiguous() for t in leaves)


def step(state: Tensor, x, dt, A, B, C, D, dt_bias, dt_softplus, low, high) -> Tensor:
    x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))
    y, final = reference.ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, (low, high), state, None, None)
    state.copy_(final)
    return y[:, 0].contiguous()
