"""prepare: the same texts give the same store whatever the format and the number of workers; masks cover
exactly what should be trained; bad records are named by file and line."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data import encode as encode_module
from rwkv_train.data import records as records_module
from rwkv_train.data.corpora.catalogue import read_corpus
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.data.store import Store
from rwkv_train.data.templates import Columns, Template, render

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


def test_every_format_gives_the_same_store(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(text.encode())
    (tmp_path / "texts" / "notes.md").write_text("not read")
    records = [{"text": text, "other": 1} for text in TEXTS]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"x.{suffix}", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])
    (tmp_path / "x.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "x.parquet")
    sources = ["texts", "texts/*.txt", "x.csv", "x.tsv", "x.json", "x.parquet"]
    reference = make(tmp_path, jsonl(tmp_path / "x.jsonl", records), out="reference")
    assert documents(reference) == [(text, text + "$") for text in TEXTS]
    for number, source in enumerate(sources):
        assert files(make(tmp_path, tmp_path / source, out=str(number))) == files(reference)


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


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.sampled_from("ab \n你🤖\r"), max_size=80), block=st.integers(8, 40))
def test_long_texts_come_in_pieces(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("long") / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "BLOCK", block)
        pieces = list(records_module.read(records_module.Source("file", str(path))))
    texts = [piece.data.decode() for piece in pieces]  # every piece is UTF-8 by itself
    assert "".join(texts) == text and all(texts[1:])
    assert [p.first for p in pieces] == [n == 0 for n in range(len(pieces))]
    assert [p.last for p in pieces] == [n == len(pieces) - 1 for n in range(len(pieces))]
    assert all(len(piece.data) <= 2 * block for piece in pieces)


def test_pieces_make_one_document(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("".join(f"  line {n} {'#' * (n % 30)}\n" * 2 + f"{n}\n\n" for n in range(99)))
    whole = make(tmp_path, tmp_path / "x.txt", tokenizer="world", out="whole")
    monkeypatch.setattr(records_module, "BLOCK", 100)
    found = [raw.data for raw in records_module.read(records_module.Source("file", str(tmp_path / "x.txt")))]
    assert len(found) > 50 and all(piece.endswith(b"\n") and not piece[:1].isspace() for piece in found[1:])
    pieces = make(tmp_path, tmp_path / "x.txt", tokenizer="world", out="pieces")
    assert files(pieces) == files(whole) and len(whole) == 1


def test_split(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\n\na\r\nb\n \nc\n\n\n\nd")
    blank = make(tmp_path, tmp_path / "x.txt", split="blank", out="blank")
    line = make(tmp_path, tmp_path / "x.txt", split="line", out="line")
    assert [text for text, _ in documents(blank)] == ["a\r\nb", "c", "d"]
    assert [text for text, _ in documents(line)] == ["a", "b", "c", "d"]
    source = records_module.Source("file", str(tmp_path / "x.txt"))
    assert [raw.where[-2:] for raw in records_module.read(source, "blank")] == [":3", ":6", "10"]
    assert [raw.where[-2:] for raw in records_module.read(source, "line")] == [":3", ":4", ":6", "10"]


def test_pairs_train_the_completion_and_the_end(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"prompt": "Q: 1+1\nA:", "completion": " 2\n"}] * 2)
    assert documents(make(tmp_path, source)) == [("Q: 1+1\nA: 2\n", " 2\n$")] * 2
    rows = [{"instruction": "Add", "input": "1+1", "output": "=2"}, {"instruction": "Go", "output": "!"}]
    columns = {"prompt_field": "instruction,input", "completion_field": "output"}
    store = make(tmp_path, jsonl(tmp_path / "y.jsonl", rows), out="columns", **columns)
    assert documents(store) == [("Add\n1+1=2", "=2$"), ("Go!", "!$")]


WRITTEN = "System: Be brief.\n\nUser: Hi\nthere\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant: See\nyou.\n\n"


@pytest.mark.parametrize(
    ("roles", "trained"),
    [
        (["assistant"], " Hello!\n\n See\nyou.\n\n$"),
        (["user"], " Hi\nthere\n\n Bye\n\n"),
        (["user", "assistant"], " Hi\nthere\n\n Hello!\n\n Bye\n\n See\nyou.\n\n$"),
        (["system"], " Be brief.\n\n"),
    ],
)
def test_messages_train_the_roles_asked_for(tmp_path, roles, trained):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    source = jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}, {"conversations": sharegpt}])
    assert documents(make(tmp_path, source, train_roles=roles)) == [(WRITTEN, trained)] * 2


def test_generation_prompt_is_what_training_saw():
    template = Template()
    both = Template(train_roles=["user", "assistant"])
    assert both.prompt(CHAT[:2]) == [text for text, _ in both.segments(CHAT[:3])[:-1]]
    segments = template.segments(CHAT)
    assert [trained for _, trained in segments] == [
        False,
        True,
        False,
        True,
    ]  # joined as generation reads them
    assert segments[-1] == (" See\nyou.\n\n", True)
    assert template.prompt(CHAT[:4]) == [text for text, _ in segments[:-1]]
    assert template.prompt([]) == ["Assistant:"]


def test_template_file(tmp_path):
    (tmp_path / "t.yaml").write_text(
        'roles: {user: "<u>{content}</u>", bot: "<b> {content}</b>"}\ntrain_roles: [bot]\ncollapse_blank_lines: false\n'
    )
    messages = [{"role": "user", "content": "a\n\n{content}"}, {"role": "bot", "content": "b"}]
    source = jsonl(tmp_path / "x.jsonl", [{"chat": messages}])
    store = make(tmp_path, source, template=str(tmp_path / "t.yaml"), messages_field="chat", kind="messages")
    assert documents(store) == [("<u>a\n\n{content}</u><b> b</b>", " b</b>$")]
    assert Template(**store.manifest["request"]["template"]) == Template.load(tmp_path / "t.yaml")
    for content in ("rolls: {}", "roles: [1]", "roles: {user: hello}", "train_roles: [cat]", "{", "[]"):
        (tmp_path / "t.yaml").write_text(content)
        with pytest.raises(ValueError, match="emplate"):
            Template.load(tmp_path / "t.yaml")


BAD = {
    b'{"text": "a}': "bad JSON",
    b'{"txt": "a"}': 'no known column: expected "text".*found "txt".*--text-field',
    b'{"text": 1}': '"text" must be text',
    b'{"text": " \\n"}': '"text" is empty',
    b'["text"]': "expected an object",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b"[" * 100_000: "nested too deeply|bad JSON",
    b'{"prompt": "a", "completion": ""}': '"completion" is empty',
    b'{"messages": []}': "must be a list of messages",
    b'{"messages": [{"role": "user"}]}': "message 1 must be",
    b'{"messages": [{"role": "user", "content": null}]}': "message 1 must be",
    b'{"messages": [{"role": "cat", "content": "x"}]}': "role 'cat' is unknown.*system, user, assistant",
    b'{"messages": [{"role": "user", "content": " "}]}': r"message 1 \(user\) is empty",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_bad_line(tmp_path, capsys, line):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    with pytest.raises(ValueError, match=rf"x\.jsonl:3: .*({BAD[line]}).*--skip-bad"):
        make(tmp_path, tmp_path / "x.jsonl")
    assert os.listdir(tmp_path) == ["x.jsonl"]
    store = make(tmp_path, tmp_path / "x.jsonl", skip_bad=True)
    assert [text for text, _ in documents(store)] == ["good", "also good"]
    assert store.manifest["bad_records"] == 1
    output = capsys.readouterr().out
    assert "1 bad records left out" in output and "x.jsonl:3:" in output


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"ok\nok\nb\xe9d\n", r"x\.txt:3: invalid UTF-8"),
        ("x.txt", b" \n", r"x\.txt: the text is empty"),
        ("x.txt", b"", r"x\.txt: the text is empty"),
        ("x.csv", b'text,n\n"a\nb",1\nc\n', r"x\.csv:4: 1 fields, but the header names 2"),
        ("x.csv", b"text\n\xe9\n", r"x\.csv:2: invalid UTF-8"),
        ("x.csv", b"text,text\na,b\n", r"x\.csv:1: the header"),
        ("x.json", b'[{"text": "a"},\n{"text" "b"}]', r"x\.json:2: bad JSON"),
        ("x.json", b'[{"text": "a"}, 5]', r"x\.json: record 2: expected an object"),
        ("x.json", b'[{"text":\n "\xe9"}]', r"x\.json:2: invalid UTF-8"),
        ("x.parquet", b"PAR1 or so", r"x\.parquet.*damaged parquet"),
        ("x.pdf", b"%PDF", r"'.pdf' are unknown"),
    ],
)
def test_bad_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        make(tmp_path, tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_bad_text_among_long_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "BLOCK", 16)
    (tmp_path / "a.txt").write_bytes(b"one line\n" * 10 + b"caf\xe9\n" + b"one line\n" * 10)
    (tmp_path / "b.txt").write_bytes(b"a second text\n" * 10)
    with pytest.raises(ValueError, match=r"a\.txt:11: invalid UTF-8"):
        make(tmp_path, tmp_path / "*.txt")
    assert documents(make(tmp_path, tmp_path / "*.txt", skip_bad=True))[0][0] == "a second text\n" * 10


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
def test_a_stopped_run_leaves_no_store_and_no_process(tmp_path, sent):
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
