"""Hugging Face's layout of an RWKV-4 (RWKV/rwkv-4-*-pile): names, directory, config, without its library."""

import json
import os
import shutil
from pathlib import Path

from torch import Tensor

from rwkv_train.files import sync, temporary_beside
from rwkv_train.models.rwkv4 import RWKV4Config
from rwkv_train.weightfile import write_safetensors

# BlinkDL's word for a part of the model, and Hugging Face's.
HF_WORDS = {
    "emb": "embeddings",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}
OUR_WORDS = {theirs: ours for ours, theirs in HF_WORDS.items()}
# Where such a directory keeps its weights, in the order transformers looks for them; an index lists shards.
HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HF_STALE = (*HF_WEIGHTS[1:], "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")


def to_hf_name(name: str) -> str:
    """blocks.0.att.time_mix_k -> rwkv.blocks.0.attention.time_mix_key."""
    words = [HF_WORDS.get(word, word) for word in name.split(".")]
    return ".".join(words if words[0] == "head" else ["rwkv", *words])


def from_hf_name(name: str) -> str:
    """The inverse of `to_hf_name`."""
    return ".".join(OUR_WORDS.get(word, word) for word in name.removeprefix("rwkv.").split("."))


def hf_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, after a look at its config."""
    config = read_json(folder / "config.json")
    kind, eps = config.get("model_type"), config.get("layer_norm_epsilon", 1e-5)
    if kind != "rwkv":
        raise ValueError(f'{folder}/config.json: model_type is {kind!r}, expected "rwkv", which is RWKV-4')
    if eps != 1e-5:
        raise ValueError(f"{folder}/config.json: layer_norm_epsilon is {eps}, expected 1e-5; it is not supported")
    for name in HF_WEIGHTS:
        if not (folder / name).exists():
            continue
        if not name.endswith(".json"):
            return [folder / name]
        shards = read_json(folder / name).get("weight_map")
        shards = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError(f"{folder / name}: weight_map must name files of this directory; download it again")
        for shard in shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{folder / shard} is missing, and {name} lists it; download it again")
        return [folder / shard for shard in shards]
    raise ValueError(f"{folder} holds no weights: found none of {', '.join(HF_WEIGHTS)}; download it again")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read as JSON ({e}); download it again") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a JSON object; download it again")
    return found


def save_hf(tensors: dict[str, Tensor], c: RWKV4Config, target: Path, tokenizer) -> None:
    """What transformers loads: a new directory appears complete, in an old one file by file is replaced.

    tensors by our names. Raises ValueError if target holds something else than an RWKV-4.
    """
    occupied = target.is_dir() and any(target.iterdir())
    config = target / "config.json"
    if occupied and not (config.is_file() and read_json(config).get("model_type") == "rwkv"):
        raise ValueError(f"{target} is not empty and holds no RWKV-4 to replace; choose another name")
    building = temporary_beside(target)
    try:
        building.mkdir()
        write_safetensors({to_hf_name(n): t for n, t in tensors.items()}, building / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save(building / "tokenizer.json")
        dtype = str(tensors["head.weight"].dtype).removeprefix("torch.")
        (building / "config.json").write_text(json.dumps(hf_config(c, dtype), indent=2) + "\n")
        for entry in building.iterdir():
            sync(entry)
        if not target.exists():
            os.rename(building, target)
        else:
            for name in ("model.safetensors", "tokenizer.json", "config.json"):
                if (building / name).exists():
                    os.replace(building / name, target / name)
            for stale in (entry for pattern in HF_STALE for entry in target.glob(pattern)):
                stale.unlink()
            sync(target)
        sync(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def hf_config(c: RWKV4Config, dtype: str) -> dict:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "attention_hidden_size": c.n_att,
        "intermediate_size": c.n_ffn,
        "layer_norm_epsilon": 1e-5,
        "context_length": 1024,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }
