"""`bench feedback`: the protocol on a model and cases, with its controls, beside its targets."""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from rwkv_train.bench.correction_cases import fact_cases, small_talk, strangers_talk
from rwkv_train.bench.corrections import CONTROLS, SINGLES, Protocol, load_cases, plot, summary, table
from rwkv_train.bench.measure import about, machine
from rwkv_train.bench.settings import FeedbackBench
from rwkv_train.checkpoints.opener import open_model
from rwkv_train.feedback import FeedbackConfig
from rwkv_train.feedback.decode import Form
from rwkv_train.files import read_lines, read_text
from rwkv_train.program import STARTER


def feedback(config: FeedbackBench) -> None:
    """Run the protocol on a model and cases, with its controls, and print the table beside its targets."""
    cases = load_cases(config.cases) if config.cases else fact_cases()
    unrelated = [line for _, line in read_lines(config.unrelated)] if config.unrelated else small_talk()
    heldout = [[(read_text(config.heldout), True)]] if config.heldout else strangers_talk()
    model, *form = open_model(config.model or STARTER, config.tokenizer, config.template, torch.float32)
    protocol = Protocol(model, Form(*form), cases, unrelated, heldout)
    columns = {f"N={n}": (FeedbackConfig(), n) for n in config.counts}
    columns |= {f"{name}, N={n}": (FeedbackConfig(**c), n) for name, c in CONTROLS.items() for n in config.controls}
    # A run of one correction says little: more of them.
    singles = {name: SINGLES if count == 1 else 1 for name, (_, count) in columns.items()}
    results: dict[str, dict] = {}
    total = config.seeds * sum(count * singles[name] for name, (_, count) in columns.items())
    with tqdm(total=total, desc="bench feedback", unit="correction", file=sys.stderr) as bar:
        for name, (recipe, count) in columns.items():
            runs = []
            for seed in range(config.seeds):
                draws = range(seed * singles[name], (seed + 1) * singles[name])
                several = [protocol.run(recipe, count, draw, tick=bar.update) for draw in draws]
                runs.append({key: found["mean"] for key, found in summary(several).items()})
            results[name] = summary(runs)
            print(table({name: results[name]}), file=sys.stderr)
    serving = protocol.serving(FeedbackConfig())
    print(table(results) + "\n")
    print("\n".join(f"{name}: {value:.2f}" for name, value in serving.items()))
    if config.json:
        found = {"recipes": results, "serving": serving, "measured_on": about(machine())}
        Path(config.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if config.plot:
        plot(results, config.plot)
