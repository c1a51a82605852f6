"""Heads: pooled answers, answers per token, and CTC, against closed forms and on problems with a known solution."""

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from longwave.config import to_dict
from longwave.errors import LongwaveError, UsageError
from longwave.mixers import GRU, S4D, Bidirectional, Mamba2, SwiGLU
from longwave.models import heads, kinds
from longwave.models.features import Features
from longwave.models.heads import (
    CTC,
    HEADS,
    Embedder,
    Regressor,
    SequenceClassifier,
    TokenClassifier,
    TokenRegressor,
    pool,
)
from longwave.models.language_model import LanguageModel
from longwave.models.loss import info_nce
from longwave.models.state import State

torch.set_num_threads(1)
V, D, L = 19, 16, 9
MAMBA2 = Mamba2.Config(d_state=4, d_head=8)
BOTH = Bidirectional.Config(mixer=MAMBA2)
TOKENS = LanguageModel.Config(vocab_size=V, d_model=D, layers=(MAMBA2, SwiGLU.Config(d_inner=24)), tie_embeddings=False)
ENCODER = LanguageModel.Config(vocab_size=V, d_model=D, layers=(BOTH, BOTH))
VECTORS = Features.Config(d_input=3, d_model=D, layers=(BOTH, GRU.Config()))
STREAM = Features.Config(d_input=3, d_model=D, layers=(S4D.Config(d_state=4), S4D.Config(d_state=6)))
OPTIONS = {
    "sequence_classifier": {"n_classes": 4},
    "regressor": {"n_targets": 4, "pooling": "max"},
    "embedder": {"d_embedding": 4, "pooling": "last"},
    "token_classifier": {"n_classes": 4},
    "token_regressor": {"n_targets": 4},
    "ctc": {"n_labels": 3},
}
LENGTHS = torch.tensor([9, 1, 6])


def build(kind: str, encoder: Any = VECTORS, **options) -> Any:
    torch.manual_seed(2)
    head: Any = HEADS[kind]
    return head(head.Config(encoder=encoder, **OPTIONS[kind] | options)).double()


def answers(model: Any, x: Tensor, **given) -> Tensor:
    y = model(x, **given)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_padded_is_alone(kind):
    model, x = build(kind), torch.randn(3, L, 3, dtype=torch.float64)
    for row, n in enumerate(LENGTHS.tolist()):
        x[row, n:] = torch.nan
    y = answers(model, x, lengths=LENGTHS)
    for row, n in enumerate(LENGTHS.tolist()):
        alone = answers(model, x[row : row + 1, :n])[0]
        assert_close(y[row] if y.ndim == 2 else y[row, :n], alone)


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_packed_documents_have_answers_of_their_own(kind):
    model, x = build(kind), torch.randn(3, L, 3, dtype=torch.float64)
    reset = torch.zeros(3, L, dtype=torch.bool)
    reset[0, [2, 5]] = reset[2, [0, 4, 7]] = True
    lengths = torch.tensor([9, 0, 6])
    y = answers(model, x, reset=reset, lengths=lengths)
    documents = [(0, 0, 2), (0, 2, 5), (0, 5, 9), (2, 0, 4), (2, 4, 6)]
    alone = [answers(model, x[row : row + 1, a:z])[0] for row, a, z in documents]
    if y.ndim == 2:
        assert_close(y, torch.stack(alone))
    else:
        assert_close([y[row, a:z] for row, a, z in documents], alone)


def test_pooling():
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -1.0], [5.0, -9.0]], [[7.0, 8.0], [0.0, 0.0], [9.0, 9.0]]])
    lengths = torch.tensor([2, 0])
    assert pool(hidden, "mean", lengths).tolist() == [[2.0, -2.5], [0.0, 0.0]]
    assert pool(hidden, "max", lengths).tolist() == [[3.0, -1.0], [0.0, 0.0]]
    assert pool(hidden, "last", lengths).tolist() == [[3.0, -1.0], [0.0, 0.0]]
    assert pool(hidden, "first", lengths).tolist() == [[1.0, -4.0], [0.0, 0.0]]
    assert pool(hidden, "max").tolist() == [[5.0, -1.0], [9.0, 9.0]]
    assert pool(hidden, "last").tolist() == [[5.0, -9.0], [9.0, 9.0]]
    assert pool(torch.full((1, 1000, 1), 0.1, dtype=torch.bfloat16), "mean").item() == pytest.approx(0.1, abs=1e-3)


def test_losses_leave_out_what_is_missing():
    x = torch.randn(3, L, 3, dtype=torch.float64)
    model = build("sequence_classifier")
    logits = model(x)
    expected = -(logits[0].log_softmax(-1)[3] + logits[2].log_softmax(-1)[0]) / 2
    assert_close(model.loss(x, torch.tensor([3, -100, 0])), expected)

    model, targets = build("token_classifier"), torch.randint(0, 4, (3, L))
    targets[0, 2] = 7
    kept = [(row, t) for row, n in enumerate(LENGTHS.tolist()) for t in range(n) if (row, t) != (0, 2)]
    logits = model(x, lengths=LENGTHS)[0]
    expected = torch.stack([cross_entropy(logits[row, t], targets[row, t]) for row, t in kept]).mean()
    assert_close(model.loss(x, targets, lengths=LENGTHS, ignore_index=7), expected)

    model, targets = build("regressor"), torch.randn(3, 4, dtype=torch.float64)
    expected = (model(x)[:2] - targets[:2]).square().mean()
    targets[2] = torch.nan
    assert_close(model.loss(x, targets), expected)
    with pytest.raises(ValueError, match=r"targets must be \(3, 4\), got \(3,\)"):
        model.loss(x, targets[:, 0])

    model, targets = build("token_regressor"), torch.randn(3, L, 4, dtype=torch.float64)
    errors = [(model(x, lengths=LENGTHS)[0] - targets)[row, :n].square() for row, n in enumerate(LENGTHS.tolist())]
    loss = model.loss(x, targets, lengths=LENGTHS)
    assert_close(loss, torch.cat(errors).mean())
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def spelt(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label)


@torch.no_grad()
def test_ctc_sums_over_all_ways_to_spell_the_labels():
    model, x = build("ctc"), torch.randn(2, 5, 3, dtype=torch.float64)
    labels, label_lengths, lengths = torch.tensor([[2, 2, 1], [3, 0, 0]]), torch.tensor([3, 1]), torch.tensor([5, 4])
    log_probs = model(x, lengths=lengths)[0].log_softmax(-1)
    losses = []
    for row in range(2):
        target, n = tuple(labels[row, : label_lengths[row]].tolist()), int(lengths[row])
        paths = [path for path in itertools.product(range(4), repeat=n) if spelt(path) == target]
        ways = torch.stack([log_probs[row, range(n), path].sum() for path in paths])
        losses.append(-ways.logsumexp(0) / len(target))
    assert_close(model.loss(x, labels, label_lengths, lengths=lengths), torch.stack(losses).mean())

    packed = torch.cat([x[0, :5], x[1, :4]])[None]
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 5] = True
    assert_close(model.loss(packed, labels, label_lengths, reset=reset), torch.stack(losses).mean())
    assert model.decode(packed, reset=reset) == model.decode(x, lengths=lengths)

    short = {"lengths": torch.tensor([3, 4])}  # 2 2 needs a blank between
    assert model.loss(x, labels, label_lengths, **short) == torch.inf
    assert model.loss(x, labels, label_lengths, zero_infinity=True, **short).isfinite()


def test_greedy_decoding_merges_repeats_and_drops_blanks(monkeypatch):
    model = build("ctc")
    best = torch.tensor([[0, 2, 2, 0, 2, 1, 1, 3], [3, 3, 3, 3, 0, 0, 1, 2]])
    monkeypatch.setattr(model, "forward", lambda x, **given: (nn.functional.one_hot(best).double(), None))
    assert model.decode(best) == [[2, 2, 1, 3], [3, 1, 2]]
    assert model.decode(best, lengths=torch.tensor([4, 0])) == [[2], []]


def test_embeddings():
    plain = build("embedder", d_embedding=None, normalize=False, pooling="mean")
    x = torch.randn(3, L, 3, dtype=torch.float64)
    assert_close(plain(x), plain.encoder.hidden(x)[0].mean(1))
    assert_close(build("embedder")(x).norm(dim=-1), torch.ones(3, dtype=torch.float64))
    a, b = torch.eye(3)[[0, 1]], torch.eye(3)[[0, 2]]
    # scores [[1, 0], [0, 0]] / temperature
    expected = (2 * (torch.tensor([2.0, 0.0]).logsumexp(0) - 2.0) + 2 * torch.tensor(2.0).log()) / 4
    assert_close(info_nce(a, b, temperature=0.5), expected)


@torch.no_grad()
def test_answers_per_token_stream():
    for kind in ("token_classifier", "token_regressor", "ctc"):
        model, x = build(kind, STREAM), torch.randn(2, L, 3, dtype=torch.float64)
        whole, _ = model(x, dt=0.5)
        first, state = model(x[:, :4], dt=0.5)
        assert_close(torch.cat([first, model(x[:, 4:], state, dt=0.5)[0]], 1), whole)
        state = model.init_state(2)
        assert_close(torch.stack([model.step(x[:, t], state, 0.5) for t in range(L)], 1), whole)
    model, tokens = build("token_classifier", TOKENS), torch.randint(0, V, (2, L))
    state = model.init_state(2)
    assert_close(torch.stack([model.step(tokens[:, t], state) for t in range(L)], 1), model(tokens)[0])


def test_dt_goes_to_the_encoder():
    rate = Features.Config(d_input=3, d_model=D, layers=(Bidirectional.Config(mixer=S4D.Config(d_state=4)),))
    x, dt = torch.randn(2, L, 3, dtype=torch.float64), torch.rand(2, L, dtype=torch.float64) + 0.1
    model, lengths = build("regressor", rate), torch.tensor([9, 5])
    y = model(x, lengths=lengths, dt=dt)
    assert_close(y[1:], model(x[1:, :5], dt=dt[1:, :5]))
    assert not torch.allclose(y, model(x, lengths=lengths))
    model.loss(x, torch.zeros(2, 4), lengths=lengths, dt=dt).backward()
    with pytest.raises(UsageError, match="bidirectional takes no dt"):
        build("regressor")(x, dt=dt)


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_folders(kind, tmp_path):
    model = build(kind, TOKENS).float()
    model.save(tmp_path)
    loaded, tokens = heads.load(tmp_path), torch.randint(0, V, (2, L))
    assert torch.equal(answers(loaded, tokens), answers(model, tokens))
    assert type(loaded).load(tmp_path).config == model.config
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings == json.loads(json.dumps(to_dict(model.config)))
    assert "lm_head" not in str(dict(model.named_parameters()).keys())
    with pytest.raises(UsageError, match=rf"a {kind} is a head and writes no tokens; longwave\.models\.heads\.load"):
        kinds.load(tmp_path)
    with pytest.raises(UsageError, match="unknown key 'poolin'"):
        type(model).Config.from_dict(settings | {"poolin": 1})


def test_a_folder_of_something_else(tmp_path):
    LanguageModel(TOKENS).save(tmp_path)
    with pytest.raises(UsageError, match="holds no head, but 'language_model'"):
        heads.load(tmp_path)
    build("ctc").save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LongwaveError, match="cannot read"):
        heads.load(tmp_path)


@torch.no_grad()
def test_over_a_pretrained_backbone():
    backbone, tokens = LanguageModel(TOKENS).bfloat16(), torch.randint(0, V, (2, L))
    model = SequenceClassifier.from_backbone(backbone, n_classes=3, pooling="last")
    assert model.config.encoder == TOKENS
    assert model.head.weight.dtype == torch.bfloat16
    expected = model.head(backbone.hidden(tokens)[0][:, -1])
    assert torch.equal(model(tokens), expected)
    assert not any(a.data_ptr() == b.data_ptr() for a in model.parameters() for b in backbone.parameters())
    vectors = Features(VECTORS)
    assert_close(
        TokenRegressor.from_backbone(vectors).encoder.hidden(torch.ones(1, 2, 3))[0],
        vectors.hidden(torch.ones(1, 2, 3))[0],
    )


def test_state_files(tmp_path):
    model, tokens = build("token_classifier", TOKENS).float(), torch.randint(0, V, (2, L))
    _, state = model(tokens)
    state.save(tmp_path / "s")
    assert torch.equal(model(tokens, State.load(tmp_path / "s", model))[0], model(tokens, state)[0])


def test_dropout_and_meta_device():
    model, x = build("regressor", dropout=1.0), torch.randn(2, L, 3, dtype=torch.float64)
    assert_close(model(x), model.head.bias.expand(2, 4))
    assert not torch.allclose(model.eval()(x), model.head.bias.expand(2, 4))
    for kind in OPTIONS:
        with torch.device("meta"):
            model = build(kind)
        model.to_empty(device="cpu").reset_parameters()
        assert answers(model, x).isfinite().all()


def train(model: Any, batch, steps: int, lr: float = 1e-2) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = model.loss(*batch[0], **batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_classifier_learns_which_token_is_there_more_than_once():
    """All eight classes, in rows of any length; what a mean of embeddings alone cannot tell from a pair of others."""
    torch.manual_seed(0)
    tokens = torch.stack([torch.randperm(8)[:6] for _ in range(64)])
    lengths = torch.randint(3, 7, (64,))
    answer = tokens[:, 0]
    tokens[torch.arange(64), lengths - 1] = answer
    encoder = LanguageModel.Config(vocab_size=8, d_model=32, layers=(BOTH, BOTH))
    model = SequenceClassifier(SequenceClassifier.Config(encoder=encoder, n_classes=8))
    assert train(model, ((tokens, answer), {"lengths": lengths}), 80) < 0.05
    assert torch.equal(model(tokens, lengths=lengths).argmax(-1), answer)


def test_a_tagger_sees_what_comes_after():
    """The tag of a token is the token two places on: only the backward direction knows it."""
    tokens = torch.randint(0, 5, (24, 12), generator=torch.Generator().manual_seed(1))
    targets = torch.cat([tokens[:, 2:], torch.full((24, 2), -100)], 1)
    torch.manual_seed(0)
    encoder = LanguageModel.Config(vocab_size=5, d_model=32, layers=(BOTH,))
    model = TokenClassifier(TokenClassifier.Config(encoder=encoder, n_classes=5))
    assert train(model, ((tokens, targets), {}), 120) < 0.1


def test_a_regressor_finds_the_least_squares_solution():
    """With the encoder fixed the problem is linear, and torch.linalg.lstsq knows the answer."""
    model, x = build("regressor", n_targets=1, pooling="mean"), torch.randn(40, L, 3, dtype=torch.float64)
    targets = torch.randn(40, 1, dtype=torch.float64)
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.LBFGS([*model.head.parameters()], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(x, targets)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    design = torch.cat([model.pooled(x), torch.ones(40, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(design, targets).solution
    assert_close(design @ best, model(x), atol=1e-4, rtol=0)


def test_ctc_learns_to_spell():
    """Labels stand for bursts of two to four equal vectors, with noise between; their times are not given."""
    generator = torch.Generator().manual_seed(3)
    rows, labels = [], torch.randint(1, 4, (16, 4), generator=generator)
    for row in labels:
        parts = []
        for label in row.tolist():
            parts += [torch.zeros(int(torch.randint(1, 3, (), generator=generator)), 3)]
            parts += [torch.eye(3)[label - 1].expand(int(torch.randint(2, 5, (), generator=generator)), 3)]
        rows.append(torch.cat(parts))
    lengths = torch.tensor([len(row) for row in rows])
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
    torch.manual_seed(0)
    model = CTC(CTC.Config(encoder=Features.Config(d_input=3, d_model=32, layers=(BOTH,)), n_labels=3))
    assert train(model, ((x, labels, torch.full((16,), 4)), {"lengths": lengths}), 120) < 0.3
    assert model.decode(x, lengths=lengths) == labels.tolist()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SequenceClassifier.Config(encoder=MAMBA2, n_classes=2), r"encoder must be LanguageModel\.Config"),
        (lambda: SequenceClassifier.Config(encoder=ENCODER, n_classes=0), "n_classes must be at least 1, got 0"),
        (
            lambda: Regressor.Config.from_dict({"encoder": to_dict(ENCODER), "pooling": "sum"}),
            "pooling must be one of mean, last, max, first, got 'sum'",
        ),  # pyright: ignore[reportArgumentType]
        (lambda: CTC.Config(encoder=ENCODER, n_labels=3, dropout=2.0), r"dropout must lie in 0\.\.1, got 2\.0"),
        (lambda: Embedder.Config(encoder=ENCODER, d_embedding=0), "d_embedding must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()
