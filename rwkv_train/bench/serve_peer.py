"""The package rwkvserve beside our server: the same weights, on a CPU, under the same load."""

import asyncio
import json
import socket
import sys
import tempfile
from pathlib import Path

import torch

from rwkv_train.bench.measure import installed
from rwkv_train.bench.serve_clients import Client, Load, Reply, serving, talk
from rwkv_train.bench.settings import ServeBench
from rwkv_train.checkpoints.modelfile import save_model
from rwkv_train.checkpoints.opener import Opened, open_model
from rwkv_train.models.rwkv7 import RWKV7
from rwkv_train.program import STARTER

PEER = "rwkvserve"
RARE = "\x00"  # a reply of theirs ends at this token, so nearly never


def load_peer(config: ServeBench) -> tuple[dict[int, list[Load]], str]:
    """({sessions: loads of it}, why there are none). Nothing is measured that has failed altogether."""
    if not installed(PEER):
        return {}, "it is not installed (pip install rwkvserve)"
    opened = open_model(config.model or STARTER, config.tokenizer, None, torch.float32)
    if not isinstance(opened.model, RWKV7):
        return {}, "it reads RWKV-7 alone"
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        _write(opened, folder)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        batch = f"--max-batch-size={max(*config.sessions, 2)}"
        command = [sys.executable, "-m", "rwkvserve.cli.serve", "--model-path=.", "--device=cpu", "--dtype=fp32", batch]
        try:
            with serving([*command, "--host=127.0.0.1", f"--port={port}"], folder, "running on") as address:
                loads = asyncio.run(_load(config, address))
        except ValueError as error:
            return {}, str(error)
    if not any(load.replies for some in loads.values() for load in some):
        return {}, next(why for some in loads.values() for load in some for why in load.failed)
    return loads, ""


async def _load(config: ServeBench, address: tuple[str, int]) -> dict[int, list[Load]]:
    async def turn(client: Client, session: int, count: int, last: Reply | None) -> Reply:
        # Of its two ways to stream only this one sends events, and keeps to a number of tokens.
        said = [{"role": "user", "content": f"Tell me story {session} of {count}."}]
        body = {"model": "rwkv-7", "messages": said, "max_tokens": config.tokens, "temperature": 1.3, "top_p": 1.0}
        return await client.stream("/v1/chat/completions", body)

    await talk(address, 1, turn, asyncio.sleep(0))  # its first reply is slow
    loads: dict[int, list[Load]] = {count: [] for count in config.sessions}
    for _ in range(config.repeats):
        for count, some in loads.items():
            some.append(await talk(address, count, turn, asyncio.sleep(config.seconds)))
    return loads


def _write(opened: Opened, folder: Path) -> None:
    """The model as they read it: weights, sizes, and a vocabulary in lines."""
    sizes, tokenizer = opened.model.config, opened.tokenizer
    save_model(opened.model, folder / "model.pth")
    theirs = {
        "model_type": "rwkv7",
        "n_layer": sizes.n_layer,
        "n_embd": sizes.n_embd,
        "vocab_size": sizes.vocab_size,
        "head_size_a": sizes.head_size,
        "dim_ffn": sizes.n_ffn,
        "dim_att_lora": sizes.rank_w,
        "dim_gate_lora": sizes.rank_g,
        "dim_mv_lora": sizes.rank_v,
    }
    tokens = [(id, tokenizer.decode_bytes([id])) for id in range(1, sizes.vocab_size)]
    lines = [f"{id} {data!r} {len(data)}\n" for id, data in tokens if data]
    (folder / "config.json").write_text(json.dumps(theirs), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": RARE}), encoding="utf-8")
    (folder / "rwkv_vocab_v20230424.txt").write_text("".join(lines), encoding="utf-8")
