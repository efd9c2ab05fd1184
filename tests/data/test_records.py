"""The same texts give the same records whatever the file's format; what is not read is named by file and line."""

import csv
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import TEXTS, documents, files, jsonl, make

from rwkv_train.data import records as records_module


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
        ("x.csv", b'text\na\n"never closed\nb\n', r"x\.csv:3: bad CSV \(unexpected end of data\)"),
        ("x.tsv", b'text\n"a" word\n', r"x\.tsv:2: bad CSV"),
        ("x.csv", b'"text\na\n', r"x\.csv:1: the header is bad CSV"),
        ("x.csv", b"text\n\xe9\n", r"x\.csv:2: invalid UTF-8"),
        ("x.csv", b"text,text\na,b\n", r"x\.csv:1: the header"),
        ("x.csv", b",,text\n1,2,a\n", r"x\.csv:1: the header.* each name once"),
        ("x.csv", b"\ntext\na\n", r"x\.csv:1: the header"),
        ("x.csv", "text\na\n".encode("utf-16"), r"x\.csv:1: UTF-16; save the file as UTF-8"),
        ("x.txt", "text".encode("utf-16"), r"x\.txt:1: UTF-16"),
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


def test_a_column_without_a_name_is_named_as_not_used(tmp_path, capsys):
    (tmp_path / "x.csv").write_text(",text\n0,hello\n1,world\n")
    store = make(tmp_path, tmp_path / "x.csv")
    assert [text for text, _ in documents(store)] == ["hello", "world"]
    assert 'not used: "(without a name)" (2 records)\n' in capsys.readouterr().out


def test_null_columns_of_parquet_are_as_if_absent(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    chat = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "weight": None}]
    table = pyarrow.Table.from_pylist(
        [{"text": None, "messages": chat, "system": None}, {"text": "t", "messages": None, "system": None}],
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    store = make(tmp_path, tmp_path / "x.parquet")
    assert documents(store) == [("User: a\n\nAssistant: b\n\n", " b\n\n$"), ("t", "t$")]
    assert "not used" not in capsys.readouterr().out


def test_separators_that_are_no_line_feeds_stay_in_their_line(tmp_path):
    text = "a\u2028b\x85c\x0bd\x0ce"
    jsonl(tmp_path / "x.jsonl", [{"text": text}] * 2)
    (tmp_path / "x.csv").write_text(f"text\r\n{text}\r\n{text}\r\n", newline="", encoding="utf-8")
    (tmp_path / "x.txt").write_text(f"{text}\r\n{text}", newline="", encoding="utf-8")
    for name, options in (("x.jsonl", {}), ("x.csv", {}), ("x.txt", {"split": "line"})):
        store = make(tmp_path, tmp_path / name, out=name[2:], **options)
        assert documents(store) == [(text, text + "$")] * 2
