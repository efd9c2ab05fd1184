"""What is none of ours is told by what it is: other generations, other programs' files, parts of a model."""

import struct

import pytest
import torch
from helpers import fails_to_load, small_weights
from safetensors.torch import save_file

from rwkv_train import load_model

MATRIX, VECTOR = torch.zeros(8, 8), torch.zeros(8)


def written(path, generation, added):
    tensors = small_weights(generation) | added
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize(
    ("generation", "added", "parts"),
    [
        ("rwkv4", {"blocks.0.att.ln_x.weight": VECTOR}, ["an RWKV-5 (", "ln_x"]),
        ("rwkv4", {"blocks.0.att.ln_x.weight": VECTOR, "blocks.0.att.gate.weight": MATRIX}, ["an RWKV-5.1"]),
        (
            "rwkv4",
            {f"blocks.0.att.{name}": MATRIX for name in ("ln_x.weight", "gate.weight", "time_faaaa", "time_decay")},
            ["an RWKV-5.2"],
        ),
        ("rwkv4", {"blocks.0.att.time_maa_x": VECTOR, "blocks.0.att.ln_x.weight": VECTOR}, ["an RWKV-6"]),
        ("rwkv4", {"blocks.0.att.time_decay_w1": MATRIX, "blocks.0.att.time_mix_w1": MATRIX}, ["an RWKV-6"]),
        (
            "rwkv7",
            {f"blocks.0.ffn.{name}": MATRIX for name in ("s_emb.weight", "s_emb_x.weight", "s0", "s1", "s2")},
            [
                "an RWKV-7a: an RWKV-7 with DeepEmbed",
            ],
        ),
        ("rwkv7", {"blocks.0.qkv.qq.weight": MATRIX, "blocks.0.ffn.s_emb.weight": MATRIX}, ["an RWKV-7b"]),
        ("rwkv7", {"blocks.0.ffn.enn.weight": MATRIX}, ["an RWKV-8"]),
        ("rwkv7", {"blocks.0.ffn.enn.weight": MATRIX, "blocks.0.qkv.kk.weight": MATRIX}, ["an RWKV-8"]),
        ("rwkv7", {"model.layers.1.self_attn.q_proj.weight": MATRIX}, ["a transformer, or a hybrid"]),
    ],
)
def test_other_models(tmp_path, generation, added, parts):
    path = written(tmp_path / "m.pth", generation, added)
    fails_to_load(path, *parts, "is not supported; load an RWKV-4 or RWKV-7")


def test_what_only_the_name_tells(tmp_path):
    for name, kind in (
        ("rwkv7a-g1b-0.1b-20250819-ctx4096.pth", "by its name an RWKV-7a"),
        ("rwkv8-g1-0.1b.pth", "by its name an RWKV-8"),
    ):
        fails_to_load(written(tmp_path / name, "rwkv7", {"blocks.0.ffn.new": MATRIX}), kind, "unexpected")
    load_model(written(tmp_path / "rwkv7a-plain.pth", "rwkv7", {}))  # a name alone is no reason


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("m.gguf", b"GGUF\x03\0\0\0" + bytes(60), "a GGUF file, of llama.cpp"),
        ("m.pth", b"GGUF\x03\0\0\0" + bytes(60), "a GGUF file"),
        ("m.bin", struct.pack("<6i", 0x67676D66, 101, 256, 64, 4, 0), "a file of rwkv.cpp"),
        ("m.onnx", b"\x08\x08\x12\x07pytorch" + bytes(60), "an ONNX model"),
        ("m.param", b"7767517\n12 13\n", "an ncnn model"),
        ("m.ncnn.bin", b"\x01\x02\x03\x04" + bytes(60), "an ncnn model"),
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
        ("m.txt", b"hello", "is no checkpoint"),
    ],
)
def test_files_of_other_programs(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    fails_to_load(tmp_path / name, kind, "load the .pth" if "checkpoint" not in kind else "expected .pth")


def test_parts_of_a_model(tmp_path):
    for name, tensors, kind in (
        ("lora.pth", {"blocks.0.att.key.lora_A": MATRIX, "blocks.0.att.key.lora_B": MATRIX}, "a LoRA"),
        ("peft.pth", {"base_model.model.blocks.0.att.key.lora_A.weight": MATRIX}, "a LoRA"),
        ("miss.pth", {"blocks.0.att.key.disha": MATRIX}, "a MiSS"),
        ("peft-miss.pth", {"base_model.model.model.layers.0.attn.k_proj.miss_block": MATRIX}, "a MiSS"),
        ("state.pth", {"blocks.0.att.time_state": torch.zeros(1, 8, 8)}, "an adapter alone"),
        ("adapter.pth", {"blocks.0.att.key.up": MATRIX, "blocks.0.att.key.down": MATRIX}, "an adapter"),
    ):
        torch.save(tensors, tmp_path / name)
        fails_to_load(tmp_path / name, f"holds {kind}", f"give it with its model, BASE+{tmp_path / name}")


def test_files_of_ai00(tmp_path):
    """Its converter writes safetensors in float16, with the low-rank maps turned; one that is not turned is opened."""
    tensors = {name: t.half() for name, t in small_weights("rwkv7").items()}
    save_file(tensors, tmp_path / "plain.st")
    assert load_model(tmp_path / "plain.st").dtype == torch.float16
    turned = {name: t.t().contiguous() if name[-2:] in ("w1", "w2") else t for name, t in tensors.items()}
    save_file(turned, tmp_path / "turned.st")
    fails_to_load(tmp_path / "turned.st", "att.w1 has shape [3, 8], turned", "ai00", "load the .pth")
