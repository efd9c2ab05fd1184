"""What a file of weights holds, under our names: whose layout it has, which tensors, which sizes of a model.

Nothing is opened that is no RWKV-4 or RWKV-7.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.foreign import ORIGINAL, refuse_model
from rwkv_train.checkpoints.hf import check_heads, from_hf_name, hf_files, hf_generation, to_hf_name, turned
from rwkv_train.checkpoints.run_checkpoint import TRAINER, WEIGHTS, newest_sound
from rwkv_train.checkpoints.states import TIME_STATE, from_time_states
from rwkv_train.checkpoints.weightfile import map_weights
from rwkv_train.models.adapters import is_adapter
from rwkv_train.models.base import RWKV
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Found:
    """A file's tensors under our names, and how the file itself spells those."""

    source: Path
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    hf: type[RWKV] | None  # whose Hugging Face layout it has
    mapped: bool = False  # whether the tensors are the file, as `map_weights` says

    @property
    def generation(self) -> type[RWKV]:
        return RWKV7 if self.hf is RWKV7 or any(".att.r_k" in name for name in self.keys) else RWKV4

    def key(self, name: str) -> str:
        """What the file calls, or would call, our parameter `name`."""
        return self.keys.get(name) or (to_hf_name(self.hf, name) if self.hf else name)

    def get(self, name: str) -> Tensor:
        if name not in self.tensors:
            some, kind = ", ".join(list(self.keys.values())[:3]) or "none", self.generation.name
            raise ValueError(
                f"{self.source}: {self.key(name)} is missing, expected in every {kind} "
                f"(the file's {len(self.keys)} keys: {some}, ...); is it complete, and an {kind}?"
            )
        return self.tensors[name]

    def take_adapter(self) -> dict[str, Tensor]:
        """The tensors of an adapter, which this then no longer has."""
        names = [name for name in self.tensors if is_adapter(name) or TIME_STATE.fullmatch(name)]
        for name in names:
            del self.keys[name]
        return from_time_states({name: self.tensors.pop(name).clone() for name in names}, self.source)

    def matrix(self, name: str) -> torch.Size:
        """The shape of what has to be a matrix."""
        t = self.get(name)
        if t.ndim != 2 or not t.numel():
            raise ValueError(f"{self.source}: {self.key(name)} has shape {list(t.shape)}, expected a matrix")
        return t.shape

    @property
    def n_layer(self) -> int:
        """Blocks counted, not the highest number: a damaged name must not ask for a million of them."""
        return len({match[1] for name in self.tensors if (match := re.match(r"blocks\.([0-9]+)\.", name))})

    def fitted(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor in the model's shape; between programs only vectors differ, in axes of size 1."""
        t = self.get(name)
        is_vector = max(t.shape, default=1) == t.numel() == shape.numel() == max(shape)
        if t.shape != shape and not is_vector:
            raise ValueError(
                f"{self.source}: {self.key(name)} has shape {list(t.shape)}, expected {list(shape)}, going "
                f"by the file's other tensors; load an unconverted {self.generation.name}"
            )
        return t.reshape(shape)


def read_model(path: Path) -> Found:
    """The tensors of what path names, as `map_weights` has them."""
    files = _weight_files(path)
    content, mapped = {}, True
    for file in files:
        values, maps = map_weights(file)
        content |= values
        mapped &= maps
    found = sort_keys(files[0] if len(files) == 1 else path, content, mapped)
    if found.hf is RWKV7 and (path / "config.json").is_file():
        check_heads(path, *found.matrix("blocks.0.att.r_k"))
    return found


def _weight_files(path: Path) -> list[Path]:
    """The file, or the shards, that hold the weights of what path names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        owner, is_name = path.parent, len(path.parts) == 2 and not path.suffix and not path.is_absolute()
        could_be_hub = is_name and owner.name not in ("runs", "data") and not owner.exists()
        hint = f"a model on the Hugging Face hub is named hf:{path}" if could_be_hub else "check the name"
        raise FileNotFoundError(f"{path}: no such file or directory; {hint}")
    if (path / "config.json").is_file():
        return hf_files(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} holds an adapter alone; give it with its model, BASE+{path}")
    if newest := newest_sound(path):
        return _weight_files(newest)
    for name in (WEIGHTS, TRAINER, "model.pth"):  # of one checkpoint; of a folder as data/starter is
        if (path / name).is_file():
            return [path / name]
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".safetensors", ".ckpt"))
    hint = f"name the file to load ({', '.join(others[:3])})" if others else "check the name"
    raise ValueError(
        f"{path} holds no model: found neither config.json (a Hugging Face directory), "
        f"nor model.pth, nor a sound checkpoints/step=N (a run); {hint}"
    )


def sort_keys(source: Path, content: dict[str, object], mapped: bool) -> Found:
    """Rename to our names, and refuse what is not a plain tensor of floats."""
    refuse_model(source, {key: value for key, value in content.items() if key.isprintable()})
    hf = hf_generation(list(content))
    found = Found(source, {}, {}, hf, mapped)
    for key, value in content.items():
        if not key.isprintable():  # nothing a message should repeat
            raise ValueError(f"{source} is damaged: it names a tensor {key!r}; download or save it again")
        name = from_hf_name(hf, key) if hf else key
        if name in found.keys:
            raise ValueError(f"{source} holds both {found.keys[name]} and {key}, the same weight; remove one")
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{source}: {key} is of type {type(value).__name__}, expected a tensor; if the file was "
                "converted for another program, load the original"
            )
        if value.dtype not in DTYPES or value.layout != torch.strided or value.device.type != "cpu":
            what = ", ".join(str(part) for part in (value.dtype, value.layout, value.device))
            raise ValueError(
                f"{source}: {key} is {what}, expected dense float16, bfloat16, float32 or float64; "
                "load the original, not quantised, file"
            )
        value = value.detach().t() if hf and turned(name) and value.ndim == 2 else value.detach()
        found.tensors[name], found.keys[name] = value, key
    return found


def sizes(found: Found) -> RWKV4Config | RWKV7Config:
    return _rwkv7_config(found) if found.generation is RWKV7 else _rwkv4_config(found)


def _rwkv4_config(found: Found) -> RWKV4Config:
    names = ("emb.weight", "blocks.0.att.key.weight", "blocks.0.ffn.key.weight")
    (vocab_size, n_embd), (n_att, _), (n_ffn, _) = map(found.matrix, names)
    return RWKV4Config(vocab_size, n_embd, found.n_layer, n_att=n_att, n_ffn=n_ffn)


def _rwkv7_config(found: Found) -> RWKV7Config:
    """Head size and ranks from the shapes, too: released files do not follow one formula."""
    vocab_size, n_embd = found.matrix("emb.weight")
    n_head, head_size = found.matrix("blocks.0.att.r_k")
    if n_head * head_size != n_embd:
        shape = f"{found.key('blocks.0.att.r_k')} has shape {[n_head, head_size]}"
        raise ValueError(f"{found.source}: {shape}, expected heads and channels of a head, together {n_embd}")
    if (turned := found.matrix("blocks.0.att.w1"))[1] == n_embd != turned[0]:
        shape = f"{found.key('blocks.0.att.w1')} has shape {list(turned)}"
        raise ValueError(f"{found.source}: {shape}, turned, as web-rwkv's converter (ai00's .st) leaves it; {ORIGINAL}")
    n_ffn, _ = found.matrix("blocks.0.ffn.key.weight")
    ranks = {f"rank_{x}": found.matrix(f"blocks.0.att.{x}1")[1] for x in "wag"}
    first_v = "blocks.0.att.v1" in found.tensors
    if found.n_layer > 1 or first_v:
        ranks["rank_v"] = found.matrix(f"blocks.{int(found.n_layer > 1)}.att.v1")[1]
    return RWKV7Config(vocab_size, n_embd, found.n_layer, head_size, n_ffn, first_v=first_v, **ranks)
