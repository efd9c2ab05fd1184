"""Weights of a profile kept as files, so that most of its journal need not be replayed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.weightfile import read_weights, write_safetensors
from rwkv_train.feedback.trainable import changed, with_weights
from rwkv_train.files import replace_file
from rwkv_train.models.base import RWKV

NEWEST = 8  # are kept, and with them
MILESTONES = 8  # at most, for an undo from far back: after each 100 corrections, or 200, 400, ...
APART = 100


class Snapshots:
    """A folder of what corrections changed of a base model, each file named by the corrections and by its content."""

    def __init__(self, folder: Path, base: RWKV):
        self.folder, self.base = folder, base

    def save(self, model: RWKV, names: list[str], live: Iterable[str] = ()) -> None:
        """Keep the model after corrections. names: as `names_of` gives them. live: names that must stay, too.

        Of the others the newest stay, and the milestones of these corrections.
        """
        self.folder.mkdir(exist_ok=True)
        weights = changed(model, self.base)
        path = self.folder / f"{names[-1]}-{weights_hash(weights)[:16]}.safetensors"
        replace_file(path, lambda temporary: write_safetensors(weights, temporary))
        stay = {*live, *names[:: _apart(len(names) - 1)]}
        for old in self._files()[:-NEWEST]:
            if _named(old) not in stay:
                old.unlink()

    def nearest(self, names: list[str]) -> tuple[int, RWKV]:
        """(of how many of the corrections a sound snapshot is kept, the model after them); after none, the base.

        names: as `names_of` gives them.
        """
        files = {_named(path): path for path in self._files()}  # of several of a name the newest
        for count in range(len(names) - 1, 0, -1):
            model = self._read(files[names[count]]) if names[count] in files else None
            if model is not None:
                return count, model
        return 0, self.base

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)

    def _read(self, path: Path) -> RWKV | None:
        """The model that a file holds; None if it is damaged: what it held can be replayed."""
        try:
            weights = read_weights(path)
        except ValueError:
            return None
        return with_weights(self.base, weights) if path.stem.endswith(weights_hash(weights)[:16]) else None


def _named(path: Path) -> str:
    return path.name.partition("-")[0]


def _apart(count: int) -> int:
    """How many corrections lie between two milestones, where there are `count`."""
    apart = APART
    while count // apart > MILESTONES:
        apart *= 2
    return apart


def names_of(ids: Iterable[int]) -> list[str]:
    """What snapshots are called: after the first 0, 1, 2, ... of corrections with these numbers."""
    digest, names, comma = hashlib.sha256(), [""], b""
    for number in ids:
        digest.update(comma + str(number).encode())
        comma = b","
        names.append(digest.hexdigest()[:16])
    return names


def weights_hash(weights: dict[str, Tensor]) -> str:
    """sha256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
