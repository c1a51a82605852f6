"""Both directions: against flipping by hand, document by document, for every mixer."""

import copy
import json

import pytest
import torch
from mixer_cases import CASES, D, build
from torch.testing import assert_close

from longwave.config import from_dict, to_dict
from longwave.errors import UsageError
from longwave.mixers import ENCODERS, MIXERS, Attention, Bidirectional, Mamba2, SwiGLU
from longwave.mixers.base import takes_dt
from longwave.mixers.documents import mirror

torch.set_num_threads(1)
L = 9
LENGTHS = torch.tensor([L, 0, 1, 6])
SMALL = Mamba2.Config(d_state=4, d_head=8)


def both_ways(case: str, **options) -> Bidirectional:
    kind, settings = CASES[case]
    layer = Bidirectional(D, Bidirectional.Config(mixer=MIXERS[kind].Config(**settings), **options)).double()
    layer.fwd, layer.rev = build(case), build(case)
    return layer


def by_hand(layer: Bidirectional, x: torch.Tensor) -> torch.Tensor:
    """One document (l, d)."""
    ahead, back = layer.fwd(x[None])[0][0], layer.rev(x.flip(0)[None])[0][0].flip(0)
    return ahead + back if layer.merge is None else layer.merge(torch.cat([ahead, back], -1))


@pytest.mark.parametrize("case", [case for case in CASES if case in MIXERS])
@pytest.mark.parametrize("combine", ["sum", "concat"])
@torch.no_grad()
def test_padded_and_packed_documents_are_turned_one_by_one(case, combine):
    layer, x = both_ways(case, combine=combine), torch.randn(4, L, D, dtype=torch.float64)
    assert_close(layer(x)[2], by_hand(layer, x[2]))
    for i, n in enumerate(LENGTHS):
        x[i, n:] = torch.nan
    reset = torch.zeros(4, L, dtype=torch.bool)
    reset[0, [2, 7]] = reset[3, [0, 3, 8]] = reset[1, 4] = True
    y = layer(x, reset=reset, lengths=LENGTHS)
    assert y.isfinite().all()
    for row, begin, end in ((0, 0, 2), (0, 2, 7), (0, 7, 9), (2, 0, 1), (3, 0, 3), (3, 3, 6)):
        assert_close(y[row, begin:end], by_hand(layer, x[row, begin:end]))
    padded = layer(x, lengths=LENGTHS)
    for row in (0, 2, 3):
        assert_close(padded[row, : LENGTHS[row]], by_hand(layer, x[row, : LENGTHS[row]]))


def test_nothing_flows_from_padding_or_into_it():
    layer, x = both_ways("mamba2"), torch.randn(4, L, D, dtype=torch.float64)
    x[3, 6:] = torch.inf
    x.requires_grad_()
    y = layer(x, lengths=LENGTHS)
    y[3, :6].square().sum().backward()
    assert x.grad is not None
    assert x.grad[3, :6].all()
    assert not x.grad[3, 6:].any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_mirror_of_documents():
    reset = torch.tensor([[False, False, True, False, False, True], [False, True, False, False, False, False]])
    places = mirror(2, 6, reset, torch.tensor([6, 4]), reset.device)
    assert places.tolist() == [[1, 0, 4, 3, 2, 5], [0, 3, 2, 1, 4, 5]]
    assert mirror(1, 3, None, None, reset.device).tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("case", [case for case in CASES if case in MIXERS and takes_dt(MIXERS[case])])
@torch.no_grad()
def test_a_token_lasts_as_long_in_both_directions(case):
    layer, x = both_ways(case), torch.randn(2, L, D, dtype=torch.float64)
    dt = torch.rand(2, L, dtype=torch.float64) + 0.5
    assert takes_dt(layer)
    y = layer(x, lengths=torch.tensor([L, 5]), dt=dt)
    alone = x[1:, :5]
    ahead = layer.fwd(alone, dt=dt[1:, :5])[0]
    back = layer.rev(alone.flip(1), dt=dt[1:, :5].flip(1))[0].flip(1)
    assert_close(y[1:, :5], ahead + back)
    assert_close(layer(x, dt=dt)[:1], y[:1])
    assert not torch.allclose(layer(x, dt=0.5), layer(x))


def test_every_token_sees_all_of_its_document_and_none_else():
    layer, x = both_ways("mamba2"), torch.randn(1, L, D, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(1, L, dtype=torch.bool)
    reset[0, 4] = True
    layer(x, reset=reset)[0, 6].sum().backward()
    assert x.grad is not None
    assert x.grad[0, 4:].abs().sum(1).all()
    assert not x.grad[0, :4].any()


def test_compiles_whole():
    torch._dynamo.reset()
    layer, x = Bidirectional(D, Bidirectional.Config(mixer=SMALL)), torch.randn(4, L, D)
    given = {"reset": torch.rand(4, L) < 0.3, "lengths": LENGTHS}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, **given), layer(x, **given))


def test_tied_directions_share_their_projections():
    untied, tied = (Bidirectional(D, Bidirectional.Config(mixer=SMALL, tied=tied)) for tied in (False, True))

    def count(layer):
        return sum(parameter.numel() for parameter in layer.parameters())

    shared = tied.fwd.in_proj.weight.numel() + tied.fwd.out_proj.weight.numel()
    assert count(untied) - count(tied) == shared
    assert tied.rev.A_log is not tied.fwd.A_log
    with torch.device("meta"):
        layer = Bidirectional(D, Bidirectional.Config(mixer=SMALL, tied=True))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert copy.deepcopy(layer).rev.in_proj.weight is not layer.fwd.in_proj.weight
    assert layer.rev.in_proj.weight is layer.fwd.in_proj.weight
    assert layer(torch.randn(1, L, D)).isfinite().all()
    with pytest.raises(UsageError, match="tied=True shares in_proj and out_proj, and attention has neither"):
        Bidirectional(D, Bidirectional.Config(mixer=Attention.Config(n_heads=2), tied=True))


def test_costs():
    layer = Bidirectional(D, Bidirectional.Config(mixer=SMALL, combine="concat"))
    assert layer.flops(7) == 2 * layer.fwd.flops(7) + 7 * 2 * 2 * D * D
    assert layer.state_bytes(100) == 0


def test_there_is_no_state():
    layer = Bidirectional(D, Bidirectional.Config(mixer=SMALL))
    for ask in (lambda: layer.init_state(2), lambda: layer.step(torch.zeros(2, D), None)):
        with pytest.raises(UsageError, match="reads each sequence whole"):
            ask()


def test_configuration():
    config = Bidirectional.Config(mixer=SMALL, combine="concat", tied=True)
    kinds = {kind: layer.Config for kind, layer in (MIXERS | ENCODERS).items()}
    assert from_dict(Bidirectional.Config, json.loads(json.dumps(to_dict(config))), kinds) == config
    for mixer in (SwiGLU.Config(), Bidirectional.Config(), "mamba2", Mamba2.Config):
        with pytest.raises(UsageError, match="no mixer's configuration"):
            Bidirectional.Config(mixer=mixer)
    with pytest.raises(UsageError, match="combine must be 'sum' or 'concat', got 'product'"):
        Bidirectional.Config(combine="product")  # pyright: ignore[reportArgumentType]
