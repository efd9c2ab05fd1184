"""The `feedback` command: a file of corrections, learnt one after another."""

import sys
from collections import Counter

import torch
from tqdm import tqdm

from rwkv_train.chat.opening import data_folder, profile_folder
from rwkv_train.checkpoints.opener import open_model
from rwkv_train.command_config import FeedbackFileConfig
from rwkv_train.feedback import Correction, Learner
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
    with Learner(model, tokenizer, folder, template) as learner:
        for n, correction in corrections.items():  # all of them, before any is learnt
            try:
                learner.check(correction)
            except ValueError as error:
                raise ValueError(f"{config.file}:{n}: {error}") from None
        bar = tqdm(corrections.values(), desc="feedback", unit="correction", leave=False)
        outcomes = [learner.learn(correction) for correction in bar]
    print(f"{'':>4}  {'loss':>15}  {'steps':>5}  {'s':>5}  {'drift':>7}  answer")
    for o in outcomes:
        losses = f"{o.loss_before:.3f} -> {o.loss_after:.3f}"
        mark = o.answer_after if o.accepted else f"not learnt: {o.why}"
        print(f"{o.id:>4}  {losses:>15}  {o.steps:>5}  {o.seconds:>5.1f}  {o.drift:>7.4f}  {mark}")
    learned = sum(o.accepted for o in outcomes)
    print(f"\n{learned} of {len(outcomes)} learnt; kept in {folder}")
    return 0 if learned == len(outcomes) else 1


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
