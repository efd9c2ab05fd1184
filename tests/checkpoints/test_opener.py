"""What a text was made with goes from store to run to model, and is compared wherever a model and a text meet."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers import random_model, run, save_point
from runs import config_of

from rwkv_train import save_model
from rwkv_train.checkpoints.opener import format_of, format_of_run, open_model
from rwkv_train.config import ModelConfig
from rwkv_train.data.batches import make_batches
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.data.store import Store
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.tokenizer import load_tokenizer, train_bpe

OWN = Template({"user": "<u>{content}</u>", "assistant": "<a>{content}</a>"})
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}]}
TEXTS = {"a": "the cat sat on the mat", "b": "zebras quiz vexing lynxes"}  # learnt from, they give as many ids


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with own.yaml and, for a and b, a tokenizer and a model of as many ids; a's is a run's."""
    monkeypatch.chdir(tmp_path)
    OWN.save("own.yaml")
    for name, text in TEXTS.items():
        tokenizer = train_bpe([text], 260)
        assert tokenizer.vocab_size == 260
        save_point(tmp_path / name, 1, random_model(vocab_size=260))
        TextFormat(tokenizer, OWN).save(tmp_path / name)
    return tmp_path


def store(name, tokenizer="a", record=CHAT, template="own.yaml") -> str:
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for _ in range(4))
    prepare(PrepareConfig([f"{name}.jsonl"], name, tokenizer=tokenizer, template=template))
    return name


def fit_config(path, init=None, val=None):
    config = config_of(path, "runs")
    model = ModelConfig(init=init) if init else config.model
    return replace(config, model=model, data=replace(config.data, val=val, val_share=0.3))


def test_every_name_of_a_model_finds_what_lies_with_it(here):
    save_model(random_model(), "folder/model.pth")
    TextFormat(load_tokenizer("bytes"), OWN).save(here / "folder")
    names = ["a", "a/checkpoints/step=00000001", "a/checkpoints/step=00000001/trainer.ckpt", "a+adapter.pth"]
    for name in names:
        found = format_of(name)
        assert found.template == OWN and found.tokenizer.name == "bpe260"
    for name in ("folder", "folder/model.pth"):
        assert format_of(name).template == OWN and format_of(name).tokenizer.name == "bytes"
    save_model(random_model(vocab_size=260), "hf/", None, *format_of("a"))
    assert open_model("hf").template == OWN
    assert open_model("hf").tokenizer.fingerprint == format_of("a").tokenizer.fingerprint


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "must be cpu, cuda or cuda:N, found gpu"), ("cuda:x", "found cuda:x"), ("cuda:99", "torch sees")],
)
def test_a_device_that_is_not_there_is_refused(here, device, message):
    with pytest.raises(ValueError, match=message):
        open_model("a", device=device)


def test_a_text_of_another_tokenizer_is_refused_in_words_that_name_both(here, capsys):
    ours, theirs = (str(format_of(name).tokenizer) for name in "ab")
    assert ours.startswith("bpe260 (fingerprint ") and ours != theirs
    path = store("text", tokenizer="b")
    remedy = "--tokenizer a/tokenizer.json"
    for argv in (["validate", "--model=a", "--data", path], ["generate", "--model=a", "--tokenizer=b"]):
        code, _, err = run(*argv, capsys=capsys)
        assert code == 1 and ours in err and theirs in err and "--tokenizer" in err
    with pytest.raises(ValueError, match=r"bpe260.*bpe260") as caught:
        format_of_run("a", Store.open(path), None)
    assert ours in str(caught.value) and theirs in str(caught.value) and remedy in str(caught.value)
    with pytest.raises(ValueError, match="leave the tokenizer out"):
        Store.open(path).text_format("a")
    with pytest.raises(ValueError, match=r"data\.val"):
        make_batches(fit_config(path, val=store("val", tokenizer="a")), Store.open(path), 260)


def test_the_same_ids_that_end_otherwise_are_another_tokenizer(here):
    known = format_of("a").tokenizer
    shutil.copytree("a", "c")
    config = json.loads((here / "c/tokenizer_config.json").read_text())
    (here / "c/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "!"}))
    other = format_of("c").tokenizer
    assert other.fingerprint == known.fingerprint and other.eod != known.eod
    with pytest.raises(ValueError, match=f"end of document {known.eod}.*end of document {other.eod}"):
        format_of_run("c", Store.open(store("text")), None)


def test_what_is_unknown_is_told_once(here, capsys):
    save_model(random_model(vocab_size=260), "bare/m.pth")
    text = Store.open(store("text"))
    found, notes = format_of_run("bare/m.pth", text, None)
    assert found.template == OWN and found.tokenizer.fingerprint == text.tokenizer().fingerprint
    assert len(notes) == 1 and "bare/m.pth does not say which tokenizer" in notes[0] and "bpe260" in notes[0]
    shutil.copy("text/tokens.bin", "plain.bin")
    shutil.copy("text/tokens.idx", "plain.idx")
    found, notes = format_of_run("a", Store.open("plain"), None)
    assert found.tokenizer.name == "bpe260" and len(notes) == 1 and "plain does not say" in notes[0]
    assert format_of_run("a", Store.open("plain"), "a")[1] == []
    code, _, err = run("validate", "--model=bare/m.pth", "--data=text", capsys=capsys)
    assert code == 0 and err.count("note: ") == 1 and "bare/m.pth does not say" in err
    open_model("bare/m.pth", "a")
    assert capsys.readouterr().err.count("does not say how chats are written") == 1


def test_a_run_keeps_how_its_chats_are_written(here, capsys):
    chats, text = Store.open(store("chats")), Store.open(store("text", record={"text": "the mat"}, template=None))
    assert chats.text_format().template == OWN and text.text_format().template is None
    assert format_of_run(None, chats, None)[0].template == OWN
    assert format_of_run("a", text, None)[0].template == OWN  # the text has no chats: as the model knows them
    world = Store.open(store("world", template=None))
    found, notes = format_of_run("a", world, None)
    assert found.template.roles == Template().roles
    assert len(notes) == 1 and "'User: {content}\\n\\n', not '<u>{content}</u>'" in notes[0]
    with pytest.raises(ValueError, match=r"written otherwise.*--template"):
        make_batches(fit_config("chats", val="world"), chats, 260)
    Template().save("world.yaml")
    assert open_model("a", template="world.yaml").template == Template()
    assert "--template is taken" in capsys.readouterr().err


def test_a_store_of_before_says_its_template_without_counting_chats(here):
    chats = Store.open(store("chats"))
    before = replace(chats, manifest={k: v for k, v in chats.manifest.items() if k != "chats"})
    assert before.text_format().template == OWN
    assert replace(chats, manifest=before.manifest | {"request": {}}).text_format().template is None


def test_fit_writes_it_and_its_export_carries_it(here, capsys):
    store("chats", tokenizer="world")
    argv = "fit --name=r --model.n_layer=1 --model.n_embd=8 --data.path=chats --data.chunk_len=8 --data.lanes=2"
    argv = [*argv.split(), "--data.val_share=0", "--train.steps=1", "--train.device=cpu", "--samples.prompts=[]"]
    assert run(*argv, capsys=capsys)[0] == 0
    code, out, _ = run("export", "--model=runs/r", "--out=hf/", capsys=capsys)
    assert code == 0 and "AutoTokenizer opens it" in out and (here / "hf/tokenizer.json").exists()
    for name in ("runs/r", "hf"):
        assert format_of(name).tokenizer.name == "world" and format_of(name).template == OWN
    code, out, _ = run("export", "--model=runs/r", "--out=r.pth", capsys=capsys)
    assert code == 0 and "without the tokenizer world" in out and "template of its chats" in out
    assert sorted(p.name for p in here.glob("r.*")) == ["r.pth"]


def test_a_run_of_before_whose_tokenizer_names_no_end_is_opened(here, capsys):
    spec = json.loads((here / "a/tokenizer.json").read_text())
    spec["added_tokens"] = []
    spec["model"]["vocab"]["?"], spec["model"]["vocab"]["other"] = 260, 0
    spec["model"]["vocab"].pop("<|endoftext|>")
    (here / "a/tokenizer.json").write_text(json.dumps(spec))
    (here / "a/tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="does not say what ends a document"):
        format_of("a")
    (here / "a/config.yaml").write_text("name: a\n")
    assert format_of("a").tokenizer.eod == 0
    assert "was trained with id 0" in capsys.readouterr().err
