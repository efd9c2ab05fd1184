"""One file of weights, read without trusting it.

What a file is gets decided by its first bytes, never by its name.
"""

import errno
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def read_weights(path: Path, shapes_only: bool = False) -> dict[str, object]:
    """Everything in a `.pth` or `.safetensors` file, on the CPU; of a training checkpoint, the model's part.

    shapes_only: tensors that may stay on the disk, or have the shapes alone.
    Values are what the file holds, tensors or not. Raises ValueError, naming file and remedy, otherwise.
    """
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from e
    if not head:
        raise ValueError(f"{path} is empty; download or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f'{path} is a Git LFS pointer, not the file itself; run "git lfs pull" beside it')
    if head[8:9] == b"{":
        return _guarded(path, _safetensors_shapes if shapes_only else _read_safetensors)
    if not head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is no checkpoint: it starts with {head[:12]!r}; expected .pth or .safetensors")
    # Two thirds of a training checkpoint are the optimizer's: mapping the file leaves those on the disk.
    mapped = (shapes_only or path.suffix == ".ckpt") and head.startswith(b"PK")
    found = _guarded(path, _map_pth if mapped else _read_pth)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
        # Lightning's names begin with the attribute that holds the model.
        model = {str(k).removeprefix("model."): v for k, v in found.items() if str(k).startswith("model.")}
        found = model or found
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ValueError(f"{path} holds a {kind}, expected a dict of tensors; save the model's state_dict")
    return {str(k): v.clone() if mapped and not shapes_only and isinstance(v, Tensor) else v for k, v in found.items()}


def _map_pth(path: Path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_pth(path: Path):
    with path.open("rb") as f:  # given a name, torch goes by its suffix
        return torch.load(f, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        names = list(f.keys())
    tensors = {}
    for name in names:  # opened anew each time: the pages of an open mapping count as ours, so twice the model
        with safe_open(path, "pt") as f:
            tensors[name] = f.get_tensor(name).clone()
    return tensors


def _safetensors_shapes(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return {name: torch.zeros(()).expand(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118


def metadata_of(path: Path) -> dict[str, str]:
    """What a `.safetensors` file says beside its tensors; nothing where there is none, and in other files."""
    from safetensors import safe_open

    def read(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}

    return _guarded(path, read) if path.suffix == ".safetensors" else {}


def _guarded(path: Path, read: Callable):
    """read(path), with whatever a damaged file makes the libraries raise told as one ValueError."""
    try:
        return read(path)
    except MemoryError:
        raise
    except Exception as e:  # the bytes decide what the unpickler raises: KeyError, AssertionError, anything
        if blocked := re.search(r"GLOBAL (\S+)", str(e)):
            raise ValueError(
                f"{path} holds more than tensors ({blocked[1]}) and is not opened for safety: such files can "
                "run code; get the weights as .safetensors, or save a plain dict of tensors where it was made"
            ) from e
        if "can't allocate memory" in str(e):
            raise ValueError(f"{path} does not fit into memory") from e
        raise ValueError(f"{path} is truncated or damaged ({type(e).__name__}); download or save it again") from e


def write_pth(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as f:  # given a name, torch would write that name into the file
        torch.save(tensors, f)


def write_safetensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """about: what the file says beside its tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"} | (about or {}))  # transformers insists on the format
    except SafetensorError as error:  # as on a full disk
        raise OSError(errno.EIO, str(error), str(path)) from None
    path.chmod(mode)  # the library makes the file readable by its owner only
