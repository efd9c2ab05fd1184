"""Text out of tokens as they come: all of it, whole characters, and nothing of what ends it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.generation.reply import Reply
from rwkv_train.tokenizer import load_tokenizer, train_bpe

BYTES = load_tokenizer("bytes")
TOKENIZERS = [BYTES, load_tokenizer("world"), train_bpe(["Hello 你好🤖é, how are you?\n"] * 20, 330)]


def pieces(tokenizer, ids, stop=()) -> list[str]:
    reply, found = Reply(tokenizer, None, stop=stop), []
    for token in ids:
        found.append(reply.push(token, lambda: None))
        if reply.done:
            break
    return [*found, reply.finish()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "world", "bpe"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)) + tokenizer.encode("🤖é")
    ids = ids[: data.draw(st.integers(0, len(ids)))]  # also stops in the middle of a character
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_piece_waits_for_the_whole_character():
    assert pieces(BYTES, BYTES.encode("a你b")) == ["a", "", "", "你", "b", ""]


TEXT = st.text(st.sampled_from("ab\n 你🤖"), max_size=12)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "world", "bpe"])
@settings(max_examples=80, deadline=None)
@given(text=TEXT, stop=st.lists(st.text(st.sampled_from("ab\n 你🤖"), min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_the_first_of_its_stops(tokenizer, text, stop):
    """And what was shown on the way is a part of it."""
    shown = pieces(tokenizer, tokenizer.encode(text), tuple(stop))
    assert "".join(shown) == text[: min((text.find(end) for end in stop if end in text), default=len(text))]
