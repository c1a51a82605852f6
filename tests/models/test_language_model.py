"""The model: one function of the tokens however they come, and what it says about itself."""

import copy
import itertools
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from longwave.config import to_dict
from longwave.errors import UsageError
from longwave.mixers import Attention, Mamba, Mamba2, nested
from longwave.models.language_model import LanguageModel
from longwave.models.loss import linear_cross_entropy

BUDGET = {"atol": 2e-5, "rtol": 2e-5}


def step_all(model, tokens, state):
    return torch.stack([model.step(tokens[:, t], state) for t in range(tokens.shape[1])], dim=1)


def tensors(state):
    return [state.position, *nested.tensors(state.layers)]


@torch.no_grad()
def test_whole_is_pieces_is_steps(model, tokens):
    whole, end = model(tokens)
    state, pieces = None, []
    for piece in tokens.split([1, 6, 3, 7], dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    assert_close(torch.cat(pieces, dim=1), whole, **BUDGET)

    stepped = model.init_state(3, length=17)
    assert_close(step_all(model, tokens, stepped), whole, **BUDGET)
    for other in (state, stepped):
        for a, b in zip(tensors(other.reserve(0)), tensors(end.reserve(0)), strict=True):
            assert_close(a, b, **BUDGET)
    assert end.position.tolist() == [17, 17, 17]


@torch.no_grad()
def test_steps_go_on_from_a_prefill(model, tokens):
    whole, _ = model(tokens)
    _, state = model(tokens[:, :9])
    assert_close(step_all(model, tokens[:, 9:], state.reserve(8)), whole[:, 9:], **BUDGET)


@torch.no_grad()
def test_forward_leaves_its_state_and_step_its_logits_alone(model, tokens):
    first, state = model(tokens[:, :8])
    logits, before = first.clone(), state.clone()
    model(tokens[:, 8:], state)
    for a, b in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(a, b)
    model.step(tokens[:, 8], state.reserve(1))
    for a, b in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(a, b)
    model.step(tokens[:, 8], model(tokens[:, :8])[1].reserve(1))
    assert torch.equal(first, logits)


@torch.no_grad()
def test_packed_is_separate(model, tokens):
    reset = torch.zeros(3, 17, dtype=torch.bool)
    starts = ([4, 5], [0, 11], [9])
    for row, at in enumerate(starts):
        reset[row, at] = True
    packed, state = model(tokens, reset=reset)
    for row, at in enumerate(starts):
        edges = sorted({0, *at, 17})
        for a, b in itertools.pairwise(edges):
            alone, end = model(tokens[row : row + 1, a:b])
            assert_close(packed[row : row + 1, a:b], alone, **BUDGET)
        follow, _ = model(tokens[:1], state.index_select([row]))
        assert_close(follow, model(tokens[:1], end)[0], **BUDGET)


@torch.no_grad()
def test_batched_with_lengths_is_alone(model, tokens):
    _, before = model(tokens[:, :4])
    lengths = torch.tensor([13, 0, 6])
    logits, after = model(tokens[:, 4:], before, lengths=lengths)
    assert after.position.tolist() == [17, 4, 10]
    for row, n in enumerate(lengths.tolist()):
        own = before.index_select([row])
        if n:
            alone, own = model(tokens[row : row + 1, 4 : 4 + n], own)
            assert_close(logits[row : row + 1, :n], alone, **BUDGET)
        follow, _ = model(tokens[:1, :5], after.index_select([row]))
        assert_close(follow, model(tokens[:1, :5], own)[0], **BUDGET)


def test_padding_carries_no_gradient(build, tokens):
    model = build("hybrid")
    lengths = torch.tensor([17, 5, 9])
    mask = torch.arange(17) < lengths[:, None]
    gradients = []
    for filler in (0, 7):
        model.zero_grad()
        targets = torch.where(mask, tokens, -100)
        model.loss(torch.where(mask, tokens, filler), targets, lengths=lengths).backward()
        gradients.append(model.layers[0].mixer.in_proj.weight.grad.clone())
    assert_close(gradients[0], gradients[1], **BUDGET)


def test_gradient_flows_through_the_state(build, tokens):
    model = build("hybrid").double()
    whole = torch.autograd.grad(model(tokens)[0][:, 8:].square().sum(), model.embedding.weight)[0]
    _, state = model(tokens[:, :8])
    pieces = torch.autograd.grad(model(tokens[:, 8:], state)[0].square().sum(), model.embedding.weight)[0]
    assert_close(pieces, whole)
    cut = torch.autograd.grad(model(tokens[:, 8:], state.detach())[0].square().sum(), model.embedding.weight)[0]
    assert not torch.allclose(cut, whole)


def test_every_linear_is_called_as_a_module(model, tokens):
    calls: dict[str, int] = {}

    class Counting(nn.Module):
        """What a LoRA wrapper is: another module in the Linear's place."""

        def __init__(self, name, inner):
            super().__init__()
            self.name, self.inner, self.weight, self.bias = name, inner, inner.weight, inner.bias

        def forward(self, x):
            calls[self.name] = calls.get(self.name, 0) + 1
            return 2 * self.inner(x)

    plain = model.loss(tokens, tokens)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, leaf, Counting(name, getattr(parent, leaf)))
    assert model.loss(tokens, tokens) != plain
    assert set(calls) == set(names)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert set(calls) == set(names)
    calls.clear()
    model.step(tokens[:, 0], model.init_state(3, length=1))
    assert set(calls) == set(names)


def test_compiles_to_one_graph(build, tokens):
    """The RNNs are left out: their packing depends on the values of reset and lengths."""
    torch.compiler.reset()
    model = build("compiled")
    documents = {"reset": torch.zeros(3, 17, dtype=torch.bool), "lengths": torch.tensor([17, 3, 0])}
    documents["reset"][1, 5] = True
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, state = forward(tokens)
    expected, end = model(tokens)
    assert_close(logits, expected)
    assert state.fingerprint == end.fingerprint
    for a, b in zip(tensors(state), tensors(end), strict=True):
        assert_close(a, b)
    assert_close(forward(tokens, state.detach(), **documents)[0], model(tokens, end, **documents)[0])

    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(tokens, tokens)
    assert_close(loss, model.loss(tokens, tokens))
    weights = list(model.parameters())
    compiled = torch.autograd.grad(loss, weights)
    for a, b in zip(compiled, torch.autograd.grad(model.loss(tokens, tokens), weights), strict=True):
        assert_close(a, b)


def test_the_loss_in_parts_compiles_to_one_graph():
    torch.compiler.reset()
    head, hidden, targets = torch.nn.Linear(8, 37), torch.randn(3, 11, 8), torch.randint(0, 37, (3, 11))

    def loss():
        return linear_cross_entropy(head, hidden, targets, vocab_size=37, max_logits=37 * 5)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")()
    assert_close(compiled, loss())
    expected = torch.autograd.grad(loss(), head.weight)
    assert_close(torch.autograd.grad(compiled, head.weight), expected)


def test_copies_and_pickles(model, tokens):
    expected = model(tokens)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens)[0], expected)
        assert other.lm_head.weight is other.embedding.weight
        assert other.fingerprint == model.fingerprint


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("residual_fp32", [False, True])
def test_bfloat16_weights(build, tokens, norm, residual_fp32):
    model = build("hybrid", norm=norm, residual_fp32=residual_fp32)
    expected = model(tokens)[0]
    inputs = []
    model.layers[1].norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    model.bfloat16()
    logits, _ = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert inputs == [torch.float32 if residual_fp32 else torch.bfloat16]
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert model.step(tokens[:, 0], model.init_state(3, length=1)).dtype == torch.bfloat16


def test_autocast(build, tokens):
    model = build("hybrid")
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens)
        loss = model.loss(tokens, tokens)
        more, _ = model(tokens, state)
    assert logits.dtype == more.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert_close(loss, model.loss(tokens, tokens), atol=0.05, rtol=0.01)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


def test_initial_scales():
    slots = 8
    layers = (Mamba2.Config(d_head=16), Attention.Config(n_heads=4)) * (slots // 2)
    model = LanguageModel(LanguageModel.Config(vocab_size=500, d_model=256, layers=layers, tie_embeddings=False))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    plain = (1 / 3 / 256) ** 0.5  # nn.Linear draws uniformly within +-1 / sqrt(inputs)
    attention = model.layers[1].mixer
    assert attention.q_proj.weight.std().item() == pytest.approx(plain, rel=0.03)
    assert attention.o_proj.weight.std().item() == pytest.approx(plain / slots**0.5, rel=0.03)
    assert model.layers[0].mixer.out_proj.weight.std().item() == pytest.approx(plain / (2 * slots) ** 0.5, rel=0.03)


def test_logits_begin_near_uniform(build):
    config = build("hybrid").config
    logits, _ = LanguageModel(config)(torch.arange(61)[None])
    assert abs(logits.logsumexp(-1).mean().item() - math.log(61)) < 0.05


def test_reset_parameters_after_the_meta_device(model, tokens):
    with torch.device("meta"):
        empty = LanguageModel(model.config)
    empty.to_empty(device="cpu")
    for parameter in empty.parameters():
        parameter.data.fill_(float("nan"))
    torch.manual_seed(3)
    empty.reset_parameters()
    assert empty.lm_head.weight is empty.embedding.weight
    assert empty(tokens)[0].isfinite().all()
    fresh = LanguageModel(model.config)
    for (name, a), b in zip(empty.named_parameters(), fresh.parameters(), strict=True):
        if b.numel() >= 512 and b.std() > 0:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.25), name


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count(build, tied):
    model = build("mamba2", tie_embeddings=tied)
    in_proj, conv = 32 * (2 * 64 + 2 * 8 + 4), (64 + 16) * 5
    layer = 32 + in_proj + conv + 3 * 4 + 64 + 64 * 32
    assert model.parameter_count() == 61 * 32 * (1 if tied else 2) + 2 * layer + 32


def test_flops_are_those_counted(build):
    """torch counts the matrix products; of the pairs of tokens, the model counts those that the mask leaves."""
    model = build("transformer")
    l = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, l, dtype=torch.int64))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "attention" not in str(op) and "bmm" not in str(op))
    full, window = l * (l + 1) // 2, 5 * 6 // 2 + (l - 5) * 5
    assert model.flops(l) == products + 4 * 32 * full + 4 * 32 * window


@pytest.mark.parametrize("options", [{}, {"norm": "layer", "tie_embeddings": False, "residual_fp32": True}])
def test_json_round_trip(model, options):
    config = LanguageModel.Config(vocab_size=61, d_model=32, layers=model.config.layers, **options)
    assert LanguageModel.Config.from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["layers"][0].update(d_stat=3), r"layers\[0\]: unknown key 'd_stat'. Did you mean 'd_state'"),
        (lambda d: d.update(d_modle=3), "unknown key 'd_modle'. Did you mean 'd_model'"),
        (lambda d: d["layers"][1].update(kind="swigluu"), "unknown kind 'swigluu'. Did you mean 'swiglu'"),
        (lambda d: d["layers"][1].pop("kind"), r"layers\[1\] is .* no layer's configuration"),
        (lambda d: d.update(layers=[]), "at least one configuration"),
        (lambda d: d.pop("vocab_size"), "vocab_size"),
        (lambda d: d.update(norm="batch"), "norm must be 'rms' or 'layer' or 'rms_outer_eps', got 'batch'"),
        (lambda d: d.update(vocab_size=0), "at least 1, got 0"),
    ],
)
def test_wrong_settings(build, change, message):
    settings = to_dict(build("hybrid").config)
    change(settings)
    with pytest.raises(UsageError, match=message):
        LanguageModel.Config.from_dict(settings)


def test_a_class_or_a_word_is_no_layer():
    for wrong in (Mamba.Config, "mamba"):
        with pytest.raises(UsageError, match="no layer's configuration"):
            LanguageModel.Config(vocab_size=61, d_model=32, layers=(wrong,))


def test_wrong_inputs(build, tokens):
    model, other = build("mamba"), build("mamba2")
    with pytest.raises(ValueError, match=r"tokens must be \(b, l\), got \(17,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match="the state is of another model: 2 mamba2, d_model 32"):
        model(tokens, other.init_state(3))
