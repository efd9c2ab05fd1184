"""Models named hf:OWNER/REPO/FILE@REVISION, from a stand-in for the Hugging Face hub."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub.utils
import pytest
import torch
from helpers import random_model, run
from hub_stand_in import TOKEN, StandIn, listening, use
from runs import config_of
from safetensors.torch import save

from rwkv_train import load_model
from rwkv_train.checkpoints import hub
from rwkv_train.checkpoints.hf import to_hf
from rwkv_train.checkpoints.modelfile import model_sizes, save_adapter
from rwkv_train.checkpoints.names import called, pinned
from rwkv_train.config import ModelConfig, SampleConfig, TrainConfig
from rwkv_train.models.rwkv7 import RWKV7
from rwkv_train.run_config import found_paths, run_settings
from rwkv_train.train.fit import fit

MODEL = random_model(vocab_size=257, generation="rwkv7")


def pth(model=MODEL) -> bytes:
    file = io.BytesIO()
    torch.save(dict(model.state_dict()), file)
    return file.getvalue()


def same(model, other=MODEL) -> bool:
    return all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    with listening(StandIn()) as found:
        use(monkeypatch, found, tmp_path / "cache")
        yield found


def offline(patch):
    """As HF_HUB_OFFLINE=1 leaves the library."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils._http.reset_sessions()
    hub._chosen.cache_clear()


def test_a_file_is_downloaded_once_and_opened_offline(stand_in, monkeypatch, capsys):
    stand_in.commit("A/b", {"small.pth": pth(), "deep/er/small.pth": pth(), "README.md": b"x", "run.py": b"x"})
    for name in ("hf:A/b/small.pth", "hf:A/b/deep/er/small.pth"):
        assert same(load_model(name))
        assert "note: downloading" in capsys.readouterr().err
        hub._chosen.cache_clear()
        assert same(load_model(name)) and "downloading" not in capsys.readouterr().err
    assert len(stand_in.fetched("small.pth")) == 1 and not stand_in.fetched("run.py")  # the same bytes twice
    asked = len(stand_in.requests)
    with monkeypatch.context() as patch:
        offline(patch)
        assert same(load_model("hf:A/b/small.pth"))
        assert re.search(r"HF_HUB_OFFLINE is set\); taken from the cache, commit [0-9a-f]{12}", capsys.readouterr().err)
        with pytest.raises(ValueError, match=r"hf:C/d: .*cannot be reached.*has nothing of it"):
            load_model("hf:C/d")
    huggingface_hub.utils._http.reset_sessions()
    assert len(stand_in.requests) == asked
    assert all("torch" not in headers["user-agent"] for _, _, headers in stand_in.requests)


def test_a_hub_that_does_not_answer(stand_in, monkeypatch, capsys):
    stand_in.commit("A/b", {"small.pth": pth()})
    load_model("hf:A/b/small.pth")
    hub._chosen.cache_clear()
    monkeypatch.setattr(stand_in, "answer", lambda *_: (503, {}, b""))
    assert same(load_model("hf:A/b/small.pth"))
    assert "it answers 503); taken from the cache" in capsys.readouterr().err


def test_a_download_that_broke_off_goes_on(stand_in, monkeypatch):
    content = pth()
    stand_in.commit("A/b", {"small.pth": content})
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**10)
    stand_in.cut = True
    with pytest.raises(ValueError, match=r"cannot be downloaded \([^'\"]*\); the same command goes on with it"):
        load_model("hf:A/b/small.pth")
    stand_in.cut = False
    stand_in.requests.clear()
    assert same(load_model("hf:A/b/small.pth"))
    (headers,) = stand_in.fetched("small.pth")
    assert int(re.fullmatch(r"bytes=(\d+)-", headers["range"])[1]) > len(content) // 3


def test_what_is_not_named_is_not_guessed(stand_in, capsys):
    stand_in.commit("A/one", {"deep/small.pth": pth(), "README.md": b""})
    stand_in.commit("A/two", {"a.pth": pth(), "b.safetensors": b"", "c.gguf": b""})
    stand_in.commit("A/none", {"c.gguf": b""})
    assert same(load_model("hf:A/one"))
    assert "holds one file of weights, deep/small.pth, which is taken" in capsys.readouterr().err
    for name, said in (
        ("hf:A/two", "names no file of weights, and none is guessed; its files of weights: a.pth, b.safetensors"),
        ("hf:A/two/c.pth", "A/two has no file c.pth at main; its files of weights: a.pth, b.safetensors"),
        ("hf:A/none", "it has no .pth, .safetensors"),
        ("hf:A/none/c.gguf", "is no file of weights that is opened here; it has no .pth"),
        ("hf:A/two/c.gguf", "is no file of weights that is opened here; its files of weights: a.pth, b.safetensors"),
        ("hf:A/two/a.pth@v2", "A/two has no branch, tag or commit v2"),
        ("hf:A/three", "the hub has no repository A/three, or it is private; check the name, or log in"),
        ("hf:A", "write hf:OWNER/REPO"),
        ("hf:A/two@", "write hf:OWNER/REPO"),
        ("hf:/A/two", "write hf:OWNER/REPO"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            load_model(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not stand_in.fetched("c.gguf")


def test_offline_what_is_not_in_the_cache_is_not_said_to_be_nowhere(stand_in, monkeypatch, capsys):
    stand_in.commit("A/two", {"a.pth": pth(), "b.pth": pth(), "README.md": b"x"})
    stand_in.commit("A/folder", shards())
    load_model("hf:A/two/a.pth")
    for file in ("config.json", "model.safetensors.index.json", "a.safetensors"):
        huggingface_hub.hf_hub_download("A/folder", file)
    huggingface_hub.snapshot_download("A/two", allow_patterns="README.md", revision="main")
    with monkeypatch.context() as patch:
        offline(patch)
        for name in ("hf:A/folder", "hf:A/two/b.pth", "hf:A/two/c"):
            with pytest.raises(ValueError, match=rf"^{name}: not all of it is in the cache .*cache; download it where"):
                load_model(name)
        capsys.readouterr()
        assert same(load_model("hf:A/two"))
        assert "a.pth, which is taken of those in the cache; the repository may have others" in capsys.readouterr().err
    huggingface_hub.utils._http.reset_sessions()


def test_private_and_gated_repositories(stand_in, monkeypatch):
    stand_in.commit("A/own", {"small.pth": pth()})
    stand_in.commit("A/terms", {"small.pth": pth()})
    stand_in.private, stand_in.gated = {"A/own"}, {"A/terms"}
    with pytest.raises(ValueError, match=r"or it is private; .*hf auth login.*HF_TOKEN"):
        load_model("hf:A/own/small.pth")
    for call in (load_model, model_sizes):
        with pytest.raises(ValueError, match=r"its makers ask for consent; agree on http.*/A/terms, then log in"):
            call("hf:A/terms/small.pth")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(load_model("hf:A/own/small.pth")) and same(load_model("hf:A/terms/small.pth"))


def test_revisions_and_their_commits(stand_in):
    other = random_model(vocab_size=257, generation="rwkv7", seed=1)
    first = stand_in.commit("A/b", {"small.pth": pth()})
    stand_in.commit("A/b", {"small.pth": pth(other)}, "refs/pr/1")
    assert pinned("hf:A/b") == f"hf:A/b/small.pth@{first}"
    second = stand_in.commit("A/b", {"small.pth": pth(other)})
    hub._chosen.cache_clear()
    assert same(load_model("hf:A/b@refs/pr/1"), other) and same(load_model("hf:A/b"), other)
    assert same(load_model(f"hf:A/b@{first}"))
    assert pinned("x.pth+hf:A/b/small.pth") == f"x.pth+hf:A/b/small.pth@{second}"
    kept = f"hf:A/b/small.pth@{first}"
    assert pinned("hf:A/b", before=kept) == pinned("hf:A/b@main", before=kept) == kept
    assert pinned("hf:A/b@refs/pr/1", before=kept) == f"hf:A/b/small.pth@{second}"  # as written out
    with pytest.raises(ValueError, match="no branch, tag or commit v2"):
        pinned("hf:A/b@v2", before=kept)
    assert called("hf:A/b/small.pth@v2.1") == "small" and called("hf:A/b@v2.1+dir/x.pth") == "b+x"


def shards() -> dict[str, bytes]:
    """A Hugging Face repository with shards, the same as a pickle, and code."""
    tensors = to_hf(RWKV7, dict(MODEL.state_dict()))
    half = len(tensors) // 2
    parts = {"a.safetensors": dict(list(tensors.items())[:half]), "b.safetensors": dict(list(tensors.items())[half:])}
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    about = {"config.json": {"model_type": "rwkv7"}, "model.safetensors.index.json": index}
    code = {"pytorch_model.bin": b"pickle", "modeling_rwkv7.py": b"code", "README.md": b""}
    return {k: save(v) for k, v in parts.items()} | {k: json.dumps(v).encode() for k, v in about.items()} | code


def test_a_folder_without_pickles_and_code(stand_in):
    stand_in.commit("A/folder", shards())
    stand_in.commit("A/inside", {f"in/{name}": content for name, content in shards().items()})
    stand_in.commit("A/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b""})
    for name in ("hf:A/folder", "hf:A/inside/in"):
        assert same(load_model(name))
    names = {path.name for path in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("snapshots/*/**/*.*")}
    assert names == {"a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json"}
    stand_in.commit("A/less", {name: content for name, content in shards().items() if name != "b.safetensors"})
    stand_in.commit("A/out", shards() | {"model.safetensors.index.json": b'{"weight_map": {"x": "../../x.pth"}}'})
    for name, said in (
        ("hf:A/llama", "model_type is 'llama'"),
        ("hf:A/less", "model.safetensors.index.json lists b.safetensors, which A/less has not"),
        ("hf:A/out", r"lists ../../x.pth, which A/out has not"),
    ):
        with pytest.raises(ValueError, match=said):
            load_model(name)
    assert not stand_in.fetched("model.safetensors")


def test_a_folder_with_an_adapter_is_taken_as_one(stand_in):
    stand_in.commit("A/peft", {"adapter_config.json": b"{}", "adapter_model.safetensors": save({}), "x.pth": b""})
    assert {path.name for path in hub.fetched("hf:A/peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_sizes_are_read_without_a_download(stand_in, monkeypatch):
    wide = random_model(n_embd=64, n_layer=3, vocab_size=4000, generation="rwkv7")
    stand_in.commit("A/b", {"wide.pth": pth(wide)} | shards())
    monkeypatch.setattr(hub, "BLOCK", 2**12)
    assert model_sizes("hf:A/b/wide.pth") == wide.config
    ranges = [map(int, headers["range"].removeprefix("bytes=").split("-")) for headers in stand_in.fetched("wide.pth")]
    assert 0 < sum(last - first + 1 for first, last in ranges) < len(pth(wide)) // 4
    assert model_sizes("hf:A/b") == MODEL.config
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.pth"))


def test_commands_take_such_names(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stand_in.commit("A/b", {"small.pth": pth()})
    code, out, err = run("generate", "--model=hf:A/b", "--tokenizer=bytes", "--tokens=3", "--prompt=x", capsys=capsys)
    assert code == 0 and err.count("which is taken") == 1 and out.startswith("x")
    assert run("export", "--model=hf:A/b/small.pth", "--out=o.pth", capsys=capsys)[0] == 0
    assert same(load_model("o.pth"))
    code, _, err = run("generate", "--model=hf:A/c", "--prompt=x", capsys=capsys)
    assert code == 1 and err.count("\n") == 1 and "no repository A/c" in err


def test_a_run_keeps_the_commit_it_began_with(stand_in, tmp_path, store):
    first = stand_in.commit("A/b", {"small.pth": pth()})
    model = ModelConfig(init="hf:A/b", tune="lora", rank=2)
    train = TrainConfig(steps=2, save_every=1, device="cpu")
    config = config_of(store, tmp_path, model=model, train=train, samples=SampleConfig(prompts=[]))
    assert fit(config) == 0
    kept = f"hf:A/b/small.pth@{first}"
    assert run_settings(tmp_path / "run/config.yaml")["model"]["init"] == kept
    assert found_paths(tmp_path / "run/config.yaml")["model.init"] == kept
    stand_in.commit("A/b", {"small.pth": pth(random_model(vocab_size=257, generation="rwkv7", seed=1))})
    hub._chosen.cache_clear()
    stand_in.requests.clear()
    assert fit(replace(config, train=replace(train, steps=3)), resume="newest") == 0
    assert run_settings(tmp_path / "run/config.yaml")["model"]["init"] == kept
    assert not stand_in.fetched("small.pth")
    save_adapter(tmp_path / "run", tmp_path / "adapter.pth")
    stand_in.commit("A/c", {"adapter.pth": (tmp_path / "adapter.pth").read_bytes()})
    for name in (f"{kept}+{tmp_path}/adapter.pth", f"{kept}+hf:A/c/adapter.pth"):
        assert same(load_model(name), load_model(tmp_path / "run"))
