"""What is no model gives one clear line: what, where, and what to do."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import GENERATIONS, fails_to_load, random_model, small_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rwkv_train import load_model, save_model
from rwkv_train.checkpoints.hf import to_hf
from rwkv_train.models.rwkv4 import RWKV4
from rwkv_train.models.rwkv7 import HEAD_NORM_EPS


def written(path, **changes):
    torch.save(small_weights(**changes), path)
    return path


def test_nothing_there(tmp_path):
    fails_to_load(tmp_path / "m.pth", "no such file", error=FileNotFoundError)
    fails_to_load("RWKV/rwkv-4-169m-pile", "hf:RWKV/rwkv-4-169m-pile", error=FileNotFoundError)
    fails_to_load(tmp_path, "config.json", "checkpoints/step=N")
    written(tmp_path / "a.pth")
    fails_to_load(tmp_path, "a.pth")
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    fails_to_load(tmp_path, "no weights", "pytorch_model.bin")
    for text, part in (("{", "JSON"), ("[]", "list"), ("{}", "None"), ('{"model_type": "rwkv6"}', "rwkv6")):
        (tmp_path / "config.json").write_text(text)
        fails_to_load(tmp_path, "config.json", part)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv", "layer_norm_epsilon": 1e-6}')
    fails_to_load(tmp_path, "layer_norm_epsilon", "1e-06")
    (tmp_path / "config.json").write_text('{"model_type": "rwkv7", "attn": {"layers": [1]}}')
    fails_to_load(tmp_path, "attn", "not supported")
    (tmp_path / "config.json").write_text('{"model_type": "rwkv7", "hidden_act": "gelu"}')
    fails_to_load(tmp_path, "hidden_act is gelu", "not supported")
    for name in ("", "+", "a.pth+", "+a.pth", "a.pth++a.pth", " "):
        fails_to_load(name, "leaves the name of a model or an adapter out")


def test_a_folder_whose_config_says_other_heads(tmp_path):
    model = random_model(generation="rwkv7")  # 2 heads of 8
    save_model(model, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    others = {name: value for name, value in config.items() if name not in ("head_dim", "num_heads")}
    cases = (
        ({"head_dim": 4}, "head_dim is 4"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"num_heads": 4}, "num_heads is 4"),
    )
    for said, wrong in (*cases, ({}, "")):
        (tmp_path / "hf/config.json").write_text(json.dumps(others | {"head_norm_eps": HEAD_NORM_EPS} | said))
        if wrong:
            fails_to_load(tmp_path / "hf", f"{wrong}, and its weights have")
        else:
            load_model(tmp_path / "hf")


class Code:
    def __reduce__(self):
        return os.system, ("echo must not run > must_not_run",)


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "m.pth")
    good = path.read_bytes()
    cases = [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is no checkpoint"),
        (b"hello\n", "is no checkpoint"),
        (good[: len(good) // 2], "truncated or damaged"),
        (good[:-1], "truncated or damaged"),
        (b"\x80\x02" + bytes(range(100, 250)), "truncated or damaged"),
        (pickle.dumps({"emb.weight": Code()}, protocol=2), "not opened for safety"),
        (b"\x10\0\0\0\0\0\0\0{}", "truncated or damaged"),
        (b"\xff" * 8 + b"{}", "truncated or damaged"),
    ]
    for content, part in cases:
        path.write_bytes(content)
        fails_to_load(path, part)
    for content in ({"emb.weight": Code()}, {"a": torch.nn.Linear(2, 2)}, {"a": Path("x")}):
        torch.save(content, path)
        fails_to_load(path, "not opened for safety")
    torch.save([torch.zeros(2)], path)
    fails_to_load(path, "list", "expected a dict")
    assert not (tmp_path / "must_not_run").exists()


MATRIX = torch.zeros(8, 8)
WRONG = [
    ({"head__weight": None}, ["head.weight is missing"]),
    ({"emb__weight": None}, ["emb.weight is missing"]),
    ({"blocks__1__ln2__bias": None}, ["blocks.1.ln2.bias is missing"]),
    ({"blocks__0__ln0__weight": None}, ["blocks.0.ln0.weight is missing"]),
    ({"blocks__7__ln1__weight": torch.ones(8)}, ["blocks.2.ln1.weight is missing"]),
    ({"a\x1b[2J\nb": MATRIX}, ["is damaged"]),
    ({"extra": MATRIX}, ["unexpected: extra", "1 keys"]),
    ({"head__weight": torch.zeros(12, 8)}, ["head.weight has shape [12, 8], expected [11, 8]"]),
    ({"emb__weight": torch.zeros(8)}, ["emb.weight has shape [8], expected a matrix"]),
    ({"emb__weight": torch.zeros(0, 8)}, ["emb.weight has shape [0, 8]"]),
    ({"blocks__1__att__time_mix_k": torch.zeros(1, 1, 9)}, ["k has shape [1, 1, 9], expected [1, 1, 8]"]),
    ({"blocks__1__att__time_mix_k": torch.zeros(2, 4)}, ["time_mix_k has shape [2, 4], expected [1, 1, 8]"]),
    ({"blocks__0__ffn__key__weight": torch.zeros(8, 32)}, ["has shape", "expected"]),  # transposed
    ({"blocks__0__att__time_decay": 3.0}, ["time_decay is of type float, expected a tensor"]),
    ({"_strategy": "cuda fp16i8"}, ["_strategy is of type str"]),
    ({"head__weight": torch.zeros(11, 8, dtype=torch.int8)}, ["head.weight is torch.int8", "quantised"]),
    ({"head__weight": torch.zeros(11, 8, dtype=torch.complex64)}, ["torch.complex64"]),
    ({"head__weight": torch.zeros(11, 8).to_sparse()}, ["torch.sparse_coo"]),
    ({"head__weight": torch.zeros(11, 8, device="meta")}, ["meta"]),
    ({"rwkv.head.weight": MATRIX, "head.weight": MATRIX}, ["both", "rwkv.head.weight"]),
    ({"blocks__0__att__r_k": torch.zeros(1, 8)}, ["att.w1 is missing, expected in every RWKV-7"]),
    ({"blocks__0__att__r_k": MATRIX}, ["att.r_k has shape [8, 8]", "together 8"]),
    ({"blocks__0__att__time_maa_x": MATRIX}, ["time_maa_x", "is an RWKV-6"]),
    ({"blocks__0__att__ln_x__weight": MATRIX}, ["ln_x", "RWKV-5"]),
    ({"blocks__0__att__key__lora_A": MATRIX}, ["lora_A", "merge"]),
]  # fmt: skip


WRONG_7 = [
    ({"blocks__1__att__w2": None}, ["blocks.1.att.w2 is missing, expected in every RWKV-7"]),
    ({"blocks__0__att__v0": torch.zeros(1, 1, 8)}, ["unexpected: blocks.0.att.v0"]),
    ({"blocks__1__att__k_k": torch.zeros(1, 1, 9)}, ["k_k has shape [1, 1, 9], expected [1, 1, 8]"]),
    ({"blocks__1__att__r_k": torch.zeros(2, 4)}, ["r_k has shape [2, 4], expected [1, 8]"]),
    ({"blocks__0__att__r_k": torch.zeros(3, 4)}, ["r_k has shape [3, 4]", "together 8"]),
    ({"blocks__1__att__a1": torch.zeros(8, 5)}, ["a1 has shape [8, 5], expected [8, 4]"]),
    ({"blocks__1__att__key__weight": torch.zeros(8, 8, dtype=torch.int8)}, ["torch.int8", "quantised"]),
]


@pytest.mark.parametrize(
    "generation, changes, parts", [*(("rwkv4", *w) for w in WRONG), *(("rwkv7", *w) for w in WRONG_7)]
)
def test_wrong_contents(tmp_path, generation, changes, parts):
    fails_to_load(written(tmp_path / "m.pth", generation=generation, **changes), *parts)


def test_messages_spell_keys_as_the_file_does(tmp_path):
    save_model(random_model(), tmp_path / "hf")
    tensors = to_hf(RWKV4, small_weights(blocks__1__att__time_mix_k=None))
    save_file(tensors, tmp_path / "hf/model.safetensors")
    fails_to_load(tmp_path / "hf/model.safetensors", "rwkv.blocks.1.attention.time_mix_key is missing")
    torch.save({"model.embed_tokens.weight": MATRIX}, tmp_path / "llama.pth")
    fails_to_load(tmp_path / "llama.pth", "emb.weight is missing", "model.embed_tokens.weight")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["m.pth", "legacy.pth", "m.safetensors"])
def test_damaged_files_fail_in_one_way(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    generation = data.draw(st.sampled_from(GENERATIONS), label="generation")
    tensors = dict(random_model(n_embd=4, n_layer=1, vocab_size=5, generation=generation, head_size=2).state_dict())
    if name == "m.safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name == "m.pth")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="flips")):
            content[data.draw(st.integers(0, len(content) - 1), label="at")] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        model = load_model(path)
    except ValueError as e:
        assert path.name in str(e)
    else:
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
