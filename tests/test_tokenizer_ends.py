"""What ends a document is told by a name, a file beside, or a flag, and never guessed."""

import json

import pytest
from helpers import run

from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.data.store import Store
from rwkv_train.data.text_format import TextFormat
from rwkv_train.tokenizer import EOD_NAMES, UnknownEnd, load_tokenizer, train_bpe


def letters(folder, *specials):
    """A tokenizer of "!", other printable letters and then special tokens, as a file in `folder`."""
    tokens = [chr(i) for i in range(0x21, 0x7F)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": len(tokens) + i, "content": s, **flags} for i, s in enumerate(specials)],
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate([*tokens, *specials])}, "merges": []},
    }
    folder.mkdir(exist_ok=True)
    path = folder / "letters.json"
    path.write_text(json.dumps(spec))
    return path


@pytest.mark.parametrize("name", EOD_NAMES)
def test_usual_names_are_found(tmp_path, name):
    tokenizer = load_tokenizer(letters(tmp_path, "[PAD]", name))
    assert tokenizer.eod == tokenizer.vocab_size - 1 and tokenizer.eod not in tokenizer.encode(f"a{name}!")


@pytest.mark.parametrize("specials", [(), ("[PAD]", "<unk>")])
def test_without_one_it_is_refused_with_the_names_and_the_flag(tmp_path, specials, capsys):
    path = letters(tmp_path, *specials)
    with pytest.raises(UnknownEnd, match=r"letters\.json does not say what ends a document"):
        load_tokenizer(path)
    (tmp_path / "t.txt").write_text("Hi!")
    code, _, err = run("prepare", tmp_path / "t.txt", "--tokenizer", path, "--out", tmp_path / "s", capsys=capsys)
    assert code == 1 and "--eod" in err and "[EOS]" in err and "tokenizer_config.json" in err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<stop>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<stop>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "<stop>"}),
        ("generation_config.json", {"eos_token_id": [95, 94]}),
        ("manifest.json", {"eod": 95}),
    ],
)
def test_what_a_file_beside_it_says_rules(tmp_path, file, content):
    path = letters(tmp_path, "</s>", "<stop>")
    assert load_tokenizer(path).eod == 94
    (tmp_path / file).write_text(json.dumps(content))
    assert load_tokenizer(path).eod == 95
    assert load_tokenizer(path, "</s>").eod == load_tokenizer(path, "94").eod == load_tokenizer(path, 94).eod == 94


@pytest.mark.parametrize("content", ['{"eos_token": null}', '{"eos_token": "<other>"}', "[", "{}", "[1]"])
def test_a_file_beside_it_that_says_nothing_is_passed_over(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert load_tokenizer(letters(tmp_path, "</s>")).eod == 94


@pytest.mark.parametrize("eod", ["<other>", "4711", 4711])
def test_an_end_that_is_no_token_is_refused(tmp_path, eod):
    with pytest.raises(ValueError, match="has no token"):
        load_tokenizer(letters(tmp_path, "</s>"), eod)
    with pytest.raises(ValueError, match="ends a document with id 0"):
        load_tokenizer("bytes", eod)


def test_a_chosen_end_goes_with_the_store_and_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = letters(tmp_path, "[PAD]", "<stop>")
    (tmp_path / "t.jsonl").write_text('{"text": "Hi!"}\n{"text": "Ho!"}\n')
    store = prepare(PrepareConfig(["t.jsonl"], "s", tokenizer=str(path), eod="<stop>"))
    assert store.tokens.tolist().count(95) == 2 and store.eod == Store.open("s").tokenizer().eod == 95
    (tmp_path / "run").mkdir()
    store.text_format().save(tmp_path / "run")
    for folder in ("s", "run"):
        assert load_tokenizer(folder).eod == 95 and load_tokenizer(f"{folder}/tokenizer.json").eod == 95
    assert TextFormat.read(tmp_path / "run").tokenizer.name == "letters"
    with pytest.raises(ValueError, match="end of document 94, there 95"):
        prepare(PrepareConfig(["t.jsonl"], "s", tokenizer=str(path), eod="[PAD]"))
    with pytest.raises(ValueError, match="--eod <stop> is of no use with --train-bpe"):
        prepare(PrepareConfig(["t.jsonl"], "b", train_bpe=260, eod="<stop>"))
    capsys.readouterr()
    prepare(PrepareConfig(["t.jsonl"], "letter", tokenizer=str(path), eod="!"))
    assert "is '!' in texts, too" in "".join(capsys.readouterr())


def test_a_store_of_before_keeps_the_end_it_was_made_with(tmp_path):
    """Its manifest says it, whatever would be found today."""
    path = letters(tmp_path, "[PAD]", "[EOS]")
    (tmp_path / "t.txt").write_text("Hi!")
    store = prepare(PrepareConfig([str(tmp_path / "t.txt")], str(tmp_path / "s"), tokenizer=str(path), eod="[PAD]"))
    assert load_tokenizer(path).eod == 95 and store.tokenizer().eod == 94


def test_bytes_are_a_tokenizers_json_that_is_known_again(tmp_path):
    tokenizers, tokenizer = pytest.importorskip("tokenizers"), load_tokenizer("bytes")
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "".join(map(chr, range(0x250))) + "\n\n 你好 \U0001f600"
    assert theirs.encode(text).ids == tokenizer.encode(text) and theirs.decode(tokenizer.encode(text)) == text
    assert theirs.token_to_id("<|endoftext|>") == tokenizer.eod
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert train_bpe(["ab"], 257).fingerprint != tokenizer.fingerprint
    (tmp_path / "old.json").write_text('{"rwkv_train_tokenizer": "bytes"}')
    assert load_tokenizer(tmp_path / "old.json").fingerprint == tokenizer.fingerprint
