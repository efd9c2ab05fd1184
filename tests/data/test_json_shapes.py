"""Valid JSON is read whatever its shape, or refused in words that say what it is and what to do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared import documents, make

from rwkv_train.data.records import read
from rwkv_train.data.render import Columns
from rwkv_train.data.sources import Source

texts = st.lists(st.text(min_size=1, max_size=3).filter(str.strip), min_size=1, max_size=4)
SHAPES = {
    "lines": lambda records: "\n".join(map(json.dumps, records)),
    "array": json.dumps,
    "array over lines": lambda records: "[" + ",\n".join(map(json.dumps, records)) + "]",
    "indented array": lambda records: json.dumps(records, indent=1),
    "indented object": lambda records: json.dumps({"version": 1, "data": records}, indent=1),
    "object": lambda records: json.dumps({"version": 1, "data": records}),
    "raw letters": lambda records: json.dumps({"data": records}, indent=1, ensure_ascii=False),
}


def found(path):
    """Texts of the records that are read from a file."""
    raws = [raw for raw in read(Source("file", str(path)), columns=Columns())]
    return [json.loads(raw.data)["text"] if raw.form == "json" else raw.data["text"] for raw in raws]


@given(texts=texts, suffix=st.sampled_from(["json", "jsonl"]), shape=st.sampled_from(list(SHAPES)), mark=st.booleans())
def test_every_shape_gives_the_same_records(tmp_path_factory, texts, suffix, shape, mark):
    path = tmp_path_factory.mktemp("json") / f"x.{suffix}"
    written = SHAPES[shape]([{"text": text} for text in texts])
    path.write_bytes(b"\xef\xbb\xbf" * mark + b"\n" * mark + written.encode("utf-8", "surrogatepass"))
    assert found(path) == texts


@pytest.mark.parametrize(
    "record", [{"text": "a", "tags": [{"b": 1}]}, {"messages": [{"role": "user", "content": "a"}]}]
)
@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_that_is_a_record_is_one_record(tmp_path, record, indent):
    (tmp_path / "x.json").write_text(json.dumps(record, indent=indent))
    (raw,) = read(Source("file", str(tmp_path / "x.json")), columns=Columns())
    assert (json.loads(raw.data) if raw.form == "json" else raw.data) == record


def test_what_lies_beside_the_records_is_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"version": "1.0", "data": [{"text": "a"}], "more": []}, indent=1))
    assert documents(make(tmp_path, tmp_path / "x.json", train_bpe=300, tokenizer=None)) == [("a", "a$")]
    told = 'x.json: one object, its records are the list "data", not used: "version", "more"\n'
    assert capsys.readouterr().out.count(told) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n"a": {"text": "b"}}', r'x.json: one object with the keys "a", none of them a list of records; write'),
        ('{\n"a": [{}], "b": [{}], "c": 1}', r'the keys "a", "b", "c", of which "a", "b" are lists of records; write'),
        ('{\n"text": "a"}\n{"text": "b"}', r"x.json:3: several JSON values over several lines; write"),
        ('{\n"text": "a",\n}', r"x.json:3: bad JSON"),
        ('{"text": "a",\n"text": "b"}', r'the key "text" stands twice in one object'),
        ('{"text": "a", "text": "b"}\n{"text": "c"}', r'x.json:1: bad JSON \(the key "text" stands twice'),
        ('[{"text": "a"},\n{"text": "b", "id": 1, "id": 1}]', r'the key "id" stands twice'),
        ('{"id": 1}', r'x.json:1: no known column: expected .* found "id"'),
        ('{"data": []}', r'x.json:1: no known column: expected .* found "data"'),
        ('"text"', "x.json:1: expected an object"),
        ('["a", "b"]', "x.json: record 1: expected an object"),
        ('["a"]\n["b"]', "x.json:1: expected an object"),
        ('{"a":' * 100_000, "x.json:1: bad JSON .nested too deeply|x.json:1: bad JSON"),
        ("[" * 100_000 + "]" * 100_000, "x.json:1: bad JSON .nested too deeply"),
        ('{"text": NaN}', r'x.json:1: no known column.*found "text" \(null\)'),
        ('{"text": null}', r'x.json:1: no known column.*found "text" \(null\)'),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        make(tmp_path, tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_values_that_are_missing_in_python_are_missing_here(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "input": NaN, "completion": "a", "score": -Infinity}\n')
    store = make(tmp_path, tmp_path / "x.jsonl", prompt_field="prompt,input")
    assert documents(store) == [("qa", "a$")] and "not used" not in capsys.readouterr().out
