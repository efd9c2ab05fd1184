"""Text is read as it was typed: every route to the same lines gives the same lines."""

import io
import json
import re

import pytest
from helpers import run
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.files import (
    BadJSON,
    numbered_lines,
    parse_json,
    quoted,
    read_lines,
    read_text,
    read_yaml,
    replace_file,
    typed_lines,
)

SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines cuts and an editor does not
lines = st.lists(st.text(st.sampled_from("ab {}你🤖\ufeff" + SEPARATORS), max_size=6), max_size=5)


@given(lines=lines, mark=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_every_reader_cuts_alike(tmp_path_factory, lines, mark, end):
    text = end.join(lines)
    data = b"\xef\xbb\xbf" * mark + text.encode()
    path = tmp_path_factory.mktemp("lines") / "x.txt"
    path.write_bytes(data)
    if not mark:
        text = text.removeprefix("\ufeff")  # at the beginning it can be nothing but a mark
    assert read_text(path) == text
    wanted = [(n, line) for n, line in enumerate(text.split(end), 1) if line.strip()]
    assert read_lines(path) == wanted
    from_bytes = [
        (n, line.decode().removesuffix("\n").removesuffix("\r")) for n, line in numbered_lines(io.BytesIO(data))
    ]
    assert [(n, line) for n, line in from_bytes if line.strip()] == wanted
    typed = typed_lines(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n"))
    assert [line.rstrip("\r\n") for line in typed if line.strip()] == [line for _, line in wanted]


def test_what_is_no_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\xe9\n")
    with pytest.raises(ValueError, match=r"x\.txt:2: invalid UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        read_lines(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_text("one", encoding="utf-16")
    with pytest.raises(ValueError, match=r"x\.txt:1: UTF-16; save the file as UTF-8"):
        read_text(tmp_path / "x.txt")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30)
@given(value=values, ascii_only=st.booleans())
def test_json_is_read_as_it_was_written(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "bad JSON .*column 2"),
        ('{"a": 1,\n "a": 2}', 'the key "a" stands twice'),
        ('{"b": {"\\ud83d": 1, "\\ud83d": 2}}', r'the key "\\ud83d" stands twice'),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "digits"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(text, words):
    with pytest.raises(BadJSON, match=words) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_the_line_of_bad_json_is_known():
    with pytest.raises(BadJSON) as caught:
        parse_json('[1,\n2,\n"]')
    assert caught.value.line == 3


def test_missing_values_as_python_writes_them_are_null():
    assert parse_json(json.dumps({"a": float("nan"), "b": [float("inf"), -float("inf")]})) == {
        "a": None,
        "b": [None] * 2,
    }


@given(st.text(st.characters(exclude_categories=())))
def test_quoted_names_can_be_shown_anywhere(name):
    shown = quoted(name)
    assert shown.isprintable() and len(shown) <= 700
    shown.encode()
    if name.isprintable() and len(name) <= 60:
        assert shown == f'"{name}"'


def test_errors_name_what_was_asked_for(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder; name a file in it"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"/nowhere/x'$"):  # and not the file that would become it
        replace_file(tmp_path / "nowhere" / "x", lambda temporary: temporary.write_text("x"))


def test_yaml_is_read_without_a_mark(tmp_path):
    (tmp_path / "x.yaml").write_text("\ufeffa: {b: [1, 2]}\n", encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"b": [1, 2]}}


def test_yaml_whose_parts_stand_in_several_places_is_read_once(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a [*a]\n", encoding="utf-8")
    inner = read_yaml(tmp_path / "x.yaml")["a"]
    assert inner[0] is inner
    doubled = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    (tmp_path / "x.yaml").write_text(f"a0: &a0 [1]\n{doubled}", encoding="utf-8")
    assert len(read_yaml(tmp_path / "x.yaml")) == 60


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: {c: 1,\n c: 2}\n", r'x\.yaml:3: the key "c" stands twice'),
        (b"a: [{b: 1}, {c: 1, c: 2}]\n", r'x\.yaml:1: the key "c" stands twice'),
        (b"a: 1\nb: {\n", r"x\.yaml:3: no YAML"),
        (b"a: 1\nb: caf\xe9\n", r"x\.yaml:2: invalid UTF-8"),
        (b"a: \x07\n", r"x\.yaml: no YAML"),
        (b"a: 2026-13-45\n", r"x\.yaml: no YAML \(month must be in 1..12"),
        (b"a: !!bool x\n", r"x\.yaml: no YAML"),
        (b"a: !!timestamp x\n", r"x\.yaml: no YAML"),
    ],
)
def test_what_is_no_yaml_is_named_with_its_line(tmp_path, content, words, capsys):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_yaml(tmp_path / "x.yaml")
    code, _, err = run("generate", f"--config={tmp_path / 'x.yaml'}", capsys=capsys)
    assert code == 2 and re.search(words, err) and err.count("\n") == 1
