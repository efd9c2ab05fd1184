"""`bench feedback`: the protocol on a model and cases, with its controls, beside its targets."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from rwkv_train.bench.case_sets import CaseSet, case_set
from rwkv_train.bench.correction_cases import chosen_cases
from rwkv_train.bench.correction_measures import Marks, by_group, figures, summary
from rwkv_train.bench.correction_tables import LESS_IS_BETTER, Results, kinds_table, line, plot, table
from rwkv_train.bench.corrections import CONTROLS, Protocol, Tick
from rwkv_train.bench.fact_cases import small_talk, strangers_questions, strangers_talk
from rwkv_train.bench.joint import learnt_together
from rwkv_train.bench.measure import installed, write_json
from rwkv_train.bench.settings import FeedbackBench
from rwkv_train.chat.session import number
from rwkv_train.checkpoints.opener import open_model
from rwkv_train.feedback import FeedbackConfig
from rwkv_train.feedback.decode import Form
from rwkv_train.feedback.settings import RENAMED
from rwkv_train.files import read_lines, read_text
from rwkv_train.program import STARTER

JOINT = "joint"
PARTS = 10  # of all that must not change, one for each of many single corrections


def feedback(config: FeedbackBench) -> None:
    """Run the protocol on a model and cases, with its controls, and print the tables beside their targets."""
    _check(config)
    found, recipe = case_set(config.cases), chosen_recipe(config.recipe)
    found = replace(found, cases=chosen_cases(found.cases, config.kinds, config.limit))
    counts = _counts(config.counts, found.counts, len(found.cases), "counts")
    controls = _counts(config.controls, found.control_counts, len(found.cases), "controls")
    if not counts and not controls:
        raise ValueError("counts and controls are empty, so nothing would be measured; give one of them a number")
    if config.also and not any(case.paraphrases for case in found.cases):
        raise ValueError("also gives the first paraphrase of each case, and no case has any; leave it out")
    unrelated = [text for _, text in read_lines(config.unrelated)] if config.unrelated else small_talk()
    unread = [] if config.unrelated else strangers_questions()
    heldout = [[(read_text(config.heldout), True)]] if config.heldout else strangers_talk()
    model, *form = open_model(config.model or STARTER, config.tokenizer, config.template, torch.float32)
    protocol = Protocol(model, Form(*form), found.cases, unrelated, heldout, config.also, config.before, unread)
    if known := protocol.known():
        _tell(f"{len(known)} of {len(found.cases)} cases are answered right before anything is learnt")
    ways = {"": (partial(corrected, protocol, found, recipe), counts)}
    for name in found.controls if controls else []:
        worse = partial(corrected, protocol, found, replace(recipe, **CONTROLS.get(name, {})))
        ways[f"{name}, "] = (partial(together, protocol, recipe) if name == JOINT else worse, controls)
    runs = Runs(found, config)
    total = config.seeds * sum(_corrections(found, some) for _, some in ways.values())
    with tqdm(total=total, desc="bench feedback", unit="correction", file=sys.stderr) as bar:
        for name, (way, some) in ways.items():
            for seed in range(config.seeds):
                for count, marks in way(some, seed, bar.update):
                    runs.add(f"{name}N={count}", seed, marks)
    serving = protocol.serving(recipe) if found.draws else {}
    runs.write(serving)
    print(runs.tables())
    if serving:
        print("", *(f"{name}: {value:.2f}" for name, value in serving.items()), sep="\n")
    if config.plot:
        plot(runs.results(), config.plot, found.targets)


def corrected(
    protocol: Protocol, found: CaseSet, recipe: FeedbackConfig, counts: list[int], seed: int, tick: Tick
) -> Iterator[tuple[int, list[Marks]]]:
    """(number, measures) of corrections one after another; one means single ones, each learnt by the base."""
    if 1 in counts and found.draws:
        draws = range(seed * found.draws, (seed + 1) * found.draws)
        yield 1, protocol.alone(recipe, [(protocol.drawn(draw, 1)[0], draw) for draw in draws], tick)
    elif 1 in counts:
        drawn = [(case, seed * len(found.cases) + i) for i, case in enumerate(found.cases)]
        yield 1, protocol.alone(recipe, drawn, tick, min(PARTS, len(drawn)))
    if several := [count for count in counts if count > 1]:
        yield from protocol.stream(recipe, several, seed, tick)


def together(
    protocol: Protocol, recipe: FeedbackConfig, counts: list[int], seed: int, tick: Tick
) -> Iterator[tuple[int, list[Marks]]]:
    """(number, measures) of corrections that are all learnt together."""
    for count in counts:
        cases = protocol.drawn(seed, count)
        yield count, protocol.after(learnt_together(protocol, recipe, cases, seed, tick), cases)


class Runs:
    """What was measured so far; written and told as it comes."""

    def __init__(self, found: CaseSet, config: FeedbackBench):
        self.found, self.config = found, config
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.kinds: dict[str, dict[str, list[dict[str, float]]]] = {}
        if config.answers:
            Path(config.answers).write_text("", encoding="utf-8")
        self.write()  # what cannot be written is told before anything is measured

    def add(self, column: str, seed: int, marks: list[Marks]) -> None:
        self.runs.setdefault(column, []).append(figures(marks))
        for kind, found in by_group(marks, self.found.cases).items():
            self.kinds.setdefault(column, {}).setdefault(kind, []).append(found)
        _tell(f"{column}, seed {seed}: {line(summary(self.runs[column][-1:], LESS_IS_BETTER), self.found.targets)}")
        self.write()
        if self.config.answers:
            with open(self.config.answers, "a", encoding="utf-8") as file:
                for mark in marks:
                    if mark.case:
                        found = {"column": column, "seed": seed, **asdict(mark)}
                        file.write(json.dumps(found, ensure_ascii=False) + "\n")

    def results(self) -> Results:
        return {column: summary(runs, LESS_IS_BETTER) for column, runs in self.runs.items()}

    def by_kind(self) -> dict[str, Results]:
        return {
            column: {kind: summary(runs, LESS_IS_BETTER) for kind, runs in kinds.items()}
            for column, kinds in self.kinds.items()
        }

    def tables(self) -> str:
        tables = [table(self.results(), self.found.targets), kinds_table(self.by_kind()) if self.kinds else ""]
        return "\n\n".join(filter(None, tables))

    def write(self, serving: dict[str, float] | None = None) -> None:
        """The figures so far, where they are asked for."""
        found = {"recipes": self.results(), "kinds": self.by_kind(), "serving": serving or {}}
        write_json(self.config.json, "feedback", self.config, found)


def chosen_recipe(text: str | None) -> FeedbackConfig:
    """A recipe by what differs from the usual one: NAME=VALUE,NAME=VALUE."""
    kinds, changes = {f.name: f.type for f in fields(FeedbackConfig)}, {}
    for part in text.split(",") if text else []:
        name, _, value = part.strip().partition("=")
        if not value:
            raise ValueError(f"--recipe {part!r} sets nothing; write NAME=VALUE")
        if name in changes:
            raise ValueError(f"--recipe sets {name} twice; give it once")
        kind = kinds.get(RENAMED.get(name, name))
        changes[name] = number(value, kind) if kind in (int, float) else value
    return FeedbackConfig(**changes)


def _check(config: FeedbackBench) -> None:
    """Raises ValueError for what would fail, or mean nothing, after all was measured."""
    if config.before < 0:
        raise ValueError(f"before must not be negative, found {config.before}")
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, found {config.seeds}")
    if config.plot and not (Path(config.plot).suffix in (".svg", ".png") and Path(config.plot).parent.is_dir()):
        raise ValueError(f"--plot {config.plot} cannot be drawn; name a .svg or .png in a folder that is there")
    if config.plot and not installed("matplotlib"):
        raise ValueError('--plot needs matplotlib: pip install "rwkv_train[plots]"')
    if config.heldout is not None and not read_text(config.heldout).strip():
        raise ValueError(f"{config.heldout} is empty, so no perplexity can be measured on it; name a text")


def _counts(chosen: list[int] | None, usual: list[int], cases: int, name: str) -> list[int]:
    """Numbers of corrections: those that were chosen, or the usual ones that there are cases for."""
    if chosen is None:
        if more := [count for count in usual if count > cases]:
            _tell(f"there are {cases} cases, fewer than {', '.join(map(str, more))}: these {name} are left out")
        return [count for count in usual if count <= cases]
    if wrong := [count for count in chosen if not 1 <= count <= cases]:
        raise ValueError(f"{name} must be from 1 to {cases}, as there are so many cases; found {wrong[0]}")
    return sorted(set(chosen))


def _corrections(found: CaseSet, counts: list[int]) -> int:
    """How many corrections are learnt for some numbers of them."""
    return (1 in counts) * (found.draws or len(found.cases)) + max([n for n in counts if n > 1], default=0)


def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
