"""Flags with which a benchmark takes seconds."""

import json

TOY_GPU = {
    "shapes": ["2x24x16"],
    "models": ["16x2x31:2", "rwkv7-64x2x31:2"],
    "chunk_lens": [8, 16],
    "memory_model": "16x2x31",
    "lengths": [16, 32],
    "generated": 3,
    "copy_mb": 1,
    "square": 32,
    "repeats": 1,
}
TOY = {
    "bench wkv": ["--channels=8", "--tokens=[24,33]", "--dtypes=[fp32,bf16]", "--repeats=2"],
    "bench train": [
        "--sizes=[16x2x31,rwkv7-64x2x31]",
        "--tokens=[24]",
        "--exact-size=16x1",
        "--chunks=3",
        "--chunk-len=8",
    ],
    "bench memory": ["--size=16x2x31", "--lengths=[16]", "--chunk-len=8", "--peers=false", "--lora-size=16x2x31"],
    "bench generate": ["--size=16x2x31", "--tokens=4", "--prompt=6", "--repeats=2"],
    "bench gpu": [f"--{name.replace('_', '-')}={json.dumps(value)}" for name, value in TOY_GPU.items()],
    "bench feedback": [
        "--model=runs/chats",
        "--cases=cases.jsonl",
        "--unrelated=questions.txt",
        "--heldout=book.txt",
        "--counts=[1]",
        "--controls=[]",
        "--seeds=1",
    ],
    "bench serve": [
        "--sessions=[1,3]",
        "--tokens=6",
        "--seconds=0.3",
        "--crowd=4",
        "--turns=2",
        "--crowd-seconds=0.3",
        "--corrections=1",
        "--history=[10,400]",
        "--company=2",
        "--repeats=1",
        "--peers=false",
    ],
}
