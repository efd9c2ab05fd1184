"""Kill a run at random moments, resume it each time, and see that nothing changed.

    python tests/tools/kill_fit.py [KILLS]

The run has dropout, accumulation, validations and checkpoints every other step. In the end its weights and the losses
of all its steps are those of the run that was left alone.
"""

import multiprocessing
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from runs import config_of, losses_of, store_in, weights
from tqdm import tqdm

from rwkv_train.config import FitConfig, TrainConfig
from rwkv_train.train.fit import fit

LONGEST = 2.5  # seconds to the kill, some of which a start takes


def config(folder: Path, name: str, steps: int) -> FitConfig:
    train = TrainConfig(
        steps=steps, accumulate=2, val_every=10, save_every=2, keep_best=1, log_every=1, device="cpu", save_async=True
    )
    return replace(config_of(folder / "store", folder, train=train), name=name)


def work(config: FitConfig, resume: str | None) -> None:
    torch.set_num_threads(1)
    fit(config, resume)


def kill(folder: Path, kills: int, steps: int, seed: int = 0) -> int:
    """The number of kills it took: a run that is done before the last one is not begun again."""
    fork, rng = multiprocessing.get_context("forkserver"), random.Random(seed)
    fork.set_forkserver_preload(["kill_fit"])
    quiet = config(folder, "quiet", steps)
    alone = fork.Process(target=work, args=(quiet, None))
    alone.start()
    alone.join()
    assert alone.exitcode == 0
    done, hurt = 0, replace(quiet, name="killed")
    for n in tqdm(range(kills + 1), unit="kill"):
        child = fork.Process(target=work, args=(hurt, "newest" if (folder / "killed").is_dir() else None))
        child.start()
        child.join(rng.uniform(0, LONGEST) if n < kills else None)
        if child.is_alive():
            child.kill()
            child.join()
            done += 1
        else:
            assert child.exitcode == 0, child.exitcode
            break
    ours, theirs = weights(folder / "killed"), weights(folder / "quiet")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert losses_of(folder / "killed") == losses_of(folder / "quiet")
    return done


if __name__ == "__main__":
    kills = int((sys.argv[1:] or ["50"])[0])
    with tempfile.TemporaryDirectory() as folder:
        store_in(Path(folder) / "store")
        done = kill(Path(folder), kills, steps=30 * kills)
    print(f"killed at {done} random moments: weights and losses identical to those of the run left alone")
