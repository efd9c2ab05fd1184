"""The token store: what is written is read, also by a reader of RWKV-LM's layout; damage is a clear error."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_train.data import store as store_module
from rwkv_train.data.store import Store, StoreWriter
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def write(path, documents, tokenizer=BYTES, **options):
    """documents: lists of pieces (ids, mask)."""
    with StoreWriter(path, tokenizer, **options) as writer:
        for pieces in documents:
            for ids, mask in pieces:
                writer.append(ids, mask, len(ids))
            writer.end_document(bool(np.all(pieces[-1][1])))
    return Store.open(path)


def read_binidx_like_rwkv_lm(prefix):
    """An independent reader, byte by byte after the layout that RWKV-LM's binidx.py documents."""
    with open(f"{prefix}.idx", "rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", file.read(8)) == (1,)
        (code,) = struct.unpack("<B", file.read(1))
        n, m = struct.unpack("<QQ", file.read(16))
        sizes = struct.unpack(f"<{n}i", file.read(4 * n))
        pointers = struct.unpack(f"<{n}q", file.read(8 * n))
        boundaries = struct.unpack(f"<{m}q", file.read(8 * m))
        assert file.read() == b"" and boundaries == tuple(range(n + 1))
    letter = {8: "H", 4: "i"}[code]
    with open(f"{prefix}.bin", "rb") as file:
        data = file.read()
    return [list(struct.unpack_from(f"<{s}{letter}", data, p)) for s, p in zip(sizes, pointers, strict=True)]


def pack_index(sizes, boundaries, code=8, width=2):
    """A foreign index, packed by hand."""
    n, m = len(sizes), len(boundaries)
    pointers = [width * sum(sizes[:i]) for i in range(n)]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, n, m)
    return head + struct.pack(f"<{n}i{n}q{m}q", *sizes, *pointers, *boundaries)


ids = st.lists(st.integers(1, 256), max_size=9)
pieces = st.tuples(ids, st.booleans())


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(st.lists(pieces, min_size=1, max_size=3), min_size=1, max_size=5))
def test_written_is_read(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("store")
    store = write(folder / "s", documents)
    tokens = [[t for piece, _ in d for t in piece] + [0] for d in documents]
    mask = [m for d in documents for piece, trained in [*d, ([0], d[-1][1])] for m in [trained] * len(piece)]
    assert [list(store.tokens[o : o + n]) for o, n in zip(store.offsets, store.lengths, strict=True)] == tokens
    assert list(store.mask if store.mask is not None else [1] * len(store.tokens)) == mask
    assert (store.mask is None) == all(mask) == (not (folder / "s" / "tokens.mask").exists())
    assert read_binidx_like_rwkv_lm(folder / "s" / "tokens") == tokens
    assert len(store) == len(documents) == store.manifest["documents"]
    assert store.manifest["trained_tokens"] == sum(mask)
    assert store.manifest["text_bytes"] == store.manifest["tokens"] - len(documents)
    assert store.tokenizer().fingerprint == BYTES.fingerprint
    assert os.listdir(folder) == ["s"]


def test_large_vocabularies_are_int32(tmp_path):
    class Wide(type(BYTES)):
        vocab_size = 70000

    store = write(tmp_path / "s", [[([69999, 5], True)]], Wide())
    assert store.tokens.dtype == np.int32 and list(store.tokens) == [69999, 5, 0]
    assert read_binidx_like_rwkv_lm(tmp_path / "s" / "tokens") == [[69999, 5, 0]]


def test_pickled_store_maps_again(tmp_path):
    store = pickle.loads(pickle.dumps(write(tmp_path / "s", [[([1, 2], False)]])))
    assert isinstance(store.tokens, np.memmap) and list(store.mask) == [0, 0, 0]


def test_given_by_its_files_keeps_its_mask(tmp_path):
    write(tmp_path / "s", [[([1, 2], False), ([3], True)]])
    for name in ("s", "s/tokens", "s/tokens.bin", "s/tokens.idx"):
        assert list(Store.open(tmp_path / name).mask) == [0, 0, 1, 1]


def test_foreign_binidx(tmp_path):
    """Documents of several sequences, an empty document, and each way to name the files."""
    np.arange(1, 11, dtype="<u2").tofile(tmp_path / "x.y.bin")
    (tmp_path / "x.y.idx").write_bytes(pack_index([3, 1, 4, 2], [0, 2, 2, 4]))
    for name in ("x.y", "x.y.bin", "x.y.idx"):
        store = Store.open(tmp_path / name)
        assert (list(store.offsets), list(store.lengths)) == ([0, 4], [4, 6])
        assert store.manifest is store.mask is store.tokenizer() is None and store.eod == 0
        assert list(store.tokens) == list(range(1, 11))


@pytest.mark.parametrize(
    "index",
    [
        pack_index([3, 1, 4, 2], [0, 2, 3]),
        pack_index([3, 1, 4, 2], [0, 3, 2, 4]),
        pack_index([3, 1, 4, 2], [1, 4]),
        pack_index([3, 1, 4], [0, 3]),
        pack_index([3, -1, 8], [0, 3]),
        pack_index([3, 1, 4, 2], [0, 4], code=6),
        pack_index([3, 1, 4, 2], [0, 4], width=4),
        pack_index([], [0]),
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**61, 5),
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 2, 8, 0, 1),
        b"something else altogether, a line of text",
        b"",
    ],
)
def test_wrong_index_is_a_clear_error(tmp_path, index):
    np.arange(1, 11, dtype="<u2").tofile(tmp_path / "x.bin")
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"x\.(idx|bin).*prepare"):
        Store.open(tmp_path / "x")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "s"
    write(path, [[([5, 6], False), ([7], True)], [([8] * 9, True)]])
    return path


def content(path):
    store = Store.open(path)
    store.tokenizer()
    store.check(0, len(store.tokens))
    return [a.tolist() for a in (store.tokens, store.mask, store.offsets, store.lengths)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damage_is_an_error_or_harmless(sound, tmp_path_factory, data):
    """Any cut or appended file, and any changed byte outside the tokens and mask themselves."""
    path = tmp_path_factory.mktemp("damaged") / "s"
    shutil.copytree(sound, path)
    file = path / data.draw(st.sampled_from(sorted(os.listdir(sound))))
    raw = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["cut", "append", "remove", "change"]))
    if how == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif how == "append":
        raw += data.draw(st.binary(min_size=1, max_size=20))
    elif how == "change":
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    if how == "remove":
        file.unlink()
    try:
        found = content(path)
    except ValueError as error:
        assert str(path) in str(error) or "vocabulary" in str(error)
    else:
        assert found == content(sound)
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 3}, "format_version is 3.*Update rwkv_train"),
        ({"documents": 3}, "3 documents.*tokens.idx has 2"),
        ({"tokens": "many"}, "malformed tokens"),
        ({"trained_tokens": 14}, "tokens.mask has 14 entries"),
        ({"tokenizer": {"name": "x", "fingerprint": "x", "vocab_size": 70000}}, "int32"),
        ({"tokenizer": None}, "malformed tokenizer"),
    ],
)
def test_mismatched_manifest(sound, tmp_path, change, words):
    path = shutil.copytree(sound, tmp_path / "s")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=words):
        Store.open(path)


def test_exchanged_tokenizer(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "s")
    load_tokenizer("world").save(path / "tokenizer.json")
    with pytest.raises(ValueError, match="not the tokenizer that made this store"):
        Store.open(path).tokenizer()


def test_missing_and_unfinished(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*nothing\.idx"):
        Store.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no finished token store"):
        Store.open(tmp_path)


def test_existing_targets(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "s")
    with pytest.raises(ValueError, match="--overwrite"):
        write(path, [[([1], True)]])
    assert len(write(path, [[([1], True)]], overwrite=True)) == 1
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="no token store"):
        write(tmp_path / "notes", [[([1], True)]], overwrite=True)
    (tmp_path / "empty").mkdir()
    assert len(write(tmp_path / "empty", [[([1], True)]])) == 1
    assert sorted(os.listdir(tmp_path)) == ["empty", "notes", "s"]


def test_failed_run_leaves_nothing(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "s")
    with pytest.raises(RuntimeError), StoreWriter(path, BYTES, overwrite=True) as writer:
        writer.append([1, 2])
        raise RuntimeError
    with pytest.raises(ValueError, match="at least one document"), StoreWriter(tmp_path / "t", BYTES):
        pass
    assert os.listdir(tmp_path) == ["s"] and content(path) == content(sound)


def test_endless_document(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_DOCUMENT_TOKENS", 4)
    with pytest.raises(ValueError, match="document 2 has more than 4 tokens"):
        write(tmp_path / "s", [[([1, 2, 3], True)], [([1, 2], True), ([3, 4], True)]])


KILLED = """
import os, signal, sys
from rwkv_train.data import store
from rwkv_train.tokenizer import load_tokenizer

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(store, sys.argv[2], die)
with store.StoreWriter(sys.argv[1], load_tokenizer("bytes")) as writer:
    writer.append([1, 2], [True, False])
    writer.end_document()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("where", ["_write_ones", "_put_in_place"])
def test_killed_run_leaves_no_finished_store(tmp_path, where):
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s"), where], timeout=60)
    assert run.returncode == -signal.SIGKILL

    def folders():
        return sorted(p.name for p in tmp_path.iterdir() if p.is_dir())

    (leftover,) = folders()
    assert leftover.endswith(".tmp")
    with pytest.raises(ValueError, match="no file"):
        Store.open(tmp_path / "s")
    with StoreWriter(tmp_path / "s", BYTES) as alive:  # the dead run's folder goes, a living one's stays
        alive.append([1])
        alive.end_document()
        assert leftover not in folders() and len(folders()) == 1
        write(tmp_path / "s.other", [[([1], True)]])
        store_module._remove_leftovers(tmp_path / "s")
        assert len(folders()) == 2
    assert sorted(os.listdir(tmp_path)) == ["s", "s.other"]  # and no lock is left either


def test_a_million_documents_open_in_little_memory(tmp_path):
    import tracemalloc

    count = 1_000_000
    np.ones(count, "<u2").tofile(tmp_path / "x.bin")
    with open(tmp_path / "x.idx", "wb") as file:
        store_module.write_index(file, np.ones(count, np.int32), np.dtype("<u2"))
    tracemalloc.start()
    store = Store.open(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(store) == count and peak / count <= 32
