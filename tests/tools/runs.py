"""Small runs, as several tests make them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from rwkv_train import load_model
from rwkv_train.config import DataConfig, FitConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from rwkv_train.data.prepare import PrepareConfig, prepare

EOD = 0


def store_of(lengths, mask=None):
    """A store in memory: document d is d*1000+1, d*1000+2, ... and then the end-of-document token."""
    texts = [[d * 1000 + i for i in range(1, n)] + [EOD] for d, n in enumerate(lengths)]
    lengths = np.array([len(t) for t in texts])
    tokens = np.array([t for text in texts for t in text])
    places = {"offsets": np.cumsum(lengths) - lengths, "lengths": lengths}
    return SimpleNamespace(
        path="memory", tokens=tokens, mask=mask, manifest=None, eod=EOD, check=lambda *_: None, **places
    )


def store_in(folder: Path) -> Path:
    """Pairs whose prompts are not trained, of very unequal lengths."""
    pairs = [{"prompt": "count: " * (i % 4 + 1), "completion": "one two three " * (i % 7 + 1)} for i in range(1, 60)]
    lines = folder.with_name("pairs.jsonl")
    lines.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    prepare(PrepareConfig([str(lines)], str(folder), tokenizer="bytes"))
    return folder


def model_of(generation: str = "rwkv4", **settings) -> ModelConfig:
    heads = {"head_size": 8} if generation == "rwkv7" else {}
    return ModelConfig(architecture=generation, n_layer=2, n_embd=24, **heads, **settings)


def config_of(store, runs, generation: str = "rwkv4", **changes) -> FitConfig:
    config = FitConfig(
        name="run",
        runs=str(runs),
        seed=3,
        model=model_of(generation, dropout=0.1),
        data=DataConfig(path=str(store), lanes=4, chunk_len=16, horizon=2, val_share=0.1, val_lanes=3),
        optim=OptimConfig(lr=1e-2, warmup=2, weight_decay=0.01),
        train=TrainConfig(steps=8, accumulate=2, val_every=3, save_every=5, log_every=1, device="cpu"),
        samples=SampleConfig(prompts=["count: "], tokens=8),
    )
    return replace(config, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run).state_dict()


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in metrics(run) if "loss" in r]
