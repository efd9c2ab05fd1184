"""binidx, the token files of RWKV-LM and Megatron: `X.bin` is raw tokens, `X.idx` says where documents lie.

The index, little-endian and packed (so its arrays are unaligned):
    9 bytes "MMIDIDX" and two zeros | u64 version 1 | u8 dtype code
    u64 n sequences | u64 m document boundaries
    i32 [n] sizes in tokens | i64 [n] offsets in bytes | i64 [m] boundaries: first 0, last n
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = len(MAGIC) + 8 + 1 + 8 + 8
DTYPES = {1: np.uint8, 4: np.int32, 5: np.int64, 8: np.uint16}  # the codes that can hold token ids
REMAKE = "Copy it again, or make the store anew with `prepare`."


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 as RWKV-LM reads it, int32 where ids go past 65535."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<i4")


def read_binidx(prefix: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens [N] (mapped), offsets [D] and lengths [D] (int64, in tokens) of `prefix`.bin and `prefix`.idx.

    A document may span several sequences; empty documents are left out. ValueError for any damage.
    """
    idx, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    data = map_file(idx, np.uint8)
    dtype, n, m = _read_header(idx, data)
    sizes = np.frombuffer(data, "<i4", n, HEADER)
    pointers = np.frombuffer(data, "<i8", n, HEADER + 4 * n)
    documents = np.frombuffer(data, "<i8", m, HEADER + 12 * n)

    tokens = map_file(bin_path, dtype)
    bounds = np.zeros(n + 1, np.int64)
    np.cumsum(sizes, out=bounds[1:])
    if n == 0 or sizes.min() < 0 or not np.array_equal(pointers, bounds[:-1] * tokens.itemsize):
        raise ValueError(f"{idx}: its {n} sequences do not lie end to end from byte 0 on. {REMAKE}")
    if bounds[-1] != len(tokens):
        raise ValueError(f"{bin_path} holds {len(tokens)} tokens, its index says {bounds[-1]}. {REMAKE}")
    if m < 2 or documents[0] != 0 or documents[-1] != n or (documents[1:] < documents[:-1]).any():
        raise ValueError(f"{idx}: its document boundaries do not rise from 0 to {n}. {REMAKE}")
    bounds = bounds[documents]
    offsets, lengths = bounds[:-1], np.diff(bounds)
    if not lengths.all():
        offsets, lengths = offsets[lengths > 0], lengths[lengths > 0]
    return tokens, offsets, lengths


def _read_header(idx: Path, data: np.ndarray) -> tuple[np.dtype, int, int]:
    """dtype of the tokens, number of sequences, number of document boundaries."""
    if len(data) < HEADER or bytes(data[:9]) != MAGIC:
        found = f"{len(data)} bytes starting with {bytes(data[:9])!r}"
        raise ValueError(f"{idx} is no binidx index: {found}, expected {MAGIC!r}. {REMAKE}")
    version, code = int.from_bytes(data[9:17], "little"), int(data[17])
    n, m = int.from_bytes(data[18:26], "little"), int.from_bytes(data[26:34], "little")
    if version != 1 or code not in DTYPES:
        known = ", ".join(f"{c} ({np.dtype(d).name})" for c, d in DTYPES.items())
        found = f"version {version} and dtype code {code}"
        raise ValueError(f"{idx} has {found}, expected version 1 and one of {known}. {REMAKE}")
    if len(data) != HEADER + 12 * n + 8 * m:
        expected = f"{n} sequences and {m} boundaries need {HEADER + 12 * n + 8 * m}"
        raise ValueError(f"{idx} has {len(data)} bytes, but {expected}. {REMAKE}")
    return np.dtype(DTYPES[code]).newbyteorder("<"), n, m


def map_file(path: Path, dtype: np.dtype | type) -> np.ndarray:
    """The whole file as a read-only, memory-mapped array of `dtype`."""
    if not path.is_file():
        hint = "Give the folder that `prepare` made, or the prefix of a .bin and .idx pair."
        raise ValueError(f"There is no file {path}. {hint}")
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % width:
        raise ValueError(f"{path} has {size} bytes, expected a positive multiple of {width}. {REMAKE}")
    return np.memmap(path, dtype=dtype, mode="r")


def write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """The index of documents of `lengths` [D] int32, one sequence a document, end to end."""
    n = len(lengths)
    code = next(c for c, d in DTYPES.items() if dtype == np.dtype(d))
    head = MAGIC + (1).to_bytes(8, "little") + bytes([code])
    file.write(head + n.to_bytes(8, "little") + (n + 1).to_bytes(8, "little"))
    file.write(lengths.astype("<i4").tobytes())
    ends = np.cumsum(lengths, dtype=np.int64)
    file.write(((ends - lengths) * dtype.itemsize).astype("<i8").tobytes())
    file.write(np.arange(n + 1, dtype="<i8").tobytes())
