"""Text to token ids and back: RWKV's World vocabulary, raw bytes, or any Hugging Face `tokenizers` JSON.

All three share one interface. Decoding always goes through a table of bytes per token, because a token
may end in the middle of a UTF-8 character and only the bytes can be joined safely.
"""

import ast
import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from rwkv_train.files import read_text

KEY = "rwkv_train_tokenizer"  # the one key of the small JSON that `save` writes for world and bytes
EOD_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")


class Tokenizer:
    """What every tokenizer offers; `vocab_size` counts ids, `eod` ends a document and is never in a text."""

    name: str
    vocab_size: int
    eod: int = 0

    @cached_property
    def table(self) -> list[bytes]:
        """The bytes each id stands for, [vocab_size]; empty for special and unused ids."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what defines the ids; equal fingerprints encode every text alike."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added. Special-token names inside the text are plain text."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text's bytes. Ids that stand for nothing (special, or past the vocabulary) give no bytes."""
        table, size = self.table, len(self.table)
        return b"".join(table[i] for i in map(int, ids) if 0 <= i < size)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD. For one id at a time see `StreamDecoder`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of text behind each id, for loss in bits per byte."""
        return np.fromiter(map(len, self.table), np.int64, count=self.vocab_size)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load_tokenizer` reads back."""
        Path(path).write_text(json.dumps({KEY: self.name}) + "\n", encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """Id 0 ends a document, byte b is id b + 1."""

    name, vocab_size, eod = "bytes", 257, 0

    @cached_property
    def table(self) -> list[bytes]:
        return [b""] + [bytes([b]) for b in range(256)]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes: 0 ends a document, byte b is id b + 1").hexdigest()

    def encode(self, text: str) -> list[int]:
        return [b + 1 for b in to_utf8(text)]


class WorldTokenizer(Tokenizer):
    """RWKV World: ids 1 to 65529 are byte strings, 0 ends a document, models round up to 65536."""

    name, vocab_size, eod = "world", 65536, 0

    def __reduce__(self):
        return WorldTokenizer, ()  # the Rust object cannot be pickled, and is quick to build again

    @cached_property
    def _vocab(self) -> bytes:
        import pyrwkv_tokenizer

        path = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
        return path.read_bytes().replace(b"\r\n", b"\n")

    @cached_property
    def _rust(self):
        from pyrwkv_tokenizer import RWKVTokenizer

        return RWKVTokenizer()

    @cached_property
    def table(self) -> list[bytes]:
        # Lines are "ID LITERAL LENGTH". One literal_eval over all of them is ten times as fast as 65,529.
        rows = [line.split(" ", 1) for line in self._vocab.decode("utf-8").split("\n") if line]
        literals = ast.literal_eval("[" + ",".join(rest.rsplit(" ", 1)[0] for _, rest in rows) + "]")
        table = [b""] * self.vocab_size
        for (index, _), token in zip(rows, literals, strict=True):
            table[int(index)] = token if isinstance(token, bytes) else token.encode("utf-8")
        return table

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._vocab).hexdigest()

    def encode(self, text: str) -> list[int]:
        if not text.isascii():
            to_utf8(text)
        return self._rust.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            to_utf8(text)
        return self._rust.encode_batch(list(texts))


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` JSON.

    `byte_lengths` is exact for byte-level vocabularies (GPT-2, NeoX, Llama 3, `train_bpe`) and for
    SentencePiece ones up to the space that some of those put before a text.
    """

    def __init__(self, text: str, name: str = "json") -> None:
        from tokenizers import Tokenizer as Library

        self.name, self._text = name, text
        self._spec = json.loads(text)
        for token in self._spec["added_tokens"]:  # so that no text can spell an end of document
            token["special"] |= token["content"] in EOD_NAMES
        self._library = Library.from_str(json.dumps(self._spec))
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # "<|endoftext|>" typed by a user stays text
        vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eod = next((vocab[name] for name in EOD_NAMES if name in vocab), 0)

    def __reduce__(self):
        return JsonTokenizer, (self._text, self.name)

    @cached_property
    def table(self) -> list[bytes]:
        added = {token["id"]: token for token in self._spec["added_tokens"]}
        byte_level = _mentions(self._spec.get("decoder"), "ByteLevel")
        table = [b""] * self.vocab_size
        for token, index in self._library.get_vocab(with_added_tokens=True).items():
            if index not in added:
                table[index] = _from_byte_alphabet(token) if byte_level else _from_sentencepiece(token)
            elif not added[index]["special"]:
                table[index] = added[index]["content"].encode("utf-8")
        return table

    @cached_property
    def fingerprint(self) -> str:
        kept = {k: v for k, v in json.loads(self._text).items() if k not in ("truncation", "padding")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        to_utf8(text)
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            to_utf8(text)
        return [e.ids for e in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._text, encoding="utf-8", newline="\n")


class StreamDecoder:
    """Decodes one id at a time, holding bytes back until their character is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, often one token's text, sometimes ""."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: "" or one U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """ "world", "bytes", a tokenizers JSON, a file written by `save`, or a folder with tokenizer.json.

    Raises ValueError if `spec` is none of these or the JSON is damaged.
    """
    if spec in ("world", "bytes"):
        return WorldTokenizer() if spec == "world" else ByteTokenizer()
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        known = 'Give "world", "bytes", a tokenizers JSON file, or a folder that holds tokenizer.json.'
        raise ValueError(f"Tokenizer {str(spec)!r} is unknown: there is no file {path}. {known}")
    try:
        text = read_text(path)
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no tokenizer JSON ({error}). Copy it again from its source.") from None
    if isinstance(content, dict) and KEY in content:
        if content[KEY] not in ("world", "bytes"):
            raise ValueError(f'{path}: {KEY} is {content[KEY]!r}, expected "world" or "bytes". Correct it.')
        return load_tokenizer(content[KEY])
    try:
        return JsonTokenizer(text, path.parent.name if path.stem == "tokenizer" else path.stem)
    except Exception as error:  # the Rust library raises bare Exception for every flaw in a file
        raise ValueError(f"{path} is no tokenizers JSON ({error}). Copy it again from its source.") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` ids learnt from `texts`; "<|endoftext|>" is id 0.

    The same texts give the same tokenizer. Raises ValueError below 257 ids (256 bytes and the end).
    """
    if vocab_size < 257:
        raise ValueError(f"A byte-level BPE needs at least 257 ids, not {vocab_size}. Raise --train-bpe.")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return JsonTokenizer(library.to_str(), f"bpe{library.get_vocab_size()}")


def to_utf8(text: str) -> bytes:
    """The bytes of a text; ValueError if it holds half of a surrogate pair, which has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise ValueError(f"The text holds half a surrogate pair ({found}); remove it.") from None


def _mentions(part: object, kind: str) -> bool:
    """Whether a (possibly nested) piece of a tokenizers JSON has `type` == kind anywhere."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(_mentions(value, kind) for value in part)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(token: str) -> bytes:
    known = all(letter in _ALPHABET for letter in token)
    return bytes(_ALPHABET[letter] for letter in token) if known else token.encode("utf-8")


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("\u2581", " ").encode("utf-8")
