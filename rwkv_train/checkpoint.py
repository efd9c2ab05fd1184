"""Models in and out: BlinkDL `.pth` and `.safetensors`, Hugging Face directories, our own runs.

The layout is told by a file's keys, sizes are read off the shapes.
"""

import os
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rwkv_train.files import replace_file
from rwkv_train.hf import from_hf_name, hf_files, save_hf, to_hf_name
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.savepoint import TRAINER, WEIGHTS, newest_good
from rwkv_train.weightfile import read_weights, write_pth, write_safetensors

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> RWKV4:
    """Open a model, in eval mode, with weights that no longer depend on the file.

    path: a `.pth` or `.safetensors` file with BlinkDL's or Hugging Face's names, a Hugging Face directory,
    a run directory (its newest checkpoint), or one checkpoint of a run.
    dtype: None keeps the file's; if it mixes several, all get the widest.
    Raises FileNotFoundError if there is nothing at path, ValueError if there is no RWKV-4.
    """
    _check_dtype(dtype)
    path = Path(path).expanduser()
    files = _weight_files(path)
    content: dict[str, object] = {}
    for file in files:
        content |= read_weights(file)
    found = _sort_keys(files[0] if len(files) == 1 else path, content)
    del content  # so that `_own` frees each of the file's tensors as it goes
    with torch.device("meta"), _NoInit():  # no memory, no initialisation: every weight is assigned
        model = RWKV4(_rwkv4_config(found))
    tensors = {name: found.fitted(name, t.shape) for name, t in model.state_dict().items()}
    if extra := [key for name, key in found.keys.items() if name not in tensors]:
        raise ValueError(
            f"{found.source} holds {len(extra)} keys that no RWKV-4 of {model.config.n_layer} layers has, "
            f"unexpected: {', '.join(extra[:3])}; load the file of an RWKV-4 alone"
        )
    found.tensors.clear()
    dtype = dtype or reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    model.load_state_dict(_own(tensors, dtype, device), assign=True)
    return model.eval()


def model_sizes(path: str | Path) -> RWKV4Config:
    """The sizes of the model at path, from its shapes: its weights stay on the disk. Raises as `load_model` does."""
    path = Path(path).expanduser()
    files = _weight_files(path)
    content: dict[str, object] = {}
    for file in files:
        content |= read_weights(file, shapes_only=True)
    return _rwkv4_config(_sort_keys(files[0] if len(files) == 1 else path, content))


def save_model(model: RWKV4, path: str | Path, dtype: torch.dtype | None = None, tokenizer=None) -> None:
    """Write a model's weights: `.pth`, `.safetensors`, or a Hugging Face directory (no suffix, or "name/").

    dtype: None keeps the model's. tokenizer: its `save` writes tokenizer.json into a Hugging Face directory.
    A crash leaves the old file or the new one, complete. In an existing Hugging Face directory of an RWKV-4,
    weights and config are replaced and other files stay; any other directory with something in it is refused.
    Raises ValueError for a path that cannot be meant.
    """
    _check_dtype(dtype)
    target = Path(path).expanduser().resolve()  # resolved: to replace what a link points at, not the link
    slash = os.fspath(path).endswith(("/", os.sep))
    is_file = target.suffix in (".pth", ".safetensors") and not slash
    if not (is_file or slash or not target.suffix or target.is_dir()):
        raise ValueError(f'{path}: unknown suffix; use .pth or .safetensors, or "{path}/" for a directory')
    if target.exists() and is_file == target.is_dir():
        kinds = ("a directory", "a file") if target.is_dir() else ("a file", "a directory")
        raise ValueError(f"{path} is {kinds[0]}, expected {kinds[1]} or nothing there; choose another name")
    if tokenizer is not None and is_file:
        raise ValueError(f"{path}: a tokenizer is saved only into a Hugging Face directory, not a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = _own(dict(model.state_dict()), dtype, "cpu")
    if is_file:
        write = write_pth if target.suffix == ".pth" else write_safetensors
        replace_file(target, lambda temporary: write(tensors, temporary))
    else:
        save_hf(tensors, model.config, target, tokenizer)


def _weight_files(path: Path) -> list[Path]:
    """The file, or the shards, that hold the weights of what path names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        hint = "check the name" if path.suffix else "a model on the Hugging Face hub must be downloaded first"
        raise FileNotFoundError(f"{path}: no such file or directory; {hint}")
    if (path / "config.json").is_file():
        return hf_files(path)
    if newest := newest_good(path):
        return _weight_files(newest)
    for name in (WEIGHTS, TRAINER):  # of one checkpoint
        if (path / name).is_file():
            return [path / name]
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".safetensors", ".ckpt"))
    hint = f"name the file to load ({', '.join(others[:3])})" if others else "check the name"
    raise ValueError(
        f"{path} holds no model: found neither config.json (a Hugging Face directory) "
        f"nor a sound checkpoints/step=N (a run); {hint}"
    )


@dataclass
class _Found:
    """A file's tensors under our names, and how the file itself spells those."""

    source: Path
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    is_hf: bool

    def key(self, name: str) -> str:
        """What the file calls, or would call, our parameter `name`."""
        return self.keys.get(name) or (to_hf_name(name) if self.is_hf else name)

    def get(self, name: str) -> Tensor:
        if name not in self.tensors:
            some = ", ".join(list(self.keys.values())[:3]) or "none"
            raise ValueError(
                f"{self.source}: {self.key(name)} is missing, expected in every RWKV-4 "
                f"(the file's {len(self.keys)} keys: {some}, ...); is it complete, and an RWKV-4?"
            )
        return self.tensors[name]

    def fitted(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor in the model's shape; between programs only time_* vectors differ, in axes of size 1."""
        t = self.get(name)
        is_vector = ".time_" in name and max(t.shape, default=1) == t.numel()
        if t.shape != shape and not (is_vector and t.numel() == shape.numel()):
            raise ValueError(
                f"{self.source}: {self.key(name)} has shape {list(t.shape)}, expected {list(shape)}, going "
                "by the file's other tensors; load an unconverted RWKV-4"
            )
        return t.reshape(shape)


def _sort_keys(source: Path, content: dict[str, object]) -> _Found:
    """Rename to our names, and refuse what is not a plain tensor of floats."""
    _refuse_other_models(source, [key for key in content if key.isprintable()])
    is_hf = any(key.startswith("rwkv.") or ".attention." in key for key in content)
    found = _Found(source, {}, {}, is_hf)
    for key, value in content.items():
        if not key.isprintable():  # nothing a message should repeat
            raise ValueError(f"{source} is damaged: it names a tensor {key!r}; download or save it again")
        name = from_hf_name(key) if is_hf else key
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
        found.tensors[name], found.keys[name] = value.detach(), key
    return found


def _refuse_other_models(source: Path, keys: list[str]) -> None:
    """Tell of files that are sound but hold something else than an RWKV-4."""
    for key in keys:
        if "lora_" in key.lower():
            raise ValueError(f"{source} holds a LoRA ({key}); merge it into its base model and load the result")
    marks = {".r_k": "RWKV-7", ".time_maa_": "RWKV-6", ".ln_x.": "RWKV-5 or 6", ".time_faaaa": "RWKV-5 or 6"}
    for mark, other in marks.items():  # by mark first: RWKV-7 has an ln_x too
        for key in keys:
            if mark in key:
                raise ValueError(f"{source} ({key}): {other} is not supported by this version yet; load an RWKV-4")


def _rwkv4_config(found: _Found) -> RWKV4Config:
    """The sizes, from three matrices' shapes and the number of blocks."""
    sizes = []
    for name in ("emb.weight", "blocks.0.att.key.weight", "blocks.0.ffn.key.weight"):
        t = found.get(name)
        if t.ndim != 2 or not t.numel():
            raise ValueError(f"{found.source}: {found.key(name)} has shape {list(t.shape)}, expected a matrix")
        sizes.append(t.shape)
    # Counted, not the highest number: a damaged name must not ask for a million blocks.
    blocks = {match[1] for name in found.tensors if (match := re.match(r"blocks\.([0-9]+)\.", name))}
    return RWKV4Config(*sizes[0], len(blocks), n_att=sizes[1][0], n_ffn=sizes[2][0])


class _NoInit(TorchFunctionMode):
    """Passes over torch.nn.init: initialising meta tensors has no effect but importing the compiler, a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _own(tensors: dict[str, Tensor], dtype: torch.dtype | None, device) -> dict[str, Tensor]:
    """The tensors, contiguous, each in memory of its own (files may tie or slice them); empties `tensors`."""
    owned, seen = {}, set()
    for name in list(tensors):
        t = tensors.pop(name).detach()
        storage = t.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != t.numel() * t.element_size()
        seen.add(storage.data_ptr())
        owned[name] = t.to(device, dtype or t.dtype, copy=shared).contiguous()
    return owned


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected torch.float16, bfloat16, float32 or float64, or None")
