"""Answers cut into pieces while they grow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.engine.pieces import Pieces, open_stop
from moe_lightning.engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

TEXTS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def output_of(*answers):
    return RequestOutput("r", None, (1,), list(answers), finished=False)


def growing(text, tokens, reason=None, index=0, logprobs=None):
    return CompletionOutput(index, text, tuple(range(tokens)), reason, logprobs=logprobs)


@given(TEXTS, STOPS, st.lists(st.integers(0, 12), max_size=6), st.booleans())
def test_pieces_join_to_the_answer_and_none_shows_what_a_stop_string_cuts_off(text, stops, looks, includes):
    params = SamplingParams(stop=stops or None, include_stop_str_in_output=includes)
    pieces = Pieces(params)
    # The answer ends before the first stop string that is complete, as the engine cuts it.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    last = len(text) if not ends else min(ends)[0] if includes else min(ends)[1]
    seen = len(text) if not ends else min(ends)[0] - 1  # what is there before the stop is complete
    shown = []
    for look in sorted(looks):
        shown += pieces.take(output_of(growing(text[: min(look, seen)], look)))
    shown += pieces.take(output_of(growing(text[:last], 20, "stop")))
    assert "".join(piece.text for piece in shown) == text[:last]
    assert [token for piece in shown for token in piece.token_ids] == list(range(20))
    assert [piece.finish_reason for piece in shown[:-1]] == [None] * (len(shown) - 1)
    assert shown[-1].finish_reason == "stop"
    assert pieces.take(output_of(growing(text[:last], 20, "stop"))) == []


@given(TEXTS, STOPS)
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(text, stops):
    held = open_stop(text, stops)
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    longest = max((len(b) for b in beginnings if text.endswith(b)), default=0)
    assert held == longest


def test_each_of_n_answers_has_its_own_pieces():
    pieces = Pieces(SamplingParams(n=2))
    first = pieces.take(output_of(growing("a", 1), growing("", 1, index=1)))
    assert [(p.index, p.text) for p in first] == [(0, "a")]
    second = pieces.take(output_of(growing("ab", 2, "stop"), growing("xy", 2, index=1)))
    assert [(p.index, p.text, p.token_ids) for p in second] == [(0, "b", (1,)), (1, "xy", (0, 1))]
    third = pieces.take(output_of(growing("ab", 2, "stop"), growing("xyz", 3, "length", index=1)))
    assert [(p.index, p.text) for p in third] == [(1, "z")]


def test_tokens_without_text_come_where_log_probabilities_are_wanted():
    scores = [{0: Logprob(-1.0, 1)}, {1: Logprob(-2.0, 1)}]
    pieces = Pieces(SamplingParams(logprobs=0))
    (piece,) = pieces.take(output_of(growing("", 1, logprobs=scores[:1])))
    assert (piece.text, piece.token_ids, piece.logprobs) == ("", (0,), scores[:1])
    (piece,) = pieces.take(output_of(growing("a", 2, logprobs=scores)))
    assert (piece.text, piece.token_ids, piece.logprobs) == ("a", (1,), scores[1:])
    assert Pieces(SamplingParams()).take(output_of(growing("", 1))) == []
