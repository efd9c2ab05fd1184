"""Models in and out: BlinkDL `.pth` and `.safetensors`, Hugging Face directories, our own runs.

The layout is told by a file's keys, sizes are read off the shapes.
"""

import math
import os
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rwkv_train.checkpoints import hub
from rwkv_train.checkpoints.foreign import kind_by_name
from rwkv_train.checkpoints.found import DTYPES, Found, read_model, sizes, sort_keys
from rwkv_train.checkpoints.free_memory import check_fits
from rwkv_train.checkpoints.hf import save_hf
from rwkv_train.checkpoints.names import names_in, parts_of
from rwkv_train.checkpoints.peft import read_peft, trained_on, write_peft
from rwkv_train.checkpoints.states import to_time_states
from rwkv_train.checkpoints.weightfile import (
    drop_pages,
    no_room,
    read_shapes,
    write_pth,
    write_safetensors,
)
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.files import replace_file
from rwkv_train.models.adapters import put_on, relative, samples
from rwkv_train.models.base import RWKV
from rwkv_train.models.rwkv4 import RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7Config
from rwkv_train.ops.products import dequantised, is_quantised
from rwkv_train.program import told
from rwkv_train.tokenizer import Tokenizer

PIECE = 2**24  # bytes of a file that are copied at once


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
    found = read_model(path)
    own = found.take_adapter()
    if own and not found.tensors:
        raise ValueError(f"{path} holds an adapter alone; give it with its model, BASE+{path}")
    adapters = [(other, _adapter(other, found.generation)) for other in others]
    with torch.device("meta"), _NoInit():  # no memory, no initialisation: every weight is assigned
        model = found.generation(sizes(found))
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    widest = reduce(torch.promote_types, (found.fitted(name, shape).dtype for name, shape in shapes.items()))
    if extra := [key for name, key in found.keys.items() if name not in shapes]:
        raise ValueError(
            f"{found.source}{kind_by_name(found.source)} holds {len(extra)} keys that no {model.name} of "
            f"{model.config.n_layer} layers has, unexpected: {', '.join(extra[:3])}; load the file of an {model.name} "
            "alone"
        )
    dtype = dtype or widest
    check_fits(found.source, sum(math.prod(shape) for shape in shapes.values()), dtype, device)
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


def _load(found: Found, shapes: dict[str, torch.Size], dtype: torch.dtype, device) -> dict[str, Tensor]:
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
    adapter = relative(read_model(path).take_adapter()) if adapter is None else adapter
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
    found = read_model(parts_of(path)[0])
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
        return sizes(read_model(Path(name).expanduser()))
    content = hub.look_into(name, lambda file: read_shapes(file, name))
    return sizes(sort_keys(Path(name), content, mapped=False))


def save_model(
    model: RWKV,
    path: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    template: Template | None = None,
) -> TextFormat:
    """Write a model's weights: `.pth`, `.safetensors`, or a Hugging Face directory (no suffix, or "name/").

    dtype: None keeps the model's, weight by weight, and writes what is in few bits as it computes, in bf16. tokenizer,
    template: go into a Hugging Face directory, as files that are read back with it (see `TextFormat`); a file has no
    place for them. An RWKV-7's state to begin in is written as other programs have it, if it is all in wkv (see
    `states`).
    A crash leaves the old file or the new one, complete. In an existing Hugging Face directory of an RWKV,
    weights and config are replaced and other files stay, but for a tokenizer of more ids than the model has, which is
    told; any other directory with something in it is refused. Returns what a directory then says of text.
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
        return TextFormat()
    return save_hf(tensors, model, target, TextFormat(tokenizer, template))


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
