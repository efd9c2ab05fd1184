"""Adapters as Hugging Face PEFT has them, and as RWKV-PEFT does: read into our names, and written.

A folder with adapter_config.json and adapter_model.safetensors, or one file with names as
blocks.0.att.receptance.lora_A. PEFT's formulas: W + (lora_alpha / r) B A, or / sqrt(r) with use_rslora; of MiSS
(init_weights true) one matrix [r,out], side by side along the inputs.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.hf import from_hf_name, read_json, to_hf_name, turned
from rwkv_train.checkpoints.weightfile import metadata_of, read_shapes, read_weights, write_safetensors
from rwkv_train.files import replace_file
from rwkv_train.models.adapters import STATE
from rwkv_train.models.base import RWKV
from rwkv_train.models.factors import as_lora

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BASE = "rwkv_train_base"  # in the file's metadata: some numbers of the matrices beside which it was trained
PARTS = {"lora_A": "down", "lora_B": "up", "miss_block": "miss", "disha": "miss"}
# Settings that say nothing of the weights, or no more than these do themselves.
NO_MATTER = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "miss_dropout", "mini_r"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "runtime_config"),
    *("init_lora_weights", "init_weights", "qalora_group_size", "ensure_weight_tying", "bias", "inference_mode"),
    "eva_config",
}
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


def read_peft(path: Path, generation: type[RWKV]) -> dict[str, Tensor] | None:
    """An adapter of a generation under our names, scaled as it acts; None if there is none in this layout.

    Raises ValueError for one that is damaged or not supported.
    """
    if path.is_dir():
        if not (path / CONFIG).is_file():
            return None
        file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{path} holds {CONFIG} and no weights: found neither {' nor '.join(WEIGHTS)}")
        config = _config(path / CONFIG)
    elif path.is_file():
        file = path
        with path.open("rb") as opened:
            keys = read_shapes(opened, str(path))
        if not any(map(_split, keys)):
            return None
        beside = path.parent / CONFIG
        config = _config(beside) if beside.is_file() else {}
        if not config and any("lora_" in key for key in keys):
            raise ValueError(
                f'{path} does not say how its factors are scaled; write {{"peft_type": "LORA", "lora_alpha": ...}}, as '
                f"they were trained, into {beside}"
            )
    else:
        return None
    return _renamed(file, read_weights(file), config, generation) | _samples(file)


def trained_on(path: Path) -> str | None:
    """The name of the model that an adapter's folder gives."""
    config = path / CONFIG
    return read_json(config).get("base_model_name_or_path") if config.is_file() else None


def _config(path: Path) -> dict:
    """adapter_config.json, after a look at whether all that it says is known here."""
    config = read_json(path)
    if config.get("peft_type") not in ("LORA", "MISS"):
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, expected LORA or MISS")
    begin = "init_weights" if config["peft_type"] == "MISS" else "init_lora_weights"
    plain = (True, False, None) if config["peft_type"] == "MISS" else PLAIN_BEGINNINGS
    if config.get(begin) not in plain:
        hint = "" if begin == "init_weights" else "; save it as LoRA, by path_initial_model_for_weight_conversion"
        raise ValueError(f"{path}: {begin} is {config[begin]!r}, which changes the base model{hint}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}, which is not supported; there are no biases to change")
    for name, value in config.items():
        if value and name not in NO_MATTER:
            raise ValueError(f"{path}: {name} is {value!r:.60}, which is not supported")
    return config


def _split(key: str) -> tuple[str, str] | None:
    """(the matrix, lora_A or the like) of a tensor's name."""
    prefix, parts = r"(?:base_model\.model\.)?", "|".join(PARTS)
    match = re.fullmatch(rf"{prefix}(.+)\.({parts})(?:\.default)?(?:\.weight)?", key)
    return (match[1], match[2]) if match else None


def _renamed(file: Path, content: dict[str, object], config: dict, generation: type[RWKV]) -> dict[str, Tensor]:
    split = {key: _split(key) for key in content}
    strange = [key for key in content if not split[key] or not isinstance(content[key], Tensor)]
    if strange:
        raise ValueError(f"{file}: {strange[0]!r:.80} is no part of a LoRA or MiSS; such an adapter is not supported")
    layers: dict[str, dict[str, Tensor]] = {}
    for key, (theirs, part) in split.items():
        layers.setdefault(theirs, {})[PARTS[part]] = content[key].detach()
    found = {}
    for theirs, factors in layers.items():
        layer = from_hf_name(generation, f"{theirs}.weight").removesuffix(".weight")  # leaves BlinkDL's as they are
        whole = factors.keys() in ({"up", "down"}, {"miss"}) and all(t.ndim == 2 for t in factors.values())
        if not whole:
            shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in factors.items())
            raise ValueError(f"{file}: {theirs} has {shapes}, expected lora_A and lora_B, or one matrix of MiSS")
        if "up" in factors:
            factors["up"] = factors["up"] * _scale(config, theirs, len(factors["down"]))
            if turned(layer):
                factors = {"up": factors["down"].t(), "down": factors["up"].t()}
        found |= {f"{layer}.{part}": t.contiguous() for part, t in factors.items()}
    return found


def _scale(config: dict, layer: str, rank: int) -> float:
    """Of the factors of a matrix; rank_pattern and alpha_pattern are regular expressions for the ends of names."""
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = next((a for p, a in patterns if re.fullmatch(rf"(?:.*\.)?(?:{p})", layer)), config.get("lora_alpha"))
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{CONFIG}: lora_alpha and alpha_pattern cannot be read ({error})") from None


def _samples(file: Path) -> dict[str, Tensor]:
    """The numbers of its base that an adapter of ours knows."""
    try:
        found = json.loads(metadata_of(file).get(BASE, "{}"))
        return {f"{layer}.base": torch.tensor(numbers, dtype=torch.float32) for layer, numbers in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its {BASE} is damaged ({error}); save it again") from None


def write_peft(
    adapter: dict[str, Tensor], weights: dict[str, Tensor], generation: type[RWKV], target: Path, base: str | None
) -> None:
    """Write a folder that PEFT puts on the model of an exported folder.

    weights: those beside which it was trained; their shapes are read. base: the name of that model, if known.
    MiSS of several ranks, for which PEFT has no place, is written as the LoRA that it is as well. Raises ValueError for
    a state, and where something else lies in the folder.
    """
    if any(name in STATE for name in adapter):
        raise ValueError(f"{target}: PEFT's files have no place for the state a model begins in; use .pth")
    if target.exists() and not (target / CONFIG).is_file() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty and holds no adapter to replace; choose another name")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, t in adapter.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = t
    samples = {layer: parts.pop("base").tolist() for layer, parts in layers.items() if "base" in parts}
    named = {_hf_name(generation, layer): factors for layer, factors in layers.items() if factors}
    widths = {_hf_name(generation, layer): weights[f"{layer}.weight"].shape[1] for layer in layers}
    ranks = {name: len(factors.get("miss", factors.get("down"))) for name, factors in named.items()}
    config = {"base_model_name_or_path": base, "bias": "none", "inference_mode": True, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": sorted(named), "r": max(ranks.values())}
    if len(set(ranks.values())) == 1 and all("miss" in factors for factors in named.values()):
        config |= {"peft_type": "MISS", "init_weights": True}
        tensors = {f"base_model.model.{name}.miss_block": factors["miss"] for name, factors in named.items()}
    else:
        others = {name: rank for name, rank in ranks.items() if rank != config["r"]}
        config |= {"peft_type": "LORA", "lora_alpha": config["r"], "rank_pattern": others, "alpha_pattern": others}
        tensors = {}
        for name, factors in named.items():
            up, down = as_lora(factors, widths[name])
            tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    target.mkdir(parents=True, exist_ok=True)
    (target / CONFIG).unlink(missing_ok=True)  # written last: without it, a folder holds no adapter
    about = {BASE: json.dumps(samples)} if samples else {}
    replace_file(target / WEIGHTS[0], lambda temporary: write_safetensors(tensors, temporary, about))
    replace_file(target / CONFIG, lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n"))


def _hf_name(generation: type[RWKV], layer: str) -> str:
    return to_hf_name(generation, f"{layer}.weight").removesuffix(".weight")
