"""RWKV World as a tokenizers JSON: the library gives the ids that the package gives, whatever the text."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.tokenizer import WORLD_FILE, load_tokenizer

ROOT = Path(__file__).parent.parent
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


@pytest.fixture(scope="module")
def library(world):
    return tokenizers.Tokenizer.from_str(world.library_json)


@pytest.fixture(scope="module")
def tokens(world):
    """Those that are a text; the others are parts of one character."""
    texts = [token.decode(errors="replace") for token in world.table[1:65530]]
    return [text for text in texts if "\ufffd" not in text]


def same(library, world, texts):
    found = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    for text, ids, expected in zip(texts, found, world.encode_batch(texts), strict=True):
        assert ids == expected, text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text(library, world, tokens, data):
    text = data.draw(ANY | st.lists(st.sampled_from(tokens), max_size=12).map("".join))
    same(library, world, [text])
    assert library.decode(world.encode(text)) == text


def test_every_token_alone_and_before_another(library, world, tokens):
    assert len(tokens) > 64_000
    same(library, world, tokens)
    same(library, world, [a + b for a, b in zip(tokens[::7], reversed(tokens[::7]), strict=True)])


def test_files_and_stretches_without_a_word(library, world):
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")]
    sources += [path.read_text(encoding="utf-8") for path in ROOT.glob("rwkv_train/*/*.py")]
    assert len(sources) > 50
    same(library, world, sources)
    latin = "".join(map(chr, range(256))) * 40
    same(library, world, ["a" * 10_000, "aB3x" * 5_000, " " * 10_000, "\n" * 9_999, "\u4f60" * 3_000, latin])


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(1, 65535), max_size=12))
def test_any_ids_are_decoded_alike(library, world, ids):
    """Those that are no UTF-8, and those that stand for nothing, too."""
    assert library.decode(ids) == world.decode(ids)


def test_every_byte_is_a_token(world):
    assert {bytes([b]) for b in range(256)} <= set(world.table)


def test_it_is_known_again_as_the_library_writes_it(library, world, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).fingerprint == world.fingerprint
    spec = json.loads(world.library_json)
    spec["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = "."
    (tmp_path / "other.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path / "other.json").fingerprint != world.fingerprint


def test_the_vocabulary_file_is_known(world, tmp_path):
    (tmp_path / WORLD_FILE).write_bytes(world._vocab.replace(b"\n", b"\r\n"))  # as the package rwkv has it
    assert load_tokenizer(tmp_path / WORLD_FILE).fingerprint == world.fingerprint
    with pytest.raises(ValueError, match="there is no file"):  # beside it may lie models of other vocabularies
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).name == "world"
    (tmp_path / WORLD_FILE).write_bytes(world._vocab[:-1])
    with pytest.raises(ValueError, match=r"is not RWKV's World vocabulary.*Copy it again"):
        load_tokenizer(tmp_path)
