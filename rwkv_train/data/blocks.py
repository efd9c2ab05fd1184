"""Checksums of a file in blocks, compared when a block is first read.

So a bit that fell over on the disk is found before it is trained on, and opening a file of any size stays instant.
"""

import zlib
from pathlib import Path

import numpy as np

BLOCK = 1 << 16  # bytes


def checksums(data: np.ndarray) -> np.ndarray:
    """CRC-32 of each block of a file's bytes [N] uint8, as uint32 [ceil(N / BLOCK)]."""
    return np.array([zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)], "<u4")


class Blocks:
    """A mapped file and its checksums."""

    def __init__(self, path: Path, data: np.ndarray, sums: np.ndarray):
        self.path, self._data, self._sums = path, data.view(np.uint8), sums
        self._width = data.itemsize
        self._unread = np.ones(len(sums), bool)

    def check(self, start: int, count: int) -> None:
        """Raise ValueError if one of `count` items from `start` on lies in a block that is not what was written."""
        first, last = start * self._width // BLOCK, -(-(start + count) * self._width // BLOCK)
        for block in np.flatnonzero(self._unread[first:last]) + first:
            if zlib.crc32(self._data[block * BLOCK : (block + 1) * BLOCK]) != self._sums[block]:
                where = f"bytes {block * BLOCK:,} to {min((block + 1) * BLOCK, len(self._data)):,}"
                raise ValueError(
                    f"{self.path}: {where} are not what was written, the disk or a copy has damaged them; make the "
                    "store anew with `prepare`, or copy it again"
                )
            self._unread[block] = False
