"""Weights of a profile kept as files, so that most of its journal need not be replayed."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.weightfile import read_weights, write_safetensors
from rwkv_train.feedback.trainable import changed, with_weights
from rwkv_train.files import replace_file
from rwkv_train.models.base import RWKV

KEPT = 8  # the newest; older ones are replayed from the journal


class Snapshots:
    """A folder of what corrections changed of a base model, each file named by the corrections and by its content."""

    def __init__(self, folder: Path, base: RWKV):
        self.folder, self.base = folder, base

    def save(self, model: RWKV, records: list[dict]) -> None:
        """Keep the model after these corrections."""
        self.folder.mkdir(exist_ok=True)
        weights = changed(model, self.base)
        path = self.folder / f"{_name(records)}-{weights_hash(weights)[:16]}.safetensors"
        replace_file(path, lambda temporary: write_safetensors(weights, temporary))
        for old in sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()

    def load(self, records: list[dict]) -> RWKV | None:
        """The model after these corrections, if a sound snapshot of it is kept; after none, the base."""
        if not records:
            return self.base
        for path in self.folder.glob(f"{_name(records)}-*.safetensors"):
            try:
                weights = read_weights(path)
            except ValueError:
                continue  # damaged: what it held can be replayed
            if path.stem.endswith(weights_hash(weights)[:16]):
                return with_weights(self.base, weights)
        return None


def _name(records: list[dict]) -> str:
    ids = ",".join(str(r["id"]) for r in records)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def weights_hash(weights: dict[str, Tensor]) -> str:
    """sha256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
