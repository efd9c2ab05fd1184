"""A file as large as a released RWKV-7, and what opening it takes.

python big_model.py write 1.5b FILE: zeros in the shapes of the G1 series, in bf16, as .pth, .safetensors or a folder
of shards. python big_model.py open FILE [DTYPE]: the seconds, and the largest memory besides what the program itself
takes, over the size of the weights.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.checkpoints.hf import to_hf
from rwkv_train.checkpoints.modelfile import model_sizes
from rwkv_train.checkpoints.opener import load_in
from rwkv_train.models.quantised import BITS, quantise
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.program import peak_bytes

SIZES = {"0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "2.9b": (32, 2560), "7.2b": (32, 4096)}
SHARDS = 4


def write(size: str, target: Path) -> None:
    """A model of that size in bf16, all zeros; a .safetensors and shards are sparse files, which take no disk."""
    n_layer, n_embd = SIZES[size]
    with torch.device("meta"):
        model = RWKV7(RWKV7Config(65536, n_embd, n_layer)).to(torch.bfloat16)
    weights = dict(model.state_dict())
    if target.suffix == ".safetensors":
        write_sparse(weights, target)
    elif target.suffix:
        torch.save({name: torch.zeros_like(t, device="cpu") for name, t in weights.items()}, target)
    else:
        target.mkdir()
        weights = list(to_hf(RWKV7, weights).items())
        shards = {f"model-{i}.safetensors": dict(weights[i::SHARDS]) for i in range(SHARDS)}
        for name, shard in shards.items():
            write_sparse(shard, target / name)
        index = {"weight_map": {weight: name for name, shard in shards.items() for weight in shard}}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        (target / "config.json").write_text('{"model_type": "rwkv7"}')


def write_sparse(weights: dict[str, Tensor], path: Path) -> None:
    entries, end = {}, 0
    for name, t in weights.items():
        entries[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end := end + t.nbytes]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + end)


def measure(source: str, dtype: str | None = None) -> None:
    """Print seconds, and the peak beside the larger of what is read and what it becomes."""
    model_sizes(source)  # what is imported on the way is the program's, not the model's
    if dtype in BITS:
        quantise(RWKV7(RWKV7Config(65, 64, 1)))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    began = time.perf_counter()
    model = load_in(source, dtype)
    seconds, peak = time.perf_counter() - began, peak_bytes() - resident
    read = sum(p.numel() for p in model.parameters()) * (4 if dtype == "fp32" else 2)
    print(f"{source} {dtype or 'as it is'}: {seconds:.2f} s, {peak / read:.3f} x the {read / 1e9:.2f} GB it holds")


if __name__ == "__main__":
    {"write": lambda size, target: write(size, Path(target)), "open": measure}[sys.argv[1]](*sys.argv[2:])
