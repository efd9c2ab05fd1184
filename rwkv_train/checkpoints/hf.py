"""Hugging Face's layouts: names, directory, config, without its library.

RWKV-4 as transformers has it (RWKV/rwkv-4-*-pile), RWKV-7 as flash-linear-attention has it and the released models in
this layout (fla-hub/rwkv7-*).
"""

import json
import os
import re
import shutil
from pathlib import Path

from torch import Tensor

from rwkv_train.checkpoints.weightfile import write_safetensors
from rwkv_train.data.text_format import JINJA_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG, TextFormat
from rwkv_train.files import read_text, sync, temporary_beside
from rwkv_train.generation.presets import PRESETS
from rwkv_train.models.base import RWKV
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import HEAD_NORM_EPS, RWKV7, RWKV7Config
from rwkv_train.program import told
from rwkv_train.tokenizer import OWN_FILE, WORLD_FILE, UnknownEnd

# BlinkDL's word for a part of an RWKV-4, and Hugging Face's.
RWKV4_WORDS = {
    "emb": "embeddings",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}
OUR_WORDS = {theirs: ours for ours, theirs in RWKV4_WORDS.items()}
# The same for stretches of names of an RWKV-7, to be replaced in this order.
RWKV7_PARTS = {
    "emb.": "model.embeddings.",
    "blocks.": "model.layers.",
    "ln_out.": "model.norm.",
    "head.": "lm_head.",
    ".ln0.": ".pre_norm.",
    ".ln1.": ".attn_norm.",
    ".ln2.": ".ffn_norm.",
    ".att.receptance.": ".attn.r_proj.",
    ".att.key.": ".attn.k_proj.",
    ".att.value.": ".attn.v_proj.",
    ".att.output.": ".attn.o_proj.",
    ".att.ln_x.": ".attn.g_norm.",
    **{f".att.{x}0": f".attn.{x}_lora.lora.2.bias" for x in "wav"},
    **{f".att.{x}1": f".attn.{x}_lora.lora.0.weight" for x in "wavg"},
    **{f".att.{x}2": f".attn.{x}_lora.lora.2.weight" for x in "wavg"},
    ".att.": ".attn.",
}
MODEL_TYPES = {"rwkv": RWKV4, "rwkv7": RWKV7}  # the word for a generation in config.json
# Where such a directory keeps its weights, in the order transformers looks for them; an index lists shards.
HF_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HF_STALE = (*HF_WEIGHTS[1:], "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
# What says how to read and write text there; all of it is replaced where a part is.
HF_TOKENIZERS = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *(JINJA_FILE, OWN_FILE, WORLD_FILE),
)


def hf_generation(keys: list[str]) -> type[RWKV] | None:
    """Whose layout the names of a file follow; None for BlinkDL's."""
    if any(".attn." in key for key in keys):
        return RWKV7
    return RWKV4 if any(key.startswith("rwkv.") or ".attention." in key for key in keys) else None


def to_hf_name(generation: type[RWKV], name: str) -> str:
    """blocks.0.att.time_mix_k -> rwkv.blocks.0.attention.time_mix_key; blocks.0.att.x_k -> model.layers.0.attn.x_k."""
    if generation is RWKV7:
        for ours, theirs in RWKV7_PARTS.items():
            name = name.replace(ours, theirs)
        return name
    words = [RWKV4_WORDS.get(word, word) for word in name.split(".")]
    return ".".join(words if words[0] == "head" else ["rwkv", *words])


def from_hf_name(generation: type[RWKV], name: str) -> str:
    """The inverse of `to_hf_name`."""
    if generation is RWKV7:
        for ours, theirs in RWKV7_PARTS.items():
            name = name.replace(theirs, ours)
        return name
    return ".".join(OUR_WORDS.get(word, word) for word in name.removeprefix("rwkv.").split("."))


def turned(name: str) -> bool:
    """Whether Hugging Face's layout has a weight, by our name, transposed: its low-rank maps are linear layers."""
    return re.search(r"\.att\.[wavg][12]$", name) is not None


def to_hf(generation: type[RWKV], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by our names as Hugging Face's layout has them."""
    out = {}
    for name, t in tensors.items():
        if generation is RWKV7 and re.match(r"blocks\.0\.att\.v[012]$", name):
            continue  # of no effect, and unknown there
        if turned(name):
            t = t.t().contiguous()
        elif t.ndim == 3 and generation is RWKV7 and ".att.x_" not in name:
            t = t.flatten()
        out[to_hf_name(generation, name)] = t
    return out


def hf_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, after a look at its config."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f'{folder}/config.json: model_type is {kind!r}, expected "rwkv" (RWKV-4) or "rwkv7"')
    expected = {
        "hidden_act": "sqrelu",
        "layer_norm_epsilon": 1e-5,
        "norm_eps": 1e-5,
        "norm_first": True,
        "norm_bias": True,
        "attn": None,
    }
    if kind == "rwkv7":
        expected["head_norm_eps"] = HEAD_NORM_EPS
        channels = config.get("head_dim")
        config.setdefault("head_norm_eps", (channels if isinstance(channels, int) else 64) * 1e-5)
    for name, value in expected.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(f"{folder}/config.json: {name} is {found}, expected {value}; it is not supported")
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


def check_heads(folder: Path, heads: int, channels: int) -> None:
    """ValueError where an RWKV-7's config says that its weights have other heads."""
    config = read_json(folder / "config.json")
    for name, value in (("head_dim", channels), ("num_heads", heads)):
        if (found := config.get(name)) is None:
            continue
        if found != value:
            raise ValueError(f"{folder}/config.json: {name} is {found!r:.40}, and its weights have {value}; correct it")
        return  # the library goes by the first that is there


def read_json(path: Path) -> dict:
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read as JSON ({e}); download it again") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a JSON object; download it again")
    return found


def save_hf(tensors: dict[str, Tensor], model: RWKV, target: Path, text_format: TextFormat) -> TextFormat:
    """What transformers loads: a new directory appears complete, in an old one file by file is replaced.

    tensors: the model's, by our names. text_format: what is known of it is written too, in place of what lay there.
    Returns what the directory then says: the rest of that is as it lay there, if its tokenizer has no more ids than the
    model. Raises ValueError if target holds something else than an RWKV.
    """
    if model.initial_wkv is not None:
        raise ValueError(f"{target}: a Hugging Face directory has no place for the state a model begins in; use .pth")
    occupied = target.is_dir() and any(target.iterdir())
    config = target / "config.json"
    if occupied and not (config.is_file() and read_json(config).get("model_type") in MODEL_TYPES):
        raise ValueError(f"{target} is not empty and holds no RWKV to replace; choose another name")
    building = temporary_beside(target)
    try:
        building.mkdir()
        write_safetensors(to_hf(type(model), tensors), building / "model.safetensors")
        known, others = text_format, ()
        if occupied and not all(text_format):
            known, others = _with_old(text_format, target, model.config.vocab_size)
        about = known.export(building) if any(text_format) else []
        dtype = str(tensors["head.weight"].dtype).removeprefix("torch.")
        end = known.tokenizer.eod if known.tokenizer else 0
        ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        config = (_rwkv7_config if isinstance(model, RWKV7) else _rwkv4_config)(model.config) | ends
        config |= {"tie_word_embeddings": False, "use_cache": True, "torch_dtype": dtype}
        for name, content in (("config.json", config), ("generation_config.json", ends | _generation(known))):
            (building / name).write_text(json.dumps(content, indent=2) + "\n")
        for entry in building.iterdir():
            sync(entry)
        if not target.exists():
            os.rename(building, target)
        else:
            for name in ("model.safetensors", *about, "generation_config.json", "config.json"):
                os.replace(building / name, target / name)
            others += HF_TOKENIZERS if about and known.tokenizer else ()
            for stale in (entry for pattern in (*HF_STALE, *others) for entry in target.glob(pattern)):
                if stale.name not in about:
                    stale.unlink()
            sync(target)
        sync(target.parent)
        return known
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _with_old(known: TextFormat, target: Path, vocab_size: int) -> tuple[TextFormat, tuple[str, ...]]:
    """(What is known, and of what is not, what lies there; files there that do not fit the model)."""
    try:
        old, end = TextFormat.read(target), None
    except UnknownEnd as error:
        old, end = TextFormat.read(target, eod=0), error
    if old.tokenizer and old.tokenizer.vocab_size > vocab_size:
        sizes = f"{old.tokenizer.vocab_size:,} tokens, the model {vocab_size:,}"
        told(f"{target}: the tokenizer that lay there knows {sizes}; its files, and the chat template, are removed")
        return known, (*HF_TOKENIZERS, TEMPLATE_FILE)
    if end:
        told(f"{end}; it stays as it lay there" * (not known.tokenizer))
        return known, ()
    return TextFormat(known.tokenizer or old.tokenizer, known.template or old.template), ()


def _generation(known: TextFormat) -> dict:
    """How transformers samples from the model, if not told otherwise: as our commands do."""
    chats = known.template and "assistant" in known.template.roles
    asked = {"off": "chat", "fake": "fake-thinking"}.get(known.template.thinking, "thinking") if chats else "text"
    usual = PRESETS[asked]
    config = {"do_sample": True, "temperature": usual.temperature, "top_p": usual.top_p, "top_k": usual.top_k}
    if chats and known.tokenizer:
        end, alone = known.tokenizer.encode(known.template.end()), not known.template.turn_end().before
        if len(end) == 1 and alone:  # a reply ends with it, too
            config["eos_token_id"] = [known.tokenizer.eod, *end]
    return config


def _rwkv4_config(c: RWKV4Config) -> dict:
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
        "rescale_every": 6,
    }


def _rwkv7_config(c: RWKV7Config) -> dict:
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "head_dim": c.head_size,
        "num_heads": c.n_head,
        "head_norm_eps": HEAD_NORM_EPS,  # ours: the library has head_dim * norm_eps, the same for heads of 64
        "intermediate_size": c.n_ffn,
        "hidden_ratio": c.n_ffn / c.n_embd,
        "value_dim": [c.n_embd] * c.n_layer,
        "decay_low_rank_dim": c.rank_w,
        "a_low_rank_dim": c.rank_a,
        "v_low_rank_dim": c.rank_v,
        "gate_low_rank_dim": c.rank_g,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    }
