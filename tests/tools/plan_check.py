"""Predicted and measured peaks side by side: python tests/tools/plan_check.py [--mapped] [NAME ...]

Each case is a small run of `train.py fit` in a process of its own (or several ranks), whose peak is what the system
counted for it; the prediction is what `train.py plan` prints. --mapped keeps blocks of 256 KB and more out of the C
library's heap, and its waste out of the prediction: what is left is what torch holds.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from rwkv_train.config import DataConfig, FitConfig, ModelConfig, SampleConfig, TrainConfig
from rwkv_train.data.prepare import PrepareConfig, prepare
from rwkv_train.models.fresh import fresh_sizes
from rwkv_train.plan.command import sizes_of
from rwkv_train.plan.formulas import memory

ROOT = Path(__file__).parents[2]
VOCAB = 8192


def case(n_embd, n_layer, lanes, chunk_len, horizon=1, **train) -> dict:
    """Settings of a run; `path` is filled in when it is made."""
    more = {name: train.pop(name) for name in ("dropout", "architecture") if name in train}
    model = ModelConfig(n_layer=n_layer, n_embd=n_embd, vocab_size=VOCAB, **more)
    data = {"lanes": lanes, "chunk_len": chunk_len, "horizon": horizon, "val_share": 0.0}
    return {"model": model, "data": data, "train": TrainConfig(steps=2, device="cpu", log_every=1, **train)}


CASES = {
    "base": case(16, 1, 1, 16),
    "one-chunk": case(512, 6, 4, 512),
    "long-chunk": case(256, 4, 2, 4096),
    "horizon": case(512, 8, 2, 512, horizon=4),
    "horizon-accumulate": case(512, 8, 2, 384, horizon=3, accumulate=2),
    "checkpoint_blocks": case(512, 8, 4, 768, checkpoint_blocks=True),
    "horizon-checkpoint_blocks": case(512, 8, 4, 512, horizon=3, checkpoint_blocks=True),
    "bf16": case(512, 8, 4, 512, precision="bf16"),
    "bf16-horizon": case(512, 8, 4, 512, horizon=3, precision="bf16"),
    "bf16-horizon-checkpoint_blocks": case(768, 8, 4, 384, horizon=2, precision="bf16", checkpoint_blocks=True),
    "dropout": case(512, 6, 4, 512, dropout=0.1),
    "rwkv7": case(512, 6, 4, 512, architecture="rwkv7"),
    "rwkv7-horizon": case(512, 8, 2, 512, horizon=4, architecture="rwkv7"),
    "rwkv7-checkpoint_blocks": case(512, 8, 4, 768, checkpoint_blocks=True, architecture="rwkv7"),
    "rwkv7-bf16": case(512, 8, 4, 512, precision="bf16", architecture="rwkv7"),
    "wide": case(1024, 4, 1, 256),
    "ddp": case(512, 6, 4, 512, strategy="ddp", devices=2),
    "ddp-horizon": case(768, 6, 2, 256, horizon=3, strategy="ddp", devices=2),
    "fsdp": case(768, 8, 2, 384, strategy="fsdp", devices=2),
    "fsdp-deep": case(768, 16, 2, 64, strategy="fsdp", devices=2),
    "fsdp-deep-horizon": case(768, 16, 2, 64, horizon=3, strategy="fsdp", devices=2),
    "fsdp-horizon": case(768, 8, 2, 384, horizon=3, strategy="fsdp", devices=2),
}


def config_of(settings: dict, folder: Path) -> FitConfig:
    """A run over random bytes, in the folder."""
    store = folder / "store"
    if not store.exists():
        (folder / "text.txt").write_text("".join(map(chr, torch.randint(97, 123, (200_000,)).tolist())))
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(PrepareConfig([str(folder / "text.txt")], str(store), tokenizer="bytes"))
    data = DataConfig(path=str(store), **settings["data"])
    samples = SampleConfig(prompts=[])
    return FitConfig("run", settings["model"], data, settings["train"], runs=str(folder / "runs"), samples=samples)


def predicted(config: FitConfig) -> dict[str, float]:
    """Bytes by part."""
    return memory(config, sizes_of(fresh_sizes(config.model, VOCAB)), "cpu")


def measured(config: FitConfig, folder: Path, mapped: bool = False) -> float:
    """Bytes: the peak of the first rank's process after two steps."""
    file, ranks = folder / "config.yaml", config.train.devices
    file.write_text(yaml.safe_dump(asdict(config)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    argv = [
        sys.executable,
        *torchrun,
        "tests/tools/ranks.py" if ranks > 1 else "train.py",
        "fit",
        "--config",
        str(file),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "262144"} if mapped else {}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = max((folder / "runs").glob("run*/metrics.jsonl"), key=os.path.getmtime)
    return json.loads(metrics.read_text().splitlines()[-1])["memory_mb"] * 2**20


def main(names: list[str]) -> None:
    mapped = "--mapped" in names
    print(f"{'MB':<28}{'predicted':>10}{'measured':>10}{'ratio':>8}")
    for name in [n for n in names if n in CASES] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(CASES[name], Path(folder))
            parts, found = predicted(config), measured(config, Path(folder), mapped)
        total = sum(parts.values()) - parts["heap"] * mapped
        print(f"{name:<28}{total / 2**20:>10.0f}{found / 2**20:>10.0f}{total / found:>8.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
