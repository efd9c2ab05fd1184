"""Files of models that are not opened here: told what they are by their first bytes, their names and their keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

# What a file begins with, or its name ends in, and what that is.
FORMATS = {
    b"GGUF": "a GGUF file, of llama.cpp",
    b"fmgg": "a file of rwkv.cpp (ggml)",
    b"lmgg": "a ggml file",
    b"tjgg": "a ggml file",
    b"7767517": "an ncnn model's description",
    b"\x89HDF": "an HDF5 file, as Keras writes",
}
ENDS = {
    ".param": "an ncnn model",
    ".ncnn.bin": "an ncnn model's weights",
    ".onnx": "an ONNX model",
    ".mnn": "an MNN model",
    ".tflite": "a TensorFlow Lite model",
}
ORIGINAL = "load the .pth, the .safetensors or the Hugging Face folder that it was made from"

# A stretch of a key of what goes on a model: what that is, and how it is used.
PARTS = {
    "lora_": ("a LoRA", "give it with its model, BASE+{}, or merge it into that"),
    ".disha": ("a MiSS", "give it with its model, BASE+{}"),
    ".miss_block": ("a MiSS", "give it with its model, BASE+{}"),
}

# A stretch of a key that no RWKV-4 and no RWKV-7 has, and what has it (RWKV-LM's rwkv_v7b_demo.py, rwkv_v8_rc00_demo.py
# and rwkv_v8_rc00_hybrid_demo.py; RWKV-v5/src/model.py). The first that is found counts.
MARKS = {
    ".ffn.enn.": "an RWKV-8, which is research",
    ".qkv.qq.": "an RWKV-7b: an RWKV-7 with DeepEmbed and an attention over it",
    ".s_emb": "an RWKV-7a: an RWKV-7 with DeepEmbed",
    ".time_maa_": "an RWKV-6",
    ".time_decay_w1": "an RWKV-6",  # as web-rwkv's converter writes it
    ".self_attn.": "a transformer, or a hybrid with one",
    ".mamba.": "a Mamba, or a hybrid with one",
}
# For what keys do not tell: the same of a stretch of the file's name.
NAMES = {"rwkv7a-": ".s_emb", "rwkv7b-": ".qkv.qq.", "rwkv8-": ".ffn.enn.", "rwkv-8-": ".ffn.enn."}


def refuse_format(path: Path | str, head: bytes) -> NoReturn:
    """ValueError for a file that begins as neither a .pth nor a .safetensors does."""
    kinds = [kind for start, kind in FORMATS.items() if head.startswith(start)]
    kinds += [kind for end, kind in ENDS.items() if str(path).lower().endswith(end)]
    if kinds:
        raise ValueError(f"{path} is {kinds[0]}, which is not opened; {ORIGINAL}")
    raise ValueError(f"{path} is no checkpoint: it starts with {head[:12]!r}; expected .pth or .safetensors")


def refuse_model(source: Path, content: Mapping[str, object]) -> None:
    """ValueError for tensors, by the names a file has for them, that are sound but no RWKV-4 or RWKV-7."""
    for mark, (kind, remedy) in PARTS.items():
        for key in content:
            if mark in key.lower():
                raise ValueError(f"{source} holds {kind} ({key}), and no model alone; {remedy.format(source)}")
    for mark, kind in MARKS.items():
        for key in content:
            if mark in key:
                _refuse(source, kind, key)
    if not any(".r_k" in key for key in content):  # RWKV-7 has an ln_x too
        for key in content:
            if ".ln_x." in key or ".time_faaaa" in key:
                _refuse(source, _fifth(content), key)


def kind_by_name(source: Path) -> str:
    """What a file's name says it is, as ", by its name an RWKV-8"; "" where it says nothing."""
    kinds = [MARKS[mark] for start, mark in NAMES.items() if start in source.name.lower()]
    return f", by its name {kinds[0]}," if kinds else ""


def _refuse(source: Path, kind: str, key: str) -> NoReturn:
    raise ValueError(f"{source} is {kind} ({key}), which is not supported; load an RWKV-4 or RWKV-7")


def _fifth(content: Mapping[str, object]) -> str:
    """The RWKV-5s differ in a gate, and in whether a head's channels decay apart."""
    if not any(".gate." in key for key in content):
        return "an RWKV-5"
    apart = any(".time_decay" in key and max(getattr(t, "shape", ())[1:], default=1) > 1 for key, t in content.items())
    return "an RWKV-5.2" if apart else "an RWKV-5.1"
