"""Text to token ids and back: RWKV's World vocabulary, raw bytes, or any Hugging Face `tokenizers` JSON.

All three share one interface. Decoding always goes through a table of bytes per token, because a token
may end in the middle of a UTF-8 character and only the bytes can be joined safely.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from rwkv_train.files import read_text
from rwkv_train.tokenizer_json import (
    EOD_NAMES,
    WORLD_END,
    UnknownEnd,
    bytes_json,
    end_of_document,
    from_byte_alphabet,
    from_sentencepiece,
    longest_match_json,
    mentions,
    said_beside,
    said_in,
    vocabulary,
)

KEY = "rwkv_train_tokenizer"  # of its name: alone in the small JSON that stands for World, or in tokenizer_config.json
OWN_FILE = "rwkv_train_tokenizer.json"  # in folders: a tokenizer.json there is one that `tokenizers` opens
WORLD_FILE = "rwkv_vocab_v20230424.txt"  # the World vocabulary: a line a token, "ID LITERAL LENGTH"


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
        """The text; bytes that are no UTF-8 become U+FFFD. For one id at a time see generation/reply.py."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: bytes of text behind each id, for loss in bits per byte."""
        return np.fromiter(map(len, self.table), np.int64, count=self.vocab_size)

    def __str__(self) -> str:
        return f"{self.name} (fingerprint {self.fingerprint[:12]}, end of document {self.eod})"

    @property
    def end_in_texts(self) -> str | None:
        """The text of the end of a document, if texts can hold it, too: they would end there. None if not."""
        text = self.decode([self.eod])
        return text if text and self.eod in self.encode(text) else None

    @property
    def special_tokens(self) -> Sequence[str]:
        """Names of tokens that no text holds."""
        raise NotImplementedError

    @cached_property
    def eod_name(self) -> str:
        """What `library_json` calls the end of a document."""
        return next(name for name, index in vocabulary(json.loads(self.library_json)).items() if index == self.eod)

    @property
    def library_json(self) -> str:
        """The JSON that the library `tokenizers` opens, and encodes alike."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load_tokenizer` reads back, given the same end of document."""
        Path(path).write_text(self.library_json, encoding="utf-8", newline="\n")

    def save_in(self, folder: str | Path) -> list[str]:
        """Write the files by which `load_tokenizer` opens a folder, and knows their end of document; their names."""
        return self.export_in(folder)

    def export_in(self, folder: str | Path, chat_template: str | None = None) -> list[str]:
        """Write the files by which `load_tokenizer` and AutoTokenizer open a folder; their names.

        chat_template: the Jinja text by which AutoTokenizer writes chats. The name of a special token in a text is that
        token there, as a chat has to begin with one, and plain text here.
        """
        folder, end = Path(folder), self.eod_name
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"bos_token": end, "eos_token": end, "pad_token": end}
        config |= {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
        config |= {"model_input_names": ["input_ids", "attention_mask"], KEY: self.name}
        config |= {"chat_template": chat_template} if chat_template else {}
        (folder / "tokenizer.json").write_text(self.library_json, encoding="utf-8", newline="\n")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")
        return ["tokenizer.json", "tokenizer_config.json"]


class ByteTokenizer(Tokenizer):
    """Id 0 ends a document, byte b is id b + 1."""

    name, vocab_size, eod = "bytes", 257, 0
    special_tokens = (EOD_NAMES[0],)

    @property
    def library_json(self) -> str:
        return bytes_json()

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
    special_tokens = (WORLD_END,)

    def __reduce__(self):
        return WorldTokenizer, ()  # the Rust object cannot be pickled, and is quick to build again

    @cached_property
    def _vocab(self) -> bytes:
        import pyrwkv_tokenizer

        return _unix_lines(Path(pyrwkv_tokenizer.__file__).with_name(WORLD_FILE))

    @cached_property
    def _rust(self):
        from pyrwkv_tokenizer import RWKVTokenizer

        return RWKVTokenizer()

    @cached_property
    def table(self) -> list[bytes]:
        # One literal_eval over all of them is ten times as fast as 65,529.
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

    @property
    def library_json(self) -> str:
        return _world_json()

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({KEY: self.name}) + "\n", encoding="utf-8", newline="\n")

    def save_in(self, folder: str | Path) -> list[str]:
        self.save(Path(folder) / OWN_FILE)
        return [OWN_FILE]


@cache
def _world_json() -> str:
    return longest_match_json(WorldTokenizer().table, WORLD_END)


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` JSON.

    `byte_lengths` is exact for byte-level vocabularies (GPT-2, NeoX, Llama 3, `train_bpe`) and for
    SentencePiece ones up to the space that some of those put before a text.
    """

    def __init__(self, text: str, name: str = "json", eod: str | int | None = None, beside: Sequence = ()) -> None:
        """eod: the name or the id of what ends a document; None: what files beside it say, or a usual name.

        Raises UnknownEnd if there is no such token, ValueError if `eod` is none.
        """
        from tokenizers import Tokenizer as Library

        self.name, self._text = name, text
        self._spec = json.loads(text)
        self.eod, end = end_of_document(vocabulary(self._spec), eod, beside)
        for token in self._spec["added_tokens"]:  # so that no text can spell an end of document
            token["special"] |= token["content"] in (*EOD_NAMES, end)
        self._library = Library.from_str(json.dumps(self._spec))
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # "<|endoftext|>" typed by a user stays text
        vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1

    def __reduce__(self):
        return JsonTokenizer, (self._text, self.name, self.eod)

    @property
    def special_tokens(self) -> list[str]:
        return [token["content"] for token in self._spec["added_tokens"] if token["special"]]

    @property
    def library_json(self) -> str:
        return self._text

    @cached_property
    def table(self) -> list[bytes]:
        added = {token["id"]: token for token in self._spec["added_tokens"]}
        byte_level = mentions(self._spec.get("decoder"), "ByteLevel")
        table = [b""] * self.vocab_size
        for token, index in self._library.get_vocab(with_added_tokens=True).items():
            if index not in added:
                table[index] = from_byte_alphabet(token) if byte_level else from_sentencepiece(token)
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


def load_tokenizer(spec: str | Path, eod: str | int | None = None) -> Tokenizer:
    """ "world", "bytes", a tokenizers JSON, a file written by `save`, World's vocabulary, or a folder with one of them.

    eod: the name or the id of the token that ends a document; None: what files beside the JSON say, or a usual name.
    Raises ValueError if `spec` is none of these, the JSON is damaged, or `eod` is no token of it; UnknownEnd where
    nothing tells the end of a document.
    """
    if spec in ("world", "bytes"):
        if eod not in (None, 0, "0"):
            raise ValueError(f"The tokenizer {spec} ends a document with id 0, not with {eod!r}; drop --eod.")
        return WorldTokenizer() if spec == "world" else ByteTokenizer()
    path = tokenizer_file(Path(spec).expanduser())
    if not path.is_file():
        known = 'Give "world", "bytes", a tokenizers JSON file, or a folder that holds tokenizer.json.'
        raise ValueError(f"Tokenizer {str(spec)!r} is unknown: there is no file {path}. {known}")
    if path.suffix == ".txt":
        if hashlib.sha256(_unix_lines(path)).hexdigest() != WorldTokenizer().fingerprint:
            raise ValueError(f"{path} is not RWKV's World vocabulary, {WORLD_FILE}. Copy it again from its source.")
        return load_tokenizer("world", eod)
    try:
        text = read_text(path)
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no tokenizer JSON ({error}). Copy it again from its source.") from None
    if isinstance(content, dict) and KEY in content:
        if content[KEY] not in ("world", "bytes"):
            raise ValueError(f'{path}: {KEY} is {content[KEY]!r}, expected "world" or "bytes". Correct it.')
        return load_tokenizer(content[KEY], eod)
    try:
        if known := _known(content):
            return load_tokenizer(known, eod)
        return JsonTokenizer(text, _name(path), eod, said_beside(path))
    except UnknownEnd as error:
        raise UnknownEnd(f"{path} {error}") from None
    except Exception as error:  # the Rust library raises bare Exception for every flaw in a file
        raise ValueError(f"{path} is no tokenizers JSON ({error}). Copy it again from its source.") from None


def tokenizer_file(path: Path) -> Path:
    """Of a folder, the file in it that holds its tokenizer; there may be none."""
    if not path.is_dir():
        return path
    names = [OWN_FILE, "tokenizer.json"]
    if (path / "tokenizer_config.json").is_file():  # elsewhere the vocabulary need not be that of what lies beside it
        names.append(WORLD_FILE)
    return next((path / name for name in names if (path / name).is_file()), path / "tokenizer.json")


def _known(spec: dict) -> str | None:
    """ "world" or "bytes", if a tokenizers JSON is what these are saved as, here or again by the library."""
    own = {257: ByteTokenizer, 65530: WorldTokenizer}.get(len(vocabulary(spec)))  # so that few are written to compare
    said = {key: value for key, value in spec.items() if value is not None}
    return own.name if own and said == json.loads(own().library_json) else None


def _unix_lines(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")


def _name(path: Path) -> str:
    """What messages call a tokenizers JSON."""
    if path.name != "tokenizer.json":
        return path.stem
    said = said_in(path.with_name("tokenizer_config.json"), KEY)
    snapshot = (
        path.parent.parent.name == "snapshots"
    )  # of a cache of the hub, where folders are called by their commits
    return said if isinstance(said, str) else path.parents[2 if snapshot else 0].name


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
        what = "half a surrogate pair, or a byte that is no UTF-8"
        raise ValueError(f"The text holds {what} ({found}); remove it.") from None
