"""The token store: documents as memory-mapped tokens, readable by RWKV-LM and by anything that reads binidx.

A store is a folder:
    tokens.bin      the tokens of all documents end to end, uint16 (or int32 for vocabularies over 65536)
    tokens.idx      where each document lies (RWKV / Megatron binidx)
    tokens.mask     uint8 per token, 1 = trained as a target; absent if every token is trained
    tokens.crc      CRC-32 of each 64 KiB of tokens.bin, then of tokens.mask, uint32
    tokenizer.json  what made the tokens
    manifest.json   counts, tokenizer fingerprint, sources, the request that made the store, SHA-256 of idx and crc
Each document ends with the tokenizer's end-of-document id. D documents, N tokens.
"""

import glob
import hashlib
import json
import re
import shutil
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from rwkv_train.data.binidx import REMAKE, map_file, read_binidx, token_dtype, write_index
from rwkv_train.data.blocks import BLOCK, Blocks, checksums
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat, compare
from rwkv_train.files import sync, temporary_beside
from rwkv_train.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 2
MAX_DOCUMENT_TOKENS = 2**31 - 1  # the index counts tokens in int32


@dataclass(frozen=True, eq=False)
class Store:
    """An opened store. Everything is memory-mapped except 16 bytes a document.

    Fields: tokens [N] (uint16 or int32); mask [N] uint8 or None (all trained), aligned to targets:
    mask[i] says whether predicting token i is trained; offsets [D] and lengths [D], int64, in tokens;
    manifest is None for a plain binidx.
    """

    path: Path
    tokens: np.ndarray
    mask: np.ndarray | None
    offsets: np.ndarray = field(repr=False)
    lengths: np.ndarray = field(repr=False)
    manifest: dict | None = field(repr=False)
    blocks: tuple[Blocks, ...] = field(default=(), repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open a store folder, or a plain binidx by its prefix or by either file.

        Raises ValueError that names the file, what was found, what was expected and what to do.
        """
        path = Path(path).expanduser()
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        if prefix.name == "tokens" and (prefix.parent / "manifest.json").is_file():
            path = prefix.parent  # a store given by its files; read as plain binidx it would lose its mask
        if not path.is_dir():
            tokens, offsets, lengths = read_binidx(prefix)
            return cls(prefix, tokens, None, offsets, lengths, None)
        manifest = _read_manifest(path / "manifest.json")
        tokens, offsets, lengths = read_binidx(path / "tokens")
        _check_manifest(path / "manifest.json", manifest, tokens, lengths)
        mask = _read_mask(path / "tokens.mask", manifest)
        return cls(path, tokens, mask, offsets, lengths, manifest, _read_blocks(path, manifest, tokens, mask))

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self):
        return Store.open, (self.path,)  # a loader's worker maps the files too, instead of copying them

    @property
    def eod(self) -> int:
        """The id that ends a document; 0, RWKV's convention, for a plain binidx."""
        return self.manifest["eod"] if self.manifest else 0

    def check(self, start: int, count: int) -> None:
        """Raise ValueError if some tokens, or their mask, are not what was written. A plain binidx cannot tell."""
        for blocks in self.blocks:
            blocks.check(start, count)

    def document_at(self, token: int) -> int:
        """Which document a token of the store belongs to."""
        return int(np.searchsorted(self.offsets, token, "right")) - 1

    def tokenizer(self, given: str | None = None) -> Tokenizer | None:
        """The tokenizer that made the store; of a plain binidx, which does not say it, the one `given` or None.

        Raises ValueError if it was exchanged, or is not the one given.
        """
        if self.manifest is None:
            return load_tokenizer(given) if given else None
        tokenizer = load_tokenizer(self.path / "tokenizer.json", self.eod)
        tokenizer.name = self.manifest["tokenizer"]["name"]
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            expected = self.manifest["tokenizer"]["fingerprint"][:12]
            raise ValueError(
                f"{self.path / 'tokenizer.json'} is not the tokenizer that made this store: "
                f"its fingerprint is {tokenizer.fingerprint[:12]}, the manifest says {expected}. {REMAKE}"
            )
        if given:
            remedy = "leave the tokenizer out: the store knows its own"
            compare(self.path, tokenizer, given, load_tokenizer(given), remedy)
        return tokenizer

    def text_format(self, given: str | None = None) -> TextFormat:
        """What the store was made with, as far as it says so; of its template nothing if it holds no chats."""
        manifest = self.manifest or {}
        template = (manifest.get("request") or {}).get("template")
        known = template and manifest.get("chats") != 0  # a store of before does not count them
        return TextFormat(self.tokenizer(given), Template(**template) if known else None)


def _read_manifest(path: Path) -> dict:
    """The manifest, with the fields every reader relies on checked."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no finished token store: it has no manifest.json. {REMAKE}")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}). {REMAKE}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        hint = "Update rwkv_train, or make the store anew with `prepare`."
        raise ValueError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}. {hint}")
    counts = ("eod", "documents", "tokens", "trained_tokens", "text_bytes")
    wrong = [k for k in counts if type(manifest.get(k)) is not int or manifest[k] < 0]
    tokenizer = manifest.get("tokenizer")
    types = {"name": str, "fingerprint": str, "vocab_size": int}
    if not isinstance(manifest.get("sha256"), dict):
        wrong.append("sha256")
    if not isinstance(tokenizer, dict) or any(type(tokenizer.get(k)) is not t for k, t in types.items()):
        wrong.append("tokenizer")
    if wrong:
        raise ValueError(f"{path}: missing or malformed {', '.join(wrong)}. {REMAKE}")
    return manifest


def _check_manifest(path: Path, manifest: dict, tokens: np.ndarray, lengths: np.ndarray) -> None:
    dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
    found = (manifest["documents"], manifest["tokens"], dtype)
    actual = (len(lengths), len(tokens), tokens.dtype)
    if found != actual:
        was = "{} documents, {} tokens, {}".format(*found)
        raise ValueError(f"{path} says {was}; tokens.idx has {'{}, {}, {}'.format(*actual)}. {REMAKE}")


def _read_mask(path: Path, manifest: dict) -> np.ndarray | None:
    masked = manifest["trained_tokens"] != manifest["tokens"]
    if not masked and not path.exists():
        return None
    mask = map_file(path, np.uint8)
    if not masked or len(mask) != manifest["tokens"]:
        said = f"{manifest['trained_tokens']} of {manifest['tokens']} tokens trained"
        raise ValueError(f"{path} has {len(mask)} entries, but the manifest says {said}. {REMAKE}")
    return mask


def _read_blocks(path: Path, manifest: dict, tokens: np.ndarray, mask: np.ndarray | None) -> tuple[Blocks, ...]:
    """What the files' contents are checked against, after a check of that and of the small files."""
    for name in ("tokens.idx", "tokens.crc"):
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing. {REMAKE}")
        if manifest["sha256"].get(name) != _sha256((path / name).read_bytes()):
            raise ValueError(f"{path / name} is not what was written. {REMAKE}")
    if manifest["sha256"].get("manifest.json") != _sha256(_text(manifest | {"sha256": None})):
        raise ValueError(f"{path / 'manifest.json'} is not what was written. {REMAKE}")
    sums = np.fromfile(path / "tokens.crc", "<u4")
    first = -(-tokens.nbytes // BLOCK)
    found = [Blocks(path / "tokens.bin", tokens, sums[:first])]
    if mask is not None:
        found.append(Blocks(path / "tokens.mask", mask, sums[first:]))
    return tuple(found)


def _sha256(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _text(manifest: dict) -> str:
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)  # a file's name may be no UTF-8


class StoreWriter:
    """Writes a store: a context manager that appends documents and puts the folder in place at the end.

    All files go to a sibling folder which is renamed when complete, so a run that dies leaves nothing
    that looks finished; the next writer for the same path removes it. Memory: 4 bytes a document.
    `manifest` takes what the caller wants recorded (sources, request).

    Raises ValueError if `path` exists (and, with `overwrite`, if it is something else than a store).
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer, overwrite: bool = False) -> None:
        self.path, self._tokenizer, self._overwrite = Path(path).expanduser().absolute(), tokenizer, overwrite
        self.manifest: dict = {}
        self.documents = self.tokens = self.trained_tokens = self.text_bytes = 0
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._lengths = array("i")
        self._length = 0  # tokens of the document being written
        self._mask_file = None
        check_free(self.path, overwrite)

    def __enter__(self) -> "StoreWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.path)
        self._temp = temporary_beside(self.path)
        self._lock = _lock_of(self._temp)
        self._lock.acquire()
        self._temp.mkdir()
        self._bin = open(self._temp / "tokens.bin", "wb")
        return self

    def append(self, ids: np.ndarray | list[int], mask: np.ndarray | bool = True, text_bytes: int = 0) -> None:
        """Add tokens to the current document. `mask` [len(ids)] or one value: trained as a target?"""
        if self._length + len(ids) > MAX_DOCUMENT_TOKENS:
            most = f"more than {MAX_DOCUMENT_TOKENS} tokens, the most a store can index"
            raise ValueError(f"document {self.documents + 1} has {most}; split it")
        ids = np.asarray(ids, np.int64 if isinstance(ids, list) else None)
        assert not len(ids) or 0 <= ids.min() <= ids.max() < self._tokenizer.vocab_size
        if isinstance(mask, bool):
            mask, trained = (b"\x01" if mask else b"\x00") * len(ids), len(ids) if mask else 0
        else:
            assert len(mask) == len(ids)
            mask, trained = np.asarray(mask, bool).tobytes(), int(np.count_nonzero(mask))
        if self._mask_file is None and trained < len(ids):
            self._mask_file = open(self._temp / "tokens.mask", "wb")  # noqa: SIM115
            _write_ones(self._mask_file, self.tokens)
        if self._mask_file is not None:
            self._mask_file.write(mask)
        self._bin.write(ids.astype(self._dtype).tobytes())
        self._length += len(ids)
        self.tokens += len(ids)
        self.trained_tokens += trained
        self.text_bytes += text_bytes

    def end_document(self, trained: bool = True) -> None:
        """Close the current document with the end-of-document token, `trained` as a target or not."""
        self.append([self._tokenizer.eod], trained)
        self._lengths.append(self._length)
        self._length = 0
        self.documents += 1

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                assert self._length == 0, "the last document was not ended"
                if not self.documents:
                    raise ValueError(f"Nothing was written to {self.path}: a store needs at least one document.")
                self._finish()
        finally:
            self._close()
            shutil.rmtree(self._temp, ignore_errors=True)  # gone already if it was renamed
            self._lock.release()
            self._temp.with_suffix(".lock").unlink(missing_ok=True)

    def _close(self) -> None:
        for file in (self._bin, self._mask_file):
            if file is not None:
                file.close()

    def _finish(self) -> None:
        self._close()
        with open(self._temp / "tokens.idx", "wb") as idx:
            write_index(idx, np.frombuffer(self._lengths, np.int32), self._dtype)
        contents = [self._temp / name for name in ("tokens.bin", "tokens.mask")]
        sums = [checksums(map_file(path, np.uint8)) for path in contents if path.exists()]
        np.concatenate(sums).tofile(self._temp / "tokens.crc")
        self._tokenizer.save(self._temp / "tokenizer.json")
        t = self._tokenizer
        manifest = {
            "format_version": FORMAT_VERSION,
            "tokenizer": {"name": t.name, "fingerprint": t.fingerprint, "vocab_size": t.vocab_size},
            "eod": t.eod,
            **{k: getattr(self, k) for k in ("documents", "tokens", "trained_tokens", "text_bytes")},
            **self.manifest,
            "sha256": None,
        }
        sums = {name: _sha256((self._temp / name).read_bytes()) for name in ("tokens.idx", "tokens.crc")}
        manifest["sha256"] = sums | {"manifest.json": _sha256(_text(manifest))}
        (self._temp / "manifest.json").write_text(_text(manifest), encoding="utf-8")
        for file in self._temp.iterdir():
            sync(file)
        sync(self._temp)
        _put_in_place(self._temp, self.path)
        sync(self.path.parent)


def check_free(path: Path, overwrite: bool) -> None:
    """ValueError unless a store may be written to `path`: free, an empty folder, or a store to overwrite."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path} exists and is no token store. Choose another --out, or move it away.")
    if not overwrite:
        raise ValueError(f"{path} exists already. Choose another --out, or replace it with --overwrite.")


def _put_in_place(temp: Path, path: Path) -> None:
    """Rename `temp` to `path`; what was there is removed only after that worked."""
    old = temp.with_suffix(".old.tmp")
    if path.exists():
        path.rename(old)
    temp.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders for `path` whose writer is dead."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def _lock_of(folder: Path) -> FileLock:
    """Held by a folder's writer for as long as it lives: the system frees it, even on SIGKILL."""
    return FileLock(folder.with_suffix(".lock"))


def _abandoned(folder: Path) -> bool:
    try:
        with _lock_of(folder).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _write_ones(file: BinaryIO, count: int, block: int = 1 << 20) -> None:
    for start in range(0, count, block):
        file.write(b"\x01" * min(block, count - start))
