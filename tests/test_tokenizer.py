"""Tokenizers: text comes back, ids equal the packages' own, and a stream decodes as the whole does."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.tokenizer import load_tokenizer, train_bpe

SAMPLE = ["the cat sat on the mat, the cat sat\n", "naïve café 你好 🤖 <|endoftext|> the end\n\n"] * 20
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("aé你🤖👩‍👩‍👧 \n\x00", max_size=30)


@pytest.fixture(scope="module")
def tokenizers():
    return {"world": load_tokenizer("world"), "bytes": load_tokenizer("bytes"), "bpe": train_bpe(SAMPLE, 320)}


@pytest.fixture(scope="module")
def rust():
    from pyrwkv_tokenizer import RWKVTokenizer

    return RWKVTokenizer()


@pytest.mark.parametrize("name", ["world", "bytes", "bpe"])
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_round_trip(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
    assert tokenizer.eod not in ids


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_world_ids_equal_the_package(tokenizers, rust, text):
    assert tokenizers["world"].encode(text) == rust.encode(text)


def test_world_table_equals_its_file_of_lengths(tokenizers):
    """The vocabulary file states each token's length in bytes: an independent check of the parsed table."""
    import pyrwkv_tokenizer as package

    lines = Path(package.RWKVTokenizer().vocab_filepath).read_text(encoding="utf-8").splitlines()
    stated = {int(line.split(" ", 1)[0]): int(line.rsplit(" ", 1)[1]) for line in lines}
    lengths = tokenizers["world"].byte_lengths()
    assert lengths.dtype == np.int64 and lengths.shape == (65536,)
    assert all(lengths[index] == length for index, length in stated.items())
    assert lengths.sum() == sum(stated.values()) and len(set(tokenizers["world"].table)) == len(stated) + 1


def test_bpe_is_deterministic_and_byte_complete(tmp_path):
    one, two = train_bpe(iter(SAMPLE), 320), train_bpe(iter(SAMPLE), 320)
    assert one.fingerprint == two.fingerprint and one.encode(SAMPLE[1]) == two.encode(SAMPLE[1])
    assert one.vocab_size <= 320 and one.eod == 0 and one.byte_lengths()[0] == 0
    assert len(one.encode(SAMPLE[0])) < len(SAMPLE[0])
    assert one.fingerprint != train_bpe(SAMPLE, 300).fingerprint
    with pytest.raises(ValueError, match="257"):
        train_bpe(SAMPLE, 100)


def test_special_token_in_a_text_stays_text(tokenizers, tmp_path):
    tokenizer = tokenizers["bpe"]
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    tokenizer.save(tmp_path / "t.json")
    spec = json.loads((tmp_path / "t.json").read_text())
    spec["added_tokens"][0]["special"] = False  # some published files forget the flag
    (tmp_path / "t.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path / "t.json").encode("a<|endoftext|>b") == ids


@pytest.mark.parametrize("name", ["world", "bytes", "bpe"])
def test_saved_and_pickled_are_the_same(tokenizers, name, tmp_path):
    tokenizer = tokenizers[name]
    tokenizer.save(tmp_path / "tokenizer.json")
    for other in (
        load_tokenizer(tmp_path / "tokenizer.json"),
        load_tokenizer(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.fingerprint == tokenizer.fingerprint and other.vocab_size == tokenizer.vocab_size
        assert other.encode(SAMPLE[1]) == tokenizer.encode(SAMPLE[1])


def test_any_tokenizers_json(tmp_path):
    """Not byte-level: SentencePiece spaces and byte fallback; the end is found by its usual names."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xF0>": 3, "\u2581cat": 4, "s": 5}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": c, **added} for i, c in enumerate(["<unk>", "<s>", "</s>"])],
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
    }
    (tmp_path / "x.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path / "x.json")
    assert (tokenizer.eod, tokenizer.vocab_size) == (2, 6)
    assert tokenizer.decode_bytes([1, 4, 5, 3, 2, 99]) == b" cats\xf0"
    assert list(tokenizer.byte_lengths()) == [0, 0, 0, 1, 4, 1]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rwkv_train_tokenizer": "x"}', "\xff", '{"model": 3}'])
def test_damaged_json_is_a_clear_error(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_unknown_spec_names_the_choices():
    with pytest.raises(ValueError, match='"world", "bytes"'):
        load_tokenizer("wrold")


@pytest.mark.parametrize("name", ["world", "bytes", "bpe"])
def test_half_a_surrogate_is_a_clear_error(tokenizers, name):
    for encode in (tokenizers[name].encode, lambda text: tokenizers[name].encode_batch([text])):
        with pytest.raises(ValueError, match=r"U\+D800 at character 2"):
            encode("ab\ud800")
