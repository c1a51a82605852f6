"""SSM: the call of nn.GRU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from longwave.errors import LongwaveError, UsageError
from longwave.mixers import MIXERS, S4D, Attention, Bidirectional, Mamba2, SwiGLU
from longwave.models.ssm import SSM
from longwave.models.state import State

BUDGET = {"atol": 2e-5, "rtol": 2e-5}
MAMBA2 = Mamba2.Config(d_state=8, d_head=16)


@pytest.fixture
def x():
    return torch.randn(3, 11, 5)


def ssm(**options):
    return SSM(5, 64, 2, **{"batch_first": True, "mixer": MAMBA2} | options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(3, 11, 5), (11, 5)])
def test_shapes_are_those_of_gru(batch_first, shape):
    gru = nn.GRU(5, 64, 2, batch_first=batch_first)
    x = torch.randn(shape)
    y, state = ssm(batch_first=batch_first)(x)
    assert y.shape == gru(x)[0].shape
    rows = 1 if len(shape) == 2 else shape[0 if batch_first else 1]
    length = shape[0] if len(shape) == 2 else shape[1 if batch_first else 0]
    assert state.position.tolist() == [length] * rows


@torch.no_grad()
def test_layouts_agree(x):
    first = ssm()
    second = copy.deepcopy(first)
    second.batch_first = False
    reset = torch.rand(3, 11) < 0.2
    lengths = torch.tensor([11, 4, 7])
    y, state = first(x, reset=reset, lengths=lengths)
    for _ in range(2):
        other, _ = second(x.transpose(0, 1), reset=reset.T, lengths=lengths)
        assert_close(other.transpose(0, 1), y)
    for row in range(3):
        n = int(lengths[row])
        alone, end = first(x[row, :n], reset=reset[row, :n])
        assert_close(alone, y[row, :n], **BUDGET)
        follow = first(x[row], state.index_select([row]))[0]
        assert_close(follow, first(x[row], end)[0], **BUDGET)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_whole_is_pieces_is_steps(x, mixer):
    model = ssm(mixer=mixer).eval()
    whole, _ = model(x)
    first, state = model(x[:, :4])
    rest, _ = model(x[:, 4:], state)
    assert_close(torch.cat([first, rest], dim=1), whole, **BUDGET)
    state = model.init_state(3, length=11)
    stepped = [model.step(x[:, t], state) for t in range(11)]
    assert_close(torch.stack(stepped, dim=1), whole, **BUDGET)
    assert state.nbytes == 3 * model.state_bytes(11)


def test_gradients_reach_back_through_the_state(x):
    model = ssm().double()
    x = x.double()
    whole = torch.autograd.grad(model(x)[0][:, 6:].sum(), model.in_proj.weight)[0]
    _, state = model(x[:, :6])
    assert_close(torch.autograd.grad(model(x[:, 6:], state)[0].sum(), model.in_proj.weight)[0], whole)


def test_lengths_in_place_of_a_packed_sequence(x):
    model = ssm()
    packed = pack_padded_sequence(x, torch.tensor([4, 11, 7]), batch_first=True, enforce_sorted=False)
    with pytest.raises(UsageError, match="pad_packed_sequence"):
        model(packed)
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    y, state = model(padded, lengths=lengths)
    assert state.position.tolist() == [4, 11, 7]
    assert_close(y[0, :4], model(x[0, :4])[0], **BUDGET)


def test_dropout_falls_between_layers_alone(x):
    model = ssm(dropout=1.0)
    seen = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y, _ = model(x)
    assert seen[0].count_nonzero() == seen[0].numel()
    assert seen[1].count_nonzero() == 0
    assert model.eval()(x)[0].count_nonzero() > 0
    assert y.shape == (3, 11, 64)
    one = SSM(5, 64, dropout=1.0, batch_first=True, mixer=MAMBA2)
    assert torch.equal(one(x)[0], one.eval()(x)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_bidirectional(x, batch_first):
    """Both directions in one residual stream, layer by layer; y keeps the width of one."""
    model = ssm(bidirectional=True, batch_first=batch_first).double()
    x, lengths, reset = x.double(), torch.tensor([11, 4, 0]), torch.zeros(3, 11, dtype=torch.bool)
    reset[0, 5] = True
    x[1, 4:], x[2] = torch.nan, torch.inf
    given = (x, reset) if batch_first else (x.transpose(0, 1), reset.T)
    y, state = model(given[0], reset=given[1], lengths=lengths)
    y = y if batch_first else y.transpose(0, 1)
    assert y.shape == (3, 11, 64)
    assert y.isfinite().all()

    def by_hand(document):
        stream = model.in_proj(document)[None]
        for block in model.layers:
            u = block.norm(stream)
            stream = stream + block.mixer.fwd(u)[0] + block.mixer.rev(u.flip(1))[0].flip(1)
        return model.norm_f(stream)[0]

    for row, begin, end in ((0, 0, 5), (0, 5, 11), (1, 0, 4)):
        assert_close(y[row, begin:end], by_hand(x[row, begin:end]))
    assert_close(model(x[1, :4])[0], by_hand(x[1, :4]))
    y[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for ask in (lambda: model(given[0], state), lambda: model.init_state(3), lambda: model.step(x[:, 0], state)):
        with pytest.raises(UsageError, match="no state to go on from"):
            ask()
    assert not model.causal
    assert model.state_bytes(100) == 0
    joined = ssm(mixer=Bidirectional.Config(mixer=MAMBA2, combine="concat"))
    assert joined(torch.randn(3, 11, 5))[0].shape == (3, 11, 64)


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_dt_reaches_every_layer(x, batch_first):
    model = SSM(5, 8, 2, mixer=S4D.Config(d_state=4), batch_first=batch_first).double().eval()
    x, dt = x.double(), torch.rand(3, 11, dtype=torch.float64) + 0.5

    def run(x, dt, state=None):
        x = x if batch_first else x.transpose(0, 1)
        dt = dt.T if isinstance(dt, torch.Tensor) and not batch_first else dt
        y, state = model(x, state, dt=dt)
        return (y if batch_first else y.transpose(0, 1)), state

    assert_close(run(x, torch.full((3, 11), 0.5, dtype=torch.float64))[0], run(x, 0.5)[0])
    assert_close(run(x, 1.0)[0], run(x, None)[0])
    whole, _ = run(x, dt)
    first, state = run(x[:, :4], dt[:, :4])
    assert_close(torch.cat([first, run(x[:, 4:], dt[:, 4:], state)[0]], 1), whole)
    state = model.init_state(3)
    assert_close(torch.stack([model.step(x[:, t], state, dt[:, t]) for t in range(11)], 1), whole)
    alone, _ = model(x[1], dt=dt[1])
    assert_close(alone, whole[1])
    for give in (lambda: ssm()(x.float(), dt=0.5), lambda: ssm().step(x[:, 0].float(), ssm().init_state(3), 0.5)):
        with pytest.raises(UsageError, match=r"mamba2 takes no dt.* lti, .*s4d"):
            give()


def test_padding_may_hold_anything(x):
    model = ssm(mixer="gru")
    x[1, 4:] = torch.nan
    y, _ = model(x, lengths=torch.tensor([11, 4, 11]))
    y[1, :4].sum().backward()
    assert_close(y[1, :4], model(x[1, :4])[0], **BUDGET)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_projects_only_when_sizes_differ(x):
    assert isinstance(ssm().in_proj, nn.Linear)
    same = SSM(64, 64, mixer=MAMBA2)
    assert same.in_proj is None
    assert ssm().flops(7) == same.flops(7) + 2 * 7 * 5 * 64 + ssm().layers[0].mixer.flops(7)


def test_it_learns_what_needs_memory():
    """The sign of the first input, asked for seven steps later."""
    model, readout = SSM(1, 32, mixer=MAMBA2, batch_first=True), nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*model.parameters(), *readout.parameters()], lr=1e-2)
    for _ in range(200):
        x = torch.zeros(32, 8, 1)
        x[:, 0] = torch.randn(32, 1).sign()
        loss = (readout(model(x)[0][:, -1]) - x[:, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_state_file(x, tmp_path):
    model = ssm(mixer=Attention.Config(n_heads=4))
    _, state = model(x)
    state.save(tmp_path / "s")
    assert torch.equal(model(x, State.load(tmp_path / "s", model))[0], model(x, state)[0])
    with pytest.raises(LongwaveError, match="of another model: 2 attention, d_model 64"):
        State.load(tmp_path / "s", ssm())
    with pytest.raises(ValueError, match="the state is of another model"):
        ssm()(x, state)


def test_reset_parameters(x):
    model = ssm()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.reset_parameters()
    assert model(x)[0].isfinite().all()


def test_wrong_use(x):
    with pytest.raises(ValueError, match=r"input_size=5, got \(3, 11, 4\)"):
        ssm()(x[..., :4])
    with pytest.raises(UsageError, match=r"unknown mixer 'mamba22'\. Did you mean 'mamba2'"):
        SSM(5, 64, mixer="mamba22")
    with pytest.raises(UsageError, match="'swiglu' is no mixer"):
        SSM(5, 64, mixer=SwiGLU.Config())
    with pytest.raises(UsageError, match="no layer's configuration"):
        SSM(5, 64, mixer=Mamba2)
    with pytest.raises(UsageError, match="got 5, 64, 0 and"):
        SSM(5, 64, 0)
    with pytest.raises(UsageError, match="d_inner=40"):
        SSM(5, 20)
