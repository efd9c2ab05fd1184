"""Weights of a profile kept as files, so that most of its journal need not be replayed."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.weightfile import read_weights, write_safetensors
from rwkv_train.feedback.trainable import changed, with_weights
from rwkv_train.files import replace_file
from rwkv_train.models.base import RWKV
from rwkv_train.ops.products import as_wide, is_quantised

NEWEST = 8  # are kept, and with them
MILESTONES = 8  # at most, for an undo from far back: after each 100 corrections, or 200, 400, ...
APART = 100


class Snapshots:
    """A folder of what corrections changed of a base model, each file named by the corrections and by its content.

    A sequence is what weights follow from: the journal's records of corrections and sleeps, in order.
    """

    def __init__(self, folder: Path, base: RWKV):
        self.folder, self.base = folder, base

    def save(self, model: RWKV, sequence: list[dict], live: list[dict] | None = None) -> None:
        """Keep the model after a sequence. live: the one in use, if that is another one.

        Of the others stay the newest, the milestones of this sequence, and what an undo or a crash would need of it and
        of the one in use: the last, and those before and after the last sleep.
        """
        self.folder.mkdir(exist_ok=True)
        weights, names = changed(model, self.base), _names(sequence)
        path = self.folder / f"{names[-1]}-{weights_hash(weights)[:16]}.safetensors"
        replace_file(path, lambda temporary: write_safetensors(weights, temporary))
        stay = {*names[:: _apart(len(sequence))], *_needed(sequence, names)}
        if live is not None:
            stay |= _needed(live, _names(live))
        for old in self._files()[:-NEWEST]:
            if _named(old) not in stay:
                old.unlink()

    def nearest(self, sequence: list[dict]) -> tuple[int, RWKV]:
        """(of how much of the sequence a sound snapshot is kept, the model after that); after nothing, the base."""
        names = _names(sequence)
        files = {_named(path): path for path in self._files()}  # of several of a name the newest
        for count in range(len(sequence), 0, -1):
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


def _needed(sequence: list[dict], names: list[str]) -> set[str]:
    asleep = [n for n, record in enumerate(sequence) if record["kind"] == "slept"][-1:]
    return {names[-1], *(name for n in asleep for name in names[n : n + 2])}


def _names(sequence: list[dict]) -> list[str]:
    """What snapshots after the first 0, 1, 2, ... records are called: by all the numbers up to there."""
    digest, names, comma = hashlib.sha256(), [""], b""
    for record in sequence:
        digest.update(comma + str(record["id"]).encode())
        comma = b","
        names.append(digest.hexdigest()[:16])
    return names


def weights_hash(weights: dict[str, Tensor]) -> str:
    """sha256 of tensors and their names; of those in few bits as float32."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        weight = as_wide(weight) if is_quantised(weight) else weight
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
