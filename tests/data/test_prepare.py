"""prepare: the same request gives the same store with any number of workers, and a stopped one leaves nothing."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from prepared import CHAT, documents, files, jsonl, make

from rwkv_train.data import encode as encode_module
from rwkv_train.data import prepare as prepare_module
from rwkv_train.data import records as records_module
from rwkv_train.data.corpora.catalogue import read_corpus
from rwkv_train.data.render import Columns, render
from rwkv_train.data.store import Store
from rwkv_train.data.templates import Template


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
def test_workers_do_not_matter(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(encode_module, "BATCH_RECORDS", 3)
    chats = [{"messages": CHAT[: 3 + 2 * (i % 2)]} if i % 3 else {"text": f"text {i}"} for i in range(60)]
    source = jsonl(tmp_path / "x.jsonl", [*chats, {"wrong": 1}])
    options = {"tokenizer": tokenizer, "skip_bad": True}
    one, two = (make(tmp_path, source, out=str(n), workers=n, **options) for n in (1, 2))
    assert files(one) == files(two) and len(one) == 60
    assert (one.path / "manifest.json").read_bytes() == (two.path / "manifest.json").read_bytes()


def test_workers_stop_at_the_first_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_RECORDS", 1)
    source = jsonl(tmp_path / "x.jsonl", [{"text": "a"}] * 20 + [{"text": 5}] + [{"text": "a"}] * 20)
    with pytest.raises(ValueError, match=r"x\.jsonl:21: \"text\" must be text, found 5"):
        make(tmp_path, source, workers=2)
    assert os.listdir(tmp_path) == ["x.jsonl"]


class Deadly(encode_module.Encoder):
    def __call__(self, raw):
        os._exit(3)


def test_a_dead_worker_is_an_error(monkeypatch):
    monkeypatch.setattr(encode_module, "BATCH_RECORDS", 1)
    raws = [records_module.Raw(f"x:{n}", "text", b"abc", 3) for n in range(30)]
    encoder = Deadly(None, "auto", Template(), Columns())
    with pytest.raises(ValueError, match="worker process of prepare died"):
        list(encode_module.encode(encoder, raws, workers=2))


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("data/missing.jsonl", {}, "no file or folder data/missing.jsonl"),
        ("./missing", {}, "no file or folder"),
        ("nothing*.txt", {}, "holds no .txt"),
        ("corpus:shakespeare", {}, "corpus:chatterbot, corpus:python-topics"),
        ("corpus:chatterbot/klingon", {}, "english"),
        (
            "corpus:chatterbot",
            {"tokenizer": "world", "train_bpe": 300},
            "--tokenizer world and --train-bpe 300",
        ),
        ("corpus:chatterbot", {"tokenizer": "wrold"}, "unknown"),
        ("corpus:chatterbot", {"limit": -1}, "--limit is -1"),
        ("corpus:chatterbot", {"split": "line"}, "--split line cuts .txt files, and there is none"),
        ("corpus:chatterbot", {"kind": "messages", "text_field": "t"}, "--kind messages has no use for --text-field"),
        (
            "corpus:chatterbot",
            {"kind": "text", "template": "t.yaml", "train_roles": ["user"]},
            "--kind text has no use for --template and --train-roles",
        ),
        ("corpus:chatterbot", {"kind": "pairs", "messages_field": "m"}, "--kind pairs has no use for --messages-field"),
        ("corpus:chatterbot", {"train_roles": ["robot"]}, "role 'robot' is unknown"),
        ("corpus:chatterbot", {"train_roles": []}, "Nothing to train.*--train-roles"),
        ("corpus:chatterbot", {"kind": "text", "skip_bad": True}, "no usable record, 2025 bad ones.*ai.yml"),
        ("corpus:chatterbot", {"prompt_field": "a,,b"}, "--prompt-field 'a,,b'"),
    ],
)
def test_wrong_request(tmp_path, source, options, words):
    with pytest.raises(ValueError, match=words):
        make(tmp_path, source, **options)
    assert os.listdir(tmp_path) == []


def test_a_text_file_is_no_pair_and_no_chat(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    for kind in ("pairs", "messages"):
        with pytest.raises(ValueError, match=rf"--kind {kind}, but .*a\.txt is plain text\. Leave \.txt files out"):
            make(tmp_path, tmp_path, kind=kind, skip_bad=True)
    assert len(make(tmp_path, tmp_path)) == 2


def test_a_prompt_column_that_is_not_there_is_told(tmp_path, capsys):
    pairs = [{"prompt": "a", "input": "x", "completion": "b"}, {"prompt": "a", "input": None, "completion": "b"}]
    source = jsonl(tmp_path / "x.jsonl", pairs)
    make(tmp_path, source, prompt_field="prompt,inptu,input")
    out = capsys.readouterr().out
    assert 'no prompt column "inptu" (2 records)' in out and 'no prompt column "input" (1 record)' in out


def test_same_request_again(tmp_path, capsys):
    source = jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])
    first = make(tmp_path, source, train_bpe=300, tokenizer=None)
    assert f"--data.path {tmp_path / 'store'}" in capsys.readouterr().out
    stamp = (first.path / "tokens.bin").stat().st_mtime_ns
    again = make(tmp_path, source, train_bpe=300, tokenizer=None, workers=2)
    assert (again.path / "tokens.bin").stat().st_mtime_ns == stamp and files(again) == files(first)
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"different: tokenizer, limit.*--overwrite"):
        make(tmp_path, source, limit=1)
    jsonl(source, [{"text": "changed"}])
    with pytest.raises(ValueError, match="different: sources"):
        make(tmp_path, source, train_bpe=300, tokenizer=None)
    assert len(make(tmp_path, source, overwrite=True)) == 1
    (tmp_path / "store" / "tokens.idx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokens\.idx.*--overwrite"):
        make(tmp_path, source)


def test_limit_and_learnt_tokenizer(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"text": f"the cat {n}"} for n in range(9)])
    store = make(tmp_path, source, limit=4, train_bpe=280, tokenizer=None)
    assert [text for text, _ in documents(store)] == [f"the cat {n}" for n in range(4)]
    assert store.tokenizer().vocab_size == store.manifest["tokenizer"]["vocab_size"] <= 280
    with pytest.raises(ValueError, match=r"x\.jsonl:1: "):
        make(tmp_path, source, kind="messages", train_bpe=280, tokenizer=None, out="other")


def test_settings_that_no_record_needed_are_told(tmp_path, capsys):
    (tmp_path / "t.yaml").write_text("train_roles: [user]\n")
    source = jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    make(tmp_path, source, template=str(tmp_path / "t.yaml"), completion_field="answer")
    out = capsys.readouterr().out
    assert "--template had no effect: no record is a chat\n" in out
    assert "--completion-field had no effect: no record is a pair\n" in out
    make(tmp_path, source, out="plain")
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize("request_of", [{"train_bpe": 300, "tokenizer": None}, {"tokenizer": "bytes"}])
def test_half_a_surrogate_pair_is_named_and_can_be_left_out(tmp_path, capsys, request_of):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": "bad \\ud83d half"}\n{"\\ud83d": "column"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*U\+D83D at character 4\); remove it\. .*--skip-bad"):
        make(tmp_path, tmp_path / "x.jsonl", **request_of)
    store = make(tmp_path, tmp_path / "x.jsonl", skip_bad=True, **request_of)
    assert documents(store) == [("good", "good$")] and store.manifest["bad_records"] == 2
    assert r'found "\ud83d"; name yours' in capsys.readouterr().out


def test_a_store_of_an_earlier_reading_is_kept_and_that_is_told(tmp_path, capsys, monkeypatch):
    source = jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    request = prepare_module._request
    monkeypatch.setattr(prepare_module, "_request", lambda *a: {k: v for k, v in request(*a).items() if k != "reading"})
    make(tmp_path, source)
    monkeypatch.setattr(prepare_module, "_request", request)
    assert "earlier version" not in capsys.readouterr().out
    make(tmp_path, source)
    out = capsys.readouterr().out
    assert "is up to date" in out and "earlier version" in out and "--overwrite" in out
    assert all(what in out for what in prepare_module.UNKNOWN.values())
    monkeypatch.setattr(prepare_module, "_request", lambda *a: request(*a) | {"reading": 2})
    make(tmp_path, source, out="second")
    monkeypatch.setattr(prepare_module, "_request", request)
    capsys.readouterr()
    make(tmp_path, source, out="second")
    out = capsys.readouterr().out
    assert prepare_module.UNKNOWN[2] in out and prepare_module.UNKNOWN[1] not in out


def test_hub_names(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "missing":
            raise FileNotFoundError("no such data set")
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for number, name in enumerate(["some/set", "hub:some/set@small:test[:1%]"]):
        store = make(tmp_path, name, out=str(number))
        assert [text for text, _ in documents(store)] == ["a", "b"]
    assert asked == [("some/set", None, "train"), ("some/set", "small", "test[:1%]")]
    with pytest.raises(ValueError, match=r"missing is no file here.*no such data set"):
        make(tmp_path, "missing", out="missing")
    with pytest.raises(ValueError, match="hub:some/set:1: no column"):
        make(tmp_path, "some/set", out="messages", kind="messages")


def test_corpora():
    for name, least in (("chatterbot", 2000), ("chatterbot/chinese", 400), ("python-topics", 70)):
        records = list(read_corpus(name))
        assert len(records) >= least and len({where for where, _ in records}) == len(records)
        for where, record in records:
            assert render(record, "auto", Template(), Columns()), where
    _, record = next(read_corpus("chatterbot"))
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"]


def test_mask_file_only_where_needed(tmp_path):
    store = make(tmp_path, "corpus:python-topics", limit=3)
    assert store.mask is None and not (store.path / "tokens.mask").exists()
    chat = make(tmp_path, "corpus:chatterbot", limit=3, out="chat")
    assert 0 < np.count_nonzero(chat.mask) < len(chat.tokens)


KILLED = """
import os, signal, sys
from rwkv_train.data import encode, prepare, records


def encode_and_die(encoder, raws, workers):
    for number, encoded in enumerate(real(encoder, raws, workers)):
        if number == 20:
            os.kill(os.getpid(), int(sys.argv[3]))
        yield encoded

if __name__ == "__main__":
    encode.BATCH_RECORDS = 1
    real, prepare.encode = encode.encode, encode_and_die
    prepare.prepare(prepare.PrepareConfig([sys.argv[1]], sys.argv[2], tokenizer="bytes", workers=2))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_no_store_and_no_process(tmp_path, sent, heard_signals):
    (tmp_path / "run.py").write_text(KILLED)
    source, out = jsonl(tmp_path / "x.jsonl", [{"text": "a"}] * 50), tmp_path / "store"
    arguments = [sys.executable, str(tmp_path / "run.py"), str(source), str(out), str(int(sent))]
    # The pipe is read until every process that holds it has ended, workers too: one that lives on times out.
    run = subprocess.run(arguments, capture_output=True, timeout=60)
    assert run.returncode == -sent
    with pytest.raises(ValueError, match="no file"):
        Store.open(out)
    assert len(make(tmp_path, source)) == 50
    assert sorted(os.listdir(tmp_path)) == ["run.py", "store", "x.jsonl"]
