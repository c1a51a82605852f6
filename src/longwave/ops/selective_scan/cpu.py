"""The CPU form."""

import torch
from torch import Tensor

from longwave.ops.selective_scan import reference


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    y, final = reference.selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, reset, lengths)
    b, l, e = x.shape
    chunks = -(-l // chunk_len) if chunk_len else 0
    return y.contiguous(), final.contiguous(), final.new_zeros(b, chunks, A.shape[1], e)


def backward(dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        *tensors, state = leaves
        out = reference.selective_scan(*tensors, dt_softplus, state, reset, lengths)
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], (dy, dfinal)))
    return tuple(dy.new_empty(0) if t is None else next(grads).contiguous() for t in leaves)


def step(state: Tensor, x, dt, A, B, C, D, z, dt_bias, dt_softplus) -> Tensor:
    x, dt, B, C, z = (None if t is None else t[:, None] for t in (x, dt, B, C, z))
    y, final = reference.selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, None, None)
    state.copy_(final)
    return y[:, 0].contiguous()
