"""SaShiMi: one signal, however it is cut, padded or packed; against the published recurrence written out here."""

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longwave.config import to_dict
from longwave.errors import LongwaveError, UsageError
from longwave.generate.decoder import Decoder
from longwave.generate.sampling import Sampling
from longwave.generate.text_model import TextModel
from longwave.mixers import GRU, S4, S4D, Attention, Bidirectional, Mamba2, SwiGLU
from longwave.models.sashimi import SaShiMi
from longwave.models.state import State
from longwave.models.unet import PoolState

torch.set_num_threads(1)
V, L, B = 23, 30, 3
MIXERS = {
    "s4": S4.Config(d_state=8),
    "s4d": S4D.Config(d_state=8),
    "gru": GRU.Config(),
    "mamba2": Mamba2.Config(d_state=4, d_head=4),
}
few = settings(max_examples=8, deadline=None, derandomize=True)
cuts = st.lists(st.integers(1, L - 1), unique=True, max_size=5).map(lambda c: [0, *sorted(c), L])
resets = st.lists(st.integers(0, B * L - 1), max_size=12).map(
    lambda places: torch.zeros(B * L, dtype=torch.bool).index_fill(0, torch.tensor(places).long(), True).view(B, L)
)
lengths = st.lists(st.integers(0, L), min_size=B, max_size=B).map(torch.tensor)


def build(mixer: Any = "gru", **options) -> SaShiMi:
    torch.manual_seed(1)
    config = {"vocab_size": V, "d_model": 8, "n_layers": 1, "pool": (3, 2), "mixer": MIXERS.get(mixer, mixer)} | options
    model = SaShiMi(SaShiMi.Config(**config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def net(model: SaShiMi) -> Any:
    return model.layers


def samples(b: int = B, l: int = L) -> torch.Tensor:
    return torch.randint(0, V, (b, l), generator=torch.Generator().manual_seed(5))


def assert_same(state: State, other: State) -> None:
    """Equal but for a window's slots before the document's first token, which nothing reads."""
    assert torch.equal(state.position, other.position)
    for one, two in zip(state.layers, other.layers, strict=True):
        if isinstance(one, PoolState):
            p = one.queue.shape[1]
            assert torch.equal(one.seen, two.seen)
            for row, seen in enumerate(one.seen.tolist()):
                held = seen % p
                assert_close(one.window[row, p - 1 - held :], two.window[row, p - 1 - held :])
                if seen >= p:
                    assert_close(one.queue[row], two.queue[row])
        elif one is not None:
            assert_close(tuple(one), tuple(two))


@pytest.mark.parametrize(("mixer", "unet"), [("gru", False), ("s4", True), ("mamba2", False)])
@given(cut=cuts, reset=st.none() | resets, lengths=st.none() | lengths)
@few
@torch.no_grad()
def test_whole_is_pieces(mixer, unet, cut, reset, lengths):
    model, x = build(mixer, unet=unet), samples()
    whole, expected = model(x, reset=reset, lengths=lengths)
    state, ys = model.init_state(B), []
    for a, z in pairwise(cut):
        part = None if lengths is None else (lengths - a).clamp(0, z - a)
        y, state = model(x[:, a:z], state, reset=None if reset is None else reset[:, a:z], lengths=part)
        ys.append(y)
    real = torch.ones(B, L, dtype=torch.bool) if lengths is None else torch.arange(L) < lengths[:, None]
    assert_close(torch.cat(ys, 1)[real], whole[real])
    assert_same(state, expected)


@pytest.mark.parametrize(("mixer", "unet"), [("gru", True), ("s4d", False), ("mamba2", False)])
@given(reset=st.none() | resets, lengths=st.none() | lengths)
@few
@torch.no_grad()
def test_steps_go_on_from_any_state(mixer, unet, reset, lengths):
    """Rows that are out of step with one another included."""
    model, x, more = build(mixer, unet=unet), samples(), samples(B, 14)
    _, state = model(x, reset=reset, lengths=lengths)
    expected, after = model(more, state)
    stepped = state.clone()
    y = torch.stack([model.step(more[:, t], stepped) for t in range(14)], 1)
    assert_close(y, expected)
    assert_same(stepped, after)


@torch.no_grad()
def test_steps_from_nothing_equal_the_whole():
    for mixer in MIXERS:
        model, x = build(mixer).float(), samples()
        whole, expected = model(x)
        state = model.init_state(B)
        y = torch.stack([model.step(x[:, t], state) for t in range(L)], 1)
        assert_close(y, whole, atol=1e-5, rtol=1e-5)
        assert torch.equal(state.position, expected.position)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_packed_is_separate(mixer):
    """Documents of every length around the groups' sizes, the state of an earlier signal before them."""
    model, bounds = build(mixer), [0, 1, 3, 8, 13, 14, 30]
    x = samples(1)
    _, before = model(samples(1, 7))
    reset = torch.zeros(1, L, dtype=torch.bool)
    reset[0, bounds[:-1]] = True
    packed, state = model(x, before, reset=reset)
    for a, z in pairwise(bounds):
        alone, end = model(x[:, a:z])
        assert_close(packed[:, a:z], alone)
    more = samples(1, 9)
    assert_close(model(more, state)[0], model(more, end)[0])


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_padded_is_alone(mixer):
    model, x, n = build(mixer), samples(4), torch.tensor([30, 0, 2, 17])
    _, before = model(samples(4, 8), lengths=torch.tensor([8, 3, 0, 5]))
    y, state = model(x, before, lengths=n)
    assert y.isfinite().all()
    for row, length in enumerate(n.tolist()):
        start = before.index_select([row])
        if length:
            alone, end = model(x[row : row + 1, :length], start)
            assert_close(y[row : row + 1, :length], alone)
            assert_same(state.index_select([row]), end)
        else:
            assert_same(state.index_select([row]), start)


def test_causal_and_heard_a_group_later():
    """The first tier alone passes a sample on at once; the tier below speaks of it from the next group on."""
    model = build("gru", ff=0, pool=(5,))
    with torch.no_grad():
        for block in net(model).u_layers[0][1:]:  # the first tier's own blocks say nothing
            block.mixer.weight_ih_l0.zero_()
            block.mixer.weight_hh_l0.zero_()
            block.mixer.bias_ih_l0.zero_()
            block.mixer.bias_hh_l0.zero_()
    x, changed = samples(1), samples(1)
    changed[0, 7] = (changed[0, 7] + 1) % V
    differs = (model(x)[0] != model(changed)[0]).any(-1)[0]
    assert differs.nonzero()[:, 0].tolist() == [7, *range(10, 30)]


def test_state_is_differentiable():
    model, x = build("s4d"), samples()
    weight = torch.randn(B, L, V, dtype=torch.float64)
    whole = torch.autograd.grad((model(x)[0] * weight).sum(), list(model.parameters()))
    first, state = model(x[:, :7])
    second, _ = model(x[:, 7:], state)
    pieces = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), list(model.parameters()))
    assert_close(pieces, whole)


@pytest.mark.parametrize("unet", [False, True])
@torch.no_grad()
def test_against_the_recurrence_written_out(unet):
    """Sample by sample with lists for queues, as the paper tells it, and blocks applied to whole tiers."""
    model, x = build("gru", unet=unet, n_layers=2), samples(1, 24)
    layers = net(model)

    def whole(blocks, ys, skips=None):
        for k, block in enumerate(blocks):
            ys = block(ys[None])[0][0]
            if skips is not None:
                ys = ys + skips[k]
        return ys

    def tier(i, ys):
        if i == 2:
            return whole(layers.c_layers, ys) + ys
        n = len(layers.d_layers) // 2
        seen, down = [ys], layers.d_layers[n * i + n - 1]
        for block in layers.d_layers[n * i : n * i + n - 1]:
            seen.append(block(seen[-1][None])[0][0])
        ys, p = seen.pop(), (3, 2)[i]
        low, group = [], []
        for y in ys:
            group.append(y)
            if len(group) == p:
                low.append(down.linear(torch.stack(group, 1).reshape(-1)))  # channels first, then tokens
                group = []
        low = tier(i + 1, torch.stack(low))
        up, *after = layers.u_layers[1 - i]
        spoken = [torch.zeros(ys.shape[1], dtype=torch.float64)] * p
        for y in low:
            spoken += list(up.linear(y).view(-1, p).T)
        ys = ys + torch.stack(spoken[: len(ys)])
        return whole(after, ys, seen[::-1]) if unet else whole(after, ys) + ys

    y = model.lm_head(model.norm_f(tier(0, model.embedding(x[0]))))
    assert_close(model(x)[0][0], y)


@torch.no_grad()
def test_costs_are_counted():
    for mixer in MIXERS:
        model = build(mixer).float()
        for length in (1, 5, 6, 40):
            state = model.init_state(2, length=length)
            assert state.nbytes == 2 * model.state_bytes(length) == 2 * model.state_bytes(10_000)
            assert model(samples(2, length))[1].nbytes == state.nbytes
    config = SaShiMi.Config()
    with torch.device("meta"):
        model = SaShiMi(config)
    blocks = 8 * (64 + 128 + 256) * 4 * 64
    pools = (7 * 64 + 7 * 128) * 4
    assert model.state_bytes(16_000) == blocks + pools  # S4: 4 d n each; p-1 inputs and p outputs at each pool
    tiers = zip(net(model)._blocks_by_tier(), (1, 4, 16), strict=True)
    per_tier = [sum(block.mixer.flops(16_000 // rate) for block in blocks) for blocks, rate in tiers]
    linears = 2 * 4000 * 2 * (256 * 128) + 2 * 1000 * 2 * (512 * 256)
    assert model.flops(16_000) == sum(per_tier) + linears + 2 * 16_000 * 64 * 256


@torch.no_grad()
def test_attention_in_the_tiers():
    model, x = build(Attention.Config(n_heads=2)), samples()
    whole, _ = model(x)
    first, state = model(x[:, :7])
    rest, after = model(x[:, 7:], state)
    assert_close(torch.cat([first, rest], 1), whole)
    state = model.init_state(B, length=L)
    assert_close(torch.stack([model.step(x[:, t], state) for t in range(L)], 1), whole)
    assert after.reserve(0).nbytes == B * model.state_bytes(L)
    with pytest.raises(UsageError, match="attention below its first tier takes no reset"):
        model(x, reset=torch.zeros(B, L, dtype=torch.bool))


@torch.no_grad()
def test_another_sampling_rate():
    model, x = build("s4d"), samples()
    assert_close(model(x, dt=1.0)[0], model(x)[0])
    whole, _ = model(x, dt=0.5)
    assert not torch.allclose(whole, model(x)[0])
    state = model.init_state(B)
    assert_close(torch.stack([model.step(x[:, t], state, 0.5) for t in range(L)], 1), whole)
    with pytest.raises(UsageError, match="gru takes no dt"):
        build("gru")(x, dt=0.5)
    with pytest.raises(UsageError, match="takes dt as one number"):
        model(x, dt=torch.ones(B, L))


def test_bidirectional_blocks_have_no_state():
    model, x = build(Bidirectional.Config(mixer=GRU.Config())), samples()
    y, state = model(x, lengths=torch.tensor([30, 11, 4]))
    assert_close(y[1, :11], model(x[1:2, :11])[0][0])
    for ask in (lambda: model(x, state), lambda: model.init_state(1), lambda: model.step(x[:, 0], state)):
        with pytest.raises(UsageError, match="no state to go on from"):
            ask()


@torch.no_grad()
def test_generation_and_scoring():
    model = build("gru").float()
    prompts = [[1, 2, 3], [4], list(range(11))]
    text_model = TextModel(model, None)
    batch = text_model.complete_batch(prompts, max_tokens=20, temperature=0)
    for prompt, said in zip(prompts, batch, strict=True):
        tokens = list(prompt)
        for _ in range(20):
            tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
        assert said.tokens == tokens[len(prompt) :]
        assert said.state.nbytes == model.state_bytes(1)
    again = text_model.complete([5], max_tokens=3, temperature=0, state=batch[0].state)
    longer = text_model.complete([*prompts[0], *batch[0].tokens, 5], max_tokens=3, temperature=0, chunk_len=5)
    assert again.tokens == longer.tokens
    decoder = Decoder(model, prompts, Sampling(seed=1))
    for _ in range(4):
        decoder.draw()
    assert decoder.state.position.tolist() == [7, 5, 15]
    tokens = samples(1)[0].tolist()
    logprobs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
    expected = [logprobs[t, token].item() for t, token in enumerate(tokens[1:])]
    assert text_model.score(tokens, chunk_len=4).logprobs[1:] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_files(tmp_path):
    model, x = build("s4d").float(), samples()
    model.save(tmp_path / "m")
    loaded = SaShiMi.load(tmp_path / "m")
    assert torch.equal(loaded(x)[0], model(x)[0])
    assert loaded.fingerprint == model.fingerprint
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert settings["kind"] == "sashimi"
    assert SaShiMi.Config.from_dict(settings) == model.config
    _, state = model(x, lengths=torch.tensor([30, 11, 4]))
    state.save(tmp_path / "s")
    read = State.load(tmp_path / "s", loaded)
    assert torch.equal(loaded(x, read)[0], model(x, state)[0])
    with pytest.raises(LongwaveError, match="of another model: 3 s4d, d_model 8"):
        State.load(tmp_path / "s", build("s4d", unet=True).float())
    with pytest.raises(ValueError, match="the state is of another model"):
        build("s4d", pool=(2, 3))(x, state)


def test_training_learns_a_period():
    """A period of 7 samples, for which the last sample alone does not do: 0 0 1 0 1 1 1."""
    model = build("gru", d_model=16).float()
    signal = torch.tensor([0, 0, 1, 0, 1, 1, 1]).repeat(8)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model.loss(signal[:, :-1], signal[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = TextModel(model, None).complete(signal[0, :21].tolist(), max_tokens=21, temperature=0)
    assert said.tokens == signal[0, 21:42].tolist()


def test_meta_device_and_copies():
    config = SaShiMi.Config(vocab_size=V, d_model=8, n_layers=1, mixer=MIXERS["gru"])
    with torch.device("meta"):
        model = SaShiMi(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        net(twin).d_layers[0].linear.weight.zero_()
    assert not torch.equal(twin(samples())[0], model(samples())[0])


def test_compiles_whole():
    torch._dynamo.reset()
    model, x = build("mamba2", pool=(3,), ff=0).float(), samples()
    given = {"reset": torch.rand(B, L) < 0.2, "lengths": torch.tensor([30, 4, 17])}
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    losses = [loss(x, x, **given) for loss in (compiled, model.loss)]
    assert_close(*losses)
    assert_close(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_bfloat16():
    model, x = build("gru").float(), samples()
    exact = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = model(x)
        fresh = model.init_state(B)
        steps = torch.stack([model.step(x[:, t], fresh) for t in range(L)], 1)
    assert [t.dtype for t in state.layers[0]] == [t.dtype for t in fresh.layers[0]]
    assert fresh.layers[0].window.dtype == torch.bfloat16
    scale = exact.abs().max().item()
    assert_close(y.float(), exact, atol=0.05 * scale, rtol=0)
    assert_close(steps.float(), exact, atol=0.05 * scale, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pool": (4, 1)}, r"pool must be a tuple of factors of at least 2, got \(4, 1\)"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"ff": -1}, "ff must be at least 1, or 0 for no MLP, got -1"),
        ({"mixer": SwiGLU.Config()}, "mixer is 'swiglu', which does not mix along time"),
    ],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        SaShiMi.Config(**options)


def test_configuration_in_words():
    assert "MLP" not in str(to_dict(SaShiMi.Config()))
    assert SaShiMi(SaShiMi.Config(vocab_size=V, d_model=8, mixer=GRU.Config())).samples_per_token == 16
