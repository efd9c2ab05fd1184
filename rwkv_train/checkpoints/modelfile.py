"""Models in and out: BlinkDL `.pth` and `.safetensors`, Hugging Face directories, our own runs.

The layout is told by a file's keys, sizes are read off the shapes.
"""

import math
import os
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rwkv_train.checkpoints import hub
from rwkv_train.checkpoints.foreign import ORIGINAL, kind_by_name, refuse_model
from rwkv_train.checkpoints.hf import from_hf_name, hf_files, hf_generation, save_hf, to_hf_name, turned
from rwkv_train.checkpoints.names import names_in, parts_of
from rwkv_train.checkpoints.peft import read_peft, trained_on, write_peft
from rwkv_train.checkpoints.room import check_room
from rwkv_train.checkpoints.run_checkpoint import TRAINER, WEIGHTS, newest_sound
from rwkv_train.checkpoints.states import TIME_STATE, from_time_states, to_time_states
from rwkv_train.checkpoints.weightfile import (
    drop_pages,
    map_weights,
    no_room,
    read_shapes,
    write_pth,
    write_safetensors,
)
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.files import replace_file
from rwkv_train.models.adapters import is_adapter, put_on, relative, samples
from rwkv_train.models.base import RWKV
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.ops.products import dequantised, is_quantised
from rwkv_train.program import told
from rwkv_train.tokenizer import Tokenizer

PIECE = 2**24  # bytes of a file that are copied at once
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> RWKV:
    """Open a model, in eval mode, with weights that no longer depend on the file.

    path: a `.pth` or `.safetensors` file with BlinkDL's or Hugging Face's names, a Hugging Face directory, a directory
    with model.pth, a run directory (its newest checkpoint), one checkpoint of a run, or hf:OWNER/REPO[/FILE][@REVISION]
    for one on the Hugging Face hub (see hub.py). "BASE+ADAPTER" puts an adapter (see models/adapters.py) on a model;
    that of a run comes with the run.
    dtype: None keeps the file's; if it mixes several, all get the widest.
    Raises FileNotFoundError if there is nothing at path, ValueError if there is no RWKV-4 or RWKV-7, or no room for it.
    """
    _check_dtype(dtype)
    path, *others = parts_of(path)
    found = _read(path)
    own = found.take_adapter()
    if own and not found.tensors:
        raise ValueError(f"{path} holds an adapter alone; give it with its model, BASE+{path}")
    adapters = [(other, _adapter(other, found.generation)) for other in others]
    with torch.device("meta"), _NoInit():  # no memory, no initialisation: every weight is assigned
        model = found.generation(_sizes(found))
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    widest = reduce(torch.promote_types, (found.fitted(name, shape).dtype for name, shape in shapes.items()))
    if extra := [key for name, key in found.keys.items() if name not in shapes]:
        raise ValueError(
            f"{found.source}{kind_by_name(found.source)} holds {len(extra)} keys that no {model.name} of "
            f"{model.config.n_layer} layers has, unexpected: {', '.join(extra[:3])}; load the file of an {model.name} "
            "alone"
        )
    dtype = dtype or widest
    check_room(found.source, sum(math.prod(shape) for shape in shapes.values()), dtype, device)
    try:
        model.load_state_dict(_load(found, shapes, dtype, device), assign=True)
    except RuntimeError as e:
        if not no_room(e):
            raise
        raise ValueError(f"{found.source} does not fit into memory; take a smaller model, or --dtype bf16") from e
    put_on(model, own, path)
    bare = samples(model)
    for source, adapter in adapters:
        put_on(model, adapter, source, bare)
        if not any(name.endswith(".base") for name in adapter):
            _tell_other_base(path, source)
    return model.eval()


def _load(found: "_Found", shapes: dict[str, torch.Size], dtype: torch.dtype, device) -> dict[str, Tensor]:
    """Weights of these shapes, each in memory of its own; of the file no more than a piece is in memory beside them."""
    weights = {}
    for name, shape in shapes.items():
        t = found.fitted(name, shape)
        weights[name] = torch.empty(shape, dtype=dtype, device=device)
        rows = max(1, PIECE * len(t) // t.nbytes)
        for ours, theirs in zip(weights[name].split(rows), t.split(rows), strict=True):
            ours.copy_(theirs)
            if found.mapped:
                drop_pages(theirs)
        del found.tensors[name]
    return weights


def _adapter(path: Path, generation: type[RWKV]) -> dict[str, Tensor]:
    """The adapter that a path names: a PEFT folder or file, one of ours, or that of a run."""
    adapter = read_peft(path, generation)
    adapter = relative(_read(path).take_adapter()) if adapter is None else adapter
    if not adapter:
        raise ValueError(f"{path} holds no adapter: no low-rank factors, and no state to begin in")
    return adapter


def _tell_other_base(path: Path, adapter: Path) -> None:
    """Say so on standard error where an adapter's folder names another model than it is put on."""
    name = trained_on(adapter)
    if name and Path(str(name)).stem != path.stem:
        told(f"{adapter} says that it was trained on {name}, and is put on {path}")


def save_adapter(path: str | Path, target: str | Path, base: str | None = None) -> dict[str, Tensor]:
    """Write the adapter that a run trained, and nothing else: to `.pth`, `.safetensors`, or a folder as PEFT has it.

    base: the name of the model it was trained on, which such a folder says. An RWKV-7's state is written as other
    programs have it, if it is all in wkv (see `states`). Returns what was written.
    """
    given, target = target, Path(target).expanduser().resolve()
    found = _read(parts_of(path)[0])
    adapter = relative(found.take_adapter())
    if not adapter:
        raise ValueError(f"{path} holds no adapter; a run with model.tune has one")
    if target.suffix not in (".pth", ".safetensors"):
        if target.suffix and not target.is_dir() and not os.fspath(given).endswith(("/", os.sep)):
            raise ValueError(f'{given}: unknown suffix; use .pth or .safetensors, or "{given}/" for a PEFT folder')
        if not found.tensors:
            raise ValueError(
                f"{path} is an adapter without its model; a PEFT folder is made of the run that trained it"
            )
        adapter = _own(adapter, None, "cpu")
        write_peft(adapter, found.tensors, found.generation, target, base)
        return adapter
    target.parent.mkdir(parents=True, exist_ok=True)
    write = write_pth if target.suffix == ".pth" else write_safetensors
    adapter = _own(to_time_states(adapter), None, "cpu")
    replace_file(target, lambda temporary: write(adapter, temporary))
    return adapter


def model_sizes(path: str | Path) -> RWKV4Config | RWKV7Config:
    """The sizes of the model at path, from its shapes: its weights stay where they are, on the disk or on the hub.

    Raises as `load_model` does.
    """
    name = names_in(path)[0]
    if not hub.is_hub(name):
        return _sizes(_read(Path(name).expanduser()))
    content = hub.look_into(name, lambda file: read_shapes(file, name))
    return _sizes(_sort_keys(Path(name), content, mapped=False))


def save_model(
    model: RWKV,
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    template: Template | None = None,
) -> None:
    """Write a model's weights: `.pth`, `.safetensors`, or a Hugging Face directory (no suffix, or "name/").

    dtype: None keeps the model's, weight by weight, and writes what is in few bits as it computes, in bf16. tokenizer,
    template: go into a Hugging Face directory, as files that are read back with it (see `TextFormat`); a file has no
    place for them. An RWKV-7's state to begin in is written as other programs have it, if it is all in wkv (see
    `states`).
    A crash leaves the old file or the new one, complete. In an existing Hugging Face directory of an RWKV,
    weights and config are replaced and other files stay; any other directory with something in it is refused.
    Raises ValueError for a path that cannot be meant, and for a dtype that does not hold a weight.
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
    if is_file and (tokenizer or template):
        raise ValueError(f"{path}: a tokenizer or template is saved only into a Hugging Face directory, not a file")
    weights = {n: dequantised(w) if is_quantised(w) else w for n, w in model.state_dict().items()}
    weights = to_time_states(weights)
    tensors = _own(dict(weights), dtype, "cpu")
    _check_range(weights, tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_file:
        write = write_pth if target.suffix == ".pth" else write_safetensors
        replace_file(target, lambda temporary: write(tensors, temporary))
    else:
        save_hf(tensors, model, target, TextFormat(tokenizer, template))


def _read(path: Path) -> "_Found":
    """The tensors of what path names, as `map_weights` has them."""
    files = _weight_files(path)
    content, mapped = {}, True
    for file in files:
        values, maps = map_weights(file)
        content |= values
        mapped &= maps
    return _sort_keys(files[0] if len(files) == 1 else path, content, mapped)


def _weight_files(path: Path) -> list[Path]:
    """The file, or the shards, that hold the weights of what path names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        could_be_hub = len(path.parts) == 2 and not path.suffix and not path.is_absolute()
        hint = f"a model on the Hugging Face hub is named hf:{path}" if could_be_hub else "check the name"
        raise FileNotFoundError(f"{path}: no such file or directory; {hint}")
    if (path / "config.json").is_file():
        return hf_files(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} holds an adapter alone; name its model, too: BASE+{path}")
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


@dataclass
class _Found:
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


def _sort_keys(source: Path, content: dict[str, object], mapped: bool) -> _Found:
    """Rename to our names, and refuse what is not a plain tensor of floats."""
    refuse_model(source, {key: value for key, value in content.items() if key.isprintable()})
    hf = hf_generation(list(content))
    found = _Found(source, {}, {}, hf, mapped)
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


def _sizes(found: _Found) -> RWKV4Config | RWKV7Config:
    return _rwkv7_config(found) if found.generation is RWKV7 else _rwkv4_config(found)


def _rwkv4_config(found: _Found) -> RWKV4Config:
    names = ("emb.weight", "blocks.0.att.key.weight", "blocks.0.ffn.key.weight")
    (vocab_size, n_embd), (n_att, _), (n_ffn, _) = map(found.matrix, names)
    return RWKV4Config(vocab_size, n_embd, found.n_layer, n_att=n_att, n_ffn=n_ffn)


def _rwkv7_config(found: _Found) -> RWKV7Config:
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


def _check_range(weights: dict[str, Tensor], written: dict[str, Tensor]) -> None:
    """ValueError if a weight is finite, and no longer in the dtype in which it is to be written."""
    for name, weight in weights.items():
        other = written[name]
        lost = weight.detach().to(other.device)[~other.isfinite()] if weight.dtype != other.dtype else weight[:0]
        if lost.isfinite().any():
            largest, limit = float(lost[lost.isfinite()].abs().max()), torch.finfo(other.dtype).max
            raise ValueError(
                f"{name} reaches {largest:,.6g}, and {str(other.dtype).removeprefix('torch.')} ends at {limit:,.6g}; "
                "write the model as fp32 or bf16"
            )


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected torch.float16, bfloat16, float32 or float64, or None")
