"""Mixture of experts: against each token sent by hand through the experts that the routers' papers name."""

import json
import math
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from longwave.config import from_dict, to_dict
from longwave.errors import UsageError
from longwave.mixers import MLP, MoE, SwiGLU
from longwave.mixers.moe import balance_loss, record_routing
from longwave.models.blocks import layer_configs

D = 12
EXPERT = SwiGLU.Config(d_inner=10)
GROUPED = {"router": "sigmoid", "n_groups": 4, "top_groups": 2, "scale": 2.5}
CASES = {
    "softmax_topk": {"router": "softmax_topk"},
    "topk_softmax": {"router": "topk_softmax", "top_k": 3},
    "sigmoid": {"router": "sigmoid", "normalise": False, "scale": 0.5},
    "sigmoid in groups": GROUPED,
    "mlp experts, a shared one": {
        "expert": MLP.Config(d_inner=7, activation="relu2"),
        "shared": SwiGLU.Config(d_inner=20),
        "router": "softmax_topk",
    },
    "latent": GROUPED | {"d_latent": 6, "shared": MLP.Config(d_inner=9, bias=False)},
    "all experts, one choice each": {"n_experts": 1, "top_k": 1},
}
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def make(options, dtype=torch.float64) -> Any:
    moe = MoE(D, MoE.Config(**{"expert": EXPERT} | options)).to(dtype)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return moe


def chosen_by_hand(moe, token):
    """{expert: weight} of one token, from the papers' equations."""
    config, logits = moe.config, moe.router.weight @ token
    if config.router != "sigmoid":
        best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: config.top_k]
        among = range(len(logits)) if config.router == "softmax_topk" else best
        return {i: logits[i].exp() / sum(logits[j].exp() for j in among) for i in best}
    scores = 1 / (1 + torch.exp(-logits))
    biased = (scores + moe.router.correction_bias).tolist()
    size = config.n_experts // config.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_groups)]
    groups.sort(key=lambda group: -sum(sorted((biased[i] for i in group), reverse=True)[:2]))
    open_ = [i for group in groups[: config.top_groups] for i in group]
    best = sorted(open_, key=lambda i: -biased[i])[: config.top_k]
    total = sum(scores[i] for i in best) if config.normalise else 1
    return {i: config.scale * scores[i] / total for i in best}


def by_hand(moe, token):
    x = token if moe.latent_down is None else moe.latent_down.weight @ token
    parts = [weight * moe.experts[i](x) for i, weight in chosen_by_hand(moe, token).items()]
    y = torch.stack(parts).sum(0)
    y = y if moe.latent_up is None else moe.latent_up.weight @ y
    return y if moe.shared is None else y + moe.shared(token)


@every_case
def test_every_token_goes_through_its_experts(options):
    moe = make(options)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    expected = torch.stack([torch.stack([by_hand(moe, token) for token in row]) for row in x])
    assert_close(moe(x), expected)
    assert_close(torch.stack([moe(token) for token in x.unbind(1)], dim=1), expected)
    assert_close(moe(x[0, :1]), expected[0, :1])


@every_case
def test_gradients(options):
    moe = make(options)
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moe, x)
    assert torch.autograd.gradcheck(moe, x[:1])
    wanted = [x, *(parameter for parameter in moe.parameters() if parameter.requires_grad)]
    by_hands = torch.stack([by_hand(moe, token) for token in x])
    expected = torch.autograd.grad(by_hands.square().sum(), wanted, allow_unused=True)
    assert_close(torch.autograd.grad(moe(x).square().sum(), wanted, allow_unused=True), expected)


def test_one_token_runs_its_experts_and_no_other():
    moe = make({"router": "softmax_topk", "top_k": 3, "shared": EXPERT})
    ran = []
    for i, expert in enumerate(moe.experts):
        expert.register_forward_hook(lambda module, inputs, y, i=i: ran.append((i, len(inputs[0]))))
    token = torch.randn(D, dtype=torch.float64)
    moe(token[None])
    assert {i for i, _ in ran} == set(chosen_by_hand(moe, token))
    assert [rows for _, rows in ran] == [1, 1, 1]
    ran.clear()
    moe(torch.randn(2, 50, D, dtype=torch.float64))
    assert len(ran) <= 8, "an expert runs once, on all its tokens"
    assert sum(rows for _, rows in ran) == 300, "no token is dropped"


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_deterministic_forward_and_backward(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    moe, x = make({}, torch.float32), torch.randn(4, 100, D, requires_grad=True)
    runs = []
    for _ in range(3):
        y = moe(x)
        runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])])
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_load_and_balance_loss_are_those_counted():
    moe = make({"router": "softmax_topk", "balance": 0.5})
    x = torch.randn(3, 20, D, dtype=torch.float64)
    with record_routing(moe) as routed:
        y = moe(x)
        moe(x[:, 0])
    moe(x)
    assert len(routed) == 2, "nothing is recorded after the block"
    routing = routed[0].routing
    choices = [set(chosen_by_hand(moe, token)) for token in x.flatten(0, 1)]
    tokens = [sum(i in chosen for chosen in choices) for i in range(8)]
    load = routing.load()
    assert load.tokens.tolist() == tokens
    assert load.dropped == 0
    assert load.entropy == pytest.approx(-sum(n / 120 * math.log(n / 120) for n in tokens if n))
    mean = (x.flatten(0, 1) @ moe.router.weight.T).softmax(-1).mean(0)
    expected = 8 * sum(n / 120 * p for n, p in zip(tokens, mean, strict=True))
    assert_close(routing.balance_loss(), expected)
    assert_close(balance_loss(routed[:1]), 0.5 * expected)
    assert balance_loss([]).item() == 0
    (gradient,) = torch.autograd.grad(balance_loss(routed[:1]), moe.router.weight)
    assert gradient.abs().sum() > 0
    assert y.requires_grad


def test_an_even_load_has_the_least_loss():
    moe = make({"n_experts": D, "top_k": 1, "router": "softmax_topk"})
    with torch.no_grad():
        moe.router.weight.copy_(9 * torch.eye(D))
    with record_routing(moe) as routed:
        moe(torch.eye(D, dtype=torch.float64))
        moe(torch.eye(D, dtype=torch.float64)[:1])
    even, uneven = (r.routing for r in routed)
    assert even.balance_loss().item() == pytest.approx(1)
    assert even.load().entropy == pytest.approx(math.log(D))
    assert uneven.balance_loss().item() == pytest.approx(D, rel=0.01)
    assert uneven.load().entropy == 0


def test_the_correction_bias_moves_against_the_load():
    moe = make({"router": "sigmoid"})
    assert not moe.router.correction_bias.requires_grad
    moe.router.reset_parameters()
    assert moe.router.correction_bias.tolist() == [0] * 8
    moe.router.correct(torch.tensor([4, 0, 2, 2, 2, 2, 2, 2]), rate=0.25)
    assert moe.router.correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]


def test_routing_is_in_float32_whatever_the_weights(monkeypatch):
    moe = make({"router": "sigmoid"}, torch.float32).bfloat16()
    assert moe.router.weight.dtype == torch.bfloat16
    assert moe.router.correction_bias.dtype == torch.float32
    x = torch.randn(2, 6, D)
    exact = make({"router": "sigmoid"})
    exact.load_state_dict(moe.state_dict())
    with record_routing(moe) as routed, record_routing(exact) as exactly:
        y = moe(x.bfloat16())
        exact(x.bfloat16().double())
    assert y.dtype == torch.bfloat16
    assert routed[0].routing.weights.dtype == torch.float32
    assert_close(routed[0].routing.weights.double(), exactly[0].routing.weights, atol=1e-6, rtol=0)
    with torch.autocast("cpu", torch.bfloat16), record_routing(exact.float()) as routed:
        exact(x.bfloat16().float())
    assert_close(routed[0].routing.weights.double(), exactly[0].routing.weights, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, where a graph was broken
def test_compiled_it_is_the_same_and_recorded():
    torch.compiler.reset()
    moe, x = make({"shared": EXPERT}), torch.randn(2, 7, D, dtype=torch.float64)
    counter = CompileCounter()
    compiled = torch.compile(moe, backend=counter)
    weights = [moe.router.weight, moe.shared.up_proj.weight]
    for _ in range(3):
        with record_routing(moe) as routed:
            y = compiled(x)
        assert len(routed) == 1
        assert_close(y, moe(x))
        assert_close(torch.autograd.grad(y.sum(), weights), torch.autograd.grad(moe(x).sum(), weights))
    assert counter.frame_count <= 2, "compiled anew"


@every_case
def test_flops_json_reset_and_idle_parameters(options):
    config = MoE.Config(**{"expert": EXPERT} | options)
    assert from_dict(MoE.Config, json.loads(json.dumps(to_dict(config))), layer_configs()) == config
    moe = make(options, torch.float32)
    with FlopCounterMode(display=False) as counter:
        moe(torch.randn(1, 7, D))
    assert moe.flops(7) == counter.get_total_flops()
    touched = torch.autograd.grad(moe(torch.randn(1, D)).sum(), list(moe.experts.parameters()), allow_unused=True)
    idle = sum(p.numel() for p, g in zip(moe.experts.parameters(), touched, strict=True) if g is None)
    assert moe.idle_parameters == idle
    with torch.device("meta"):
        empty = MoE(D, config)
    empty.to_empty(device="cpu")
    for module in (moe, empty):
        torch.manual_seed(0)
        module.reset_parameters()
    assert_close(empty.state_dict(), moe.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "top"}, "router must be 'softmax_topk' or 'topk_softmax' or 'sigmoid', got 'top'"),
        ({"top_k": 9}, "top_k=9 .* n_experts=8"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"router": "sigmoid", "n_groups": 3}, "n_groups=3 must divide n_experts=8"),
        ({"router": "sigmoid", "n_groups": 4, "top_k": 3}, "top_k=3 and top_groups=1"),
        ({"router": "sigmoid", "top_groups": 2}, "top_groups=2"),
        ({"scale": 2.0}, "scale=2.0 are of the router 'sigmoid', not of 'topk_softmax'"),
        ({"expert": None}, "expert must be a SwiGLU.Config or MLP.Config, got None"),
        ({"shared": "mlp"}, "shared must be a SwiGLU.Config or MLP.Config, got 'mlp'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        MoE.Config(**options)
