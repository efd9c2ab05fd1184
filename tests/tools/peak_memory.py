"""Prints the peak memory, in MB, of a process that takes training steps: python peak_memory.py TOKENS [rwkv4|rwkv7]."""

import sys

import torch

from rwkv_train.bptt import chunked_loss
from rwkv_train.config import OptimConfig
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.program import peak_bytes
from rwkv_train.train.optim import make_optimizer


def main(length: int, generation: str = "rwkv4", chunk_len: int = 512, steps: int = 1) -> None:
    torch.manual_seed(0)
    vocab_size = 1024
    rwkv7 = generation == "rwkv7"
    model = RWKV7(RWKV7Config(vocab_size, 256, 4)) if rwkv7 else RWKV4(RWKV4Config(vocab_size, 256, 4))
    model.init_weights().train()
    optimizer, _ = make_optimizer(model, OptimConfig(), steps)
    text = torch.randint(0, vocab_size, (1, length + 1))
    state = None
    for _ in range(steps):
        loss, tokens, state = chunked_loss(model, text[:, :-1], text[:, 1:], state, None, chunk_len)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = state.detach()
    print(peak_bytes() / 2**20)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
