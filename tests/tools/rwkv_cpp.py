"""Models in the file format of rwkv.cpp (MIT), by our names."""

import struct
from pathlib import Path

import numpy as np
import torch

MAGIC, FLOAT32 = 0x67676D66, 0


def read_rwkv_cpp(path: Path) -> dict[str, torch.Tensor]:
    """Weights as a `.pth` has them. The file: magic, version, V, C, L, type; then tensor by tensor dims, length of the
    name, type, the dims in reverse, the name, the data."""
    data = path.read_bytes()
    magic, _, vocab_size, n_embd, _, _ = struct.unpack_from("<6i", data)
    assert magic == MAGIC, path
    at, tensors = 24, {}
    while at < len(data):
        ndim, length, kind = struct.unpack_from("<3i", data, at)
        shape = struct.unpack_from(f"<{ndim}i", data, at + 12)[::-1]
        at += 12 + 4 * ndim
        name, at = data[at : at + length].decode(), at + length
        assert kind == FLOAT32, (name, kind)
        count = int(np.prod(shape))
        tensors[name] = torch.from_numpy(np.frombuffer(data, np.float32, count, at).reshape(shape).copy())
        at += 4 * count
    assert tensors["emb.weight"].shape == (vocab_size, n_embd)
    return {ours: t for name, t in tensors.items() for ours, t in _as_ours(name, t)}


def _as_ours(name: str, t: torch.Tensor):
    """Decays are stored as they are used, low-rank maps transposed, the six token shifts in one."""
    block, _, last = name.rpartition(".")
    if last == "x_rwkvag":
        yield from ((f"{block}.x_{letter}", x[None]) for letter, x in zip("rwkvag", t, strict=True))
    elif last == "time_decay":
        yield name, torch.log(-t)
    else:
        yield name, t.t() if last[0] in "wavg" and last[1:] in ("1", "2") else t
