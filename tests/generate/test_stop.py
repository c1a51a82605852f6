"""Stop strings, against reading the text character by character."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longwave.errors import UsageError
from longwave.generate.stop import StopText

letters = st.text("ab", max_size=30)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is said, and whether a stop string ended it: the first to be complete, the longest of several."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(
    text=letters,
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
@example(text="aab", stops=["ab"], cuts=[1, 2])
@example(text="abab", stops=["abb", "ba"], cuts=[])
def test_any_split_says_the_same(text, stops, cuts):
    said, hit = expected(text, stops)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    stop_text = StopText(stops)
    out = ""
    for a, b in itertools.pairwise(bounds):
        out += stop_text.push(text[a:b])
        assert said.startswith(out), "text was said that should have been held back"
    out += stop_text.flush()
    assert (out, stop_text.hit) == (said, hit)


def test_nothing_is_held_back_without_need():
    stop_text = StopText("User:")
    said = [stop_text.push(part) for part in ("a U", "se", "d U", "ser", ": hi", "more")]
    assert said == ["a ", "", "Used ", "", "", ""]
    assert stop_text.hit
    assert stop_text.flush() == ""


def test_one_string_is_one_stop():
    stop_text = StopText("ab")
    assert stop_text.push("xaaby") == "xa"
    assert stop_text.hit


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UsageError, match=r"\('x', ''\).*leave it out"):
        StopText(["x", ""])
