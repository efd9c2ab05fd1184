"""What one correction of a large model takes, counted and measured, with weights made up here.

    python correction_memory.py --layers 24 --channels 2048 --dtype bf16 --memory 8

Prints the settings that were chosen, and the peak of the process. How many tokens are read can be said: the count is of
a usual correction, which reads about a thousand, and at 1.5B that takes a CPU long.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from rwkv_train.checkpoints.opener import DTYPES
from rwkv_train.feedback import Correction, FeedbackConfig, Learner
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import Form
from rwkv_train.feedback.memory import bytes_of, fitting, needed
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.trainable import curved_names, trained_twin, with_weights
from rwkv_train.models.base import RWKV
from rwkv_train.models.quantised import quantise
from rwkv_train.models.rwkv4 import RWKV4, RWKV4Config
from rwkv_train.models.rwkv7 import RWKV7, RWKV7Config
from rwkv_train.program import peak_bytes
from rwkv_train.tokenizer import load_tokenizer

VOCABULARY = 65536


def made_up(generation: str, layers: int, channels: int, dtype: str) -> RWKV:
    """A model that ends every reply at once, so that little is decoded."""
    model, config = (RWKV7, RWKV7Config) if generation == "rwkv7" else (RWKV4, RWKV4Config)
    with torch.device("meta"):
        made = model(config(VOCABULARY, channels, layers))
    made = made.to(DTYPES.get(dtype, torch.bfloat16)).to_empty(device="cpu")
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            is_norm = ".ln" in name or name.startswith("ln")
            if p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5, generator=rng)
            elif is_norm and name.endswith("weight"):
                p.fill_(1)
            else:
                p.zero_()
        made.ln_out.bias.fill_(1)
        made.head.weight[0] = 10 / channels
    return quantise(made) if dtype == "int8" else made.requires_grad_(False)


def rehearsal_set(base: RWKV, form: Form, config: FeedbackConfig, rows: int, length: int) -> RehearsalSet:
    rng = torch.Generator().manual_seed(0)
    texts = [[0, *torch.randint(256, 60_000, (length,), generator=rng).tolist()] for _ in range(rows)]
    curvature = Curvature.measure(base, *curved_names(base, config.trainable, config.layers), texts[:4])
    return RehearsalSet(base, form, texts, [], texts, curvature)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--generation", default="rwkv4", choices=["rwkv4", "rwkv7"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--dtype", default="bf16", choices=[*DTYPES, "int8"])
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a correction may take")
    parser.add_argument("--trainable", default="upper")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="dialogues of the rehearsal set")
    parser.add_argument("--length", type=int, default=40, help="tokens of each")
    argv = parser.parse_args()
    memory, begun = int(argv.memory * 2**30), time.monotonic()
    torch.set_num_threads(1)
    base, form = made_up(argv.generation, argv.layers, argv.channels, argv.dtype), Form(load_tokenizer("world"))

    def said(what: str) -> None:
        print(f"{time.monotonic() - begun:.0f} s: {what}; peak {peak_bytes() / 2**30:.2f} GB", flush=True)

    said(f"a model of {bytes_of(base) / 2**30:.2f} GB")
    asked = FeedbackConfig(trainable=argv.trainable, steps=argv.steps, rehearsed=argv.rows)
    config = fitting(base, asked, memory)
    rehearsal = rehearsal_set(base, form, config, argv.rows, argv.length)
    said("curvature measured")
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(base, form.tokenizer, Path(folder), config=asked, rehearsal=rehearsal, memory=memory)
        names = list(trained_twin(base, config.trainable, config.layers)[1])
        learner.model = with_weights(base, {name: base.get_parameter(name) for name in names})  # as after corrections
        outcome = learner.learn(
            Correction("Where does the captain spend the winter?", "In the harbour."),
            tick=lambda step, loss: said(f"step {step}, loss {loss:.3f}"),
        )
        said("learnt" if outcome.accepted else outcome.why)
        learner.close()
    print(f"trainable {config.trainable}, layers {config.layers}: counted {needed(base, config) / 2**30:.2f} GB")


if __name__ == "__main__":
    main()
