"""`bench generate`: tokens a second, one by one, beside the package rwkv and transformers."""

import importlib
import io
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.bench.limits import matrix_vectors
from rwkv_train.bench.measure import Times, about, agreement, installed, machine, race, table, target, write_json
from rwkv_train.bench.models import in_transformers, plain_recurrence, random_model, random_text, size_of
from rwkv_train.bench.settings import GenerateBench
from rwkv_train.checkpoints.modelfile import save_model
from rwkv_train.generate import Sampling, prefill, random_numbers
from rwkv_train.generation.decoder import Decoder
from rwkv_train.models.base import RWKV
from rwkv_train.models.rwkv4 import RWKV4

ALLOWED = 1e-3  # relative error of the logits along the prompt, fp32
OVER_PEER = 1.3
OVER_ONE = 6.0  # of many lanes together
PEER = "package rwkv"

Step = Callable[[int, object], tuple[Tensor, object]]  # (token, state or None) -> (logits [V], state)


def generate(config: GenerateBench) -> int:
    """Print tokens a second; 1 if ours do not agree with the specification, or fail."""
    print(about(machine()) + "\n")
    model = random_model(size_of(config.size)).eval()
    contestants = {"ours": lambda token, state: prefill(model, [token], state)}
    if config.peers and installed("rwkv"):
        contestants[PEER] = _made(_rwkv_package, model)
    if config.peers and installed("transformers") and isinstance(model, RWKV4):
        contestants["transformers"] = _made(_transformers, model)
    with torch.inference_mode():
        prompt = random_text(model.config, 1, config.prompt)[0][0].tolist()
        expected = {"logits": _reference(model, prompt)}
        checked = {
            who: agreement(lambda step=step: {"logits": _read(step, prompt)[0]}, expected, ALLOWED)
            for who, step in contestants.items()
        }
        calls = {w: _generation(step, prompt, config.tokens) for w, step in contestants.items() if checked[w].near}
        many = {f"ours, {config.lanes} side by side": Sampling(0)}
        many |= {f"{who}, with sampling": Sampling(0.8, 0.5) for who in many}
        counts = dict.fromkeys(many, config.lanes * config.tokens)  # of a repeat; of others config.tokens
        if checked["ours"].near:
            calls["ours"] = _decoding(model, prompt, Sampling(0), 1, config.tokens)
            calls["ours, with sampling"] = _decoding(model, prompt, Sampling(0.8, 0.5), 1, config.tokens)
            for who, sampling in many.items():
                calls[who] = _decoding(model, prompt, sampling, config.lanes, config.tokens)
        calls["bare matrix-vector products"] = _repeated(matrix_vectors(model), config.tokens)
        failed: dict[str, str] = {}
        timed = race(calls, config.repeats, "cpu", config.budget, failed=failed)
    rows = []
    for who in dict.fromkeys([*checked, *timed, *failed]):
        row = {"who": who, "error": str(checked.get(who, "-"))}
        row["tokens/s"] = f"failed: {failed[who]}" if who in failed else "refused"
        if who in timed:
            count = counts.get(who, config.tokens)
            row |= {"tokens/s": timed[who].rate(count), "a token": timed[who].shown(count)}
        rows.append(row)
    print(table(rows))
    ratios = _ratios(config, timed, next(iter(many)))
    if ratios:
        print("\n" + table(ratios))
    write_json(config.json, "generate", config, {"rows": rows, "times": timed, "ratios": ratios})
    return int(not checked["ours"].good or any(who.startswith("ours") for who in failed))


def _ratios(config: GenerateBench, timed: Mapping[str, Times], many: str) -> list[dict[str, str]]:
    """How many tokens ours writes for one of the peer's, and lanes together for one of a lane alone."""
    ratios = []
    if PEER in timed and "ours" in timed:
        wanted = OVER_PEER if config.size == "169M" else None
        ratio = timed[PEER].median / timed["ours"].median
        ratios.append(target(f"{config.size}: tokens/s over the {PEER}, fp32", ratio, wanted, more=True))
    if many in timed and "ours" in timed:
        wanted = OVER_ONE if config.lanes == 16 and config.size.endswith("169M") else None
        ratio = config.lanes * timed["ours"].median / timed[many].median
        ratios.append(target(f"{config.size}: tokens/s of {config.lanes} lanes over one", ratio, wanted, more=True))
    return ratios


def _made(make: Callable[[RWKV], Step], model: RWKV) -> Step:
    """A peer's step. Where the peer cannot be made, one that fails for the same reason, which is then told."""
    try:
        return make(model)
    except Exception as error:  # of another version of it, whatever that may be
        reason = error

    def step(token: int, state: object) -> tuple[Tensor, object]:
        raise reason

    return step


def _reference(model: RWKV, prompt: list[int]) -> Tensor:
    """Logits [V] after the prompt in float64, by the specification."""
    with plain_recurrence():
        return deepcopy(model).double()(torch.tensor([prompt]))[0][0, -1]


def _read(step: Step, tokens: list[int]) -> tuple[Tensor, object]:
    """Read tokens one by one: (logits [V] after them, state)."""
    logits = state = None
    for token in tokens:
        logits, state = step(token, state)
    return logits, state


def _generation(step: Step, prompt: list[int], count: int) -> Callable[[], None]:
    """`count` times the likeliest token, from the state after the prompt."""
    kept: list = []

    def run() -> None:
        if not kept:
            kept.extend(_read(step, prompt))
        logits, state = kept
        state = [s.clone() for s in state] if isinstance(state, list) else state  # theirs are written to
        for _ in range(count):
            logits, state = step(int(logits.argmax()), state)

    return run


def _decoding(model: RWKV, prompt: list[int], sampling: Sampling, lanes: int, count: int) -> Callable[[], None]:
    """`count` tokens of each of some lanes, as the chat and `generate` write them."""

    def run() -> None:
        decoder = Decoder(model)
        for seed in range(lanes):
            decoder.go_on(*start, sampling, random_numbers(seed), max_new_tokens=count)
        while len(decoder):
            decoder.step()

    start = prefill(model, prompt)
    return run


def _repeated(call: Callable[[], None], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def _rwkv_package(model: RWKV) -> Step:
    """The PyPI package, as it comes (with torch.jit), on the same weights."""
    v7 = "0" if isinstance(model, RWKV4) else "1"
    os.environ |= {"RWKV_V7_ON": v7, "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}  # it reads them when imported
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        package = importlib.import_module("rwkv.model")
        save_model(model, Path(folder) / "m.pth")
        theirs = package.RWKV(model=str(Path(folder) / "m"), strategy="cpu fp32")
    return lambda token, state: theirs.forward([token], state)


def _transformers(model: RWKV4) -> Step:
    theirs = in_transformers(model).eval()

    def step(token: int, state: object) -> tuple[Tensor, object]:
        out = theirs(torch.tensor([[token]]), state=state, use_cache=True)
        return out.logits[0, -1], out.state

    return step
