"""Together or alone, in chunks or whole, carried over or in one go: the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longwave.generate.prefill import prefill
from longwave.generate.text_model import Completion, TextModel
from longwave.models.state import State
from longwave.tasks.tokenizer import ByteTokenizer


def tensors(state: State) -> list[torch.Tensor]:
    return [tensor for layer in state.layers if layer is not None for tensor in layer] + [state.position]


def same_state(ours: State, theirs: State) -> None:
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def same_completion(ours: Completion, theirs: Completion) -> None:
    assert ours.tokens == theirs.tokens
    assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def prefilled(text_model: TextModel, tokens: list[int]) -> State:
    """The state of tokens that were all read at once, by the model's own forward."""
    with torch.no_grad():
        return text_model.model(torch.tensor([tokens]))[1].reserve(0)


prompts = st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=40), min_size=1, max_size=4)
options = st.sampled_from(
    [{"temperature": 0}, {}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.02, "repetition_penalty": 1.3}]
)


@settings(max_examples=25, deadline=None)
@given(prompts=prompts, options=options, chunk_len=st.integers(1, 50), seed=st.integers(0, 99), shared=st.booleans())
def test_a_batch_is_each_prompt_alone(tiny, prompts, options, chunk_len, seed, shared):
    # Stop strings of one letter end the rows at different times.
    settings = {"max_tokens": 12, "stop": ["a", "e", "\x07", "7", "T", "&"], "logprobs": 2, **options}
    state = prefilled(tiny, list(b"Before")) if shared else None
    together = tiny.complete_batch(prompts, chunk_len=chunk_len, seed=seed, state=state, **settings)
    for i, (prompt, completion) in enumerate(zip(prompts, together, strict=True)):
        same_completion(completion, tiny.complete(prompt, seed=seed + i, state=state, **settings))
        before = list(b"Before") if shared else []
        same_state(completion.state, prefilled(tiny, [*before, *prompt, *completion.tokens]))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.95}], ids=str)
def test_a_batch_in_float32_is_each_prompt_alone(tiny_model, options):
    model = TextModel(tiny_model(dtype=torch.float32), ByteTokenizer())
    prompts = ["a", "The sea, the sea", "x" * 70]
    together = model.complete_batch(prompts, max_tokens=64, seed=0, chunk_len=32, **options)
    for i, (prompt, completion) in enumerate(zip(prompts, together, strict=True)):
        assert completion.tokens == model.complete(prompt, max_tokens=64, seed=i, **options).tokens


def test_rows_of_a_state_go_to_their_prompts(tiny):
    first = [tiny.complete(prompt, max_tokens=3, seed=0) for prompt in ("ab", "cdefg")]
    both = tiny.complete_batch(["ab", "cdefg"], max_tokens=0)
    with torch.no_grad():
        lengths = torch.tensor([2, 5])
        tokens = torch.tensor([[97, 98, 0, 0, 0], [99, 100, 101, 102, 103]])
        state = tiny.model(tokens, lengths=lengths)[1]
    for row in range(2):
        same_state(both[row].state, state.index_select([row]).reserve(0))
    together = tiny.complete_batch(["x", "yz"], state=state, max_tokens=9, seed=4)
    same_completion(together[0], tiny.complete("abx", max_tokens=9, seed=4))
    same_completion(together[1], tiny.complete("cdefgyz", max_tokens=9, seed=5))
    assert [completion.state.position.item() for completion in first] == [5, 8]


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3), chunk_len=st.integers(1, 80))
def test_prefill_in_chunks_is_the_whole(tiny, lengths, chunk_len):
    generator = torch.Generator().manual_seed(sum(lengths))
    prompts = [torch.randint(257, (l,), generator=generator).tolist() for l in lengths]
    logits, state = prefill(tiny.model, prompts, chunk_len=chunk_len)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            whole, final = tiny.model(torch.tensor([prompt]))
        torch.testing.assert_close(logits[row], whole[0, -1], rtol=1e-9, atol=1e-9)
        same_state(state.index_select([row]).reserve(0), final.reserve(0))


@settings(max_examples=15, deadline=None)
@given(first=st.text("ab ", min_size=1, max_size=9), more=st.text("cd ", min_size=1, max_size=9), n=st.integers(0, 9))
def test_a_conversation_carried_over_in_a_file_is_one_prompt(tiny, tmp_path_factory, first, more, n):
    path = tmp_path_factory.mktemp("state") / "talk.state"
    said = tiny.complete(first, max_tokens=n, seed=0)
    said.state.save(path)
    state = State.load(path, tiny.model)
    settings = {"max_tokens": 15, "seed": 1, "repetition_penalty": 1.2}
    carried = tiny.complete(more, state=state, **settings)
    whole = tiny.complete([*first.encode(), *said.tokens, *more.encode()], **settings)
    same_completion(carried, whole)
    same_state(carried.state, whole.state)


def test_the_state_given_is_left_as_it_was(tiny):
    state = tiny.complete("some text before", max_tokens=5, seed=0).state
    before = [tensor.clone() for tensor in tensors(state)]
    for _ in range(2):
        list(tiny.generate("and more", state=state, max_tokens=70))
        tiny.complete_batch(["a", "bcd"], state=state, max_tokens=70)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


def test_a_stream_may_be_left_at_any_token(tiny):
    whole = tiny.complete("Once", max_tokens=80, seed=0).tokens
    stream = tiny.generate("Once", max_tokens=80, seed=0)
    drawn = [next(stream).token for _ in range(9)]
    state = stream.state
    same_state(state, prefilled(tiny, [*b"Once", *drawn]))
    drawn += [piece.token for piece in stream]
    assert drawn == whole, "asking for the state must not disturb the stream"
    same_state(state, prefilled(tiny, [*b"Once", *drawn[:9]]))
    same_state(stream.state, prefilled(tiny, [*b"Once", *drawn]))


def test_rows_that_are_done_leave_the_batch(scripted):
    model = scripted([*b"abcdefgh"])
    sizes = []
    step = model.model.step

    def counted(tokens, state):
        sizes.append(len(tokens))
        return step(tokens, state)

    model.model.step = counted
    # After n tokens the script says its token number n: longer prompts meet the stop sooner.
    completions = model.complete_batch(["x", "xxx", "xxxxxx"], stop="g", temperature=0)
    assert [completion.text for completion in completions] == ["abcdef", "cdef", "f"]
    assert [completion.state.position.item() for completion in completions] == [8, 8, 8]
    assert sizes == [3, 3, 2, 2, 2, 1, 1]
