"""The `feedback` command: a file of corrections, or those of another profile, learnt one after another."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

from tqdm import tqdm

from rwkv_train.chat.corrections_read import Taught, of_profile, taught_by
from rwkv_train.chat.opening import data_folder, open_profile
from rwkv_train.chat.sleeping import told_slept
from rwkv_train.checkpoints.opener import open_for
from rwkv_train.command_config import FeedbackFileConfig
from rwkv_train.feedback import Correction, Learner, Reading
from rwkv_train.feedback.background import in_a_line
from rwkv_train.feedback.extent import check_differs
from rwkv_train.files import counted, read_lines


def feedback(config: FeedbackFileConfig) -> int:
    """Learn a file of corrections, one after another, and print what became of each; or all corrections together."""
    if not (config.file or config.sleep):
        raise ValueError("there is nothing to do; give --file to learn corrections, or --sleep to learn all together")
    file = Path(config.file).expanduser() if config.file else None
    taught = _read(file) if file else []
    opened = open_for(config, config.model)
    folder = data_folder(config.folder)
    with open_profile(opened, folder, config.profile, config.model, config.memory) as learner:
        if file and file.resolve() in (learner.folder.resolve(), learner.journal.path.resolve()):
            raise ValueError(f"{config.file} is what is to learn from it; name another --profile")
        items = [_checked(one, learner) for one in taught]  # all of them, before any is learnt
        left = [record["id"] for record in learner.waiting()]  # by a crash, or by a chat that was killed
        if left:
            print(f"received before and not learnt yet, so learnt first: {', '.join(map(str, left))}", file=sys.stderr)
        learned, count = 0, len(left) + len(items)
        if count:
            print(f"{'':>4}  {'loss':>15}  {'steps':>5}  {'s':>5}  {'drift':>7}  answer", flush=True)
        numbers = chain(left, _received(taught, items, learner))
        for number in tqdm(numbers, "feedback", count, unit="correction", leave=False, disable=not count):
            accepted, row = _learnt(learner, number)
            learned += accepted
            tqdm.write(row)
            sys.stdout.flush()
        if count:
            print(f"\n{learned} of {count} learnt; kept in {learner.folder}")
        if config.sleep:
            print(told_slept(learner.sleep()))
    return 0 if learned == count else 1


def _read(path: Path) -> list[Taught]:
    """The corrections in a file or a profile. ValueError for what is none."""
    if path.is_dir() or path.name == "journal.jsonl":
        left_out, taught = of_profile(path if path.is_dir() else path.parent)
    else:
        ignored: Counter[str] = Counter()
        taught = [one for n, line in read_lines(path) for one in taught_by(f"{path}:{n}", line, ignored)]
        left_out = f"not used: {counted(ignored, 'correction')}" if ignored else ""
    if not taught:
        raise ValueError(f"{path} holds no correction; put one on each line")
    if left_out:
        print(left_out, file=sys.stderr)
    return taught


def _checked(one: Taught, learner: Learner) -> Correction | Reading:
    """What is to be learnt, in its dialogue. Raises ValueError if it cannot be."""
    try:
        item = one.item
        if one.before:
            item = replace(item, context=tuple(learner.form.dialogue(one.before)))
        if one.of:
            check_differs(item.question, one.of.item.question)
        learner.check(item)
        return item
    except ValueError as error:
        raise ValueError(f"{one.where}: {error}") from None


def _received(taught: list[Taught], items: list[Correction | Reading], learner: Learner) -> Iterator[int]:
    """The numbers of corrections when it is their turn; with each, all that stands behind it is on the disk by then."""
    numbers: dict[int, int] = {}
    waiting: list[int] = []
    for one, item, following in zip_longest(taught, items, taught[1:]):
        if one.of:
            item = replace(item, of=numbers[id(one.of)], answer=None if item.keeps else item.answer)
        numbers[id(one)] = learner.receive(item)
        waiting.append(numbers[id(one)])
        if following is None or following.of is not (one.of or one):
            yield from waiting
            waiting = []


def _learnt(learner: Learner, number: int) -> tuple[bool, str]:
    """(whether a correction was learnt, its row). What goes wrong keeps no other one from being learnt."""
    record = learner.journal.records[number - 1]
    what = f"{'not' if record['keeps'] else 'also'} {record['question']} => " if record.get("of") else ""
    try:
        o = learner.commit(number)
    except Exception as error:
        return False, f"{number:>4}  {'':>15}  {'':>5}  {'':>5}  {'':>7}  {what}not learnt: {in_a_line(error)}"
    losses = f"{o.loss_before:.3f} -> {o.loss_after:.3f}"
    answer = o.answer_after if o.accepted else f"not learnt: {o.why}"
    note = f" ({o.note})" if o.note else ""
    row = f"{number:>4}  {losses:>15}  {o.steps:>5}  {o.seconds:>5.1f}  {o.drift:>7.4f}  {what}{answer}{note}"
    return o.accepted, row
