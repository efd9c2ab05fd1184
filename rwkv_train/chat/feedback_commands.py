"""Corrections at work: the feedback commands of the chat, and the `feedback` command."""

import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from rwkv_train.chat.terminal import Chat, Command, Setting, data_folder, number, template_of, weights_in
from rwkv_train.checkpoints.modelfile import load_model
from rwkv_train.command_config import FeedbackFileConfig
from rwkv_train.commands import tokenizer_of
from rwkv_train.feedback import Correction, FeedbackConfig, Learner, Outcome, Reading
from rwkv_train.feedback.background import Background, half_the_threads
from rwkv_train.feedback.decode import Form
from rwkv_train.files import BadJSON, counted, parse_json, read_lines, read_text
from rwkv_train.models.base import RWKV


class Teacher:
    """What the feedback commands of one chat share: the learner and its thread.

    wait: answer a command only when it is done, as scripts expect; otherwise at once, and tell the outcome later.
    """

    def __init__(self, chat: Chat, folder: Path, wait: bool):
        self.chat, self.wait = chat, wait
        dialogue = chat.dialogue
        self.learner = Learner(dialogue.model, dialogue.tokenizer, folder, dialogue.template)
        self.background = Background()
        if not wait:
            chat.closing.enter_context(half_the_threads())
            self.background.submit(self._prepare)
        chat.commands |= {name: Command(usage, phrase, run) for name, usage, phrase, run in self._commands()}
        chat.settings |= {f.name: self._setting(f.name, type(f.default)) for f in fields(FeedbackConfig)}
        chat.before_answer.append(self._swap)
        chat.closing.callback(self._close)

    def _commands(self):
        return [
            ("fix", "/fix TEXT", "the last reply should have been TEXT: learn it", self._fix),
            ("teach", "/teach QUESTION => ANSWER", "learn an answer to a question", self._teach),
            ("good", "/good", "the last reply was right: keep it so", self._good),
            ("bad", "/bad", "the last reply was wrong: anything but that", self._bad),
            ("learn", "/learn FILE", "get used to a text, gently", self._read),
            ("undo", "/undo [N]", "forget the last correction, or the last N", self._undo),
            ("history", "/history", "list what was learnt", self._history),
            ("diff", "/diff", "how far the model is from where it began", self._diff),
            ("export", "/export FILE", "write corrections as training data", self._export),
        ]

    def _prepare(self) -> None:
        """Make guards, so that the first correction finds them there; what is wrong with them it will tell."""
        self.chat.status = "getting to know the model"
        with suppress(ValueError, OSError):
            self.learner.guards  # noqa: B018
        self.chat.status = ""

    def _swap(self) -> None:
        """Between replies: go on with the newest weights, on the same transcript."""
        if self.learner.model is not self.chat.dialogue.model:
            self.chat.dialogue.reread(self.learner.model, self.learner.weights[:8])

    def _close(self) -> None:
        self.background.close()
        self.learner.close()

    def _fix(self, chat: Chat, answer: str) -> Iterable[str]:
        last = chat.dialogue.last()
        context = tuple(chat.dialogue.context_of_last())
        return self._learn(Correction(last.user, answer, context, last.reply if last.reply != answer else None))

    def _teach(self, chat: Chat, rest: str) -> Iterable[str]:
        question, arrow, answer = rest.partition("=>")
        if not arrow:
            raise ValueError("write /teach QUESTION => ANSWER")
        return self._learn(Correction(question.strip(), answer.strip()))

    def _good(self, chat: Chat, rest: str) -> Iterable[str]:
        last = chat.dialogue.last()
        return self._learn(Correction(last.user, last.reply, tuple(chat.dialogue.context_of_last())))

    def _bad(self, chat: Chat, rest: str) -> Iterable[str]:
        last = chat.dialogue.last()
        return self._learn(Correction(last.user, None, tuple(chat.dialogue.context_of_last()), last.reply))

    def _read(self, chat: Chat, rest: str) -> Iterable[str]:
        if not rest:
            raise ValueError("write /learn FILE")
        return self._learn(Reading(read_text(rest).replace("\r\n", "\n")))

    def _learn(self, correction: Correction | Reading) -> Iterable[str]:
        number = self.learner.receive(correction)
        yield f"received as correction {number}\n"

        def tick(step: int, loss: float) -> None:
            self.chat.status = f"learning correction {number}: step {step}, loss {loss:.3f}"

        yield from self._run(lambda: told(self.learner.commit(number, tick)))

    def _undo(self, chat: Chat, rest: str) -> Iterable[str]:
        count = int(rest) if rest.isdigit() else 1
        return self._run(lambda: f"forgot {', '.join(map(str, self.learner.undo(count)))}; the weights are as before")

    def _history(self, chat: Chat, rest: str) -> Iterable[str]:
        return ["\n".join(_line(r) for r in self.learner.active()) or "nothing was learnt yet"]

    def _diff(self, chat: Chat, rest: str) -> Iterable[str]:
        changes = [f"{name:<32}changed by {share:.2%}" for name, share in self.learner.diff().items()]
        last = chat.dialogue.turns[-1].version if chat.dialogue.turns else None
        spoken = f", the last reply is by version {last}" if last else ""
        count = len(self.learner.active())
        return ["\n".join([f"version {self.learner.weights[:8]}, {count} corrections{spoken}", *changes])]

    def _setting(self, name: str, kind: type) -> Setting:
        def change(value: str) -> None:
            self.learner.configure(**{name: number(value, kind) if kind is not str else value})

        return Setting(lambda: getattr(self.learner.config, name), change)

    def _export(self, chat: Chat, rest: str) -> Iterable[str]:
        if not rest:
            raise ValueError("write /export FILE")
        return [f"wrote {self.learner.export(rest)} corrections to {rest}, preferences to {rest}.pairs.jsonl"]

    def _run(self, job) -> Iterable[str]:
        """Do a job in the background; its result is the answer, or is told when it is there."""
        results = []

        def work():
            try:
                results.append(job())
            except (ValueError, OSError) as error:
                results.append(str(error))
            self.chat.status = ""
            if not self.wait:
                self.chat.tell(results[0])

        self.background.submit(work)
        if self.wait:
            self.background.wait()
            self._swap()
            return results
        return ["learning; go on"]


def told(o: Outcome) -> str:
    """An outcome in two or three lines."""
    scaled = f", {o.share:.0%} of the change: more would have moved too much else" if o.share < 1 else ""
    verdict = f"learnt{scaled}" if o.accepted else f"not learnt, nothing was changed: {o.why}"
    lines = [
        f"{o.id}: {verdict} ({o.steps} steps, {o.seconds:.1f} s)",
        f"loss {o.loss_before:.3f} -> {o.loss_after:.3f}, drift elsewhere {o.drift:.4f} nats a token",
    ]
    if o.wordings:
        lines.append(f"also asked as: {' | '.join(o.wordings)}")
    if o.answer_after:
        lines += [f"before: {o.answer_before}", f"after:  {o.answer_after}"]
    return "\n".join(lines)


def _line(record: dict) -> str:
    if "text" in record:
        return f"{record['id']}: read {' '.join(record['text'].split())[:60]} ..."
    answer = record["answer"] or f"anything but: {record['rejected']}"
    return f"{record['id']}: {record['question']} => {answer}"


def profile_folder(folder: Path, profile: str | None, model: str | Path) -> Path:
    """Where corrections are kept: under the profile's name, or the model's."""
    path = Path(model).expanduser().resolve()
    return folder / "profiles" / (profile or (path.parent.name if path.stem == "model" else path.stem))


def open_model(model: str | Path, tokenizer: str | None, template: str | None) -> tuple[RWKV, Form]:
    """A model in float32, and how questions are written for it."""
    path = weights_in(model)
    found = load_model(path, dtype=torch.float32)
    return found, Form(tokenizer_of(str(path), tokenizer, found.config.vocab_size), template_of(path, template))


def feedback(config: FeedbackFileConfig) -> int:
    """Learn a file of corrections, one after another, and print what became of each."""
    ignored: Counter[str] = Counter()
    corrections = {n: _correction(f"{config.file}:{n}", line, ignored) for n, line in read_lines(config.file)}
    if not corrections:
        raise ValueError(f"{config.file} holds no correction; put one on each line")
    if ignored:
        print(f"not used: {counted(ignored, 'correction')}", file=sys.stderr)
    model, form = open_model(config.model, config.tokenizer, config.template)
    folder = profile_folder(data_folder(config.folder), config.profile, config.model)
    with Learner(model, form.tokenizer, folder, form.template) as learner:
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
