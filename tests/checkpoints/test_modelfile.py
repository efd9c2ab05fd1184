"""Models in and out: every format comes back to the same bits, and nothing is half written."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import fails_to_load, random_model, save_point, small_weights
from safetensors.torch import load_file, save_file

from rwkv_train import load_model, save_model
from rwkv_train.checkpoints.hf import from_hf_name, to_hf, to_hf_name
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.models.rwkv4 import RWKV4
from rwkv_train.models.rwkv7 import RWKV7
from rwkv_train.tokenizer import OWN_FILE, load_tokenizer, train_bpe

FORMATS = ("m.pth", "m.safetensors", "hf")
HF_FILES = ("config.json", "generation_config.json", "model.safetensors")


def same(a, b):
    """Equal names, in the same order, shapes, dtypes and bits."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_format_round_trips_through_every_other(tmp_path, dtype, generation):
    sizes = {"n_att": 10} if generation == "rwkv4" else {"head_size": 3}
    model = random_model(n_embd=6, n_layer=3, vocab_size=13, n_ffn=15, dtype=dtype, generation=generation, **sizes)
    for first in FORMATS:
        for second in FORMATS:
            a, b = tmp_path / "a" / first, tmp_path / "b" / second  # the folders are made on the way
            save_model(model, a)
            save_model(load_model(a), b)
            back = load_model(b)
            same(model, back)
            assert back.config == model.config
            assert not back.training and all(p.requires_grad for p in back.parameters())
    assert torch.load(tmp_path / "a/m.pth", weights_only=True).keys() == model.state_dict().keys()


def test_equal_weights_give_equal_files(tmp_path):
    for name in ("m.pth", "m.safetensors"):
        save_model(random_model(), tmp_path / name)
        save_model(load_model(tmp_path / name), tmp_path / ("again" + name))
        assert (tmp_path / name).read_bytes() == (tmp_path / ("again" + name)).read_bytes()


def test_dtype_on_the_way_in_and_out(tmp_path):
    model = random_model()
    save_model(model, tmp_path / "m.pth", dtype=torch.bfloat16)
    same(load_model(tmp_path / "m.pth"), model.to(torch.bfloat16))
    assert load_model(tmp_path / "m.pth", dtype=torch.float64).dtype == torch.float64
    save_model(model, tmp_path / "hf", dtype=torch.float16)
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "float16"
    for call in (
        lambda: load_model(tmp_path / "m.pth", dtype=torch.int8),
        lambda: save_model(model, "x", dtype="bf16"),
    ):
        with pytest.raises(ValueError, match="dtype is"):
            call()


def test_mixed_dtypes_become_the_widest(tmp_path):
    tensors = small_weights()
    mixed = {k: v if "time_" in k else v.to(torch.bfloat16) for k, v in tensors.items()}
    torch.save(mixed, tmp_path / "m.pth")
    model = load_model(tmp_path / "m.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same(model, {k: v.float() for k, v in mixed.items()})


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin", ""])
def test_what_a_file_is_does_not_depend_on_its_name(tmp_path, suffix, generation):
    tensors = small_weights(generation)
    path = (tmp_path / "m").with_suffix("." + suffix if suffix else "")
    for content in (tensors, to_hf(RWKV4 if generation == "rwkv4" else RWKV7, tensors)):
        torch.save(content, path)
        same(load_model(path), tensors)
        torch.save(content, path, _use_new_zipfile_serialization=False)
        same(load_model(str(path)), tensors)
        save_file(content, path)
        same(load_model(path), tensors)


def test_hf_names(generation):
    model = random_model(n_layer=2, generation=generation)
    kind = type(model)
    for name in model.state_dict():
        assert from_hf_name(kind, to_hf_name(kind, name)) == name


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        (RWKV4, "blocks.1.att.time_mix_k", "rwkv.blocks.1.attention.time_mix_key"),
        (RWKV4, "blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight"),
        (RWKV4, "blocks.0.att.time_first", "rwkv.blocks.0.attention.time_first"),
        (RWKV4, "head.weight", "head.weight"),
        (RWKV7, "emb.weight", "model.embeddings.weight"),
        (RWKV7, "blocks.0.ln0.bias", "model.layers.0.pre_norm.bias"),
        (RWKV7, "blocks.10.att.w0", "model.layers.10.attn.w_lora.lora.2.bias"),
        (RWKV7, "blocks.1.att.g1", "model.layers.1.attn.g_lora.lora.0.weight"),
        (RWKV7, "blocks.1.att.v2", "model.layers.1.attn.v_lora.lora.2.weight"),
        (RWKV7, "blocks.1.att.ln_x.weight", "model.layers.1.attn.g_norm.weight"),
        (RWKV7, "blocks.1.att.receptance.weight", "model.layers.1.attn.r_proj.weight"),
        (RWKV7, "blocks.1.att.x_k", "model.layers.1.attn.x_k"),
        (RWKV7, "blocks.1.ffn.key.weight", "model.layers.1.ffn.key.weight"),
        (RWKV7, "ln_out.weight", "model.norm.weight"),
        (RWKV7, "head.weight", "lm_head.weight"),
    ],
)
def test_hf_names_are_those_of_released_files(kind, ours, theirs):
    assert to_hf_name(kind, ours) == theirs and from_hf_name(kind, theirs) == ours


def test_hf_shapes_of_rwkv7_are_those_of_released_files(tmp_path):
    """As flash-linear-attention's RWKV7ForCausalLM has them: low-rank maps are linear layers [out,in], vectors flat."""
    model = random_model(n_embd=128, head_size=64, generation="rwkv7", first_v=True)
    save_model(model, tmp_path / "hf")
    found = {k: list(v.shape) for k, v in load_file(tmp_path / "hf/model.safetensors").items() if ".1." in k}
    attention = {k.split("attn.")[1]: shape for k, shape in found.items() if ".attn." in k}
    assert attention == {
        **{f"x_{x}": [1, 1, 128] for x in "rwkvag"},
        **{f"{x}_proj.weight": [128, 128] for x in "rkvo"},
        **{f"{x}_lora.lora.0.weight": [rank, 128] for x, rank in zip("wavg", (3, 4, 5, 6), strict=True)},
        **{f"{x}_lora.lora.2.weight": [128, rank] for x, rank in zip("wavg", (3, 4, 5, 6), strict=True)},
        **{f"{x}_lora.lora.2.bias": [128] for x in "wav"},
        **{"k_k": [128], "k_a": [128], "r_k": [2, 64], "g_norm.weight": [128], "g_norm.bias": [128]},
    }
    assert found["model.layers.1.ffn.x_k"] == [128]
    names = load_file(tmp_path / "hf/model.safetensors").keys()
    assert not any("layers.0.attn.v_lora" in name for name in names)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == "rwkv7" and config["head_dim"] == 64 and config["decay_low_rank_dim"] == 3
    del config["head_norm_eps"]  # which is ours
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "hf").config == replace(model.config, first_v=False)
    config["head_dim"] = 32
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"head_norm_eps is 0.00032, expected 0.00064"):
        load_model(tmp_path / "hf")


def test_foreign_shapes_of_the_time_vectors(tmp_path):
    tensors = small_weights()
    flat = {k: v.flatten() if "time_mix" in k else v.view(1, 1, -1) if "time_" in k else v for k, v in tensors.items()}
    torch.save(flat, tmp_path / "m.pth")
    same(load_model(tmp_path / "m.pth"), tensors)


def test_tied_and_sliced_tensors_become_separate(tmp_path):
    tensors = small_weights()
    both = torch.stack([tensors["emb.weight"], tensors["head.weight"]])
    tensors |= {
        "emb.weight": both[0],
        "head.weight": both[0],
        "ln_out.weight": torch.nn.Parameter(torch.ones(8), False),
    }
    torch.save(tensors, tmp_path / "m.pth")
    model = load_model(tmp_path / "m.pth")
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(model.emb.weight, both[0])
    assert model.ln_out.weight.requires_grad


def test_weights_do_not_depend_on_the_file(tmp_path):
    for name in ("m.pth", "m.safetensors"):
        path = tmp_path / name
        (torch.save if name == "m.pth" else save_file)(small_weights(), path)
        model = load_model(path)
        with path.open("r+b") as f:  # in place, as `cp` over it would
            f.write(b"\0" * path.stat().st_size)
        same(model, small_weights())


def test_run_directory_opens_its_newest_checkpoint(tmp_path):
    run = tmp_path / "run"
    models = [random_model(seed=seed) for seed in range(3)]
    for model, step in zip(models, (9, 10, 1_000_000), strict=True):
        save_point(run, step, model)
    same(load_model(run), models[2])
    same(load_model(run / "checkpoints/step=00000009"), models[0])
    assert load_model(run).state_dict().keys() == small_weights().keys()  # and nothing of the optimizer


def shard(folder, library, names):
    """Split a directory's weights over two files and an index, as transformers does for large models."""
    tensors = to_hf(RWKV4, small_weights())
    folder.mkdir()
    where = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i::2])
        (save_file if library == "safetensors" else torch.save)(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = "model.safetensors.index.json" if library == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "rwkv"}')
    return index


@pytest.mark.parametrize("library, suffix", [("safetensors", "safetensors"), ("torch", "bin")])
def test_sharded_hf_directory(tmp_path, library, suffix):
    names = [f"part-{i}.{suffix}" for i in (1, 2)]
    index = shard(tmp_path / "hf", library, names)
    same(load_model(tmp_path / "hf"), small_weights())
    (tmp_path / "hf" / names[1]).unlink()
    fails_to_load(tmp_path / "hf", names[1], "missing", index)
    for weight_map in ({"a": "../../etc/passwd"}, {}, None, 3):
        (tmp_path / "hf" / index).write_text(json.dumps({"weight_map": weight_map}))
        fails_to_load(tmp_path / "hf", index, "weight_map")


def test_hf_directory_is_replaced_file_by_file(tmp_path):
    folder = tmp_path / "hf"
    shard(folder, "safetensors", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    (folder / "README.md").write_text("mine")
    model = random_model()
    save_model(model, folder)
    same(load_model(folder), model)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", *HF_FILES]
    assert os.listdir(tmp_path) == ["hf"]


def test_tokenizer_goes_into_the_directory(tmp_path):
    """In place of another one's, and what is not known leaves what lies there."""
    folder, learnt, template = tmp_path / "hf", train_bpe(["a b a b"], 260), Template(train_roles=["user"])
    model = random_model(vocab_size=65536)
    save_model(model, folder, tokenizer=learnt, template=template)
    assert TextFormat.read(folder).tokenizer.fingerprint == learnt.fingerprint
    (folder / OWN_FILE).write_text('{"rwkv_train_tokenizer": "world"}')  # of an older export
    files = {*HF_FILES, "template.yaml", "tokenizer.json", "tokenizer_config.json"}
    for name in ("bytes", "world"):
        save_model(model, folder, tokenizer=load_tokenizer(name))
        assert TextFormat.read(folder).tokenizer.name == name and TextFormat.read(folder).template == template
        save_model(model, folder)
        assert {p.name for p in folder.iterdir()} == files
    with pytest.raises(ValueError, match="tokenizer"):
        save_model(model, tmp_path / "m.pth", tokenizer=learnt)


def test_save_refuses_what_it_would_spoil(tmp_path):
    model = random_model()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    (tmp_path / "photos/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "dir.pth").mkdir()
    (tmp_path / "file").write_text("text")
    for name, part in (
        ("photos", "holds no RWKV to replace"),
        ("dir.pth", "a directory"),
        ("file", "a file"),
        ("x.gguf", "suffix"),
    ):
        with pytest.raises(ValueError, match=part):
            save_model(model, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dir.pth", "file", "photos"]
    assert len(os.listdir(tmp_path / "photos")) == 2
    save_model(model, f"{tmp_path}/v0.1/")
    (tmp_path / "empty.d").mkdir()
    save_model(model, tmp_path / "empty.d")
    same(load_model(tmp_path / "v0.1"), load_model(tmp_path / "empty.d"))


@pytest.mark.parametrize("name", FORMATS)
def test_failed_save_leaves_the_old_model(tmp_path, name, monkeypatch):
    old = random_model(seed=1)
    save_model(old, tmp_path / name)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, step, full)
            save_model(random_model(seed=2), tmp_path / name)
        same(load_model(tmp_path / name), old)
        assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")
def test_links_and_permissions(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "plain").write_text("")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for name in ("m.pth", "m.safetensors"):
        save_model(random_model(), tmp_path / "real" / name)
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
        save_model(random_model(seed=1), tmp_path / name)
        assert (tmp_path / name).is_symlink()
        same(load_model(tmp_path / "real" / name), random_model(seed=1))
        assert stat.S_IMODE((tmp_path / "real" / name).stat().st_mode) == usual


def test_loading_stays_light(tmp_path):
    """Neither the import nor the loading of a .pth pulls in what takes seconds to import."""
    torch.save(small_weights(), tmp_path / "m.pth")
    heavy = {"transformers", "safetensors", "lightning", "torch._dynamo"}
    code = "import sys, rwkv_train as r; r.load_model(sys.argv[1]); print(set(sys.argv[2:]) & set(sys.modules))"
    command = [sys.executable, "-c", code, str(tmp_path / "m.pth"), *heavy]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
