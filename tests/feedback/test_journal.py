"""The journal: damage is told, an unfinished end is dropped, and what cannot be written leaves it as it was."""

import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.feedback.journal import Journal


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), st.booleans(), st.data())
def test_a_damaged_journal_is_told_and_an_unfinished_end_is_dropped(tmp_path_factory, texts, cut, data):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    for text in texts:
        journal.append("received", text=text)
    journal.close()
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    if not cut and at < len(whole) - 1:
        with pytest.raises(ValueError, match="is damaged"):
            Journal(path)
        return
    found = Journal(path)
    assert found.records == journal.records[: whole[:at].count(b"\n")]
    found.append("received", text="after")
    found.close()
    assert Journal(path).records == found.records


@pytest.mark.parametrize("failure", ["short", "fsync"])
def test_a_record_that_cannot_be_written_leaves_the_journal_as_it_was(tmp_path, monkeypatch, failure):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("received", text="before")
    before = journal.path.read_bytes()
    with monkeypatch.context() as patched:
        if failure == "fsync":
            patched.setattr(os, "fsync", lambda descriptor: os.fstat(-1))
        else:
            file = journal._file
            patched.setattr(
                journal, "_file", SimpleNamespace(**{n: getattr(file, n) for n in dir(file) if n[0] != "_"})
            )
            journal._file.write = lambda line: file.write(line[:5])
        with pytest.raises(OSError):
            journal.append("received", text="lost")
    assert journal.path.read_bytes() == before
    journal.append("received", text="after")
    journal.close()
    assert [(r["id"], r["text"]) for r in Journal(journal.path).records] == [(1, "before"), (2, "after")]
