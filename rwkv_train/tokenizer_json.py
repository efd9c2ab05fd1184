"""What a tokenizers JSON says: its tokens, the bytes they stand for, which of them ends a document; and two of ours."""

import json
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

WORLD_END = "<|rwkv_tokenizer_end_of_text|>"  # what Hugging Face folders of World models call id 0
# Names of the token that ends a document, in published vocabularies; the first that is there is taken.
EOD_NAMES = (
    *("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[EOS]", "<EOS>", "<|eos|>"),
    *("<|end|>", "<end_of_turn>", "<eod>", "<|eod|>", "<|end_of_document|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    WORLD_END,
)
# What may lie beside a tokenizer, and under which key it says what ends a document.
SAID_BESIDE = {
    "manifest.json": "eod",  # of a token store
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
    "generation_config.json": "eos_token_id",
}


class UnknownEnd(ValueError):
    """Nothing says what ends a document."""


def vocabulary(spec: dict) -> dict[str, int]:
    """Ids of all tokens of a tokenizers JSON."""
    vocab = spec["model"]["vocab"]
    vocab = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}  # Unigram's
    return vocab | {token["content"]: token["id"] for token in spec["added_tokens"]}


def said_beside(path: Path) -> list[str | int]:
    """What files beside a tokenizer's say that ends a document."""
    found = []
    for name, key in SAID_BESIDE.items():
        said = said_in(path.with_name(name), key)
        said = said[0] if isinstance(said, list) and said else said
        found.append(said.get("content") if isinstance(said, dict) else said)
    return [said for said in found if type(said) in (str, int)]


def said_in(path: Path, key: str) -> object:
    """What a JSON file, if there is one, says under a key."""
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def end_of_document(vocab: dict[str, int], eod: str | int | None, beside: Sequence) -> tuple[int, str]:
    """(id, token) of what ends a document: `eod`, or the first that is there of those said beside and the usual names.

    Raises UnknownEnd, to go on from a file's name, if there is none.
    """
    tokens = {index: token for token, index in vocab.items()}
    for end in (*beside, *EOD_NAMES) if eod is None else (eod,):
        index = vocab.get(end) if isinstance(end, str) and not end.isdecimal() else int(end)
        if index in tokens:
            return index, tokens[index]
    if eod is not None:
        raise UnknownEnd(f"has no token {eod!r}; give the name or the id of one that it has")
    raise UnknownEnd(
        f"does not say what ends a document: it has none of {' '.join(EOD_NAMES)}, and no tokenizer_config.json, "
        "special_tokens_map.json or generation_config.json beside it names a token of it. Give the token's name or id "
        'to prepare with --eod, or as "eos_token" in a tokenizer_config.json beside the file'
    )


def mentions(part: object, kind: str) -> bool:
    """Whether a (possibly nested) piece of a tokenizers JSON has `type` == kind anywhere."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(mentions(value, kind) for value in part)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def from_byte_alphabet(token: str) -> bytes:
    known = all(letter in BYTE_ALPHABET for letter in token)
    return bytes(BYTE_ALPHABET[letter] for letter in token) if known else token.encode("utf-8")


BYTE_LETTERS = {b: letter for letter, b in BYTE_ALPHABET.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def bytes_json() -> str:
    """A tokenizers JSON of single bytes: byte b is id b + 1, id 0 ends a document.

    Written here and not by the library, whose next version may write it otherwise: it is known again by it.
    """
    vocab = {EOD_NAMES[0]: 0} | {letter: b + 1 for letter, b in BYTE_ALPHABET.items()}
    return _json(EOD_NAMES[0], BYTE_LEVEL, {"type": "BPE", "vocab": vocab, "merges": []})


def longest_match_json(table: Sequence[bytes], end: str) -> str:
    """A tokenizers JSON that takes the longest token that stands at a place, and goes on behind it.

    table: the bytes of each id, where any single byte is one, too; id 0, `end`, and others that are empty have none. No
    model of the library reads like this; its regular expressions do, so that one of them, of all the tokens, cuts the
    text, and the model looks up what it has cut.
    """
    vocab = {"".join(map(BYTE_LETTERS.get, token)): index for index, token in enumerate(table) if token}
    split = {"type": "Split", "pattern": {"Regex": _longest(sorted(vocab))}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, split]}
    return _json(end, cut, {"type": "WordLevel", "vocab": {end: 0} | vocab, "unk_token": end})


def _json(end: str, pre_tokenizer: dict, model: dict) -> str:
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": end, "special": True} | added],
        "pre_tokenizer": pre_tokenizer,
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    return json.dumps(spec, ensure_ascii=False) + "\n"


def _longest(texts: list[str]) -> str:
    """The regular expression of the longest of these texts, which are sorted and all different; the first may be ""."""
    optional = texts[0] == ""
    branches = [(letter, [t[1:] for t in group]) for letter, group in groupby(texts[optional:], itemgetter(0))]
    if not branches:
        return ""
    choice = _choice(branches)
    return f"(?:{choice})" + "?" * optional if optional or len(branches) > 1 else choice


def _choice(branches: list[tuple[str, list[str]]]) -> str:
    """The branch of the letter that comes next. Engines try one after the other, so many are halved by a look ahead."""
    if len(branches) <= 4:
        return "|".join(_escaped(letter) + _longest(rest) for letter, rest in branches)
    half = len(branches) // 2
    low, high = _escaped(branches[0][0]), _escaped(branches[half - 1][0])
    return f"(?=[{low}-{high}])(?:{_choice(branches[:half])})|{_choice(branches[half:])}"


def _escaped(letter: str) -> str:
    return "\\" + letter if letter in r"\.^$|?*+()[]{}-" else letter


def from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("\u2581", " ").encode("utf-8")
