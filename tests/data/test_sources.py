"""What is read of a folder or glob, and what is passed over and named."""

import os

import pytest
from prepared import documents, jsonl, make

from rwkv_train.data.sources import Passed, described, resolve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/.git/x.txt", "d/sub/b.txt", "d/a.txt", "d/n.MD", "d/README", "d/x.jsonl.gz", "d/.x.txt", "e/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "d" / "empty.csv").touch()
    (tmp_path / "d" / "broken.txt").symlink_to("nowhere")
    (tmp_path / "d" / "linked.txt").symlink_to("../e/c.txt")
    (tmp_path / "d" / "folder").symlink_to("../e")
    return tmp_path


def test_a_folder_names_what_it_passes_over(folder, capsys):
    sources, passed = resolve(["d"])
    assert [source.name for source in sources] == ["d/a.txt", "d/linked.txt", "d/sub/b.txt"]
    assert set(passed) == {
        ("hidden", "d/.git"), ("hidden", "d/.x.txt"), ("ending in .md", "d/n.MD"), ("ending in .gz", "d/x.jsonl.gz"),
        ("without an ending", "d/README"), ("empty", "d/empty.csv"), ("broken link", "d/broken.txt"),
        ("link to a folder", "d/folder"),
    }  # fmt: skip
    assert len(make(folder, "d")) == 3
    assert f"passed over: {described(passed)}\n" in capsys.readouterr().out
    assert "hidden (2: d/.git, d/.x.txt)" in described(passed)


def test_a_glob_names_what_it_passes_over(folder):
    sources, passed = resolve(["d/*"])
    assert [source.name for source in sources] == ["d/a.txt", "d/linked.txt"]
    assert {("folder", "d/sub"), ("folder", "d/folder"), ("broken link", "d/broken.txt")} < set(passed)
    everything, rest = resolve(["d/**"])  # a folder of which something is read is not passed over
    assert "d/sub/b.txt" in [s.name for s in everything] and ("folder", "d/sub") not in rest


def test_many_are_counted():
    assert described([Passed("empty", f"{n}.txt") for n in range(5)]) == "empty (5: 0.txt, 1.txt, 2.txt, ...)"


def test_a_folder_of_nothing_says_what_there_is(folder):
    (folder / "e" / "c.txt").write_text("")
    with pytest.raises(ValueError, match=r"e holds no \.txt.* There are only: empty \(1: e/c\.txt\)"):
        resolve(["e"])


def test_files_without_a_record_and_files_named_twice_are_told(folder, capsys):
    (folder / "h.csv").write_text("text\n")
    assert len(make(folder, "h.csv", "e", "e/c.txt", "d/linked.txt")) == 3
    out = capsys.readouterr().out
    assert "passed over: without a record (1: h.csv)\n" in out
    assert f"{folder}/e/c.txt was named 3 times, and is read as often\n" in out


def test_a_store_among_the_sources_is_passed_over(folder, capsys):
    first = make(folder, "e", out="e/store")
    assert make(folder, "e", out="e/store").manifest == first.manifest  # up to date
    make(folder, "e", out="other")
    assert "passed over: token store (1: e/store)\n" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="names are bytes only there")
def test_a_name_that_is_no_text_is_told_escaped(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("a")
    (tmp_path / os.fsdecode(b"\xff.md")).write_text("a")
    jsonl(tmp_path / "x.jsonl", [{"text": "b"}])
    store = make(tmp_path, tmp_path)
    assert [text for text, _ in documents(store)] == ["a", "b"] and r"\udcff.md" in capsys.readouterr().out
    assert store.manifest["request"]["sources"][0]["file"].endswith(name)
