"""The loss in parts equals torch's cross entropy on all logits, and never holds them."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longwave.errors import UsageError
from longwave.models.loss import linear_cross_entropy

V = 37


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes, backward included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.fixture(params=["plain", "hooked"])
def way(request):
    """The two ways through parts: a plain head's gradients come with the loss, another's logits are made anew."""

    def prepare(head):
        if request.param == "hooked":
            head.register_forward_hook(lambda module, args, logits: None)
        return head

    return prepare


def problem(dtype=torch.float64):
    head = nn.Linear(8, V, bias=False, dtype=dtype)
    hidden = torch.randn(3, 11, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (3, 11))
    targets[0, :4] = -100
    targets[2, 7] = -100
    return head, hidden, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("at_once", [1, 5, 11, 33, 1000])
def test_equals_plain_cross_entropy(reduction, at_once, way):
    head, hidden, targets = problem()
    way(head)
    weights = torch.randn(3, 11).double() if reduction == "none" else torch.tensor(1.7).double()
    plain = cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction=reduction)
    plain = plain.view(3, 11) if reduction == "none" else plain
    loss = linear_cross_entropy(
        head, hidden, targets, vocab_size=V, reduction=reduction, max_logits=at_once * V + V // 2
    )
    assert loss.shape == plain.shape
    assert_close(loss, plain)
    inputs = [hidden, head.weight]
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    for a, b in zip(torch.autograd.grad((loss * weights).sum(), inputs), expected, strict=True):
        assert_close(a, b)


def test_other_ignore_index():
    head, hidden, targets = problem()
    targets[targets == -100] = 0
    loss = linear_cross_entropy(head, hidden, targets, vocab_size=V, ignore_index=0, max_logits=4 * V)
    assert_close(loss, cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=0))


def test_nothing_to_predict_is_nan_as_in_torch():
    head, hidden, targets = problem()
    nothing = torch.full_like(targets, -100)
    assert linear_cross_entropy(head, hidden, nothing, vocab_size=V, max_logits=V).isnan()
    assert linear_cross_entropy(head, hidden, nothing, vocab_size=V, max_logits=V, reduction="sum") == 0


def test_memory_is_bounded(way):
    n, v, d, at_once = 64, 1000, 4, 8
    head = way(nn.Linear(d, v, bias=False))
    hidden, targets = torch.randn(2, n // 2, d, requires_grad=True), torch.randint(0, v, (2, n // 2))
    with LargestTensor() as largest:
        linear_cross_entropy(head, hidden, targets, vocab_size=v, max_logits=at_once * v).backward()
    assert largest.elements == at_once * v
    with LargestTensor() as largest:
        cross_entropy(head(hidden).flatten(0, 1), targets.flatten()).backward()
    assert largest.elements == n * v


def test_nothing_of_the_logits_is_kept_for_the_backward_pass(way):
    n, v, d, at_once = 64, 1000, 4, 8
    head = way(nn.Linear(d, v, bias=False))
    hidden, targets = torch.randn(n, d, requires_grad=True), torch.randint(0, v, (n,))

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = linear_cross_entropy(head, hidden, targets, vocab_size=v, max_logits=at_once * v)
        assert sum(kept.tensor.numel() for kept in alive) < at_once * v
        whole = linear_cross_entropy(head, hidden, targets, vocab_size=v, max_logits=n * v)
        assert sum(kept.tensor.numel() for kept in alive) > n * v
    assert_close(loss, whole)


@pytest.mark.parametrize("at_once", [4, 1000])
def test_the_head_is_called_as_a_module(at_once):
    """A head with an adapter beside it: its own parameters get their gradients."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base.requires_grad_(False), nn.Linear(8, 2), nn.Linear(2, V)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    head, hidden, targets = problem(torch.float32)
    head = Adapted(head)
    loss = linear_cross_entropy(head, hidden, targets, vocab_size=V, max_logits=at_once * V)
    plain = cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    assert_close(loss, plain)
    inputs = [p for p in head.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert_close(a, b)


def test_random_heads_draw_the_same_twice():
    """Dropout inside a wrapped head: the logits that the backward pass makes anew are those of the forward pass."""
    head, hidden, targets = problem()
    torch.manual_seed(5)
    noisy = nn.Sequential(nn.Dropout(0.5), head)
    loss = linear_cross_entropy(noisy, hidden, targets, vocab_size=V, max_logits=40 * V)
    expected = torch.autograd.grad(loss, head.weight)[0]
    torch.manual_seed(5)
    loss_in_parts = linear_cross_entropy(noisy, hidden, targets, vocab_size=V, max_logits=11 * V)
    torch.manual_seed(5)
    masks = [noisy[0](part) for part in hidden.flatten(0, 1).split(11)]
    plain = cross_entropy(head(torch.cat(masks)), targets.flatten())
    assert_close(loss_in_parts, plain)
    gradient = torch.autograd.grad(loss_in_parts, head.weight)[0]
    assert_close(gradient, torch.autograd.grad(plain, head.weight)[0])
    assert gradient.shape == expected.shape


@pytest.mark.parametrize("at_once", [4, 1000])
def test_bfloat16_autocast(at_once, way):
    head, hidden, targets = problem(torch.float32)
    way(head)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(head, hidden, targets, vocab_size=V, max_logits=at_once * V)
        plain = cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten())
    assert loss.dtype == torch.float32
    assert_close(loss, plain)
    for a, b in zip(
        torch.autograd.grad(loss, [hidden, head.weight]), torch.autograd.grad(plain, [hidden, head.weight]), strict=True
    ):
        assert a.dtype == torch.float32
        assert_close(a, b, atol=2e-3, rtol=2e-2)


def test_without_gradients():
    head, hidden, targets = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(head, hidden, targets, vocab_size=V, max_logits=4 * V)
    assert not loss.requires_grad
    assert_close(loss, cross_entropy(head(hidden).flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize(("frozen", "expected"), [("head", 1), ("hidden", 1), ("both", 0)])
def test_frozen_parts(way, frozen, expected):
    head, hidden, targets = problem()
    way(head).requires_grad_(frozen == "hidden")
    hidden = hidden.detach().requires_grad_(frozen == "head")
    loss = linear_cross_entropy(head, hidden, targets, vocab_size=V, max_logits=4 * V)
    inputs = [tensor for tensor in (hidden, head.weight) if tensor.requires_grad]
    assert loss.requires_grad == bool(inputs)
    assert len(inputs) == expected
    if inputs:
        plain = cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
        assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(plain, inputs))


def test_backward_twice_adds_up(way):
    head, hidden, targets = problem()
    loss = linear_cross_entropy(way(head), hidden, targets, vocab_size=V, max_logits=4 * V)
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()
    loss.backward()
    assert_close(head.weight.grad, 2 * once)


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_model(build, tokens, tied, monkeypatch):
    model = build("mamba", tie_embeddings=tied).double()
    monkeypatch.setitem(linear_cross_entropy.__kwdefaults__, "max_logits", 61 * 4)
    weights = list(model.parameters())
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    plain = cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(loss, plain)
    expected = torch.autograd.grad(plain, weights)
    for a, b in zip(torch.autograd.grad(loss, weights), expected, strict=True):
        assert_close(a, b)
    each = model.loss(tokens[:, :-1], tokens[:, 1:], reduction="none")
    assert each.shape == (3, 16)
    assert_close(each.mean(), plain)


def test_wrong_use():
    head, hidden, targets = problem()
    with pytest.raises(UsageError, match="got 'average'"):
        linear_cross_entropy(head, hidden, targets, vocab_size=V, reduction="average")
    with pytest.raises(ValueError, match=r"targets must be \(3, 11\), one per token, got \(3, 10\)"):
        linear_cross_entropy(head, hidden, targets[:, 1:], vocab_size=V)
