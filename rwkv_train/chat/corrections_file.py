"""The `feedback` command: a file of corrections, learnt one after another."""

import sys
from collections import Counter

import torch
from tqdm import tqdm

from rwkv_train.chat.opening import data_folder, profile_folder
from rwkv_train.checkpoints.opener import open_model
from rwkv_train.command_config import FeedbackFileConfig
from rwkv_train.feedback import Correction, Learner, Outcome
from rwkv_train.feedback.background import in_a_line
from rwkv_train.files import BadJSON, counted, parse_json, read_lines


def feedback(config: FeedbackFileConfig) -> int:
    """Learn a file of corrections, one after another, and print what became of each."""
    ignored: Counter[str] = Counter()
    corrections = {n: _correction(f"{config.file}:{n}", line, ignored) for n, line in read_lines(config.file)}
    if not corrections:
        raise ValueError(f"{config.file} holds no correction; put one on each line")
    if ignored:
        print(f"not used: {counted(ignored, 'correction')}", file=sys.stderr)
    model, tokenizer, template = open_model(config.model, config.tokenizer, config.template, torch.float32)
    folder = profile_folder(data_folder(config.folder), config.profile, config.model)
    with Learner(model, tokenizer, folder, template, recover=False) as learner:
        for n, correction in corrections.items():  # all of them, before any is learnt
            try:
                learner.check(correction)
            except ValueError as error:
                raise ValueError(f"{config.file}:{n}: {error}") from None
        left = [record["id"] for record in learner.waiting()]  # by a crash, or by a chat that was killed
        if left:
            print(f"received before and not learnt yet, so learnt first: {', '.join(map(str, left))}", file=sys.stderr)
        found = {number: _commit(learner, number) for number in left}
        for correction in tqdm(corrections.values(), desc="feedback", unit="correction", leave=False):
            number = learner.receive(correction)
            found[number] = _commit(learner, number)
    print(f"{'':>4}  {'loss':>15}  {'steps':>5}  {'s':>5}  {'drift':>7}  answer")
    print("\n".join(_row(number, outcome) for number, outcome in found.items()))
    learned = sum(isinstance(o, Outcome) and o.accepted for o in found.values())
    print(f"\n{learned} of {len(found)} learnt; kept in {folder}")
    return 0 if learned == len(found) else 1


def _commit(learner: Learner, number: int) -> Outcome | str:
    """What became of a correction, or what went wrong, which keeps no other from being learnt."""
    try:
        return learner.commit(number)
    except Exception as error:
        return in_a_line(error)


def _row(number: int, o: Outcome | str) -> str:
    if isinstance(o, str):
        return f"{number:>4}  {'':>15}  {'':>5}  {'':>5}  {'':>7}  not learnt: {o}"
    losses = f"{o.loss_before:.3f} -> {o.loss_after:.3f}"
    mark = o.answer_after if o.accepted else f"not learnt: {o.why}"
    return f"{number:>4}  {losses:>15}  {o.steps:>5}  {o.seconds:>5.1f}  {o.drift:>7.4f}  {mark}"


def _correction(where: str, line: str, ignored: Counter[str]) -> Correction:
    """The correction that a line is; the fields that corrections do not have are counted in `ignored`."""
    try:
        found = parse_json(line)
    except BadJSON as error:
        raise ValueError(f"{where}: {error}; put one correction on each line") from None
    parts = [found.pop(name, None) for name in ("question", "answer")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f'{where}: expected {{"question": ..., "answer": ...}}, both of them text')
    ignored.update(name for name, value in found.items() if value is not None)
    return Correction(*parts)
