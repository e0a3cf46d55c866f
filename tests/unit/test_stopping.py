from __future__ import annotations

from itertools import pairwise

import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.engine.detokenizer import Detokenizer
from moe_lightning.engine.request import SamplingParams
from moe_lightning.engine.stopping import (
    Finish,
    accept_token,
    find_stop_string,
    forbidden_token_ids,
    max_new_tokens,
)

EOS, STOP_ID = 900, 901
ABC = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


class Pieces:
    """A tokenizer whose token i is the i-th string given; other ids have no text, as special tokens."""

    def __init__(self, pieces):
        self._pieces = pieces

    def decode(self, token_ids, **_):
        return "".join(self._pieces[i] if i < len(self._pieces) else "" for i in token_ids)


def generate(params, pieces, ids=None, limit=1000, tokenizer=None):
    """Accept the ids until one finishes the sequence: (tokens used, finish)."""
    ids = list(range(len(pieces))) if ids is None else ids
    detokenizer = Detokenizer(tokenizer or Pieces(pieces))
    for count in range(1, len(ids) + 1):
        finish = accept_token(detokenizer, params, {EOS}, ids[:count], limit)
        if finish:
            return count, finish
    return len(ids), None


def naive_stop(text, stops, first_end=1):
    """The stop string that ends first in the text, the longest of several; try every end and every string."""
    for end in range(first_end, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return max(found, key=len), end
    return None


@st.composite
def texts_in_pieces(draw):
    text = draw(ABC)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=400)
@given(texts_in_pieces(), STOPS, st.booleans())
def test_stop_strings_are_found_as_in_the_whole_text_however_it_is_cut_into_tokens(pieces, stops, include):
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, max_tokens=None)
    _, finish = generate(params, pieces)
    text = "".join(pieces)
    expected = naive_stop(text, stops)
    if expected is None:
        assert finish is None
    else:
        stop, end = expected
        assert finish == Finish("stop", stop, text[: end if include else end - len(stop)])


@settings(max_examples=200)
@given(texts_in_pieces(), STOPS, st.integers(0, 6))
def test_generation_stops_at_the_token_that_completes_the_first_match_beyond_min_tokens(pieces, stops, least):
    count, finish = generate(SamplingParams(stop=stops, max_tokens=None, min_tokens=least), pieces)
    text, protected = "".join(pieces), len("".join(pieces[:least]))
    expected = naive_stop(text, stops, first_end=protected + 1)
    assert (finish is None) == (expected is None)
    if expected:
        stop, end = expected
        assert finish.stop_reason == stop
        assert finish.text == text[: end - len(stop)]
        assert count > least
        assert len("".join(pieces[: count - 1])) < end <= len("".join(pieces[:count]))


def test_of_several_stop_strings_the_one_complete_first_wins_whatever_their_order():
    for stops in (("cd", "b"), ("b", "cd")):
        assert find_stop_string("abcd", 4, stops) == (1, 2, "b")


def test_of_stop_strings_that_end_together_the_longest_wins():
    for stops in (("c", "bc"), ("bc", "c")):
        assert find_stop_string("abc", 3, stops) == (1, 3, "bc")


def test_a_match_in_old_text_only_is_not_found_again():
    assert find_stop_string("abXc", 1, ("ab",)) is None
    assert find_stop_string("abXc", 1, ("Xc",)) == (2, 4, "Xc")


def test_without_new_characters_nothing_is_found():
    assert find_stop_string("ab", 0, ("b", "ab")) is None


@pytest.mark.parametrize("skip", [True, False])
def test_eos_stops_without_a_reason_and_stays_out_of_the_text(skip):
    tokenizer = tiny.byte_level()
    ids = tokenizer.convert_tokens_to_ids(["h", "ll", "</s>"])
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    params = SamplingParams(skip_special_tokens=skip)
    finishes = [accept_token(detokenizer, params, {ids[-1]}, ids[:n], 16) for n in (1, 2, 3)]
    assert finishes == [None, None, Finish("stop", None, "hll")]


def test_a_stop_token_is_named_and_stays_out_of_the_text_unless_included():
    for include, text in ((False, "a"), (True, "ab")):
        params = SamplingParams(stop_token_ids=[1], include_stop_str_in_output=include)
        assert generate(params, ["a", "b", "c"]) == (2, Finish("stop", 1, text))


def test_ignored_eos_goes_on_unless_it_is_also_a_stop_token():
    assert generate(SamplingParams(ignore_eos=True), ["a", "b"], [0, EOS, 1]) == (3, None)
    params = SamplingParams(ignore_eos=True, stop_token_ids=[EOS])
    assert generate(params, ["a", "b"], [0, EOS, 1]) == (2, Finish("stop", EOS, "a"))


def test_eos_that_is_also_a_stop_token_counts_as_eos():
    params = SamplingParams(stop_token_ids=[EOS])
    assert generate(params, ["a"], [0, EOS]) == (2, Finish("stop", None, "a"))


def test_stop_tokens_before_min_tokens_do_not_stop():
    params = SamplingParams(min_tokens=3, stop_token_ids=[STOP_ID])
    assert generate(params, ["a"], [EOS, STOP_ID, 0, STOP_ID]) == (4, Finish("stop", STOP_ID, "a"))


def test_length_ends_at_the_limit_with_all_the_text():
    assert generate(SamplingParams(), ["a", "b", "c"], limit=2) == (2, Finish("length", None, "ab"))


def test_length_shows_an_unfinished_character_as_the_tokenizer_does():
    ids = tiny.byte_level_ids("a\u4f60")[:-1]
    _, finish = generate(SamplingParams(), [], ids, limit=3, tokenizer=tiny.byte_level())
    assert finish == Finish("length", None, "a\ufffd")


def test_what_stops_at_the_last_allowed_token_is_a_stop():
    assert generate(SamplingParams(stop="b"), ["a", "b"], limit=2) == (2, Finish("stop", "b", "a"))
    assert generate(SamplingParams(), ["a"], [0, EOS], limit=2) == (2, Finish("stop", None, "a"))


def test_a_stop_string_may_end_in_a_character_split_over_tokens():
    ids = tiny.byte_level_ids("ab\u4f60c")
    expected = (5, Finish("stop", "b\u4f60", "a"))
    assert generate(SamplingParams(stop="b\u4f60"), [], ids, tokenizer=tiny.byte_level()) == expected


def test_a_stop_string_is_found_in_text_that_invalid_bytes_change():
    tokenizer = tiny.sentencepiece_like()
    e_acute = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xFF>", "b"])
    params = SamplingParams(stop="\ufffd\ufffd\ufffdb")
    assert generate(params, [], e_acute, tokenizer=tokenizer) == (4, Finish("stop", params.stop, ""))


@pytest.mark.parametrize(
    ("max_tokens", "prompt", "expected"), [(16, 10, 16), (16, 95, 5), (None, 10, 90), (0, 10, 0), (5, 101, 0)]
)
def test_new_tokens_are_bounded_by_max_tokens_and_by_the_context(max_tokens, prompt, expected):
    assert max_new_tokens(SamplingParams(max_tokens=max_tokens), prompt, 100) == expected


def test_eos_and_stop_ids_are_forbidden_until_min_tokens_are_generated():
    params = SamplingParams(min_tokens=2, stop_token_ids=[7, 3])
    assert [forbidden_token_ids(params, (5,), n) for n in range(4)] == [(3, 5, 7), (3, 5, 7), (), ()]
