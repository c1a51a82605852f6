"""Text in and out: what is said, where it ends, and what the state holds then."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stop import expected

from longwave.errors import LongwaveError, UsageError
from longwave.generate.sampling import Sampling
from longwave.generate.text_model import TextModel
from longwave.mixers import GRU, Bidirectional
from longwave.models.language_model import LanguageModel
from longwave.models.state import State
from longwave.tasks.tokenizer import ByteTokenizer, load_tokenizer, train_bpe

GREEDY = {"temperature": 0}


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.sampled_from("ab\n\u00e9\u20ac\U0001f600"), min_size=1, max_size=20),
    stops=st.lists(st.text(st.sampled_from("ab\n\u00e9\u20ac"), min_size=1, max_size=3), max_size=2),
)
def test_bytes_become_whole_characters_up_to_the_stop(scripted, text, stops):
    said, hit = expected(text, stops)
    n = len(text.encode())
    pieces = list(scripted(text).generate("x", max_tokens=n, stop=stops, **GREEDY))
    assert "".join(map(str, pieces)) == said
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == ("stop" if hit else "length")
    assert bytes(piece.token for piece in pieces) == text.encode()[: len(pieces)]
    completion = scripted(text).complete("x", max_tokens=n, stop=stops, **GREEDY)
    assert str(completion) == completion.text == said
    assert completion.tokens == [piece.token for piece in pieces]
    assert completion.logprobs == [piece.logprob for piece in pieces]
    assert completion.finish_reason == pieces[-1].finish_reason
    assert completion.state.position.tolist() == [1 + len(pieces)]


def test_text_comes_as_soon_as_it_is_certain(scripted):
    model = scripted("a\u20acb User: hi")
    pieces = list(model.generate("x", stop=["User:", "\n"], **GREEDY))
    assert [piece.text for piece in pieces] == ["a", "", "", "\u20ac", "b", " ", "", "", "", "", ""]
    assert pieces[-1].finish_reason == "stop"


def test_what_was_held_back_is_said_at_the_end(scripted):
    at_length = scripted("abc Users").complete("x", max_tokens=6, stop="User", **GREEDY)
    at_end = scripted([*b"abc Us", 256]).complete("x", stop="User", **GREEDY)
    assert (at_length.text, at_length.finish_reason) == ("abc Us", "length")
    assert (at_end.text, at_end.finish_reason) == ("abc Us", "end")


def test_the_end_token_is_drawn_and_taken_in_but_not_said(scripted):
    completion = scripted([65, 256, 66]).complete("x", **GREEDY)
    assert (completion.text, completion.tokens, completion.finish_reason) == ("A", [65, 256], "end")
    assert completion.state.position.tolist() == [3]


def test_half_a_character_at_max_tokens_reads_as_the_replacement_character(scripted):
    pieces = list(scripted("\u20ac").generate("x", max_tokens=2, **GREEDY))
    assert [piece.text for piece in pieces] == ["", "\ufffd"]


def test_max_tokens_0_takes_in_the_prompt_alone(scripted):
    stream = scripted("abc").generate("xyz", max_tokens=0)
    assert (list(stream), stream.finish_reason, stream.state.position.tolist()) == ([], "length", [3])
    completion = scripted("abc").complete("xyz", max_tokens=0)
    assert (completion.text, completion.tokens, completion.state.position.tolist()) == ("", [], [3])


def test_no_step_is_made_before_it_is_needed(scripted):
    model = scripted("abcdef")
    stream = model.generate("x", max_tokens=5, **GREEDY)
    assert (len(list(stream)), model.model.steps) == (5, 4)
    assert stream.state.position.tolist() == [6]
    assert stream.state.position.tolist() == [6]
    assert model.model.steps == 5
    assert next(stream, None) is None


def test_an_empty_prompt_begins_after_an_end_token(tiny):
    assert tiny.complete("", max_tokens=5, seed=1).tokens == tiny.complete([256], max_tokens=5, seed=1).tokens
    assert (
        tiny.complete_batch(["", "ab"], max_tokens=5, seed=1)[0].tokens
        == tiny.complete([256], max_tokens=5, seed=1).tokens
    )
    with pytest.raises(UsageError, match="empty prompt"):
        tiny.complete("", state=tiny.complete("ab", max_tokens=1).state)
    with pytest.raises(UsageError, match="empty prompt"):
        TextModel(tiny.model, None).complete([])


def full_logits(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0][0].double()


def test_greedy_equals_the_argmax_of_the_whole_sequence_each_time(tiny):
    tokens = list(b"Once upon")
    for _ in range(30):
        tokens.append(int(full_logits(tiny.model, tokens)[-1].argmax()))
    assert tiny.complete("Once upon", max_tokens=30, **GREEDY).tokens == tokens[9:]


@pytest.mark.parametrize("options", [GREEDY, {"temperature": 2.0, "top_k": 20}, {"repetition_penalty": 2.0}], ids=str)
def test_logprobs_are_of_the_model_itself(tiny, options):
    completion = tiny.complete("Once upon", max_tokens=20, seed=0, logprobs=4, **options)
    logits = full_logits(tiny.model, [*b"Once upon", *completion.tokens])
    wanted = logits.softmax(-1).log()[8:-1]
    for i, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        assert logprob == pytest.approx(float(wanted[i, token]), abs=1e-5)
        best = wanted[i].argsort(descending=True)[:4].tolist()
        assert [alternative[0] for alternative in completion.alternatives[i]] == best
        assert [alternative[1] for alternative in completion.alternatives[i]] == pytest.approx(
            wanted[i, best].tolist(), abs=1e-5
        )


def test_options_come_as_keywords_or_as_a_sampling(tiny):
    plain = tiny.complete("ab", max_tokens=20, temperature=0.7, top_p=0.9, seed=3)
    assert (
        tiny.complete("ab", max_tokens=20, sampling=Sampling(temperature=0.7, top_p=0.9, seed=3)).tokens == plain.tokens
    )
    assert (
        tiny.complete("ab", max_tokens=20, sampling=Sampling(temperature=0.7, seed=9), top_p=0.9, seed=3).tokens
        == plain.tokens
    )
    assert tiny.complete("ab", max_tokens=20, temperature=0.7, top_p=0.9, seed=4).tokens != plain.tokens
    with pytest.raises(UsageError, match=r"'top'.*top_"):
        tiny.generate("ab", top=3)


def test_without_a_seed_two_runs_differ(tiny):
    assert tiny.complete("ab", max_tokens=40).tokens != tiny.complete("ab", max_tokens=40).tokens


def test_gradients_are_the_callers_own_affair(tiny):
    for _ in tiny.generate("ab", max_tokens=2):
        assert torch.is_grad_enabled()
    state = tiny.complete("ab", max_tokens=2).state
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in state.layers[0])


def test_ids_alone_without_a_tokenizer(tiny):
    bare = TextModel(tiny.model, None)
    assert bare.complete([97, 98], max_tokens=9, seed=0).tokens == tiny.complete("ab", max_tokens=9, seed=0).tokens
    assert bare.complete(torch.tensor([97, 98]), max_tokens=9, seed=0).text == ""
    with pytest.raises(UsageError, match=r"without a tokenizer.*'Hello'"):
        bare.generate("Hello")
    with pytest.raises(UsageError, match="needs a tokenizer"):
        bare.generate([97], stop="x")


def test_a_tokenizer_that_does_not_fit_is_refused(tiny, tiny_model):
    for size in (259, 65_536):
        with pytest.raises(UsageError, match=rf"{size} tokens and the model 257"):
            TextModel(tiny.model, Sized(size))
    with pytest.raises(UsageError, match="257 tokens and the model 5000"):
        TextModel(tiny_model(vocab_size=5000), ByteTokenizer())


class Sized(ByteTokenizer):
    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def test_padding_of_the_vocabulary_is_never_drawn(scripted):
    model = scripted([65, 260, 66], vocab_size=264)
    completion = model.complete("x", max_tokens=3, **GREEDY)
    assert (completion.tokens, completion.text) == ([65, 0, 66], "A\0B")
    assert completion.logprobs[1] == pytest.approx(-math.log(263 + math.exp(9)), abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([97, 257], {}, "token 257 is not in the model's vocabulary of 257; ids are 0 to 256"),
        ([-1], {}, "token -1 "),
        (["a", "b"], {}, r"got \['a', 'b'\]; for several, use complete_batch"),
        ("a", {"max_tokens": -1}, "max_tokens must be 0 or more, got -1"),
        ("a", {"chunk_len": 0}, "chunk_len must be at least 1, got 0"),
        ("a", {"logprobs": 258}, "logprobs must be .*257, got 258"),
        ("a", {"stop": ["b", ""]}, "empty string"),
        ("a", {"temperature": -1}, "temperature must be .* got -1"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_said(tiny, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        tiny.generate(prompt, **options)


def test_one_text_is_no_batch(tiny):
    with pytest.raises(UsageError, match="list of prompts, got one text, 'abc'; use complete"):
        tiny.complete_batch("abc")
    assert tiny.complete_batch([]) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [GREEDY, {}, {"top_p": 0.5}, {"repetition_penalty": 1.5}], ids=str)
def test_a_broken_model_is_found_out(scripted, value, options):
    model = scripted("abc")
    model.model.head = lambda hidden: torch.full((len(hidden), 257), value)
    with pytest.raises(LongwaveError, match="not finite"):
        next(model.generate("x", **options))


def test_saved_and_loaded_says_the_same(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    again = TextModel(LanguageModel.load(tmp_path / "model"), load_tokenizer(tmp_path / "model"))
    assert again.complete("Once", max_tokens=20, seed=0).tokens == tiny.complete("Once", max_tokens=20, seed=0).tokens
    assert again.to("cpu") is again


def test_a_bpe_tokenizer_streams_what_it_decodes(tiny_model):
    tokenizer = train_bpe(["the sea, the sky and the \u20ac sign"] * 3, 280)
    model = TextModel(tiny_model(vocab_size=288), tokenizer)
    completion = model.complete("the sea", max_tokens=80, seed=2)
    assert completion.text == tokenizer.decode(completion.tokens)
    assert "".join(map(str, model.generate("the sea", max_tokens=80, seed=2))) == completion.text


def test_score_is_the_softmax_of_the_whole_sequence(tiny):
    text = "na\u00efve text, in chunks"
    ids = list(text.encode())
    wanted = full_logits(tiny.model, [256, *ids]).softmax(-1).log()[:-1].gather(-1, torch.tensor(ids)[:, None])[:, 0]
    for chunk_len in (1, 7, 23, 512):
        score = tiny.score(text, chunk_len=chunk_len)
        assert score.tokens == ids
        assert score.logprobs == pytest.approx(wanted.tolist(), abs=1e-5)
        assert score.bits_per_byte == pytest.approx(-float(wanted.sum()) / math.log(2) / 22, rel=1e-6)
    assert tiny.score(ids).bits_per_byte == tiny.score(text).bits_per_byte


def test_score_of_a_model_that_knows_the_text(scripted):
    score = scripted("abc").score("abc")
    each = -math.log(1 + 256 * math.exp(-9))
    assert score.logprobs == pytest.approx([each] * 3, rel=1e-5)
    assert score.total == pytest.approx(3 * each, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(-each / math.log(2), rel=1e-5)


def test_score_without_an_end_token_or_a_tokenizer(tiny):
    class Endless(ByteTokenizer):
        end = None

    whole = tiny.score([97]).logprobs
    assert len(whole) == 1
    logprobs = full_logits(tiny.model, list(b"abc")).softmax(-1).log()
    wanted = [None, pytest.approx(float(logprobs[0, 98]), abs=1e-5), pytest.approx(float(logprobs[1, 99]), abs=1e-5)]
    endless = TextModel(tiny.model, Endless()).score("abc")
    assert endless.logprobs == wanted
    assert endless.n_bytes == 2
    bare = TextModel(tiny.model, None).score(b"abc")
    assert bare.logprobs == wanted
    assert bare.bits_per_byte is None
    assert TextModel(tiny.model, Endless()).score("a").logprobs == [None]
    with pytest.raises(UsageError, match="empty text"):
        tiny.score("")


def test_a_state_of_other_rows_is_refused(tiny):
    state = tiny.model.init_state(2)
    assert isinstance(state, State)
    with pytest.raises(UsageError, match="2 rows and there are 3 prompts"):
        tiny.complete_batch(["a", "b", "c"], state=state)


def test_a_model_that_sees_the_future_writes_no_text():
    config = LanguageModel.Config(vocab_size=257, d_model=16, layers=(Bidirectional.Config(mixer=GRU.Config()),))
    with pytest.raises(UsageError, match="sees what it would have to foretell"):
        TextModel(LanguageModel(config), ByteTokenizer())
