"""Stores made from small files, and what lies in them."""

import json

from rwkv_train.data.prepare import PrepareConfig, prepare

TEXTS = ['one, "two"\n\n three\r\n', "你好 🤖", "{braces} and\ttabs\nhere", " leading and trailing \n"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\n\n\nthere "},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See\n \nyou."},
]


def make(tmp_path, *sources, out="store", **options):
    options.setdefault("tokenizer", "bytes")
    return prepare(PrepareConfig([str(s) for s in sources], str(tmp_path / out), **options))


def jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def documents(store):
    """Each document's text without its end, and what of it is trained ("$" for a trained end)."""
    tokenizer, mask = store.tokenizer(), store.mask
    found = []
    for start, length in zip(store.offsets, store.lengths, strict=True):
        ids = store.tokens[start : start + length]
        assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
        trained = ids if mask is None else ids[mask[start : start + length] == 1]
        end = "$" if len(trained) and trained[-1] == tokenizer.eod else ""
        found.append((tokenizer.decode(ids), tokenizer.decode(trained) + end))
    return found


def files(store):
    """Bytes of the store but for the manifest, whose request names the sources."""
    return {f.name: f.read_bytes() for f in store.path.iterdir() if f.name != "manifest.json"}
