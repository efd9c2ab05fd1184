"""Exported folders as others open them: transformers, and rwkv7-hf, whose own folders are opened here.

Heads have 64 channels, as those of all released models: others norm smaller ones with another epsilon.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close_rel, random_model, run

from rwkv_train import load_model, save_model
from rwkv_train.checkpoints.opener import format_of
from rwkv_train.data.templates import Template
from rwkv_train.tokenizer import WORLD_FILE, load_tokenizer, train_bpe

TEXT = "Hello, \u4f60\u597d!  Two  spaces\n\nand more"
CHAT = [{"role": "user", "content": "Hi!"}]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def rwkv7_hf(transformers):
    return pytest.importorskip("rwkv7_hf", reason="needs rwkv7-hf, a peer that opens folders of an RWKV-7")


def tokenizer_of(kind: str):
    return train_bpe([TEXT] * 3, 280) if kind == "bpe" else load_tokenizer(kind)


def model_of(generation: str, vocab_size: int):
    sizes = {"n_embd": 16} if generation == "rwkv4" else {"n_embd": 128, "n_ffn": 40, "head_size": 64}
    return random_model(vocab_size=vocab_size, n_layer=3, generation=generation, **sizes)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "world"])
def test_transformers_opens_the_tokenizer(transformers, tmp_path, kind):
    """By AutoTokenizer, with our ids, without code of ours; and once more after it has saved it itself."""
    ours = tokenizer_of(kind)
    save_model(random_model(vocab_size=ours.vocab_size), tmp_path / "ours", None, ours, Template())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for opened in (theirs, transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")):
        ids = ours.encode(TEXT)
        assert opened(["hi there", "x"], padding=True)["attention_mask"][1].count(0) and opened.pad_token_id == ours.eod
        assert opened(TEXT) == {"input_ids": ids, "attention_mask": [1] * len(ids)} and opened.decode(ids) == TEXT
        assert opened.eos_token_id == ours.eod and len(opened) == {"world": 65530}.get(kind, ours.vocab_size)
        assert (
            opened.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
            == f"{ours.eod_name}User: Hi!\n\nAssistant:"
        )
    again = format_of(tmp_path / "theirs")
    assert again.template == Template() and again.tokenizer.eod == ours.eod
    if kind == "world":
        assert again.tokenizer.name == "world"


def test_transformers_opens_an_rwkv4_and_how_to_sample(transformers, tmp_path):
    ours, model = load_tokenizer("world"), model_of("rwkv4", 65536)
    save_model(model, tmp_path / "hf", tokenizer=ours, template=Template())
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    asked = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXT, return_tensors="pt")
    with torch.no_grad():
        assert_close_rel(opened(**asked).logits, model(asked.input_ids)[0], 1e-5)
    assert opened.generate(**asked, max_new_tokens=3).shape[1] <= asked.input_ids.shape[1] + 3
    how = opened.generation_config
    assert (how.do_sample, how.temperature, how.top_p, how.top_k) == (True, 0.8, 0.5, 0)
    assert how.eos_token_id == [0, *ours.encode("\n\n")] and how.pad_token_id == opened.config.eos_token_id == 0


@torch.no_grad()
def logits_both_ways(theirs, tokens):
    """Of the whole at once, and token by token with the state carried."""
    one, carried = [], None
    for t in range(tokens.shape[1]):
        out = theirs(tokens[:, t : t + 1], past_key_values=carried, use_cache=True)
        carried = out.past_key_values
        one.append(out.logits)
    return theirs(tokens).logits, torch.cat(one, 1)


def test_rwkv7_hf_opens_ours(rwkv7_hf, tmp_path):
    model = model_of("rwkv7", 280)
    save_model(model, tmp_path / "hf", tokenizer=tokenizer_of("bpe"))
    opened, how = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(how.values()) and opened.config.pad_token_id == opened.config.bos_token_id == 0
    tokens = torch.randint(280, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)[0]
    for logits in logits_both_ways(opened.eval(), tokens):
        assert_close_rel(logits, expected, 1e-5)


def test_we_open_what_rwkv7_hf_makes_of_our_file(rwkv7_hf, transformers, tmp_path):
    """Its folder has our weights to the bit, World's ids, and its way of writing chats."""
    from rwkv7_hf import converter

    model, world = model_of("rwkv7", 65536), load_tokenizer("world")
    save_model(model, tmp_path / "m.pth")
    (tmp_path / WORLD_FILE).write_bytes(world._vocab)
    argv = ["--input", tmp_path / "m.pth", "--output", tmp_path / "hf", "--vocab-file", tmp_path / WORLD_FILE]
    converter.main([*map(str, argv), "--precision", "fp32"])
    ours = load_model(tmp_path / "hf").state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in model.state_dict().items())
    known = format_of(tmp_path / "hf")
    assert known.tokenizer.name == "world" and known.template.roles["user"] == "User: {content}\n"
    theirs = rwkv7_hf.RWKV7Tokenizer.from_pretrained(tmp_path / "hf")
    plain = TEXT.replace("<|endoftext|>", "")  # its name for id 0 is no text there
    assert theirs(plain).input_ids == world.encode(plain)
    opened = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([world.encode(TEXT)])
    with torch.no_grad():
        assert_close_rel(opened(ids).logits, model(ids)[0], 1e-5)


def test_export_names_the_tokenizer_and_the_template(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(model_of("rwkv7", 65536), "m.pth")
    Template({"user": "Q: {content}\n", "assistant": "A: {content}\n"}).save("own.yaml")
    code, out, err = run("export", "--model=m.pth", "--out=hf", capsys=capsys)
    assert code == 0 and "taken to be RWKV World's" in err and "AutoTokenizer opens it" in out
    assert "rwkv7-hf opens them" in out and "chats: unknown how they are written" in out
    assert format_of("hf").tokenizer.name == "world" and format_of("hf").template is None
    code, out, err = run("export", "--model=hf", "--out=hf", "--template=own.yaml", capsys=capsys)
    assert code == 0 and "apply_chat_template writes them\n" in out and not err
    assert "Q: " in json.loads(Path("hf/tokenizer_config.json").read_text())["chat_template"]
    code, _, err = run("export", "--model=hf", "--out=m.pth", "--template=own.yaml", capsys=capsys)
    assert code == 1 and "a file of weights has no place for --tokenizer and --template" in err
    code, _, err = run("export", "--model=hf", "--out=x", "--tokenizer=bytes", capsys=capsys)
    assert code == 1 and "leave --tokenizer out" in err and not Path("x").exists()


def test_what_is_given_joins_what_lies_in_the_folder(transformers, tmp_path):
    """A template alone goes into the tokenizer's files there, and a folder's end of document stays."""
    learnt, folder = train_bpe(["a b a b"], 260), tmp_path / "hf"
    save_model(random_model(vocab_size=260), folder, tokenizer=learnt)
    spec, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "b"}))
    save_model(random_model(vocab_size=260), folder, template=Template())
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    assert opened.apply_chat_template(CHAT, tokenize=False) == "User: Hi!\n\n"
    end = spec["model"]["vocab"]["b"]
    assert opened.eos_token_id == end and json.loads((folder / "config.json").read_text())["eos_token_id"] == end
    save_model(random_model(vocab_size=260), folder)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == end
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template


def test_a_tokenizer_that_does_not_fit_goes_and_one_that_fits_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small, large = (random_model(vocab_size=size) for size in (257, 65536))
    save_model(small, "small.pth")
    save_model(large, "hf", tokenizer=load_tokenizer("world"), template=Template())
    spec = json.loads(Path("hf/tokenizer.json").read_text())
    code, out, err = run("export", "--model=small.pth", "--out=hf", capsys=capsys)
    assert code == 0 and "knows 65,536 tokens, the model 257; its files, and the chat template, are removed" in err
    assert "tokenizer: unknown, so none is written" in out and "chats: unknown how" in out
    assert {p.name for p in Path("hf").iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    save_model(large, "hf", tokenizer=load_tokenizer("world"), template=Template())
    code, out, err = run("export", "--model=small.pth", "--out=hf", "--tokenizer=bytes", capsys=capsys)
    assert code == 0 and "are removed" in err and "chats: unknown how" in out and format_of("hf").template is None
    spec["added_tokens"] = []  # nor does one that names no end
    spec["model"]["vocab"] = {f"{token}.": index for token, index in spec["model"]["vocab"].items()}
    Path("hf/tokenizer.json").write_text(json.dumps(spec))
    code, out, err = run("export", "--model=small.pth", "--out=hf", capsys=capsys)
    assert code == 0 and "are removed" in err and not Path("hf/tokenizer.json").exists()
    save_model(small, "hf", tokenizer=load_tokenizer("bytes"), template=Template())
    code, out, err = run("export", "--model=small.pth", "--out=hf", capsys=capsys)
    assert code == 0 and not err and "end of document 0), that which lay there: AutoTokenizer opens it" in out
    assert "apply_chat_template writes them, that which lay there" in out
    code, out, err = run("export", "--model=small.pth", "--out=hf", "--tokenizer=bytes", capsys=capsys)
    assert "0): AutoTokenizer" in out
