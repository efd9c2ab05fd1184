"""Corrections at work: the feedback commands of the chat, and the `feedback` and `bench` commands."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from rwkv_train.chat import STARTER, Chat, Command, data_folder, weights_in
from rwkv_train.checkpoint import load_model
from rwkv_train.cli import BenchConfig, FeedbackFileConfig
from rwkv_train.commands import tokenizer_of
from rwkv_train.feedback import Correction, Learner, Outcome
from rwkv_train.feedback.background import Background
from rwkv_train.feedback.bench import CONTROLS, Protocol, load_cases, table
from rwkv_train.feedback.cases import fact_cases, small_talk, strangers_talk
from rwkv_train.feedback.steps import FeedbackConfig

SINGLES = 10  # runs of a single correction for every seed


class Teacher:
    """What the feedback commands of one chat share: the learner and its thread.

    wait: answer a command only when it is done, as scripts expect; otherwise at once, and tell the outcome later.
    """

    def __init__(self, chat: Chat, folder: Path, wait: bool):
        self.chat, self.wait = chat, wait
        dialogue = chat.dialogue
        self.learner = Learner(dialogue.model, dialogue.tokenizer, folder, template=dialogue.template)
        self.background = Background()
        chat.commands |= {name: Command(usage, phrase, run) for name, usage, phrase, run in self._commands()}
        chat.before_answer.append(self._swap)
        chat.closing.callback(self._close)

    def _commands(self):
        return [
            ("fix", "/fix TEXT", "the last reply should have been TEXT: learn it", self._fix),
            ("teach", "/teach QUESTION => ANSWER", "learn an answer to a question", self._teach),
            ("good", "/good", "the last reply was right: keep it so", self._good),
            ("undo", "/undo [N]", "forget the last correction, or the last N", self._undo),
            ("history", "/history", "list what was learnt", self._history),
            ("export", "/export FILE", "write corrections as training data", self._export),
        ]

    def _swap(self) -> None:
        """Between replies: go on with the newest weights, on the same transcript."""
        if self.learner.model is not self.chat.dialogue.model:
            self.chat.dialogue.reread(self.learner.model)

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

    def _learn(self, correction: Correction) -> Iterable[str]:
        number = self.learner.receive(correction)
        yield f"received as correction {number}\n"
        yield from self._run(lambda: told(self.learner.commit(number)))

    def _undo(self, chat: Chat, rest: str) -> Iterable[str]:
        count = int(rest) if rest.isdigit() else 1
        return self._run(lambda: f"forgot {', '.join(map(str, self.learner.undo(count)))}; the weights are as before")

    def _history(self, chat: Chat, rest: str) -> Iterable[str]:
        lines = [f"{r['id']}: {r['question']} => {r['answer']}" for r in self.learner.active()]
        return ["\n".join(lines) or "nothing was learnt yet"]

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
    verdict = "learnt" if o.accepted else f"not learnt, nothing was changed: {o.why}"
    return (
        f"{o.id}: {verdict} ({o.steps} steps, {o.seconds:.1f} s)\n"
        f"loss {o.loss_before:.3f} -> {o.loss_after:.3f}, drift elsewhere {o.drift:.4f} nats a token\n"
        f"before: {o.answer_before}\nafter:  {o.answer_after}"
    )


def profile_folder(folder: Path, profile: str | None, model: str | Path) -> Path:
    """Where corrections are kept: under the profile's name, or the model's."""
    path = Path(model).expanduser().resolve()
    return folder / "profiles" / (profile or (path.parent.name if path.stem == "model" else path.stem))


def _open(model: str | Path, given: str | None):
    """(model in float32, tokenizer)."""
    path = weights_in(model)
    found = load_model(path, dtype=torch.float32)
    return found, tokenizer_of(str(path), given, found.config.vocab_size)


def feedback(config: FeedbackFileConfig) -> int:
    """Learn a file of corrections, one after another, and print what became of each."""
    corrections = [_correction(config.file, n, line) for n, line in enumerate(_lines(config.file), 1)]
    model, tokenizer = _open(config.model, config.tokenizer)
    folder = profile_folder(data_folder(config.folder), config.profile, config.model)
    learner = Learner(model, tokenizer, folder)
    outcomes = [learner.learn(c) for c in tqdm(corrections, desc="feedback", unit="correction", leave=False)]
    print(f"{'':>4}  {'loss':>15}  {'steps':>5}  {'s':>5}  {'drift':>7}  answer")
    for o in outcomes:
        losses = f"{o.loss_before:.3f} -> {o.loss_after:.3f}"
        mark = o.answer_after if o.accepted else f"not learnt: {o.why}"
        print(f"{o.id:>4}  {losses:>15}  {o.steps:>5}  {o.seconds:>5.1f}  {o.drift:>7.4f}  {mark}")
    learned = sum(o.accepted for o in outcomes)
    print(f"\n{learned} of {len(outcomes)} learnt; kept in {learner.folder}")
    learner.close()
    return 0 if learned == len(outcomes) else 1


def _lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _correction(path: str, number: int, line: str) -> Correction:
    try:
        found = json.loads(line)
        return Correction(found["question"], found["answer"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}:{number}: expected {{"question": ..., "answer": ...}}') from None


def bench(config: BenchConfig) -> None:
    """Run the protocol on a model and cases, with its controls, and print the table beside its targets."""
    if config.what != ["feedback"]:
        raise ValueError(f"there is no benchmark {' '.join(config.what)!r}; there is: feedback")
    cases = load_cases(config.cases) if config.cases else fact_cases()
    unrelated = _lines(config.unrelated) if config.unrelated else small_talk()
    heldout = Path(config.heldout).read_text(encoding="utf-8") if config.heldout else strangers_talk()
    model, tokenizer = _open(config.model or STARTER, config.tokenizer)
    protocol = Protocol(model, tokenizer, cases, unrelated, heldout)
    columns = {f"N={n}": (FeedbackConfig(), n) for n in config.counts}
    most = max(config.counts)
    columns |= {f"{name} N={most}": (FeedbackConfig(**changes), most) for name, changes in CONTROLS.items()}
    results: dict[str, dict] = {}
    # A run of one correction says little: more of them.
    repeats = {name: config.seeds * (SINGLES if count == 1 else 1) for name, (_, count) in columns.items()}
    total = sum(count * repeats[name] for name, (_, count) in columns.items())
    with tqdm(total=total, desc="bench feedback", unit="correction", file=sys.stderr) as bar:
        for name, (recipe, count) in columns.items():
            runs = [protocol.run(recipe, count, seed, tick=bar.update) for seed in range(repeats[name])]
            results[name] = {key: sum(r[key] for r in runs) / len(runs) for key in runs[0]}
            results[name + " runs"] = runs
    shown = {name: r for name, r in results.items() if not name.endswith(" runs")}
    print(table(shown))
    if config.json:
        Path(config.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
