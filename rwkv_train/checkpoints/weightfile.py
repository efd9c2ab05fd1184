"""One file of weights, read without trusting it.

What a file is gets decided by its first bytes, never by its name.
"""

import ctypes
import errno
import json
import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.serialization import skip_data

from rwkv_train.checkpoints.foreign import refuse_format

SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
HEADER = 100_000_000  # bytes that the safetensors library allows its header to have


def read_weights(path: Path) -> dict[str, object]:
    """What `map_weights` finds, in memory of its own."""
    values, mapped = map_weights(path)
    for name, value in values.items():
        if mapped and isinstance(value, Tensor):
            values[name] = value.clone()
            drop_pages(value)
    return values


def map_weights(path: Path) -> tuple[dict[str, object], bool]:
    """Everything in a `.pth` or `.safetensors` file, on the CPU; of a training checkpoint, the model's part.

    The second is whether the tensors are the file, mapped: nothing is read before it is used, and they change with it.
    A `.pth` as torch wrote it before 1.6 is read as a whole. Values are what the file holds, tensors or not. Raises
    ValueError, naming file and remedy, otherwise.
    """
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from e
    if _is_safetensors(path, head):
        return _guarded(path, _map_safetensors), True
    # A name that ends in .safetensors would have torch take the file for one.
    mapped = head.startswith(b"PK") and path.suffix != ".safetensors"
    return _plain(path, _guarded(path, _map_pth if mapped else _read_pth)), mapped


def drop_pages(t: Tensor) -> None:
    """Take what was read of a mapped tensor out of this process's memory; it is read again where it is used again."""
    if not hasattr(mmap, "MADV_DONTNEED") or not t.is_contiguous():
        return
    start, end = t.data_ptr(), t.data_ptr() + t.nbytes
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE  # its own pages alone
    if start < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def read_shapes(file: BinaryIO, name: str) -> dict[str, object]:
    """The same of an open file, with tensors of the right shapes and dtypes and no contents.

    Little more than the names is read, which makes it right for a file that lies far away.
    """
    head = file.read(64)
    file.seek(0)
    if _is_safetensors(name, head):
        return _guarded(name, lambda _: _safetensors_shapes(file))
    with skip_data():
        return _plain(name, _guarded(name, lambda _: torch.load(file, map_location="cpu", weights_only=True)))


def _is_safetensors(path: Path | str, head: bytes) -> bool:
    """Whether it is one, or a .pth; ValueError for anything else."""
    if not head:
        raise ValueError(f"{path} is empty; download or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f'{path} is a Git LFS pointer, not the file itself; run "git lfs pull" beside it')
    if head[8:9] == b"{":
        return True
    if not head.startswith((b"PK", b"\x80")):
        refuse_format(path, head)
    return False


def _plain(path: Path | str, found: object) -> dict[str, object]:
    """The dict of tensors among what torch has found."""
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
        # Lightning's names begin with the attribute that holds the model.
        model = {str(k).removeprefix("model."): v for k, v in found.items() if str(k).startswith("model.")}
        found = model or found
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ValueError(f"{path} holds a {kind}, expected a dict of tensors; save the model's state_dict")
    return {str(k): v for k, v in found.items()}


def read_list(path: Path) -> list:
    """The list in a `.pth` file, on the CPU. Raises ValueError, naming file and remedy, otherwise."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the name")
    found = _guarded(path, _read_pth)
    if not isinstance(found, list):
        kind = type(found).__name__
        raise ValueError(f"{path} holds a {kind}, expected a list of tensors, the state that a text has left")
    return found


def _map_pth(path: Path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_pth(path: Path):
    with path.open("rb") as f:  # given a name, torch goes by its suffix
        return torch.load(f, map_location="cpu", weights_only=True)


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def _safetensors_shapes(file: BinaryIO) -> dict[str, Tensor]:
    size = int.from_bytes(file.read(8), "little")
    if size > HEADER:
        raise ValueError(f"a header of {size} bytes")
    entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return {k: torch.zeros((), dtype=SAFETENSORS_DTYPES[e["dtype"]]).expand(e["shape"]) for k, e in entries.items()}


def metadata_of(path: Path) -> dict[str, str]:
    """What a `.safetensors` file says beside its tensors; nothing where there is none, and in other files."""
    from safetensors import safe_open

    def read(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}

    return _guarded(path, read) if path.suffix == ".safetensors" else {}


def _guarded(path: Path | str, read: Callable):
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
        if no_room(e):
            raise ValueError(f"{path} does not fit into memory") from e
        raise ValueError(f"{path} is truncated or damaged ({type(e).__name__}); download or save it again") from e


def no_room(error: Exception) -> bool:
    """Whether this is torch's way, or the system's, of saying that memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or "t allocate memory" in str(error)


def write_pth(tensors: dict[str, Tensor] | list[Tensor], path: Path) -> None:
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
