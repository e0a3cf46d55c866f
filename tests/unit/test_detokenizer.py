from __future__ import annotations

import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.engine.detokenizer import Detokenizer

KINDS = pytest.mark.parametrize("kind", tiny.ALL)


def texts_after_each_token(tokenizer, ids, *, skip_special_tokens=True):
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    texts = []
    for token_id in ids:
        before = detokenizer.text
        detokenizer.append(token_id)
        unchanged = len(detokenizer.text) - detokenizer.num_new_chars
        assert detokenizer.text[:unchanged] == before[:unchanged]
        texts.append(detokenizer.text)
    return texts, detokenizer.finish()


def byte_ids(text):
    return [byte_id(b) for b in text.encode()]


def byte_id(byte):
    return tiny.sentencepiece_like().convert_tokens_to_ids(f"<0x{byte:02X}>")


@KINDS
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_final_text_equals_decoding_all_tokens_at_once_whatever_they_are(kind, data):
    tokenizer = tiny.ALL[kind]()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    skip = data.draw(st.booleans())
    _, text = texts_after_each_token(tokenizer, ids, skip_special_tokens=skip)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=20))
def test_each_byte_shows_exactly_the_characters_that_are_complete(text):
    texts, final = texts_after_each_token(tiny.byte_level(), tiny.byte_level_ids(text))
    assert texts == [text.encode()[: count + 1].decode(errors="ignore") for count in range(len(texts))]
    assert final == text


@KINDS
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_so_far_lacks_at_most_an_unfinished_character(kind, data):
    tokenizer = tiny.ALL[kind]()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    texts, _ = texts_after_each_token(tokenizer, ids)
    for count, shown in enumerate(texts, start=1):
        whole = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if not whole.endswith("\ufffd"):
            assert shown == whole


@pytest.mark.parametrize("kind", ["byte_level", "slow_byte_level"])
def test_a_character_split_over_tokens_appears_with_its_last_byte(kind):
    texts, _ = texts_after_each_token(tiny.ALL[kind](), tiny.byte_level_ids("a\u4f60b"))
    assert texts == ["a", "a", "a", "a\u4f60", "a\u4f60b"]


@pytest.mark.parametrize("kind", ["sentencepiece_like", "slow_sentencepiece_like"])
def test_leading_space_is_dropped_once_and_inner_spaces_stay(kind):
    hello = tiny.sentencepiece_like().convert_tokens_to_ids("\u2581hello")
    space = tiny.sentencepiece_like().convert_tokens_to_ids("\u2581")
    texts, final = texts_after_each_token(tiny.ALL[kind](), [hello, hello, space, hello])
    assert texts[0] == "hello"
    assert final == texts[-1] == "hello hello  hello"


def test_special_tokens_between_words_leave_the_space():
    tokenizer = tiny.sentencepiece_like()
    hello, eos = tokenizer.convert_tokens_to_ids(["\u2581hello", "</s>"])
    texts, _ = texts_after_each_token(tokenizer, [eos, hello, eos, eos, hello])
    assert texts == ["", "hello", "hello", "hello", "hello hello"]


def test_special_tokens_are_shown_when_not_skipped():
    tokenizer = tiny.byte_level()
    ids = tokenizer.convert_tokens_to_ids(["h", "</s>"])
    assert texts_after_each_token(tokenizer, ids, skip_special_tokens=False)[1] == "h</s>"


def test_unfinished_character_is_shown_only_by_finish():
    tokenizer = tiny.sentencepiece_like()
    ids = [tokenizer.convert_tokens_to_ids("a"), *byte_ids("\u4f60")[:2]]
    texts, final = texts_after_each_token(tokenizer, ids)
    assert texts == ["a", "a", "a"]
    assert final == "a\ufffd\ufffd"


def test_bytes_that_turn_out_invalid_change_the_text_as_the_tokenizer_does():
    tokenizer = tiny.sentencepiece_like()
    after, hello = tokenizer.convert_tokens_to_ids(["b", "\u2581hello"])
    ids = [*byte_ids("\u00e9"), byte_id(0xFF), after, hello, *byte_ids("\u00e9")]
    texts, final = texts_after_each_token(tokenizer, ids)
    garbled = "\ufffd\ufffd\ufffdb"
    assert texts[:4] == ["", "\u00e9", "\u00e9", garbled]
    assert texts[4:] == [f"{garbled} hello", f"{garbled} hello", f"{garbled} hello\u00e9"]
    assert final == texts[-1]


def test_errors_of_the_decoder_that_are_not_about_the_text_are_not_hidden():
    class BrokenStream:
        def step(self, _tokenizer, _token_id):
            raise RuntimeError("out of ids")

    detokenizer = Detokenizer(tiny.byte_level())
    detokenizer._stream = BrokenStream()
    with pytest.raises(RuntimeError, match="out of ids"):
        detokenizer.append(1)
        _ = detokenizer.text
