"""Corrections in a chat: the commands that teach, and the thread that learns."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from rwkv_train.chat.session import Chat, Command, Setting, number
from rwkv_train.chat.sleeping import Sleeper
from rwkv_train.chat.telling import exported, history, question_of, told
from rwkv_train.feedback import Correction, FeedbackConfig, Learner, Reading
from rwkv_train.feedback.background import Background, half_the_threads, in_a_line
from rwkv_train.feedback.correction import item_of, outdated
from rwkv_train.feedback.extent import another_wording, kept_question
from rwkv_train.feedback.journal import Ledger
from rwkv_train.files import read_text


class Teacher:
    """What the feedback commands of one chat share: the learner and its thread. A context: it ends with the chat.

    learner: what it has received and not learnt is learnt now. wait: answer a command only when it is done, as scripts
    expect; otherwise at once, and tell the outcome later.
    """

    def __init__(self, chat: Chat, learner: Learner, wait: bool):
        self.chat, self.learner, self.wait = chat, learner, wait
        self._now: int | None = None  # the correction that is being learnt
        self._failed: dict[int, str] = {}  # why, of those whose failure could not be recorded either

    def __enter__(self) -> "Teacher":
        with ExitStack() as ending:  # an interrupt closes the thread as well
            self._begin(ending)
            self._ending = ending.pop_all()
        return self

    def _begin(self, ending: ExitStack) -> None:
        if not self.wait:
            self.learner.watch = self._watch
            ending.enter_context(half_the_threads())
        self.background = Background(lambda error: self._tell(in_a_line(error)))
        ending.callback(self.background.close)
        self._sleeper = Sleeper(self.chat, self.learner, self.background, self._tell)
        ending.callback(self._sleeper.close)
        if not self.wait:
            self.background.submit(self._prepare)
        for record in self.learner.waiting():  # as after a crash
            self.background.submit(lambda number=record["id"]: self._tell(self._commit(number)))
        if self.wait:
            self.background.wait()

    def __exit__(self, *error) -> None:
        self._ending.close()

    def commands(self) -> dict[str, Command]:
        """For the chat, by name."""
        listed = [
            ("fix", "/fix TEXT", "the last reply should have been TEXT: learn it", self._fix),
            ("teach", "/teach QUESTION => ANSWER", "learn an answer to a question", self._teach),
            ("also", "/also TEXT", "TEXT is another way to ask what was just corrected", self._also),
            ("not", "/not TEXT", "TEXT keeps the answer it had before; TEXT may be 12a, or 12: TEXT", self._not),
            ("good", "/good", "the last reply was right: keep it so", self._good),
            ("bad", "/bad", "the last reply was wrong: anything but that", self._bad),
            ("learn", "/learn FILE", "get used to a text, gently", self._read),
            ("sleep", "/sleep", "learn all corrections together, until you type, and keep that if better", self._sleep),
            ("undo", "/undo [N]", "forget the last correction or sleep, or the last N", self._undo),
            ("history", "/history", "list what was learnt, and what was not", self._history),
            ("diff", "/diff", "how far the model is from where it began", self._diff),
            ("export", "/export FILE", "write corrections as training data", self._export),
        ]
        return {name: Command(usage, phrase, run) for name, usage, phrase, run in listed}

    def settings(self) -> dict[str, Setting]:
        """How corrections are learnt, for the chat, by name."""
        return {f.name: self._setting(f.name, type(f.default)) for f in fields(FeedbackConfig)}

    def swap(self) -> None:
        """Between replies: go on with the newest weights, on the same transcript."""
        model = self.learner.model  # once: the thread may replace it at any time
        if model is not self.chat.dialogue.model:
            self.chat.dialogue.reread(model, self.learner.weights_of(model)[:8])

    def _prepare(self) -> None:
        """Make the rehearsal set, so that the first correction finds it there."""
        self.chat.status = "getting to know the model"
        try:
            self.learner.rehearsal  # noqa: B018
        except Exception as error:
            self._tell(
                f"what the model says could not be measured, the first correction tries again: {in_a_line(error)}"
            )
        finally:
            self.chat.status = ""

    def _watch(self, what: str, items: Sequence) -> Iterable:
        """The items, with how far they are as the status."""
        try:
            for n, item in enumerate(items):
                self.chat.status = f"{what}: {n} of {len(items)}"
                yield item
        finally:
            self.chat.status = ""

    def _tell(self, text: str) -> None:
        """Say something that is no answer; a script, which expects answers alone, finds it on standard error."""
        if self.wait:
            print(text, file=sys.stderr)
        else:
            self.chat.tell(text)

    def _fix(self, chat: Chat, answer: str) -> Iterable[str]:
        last = chat.dialogue.last()
        context = tuple(chat.dialogue.context_of_last())
        return self._learn(Correction(last.user, answer, context, last.reply if last.reply != answer else None))

    def _teach(self, chat: Chat, rest: str) -> Iterable[str]:
        question, arrow, answer = rest.partition("=>")
        if not arrow:
            raise ValueError("write /teach QUESTION => ANSWER")
        return self._learn(Correction(question.strip(), answer.strip()))

    def _also(self, chat: Chat, rest: str) -> Iterable[str]:
        correction = another_wording(self.learner.journal, *self._question(rest, "also"))
        return self._learn(correction, f", another way to ask {correction.of}: {correction.question}")

    def _not(self, chat: Chat, rest: str) -> Iterable[str]:
        correction = kept_question(self.learner.journal, *self._question(rest, "not"))
        return self._learn(correction, f", which keeps its answer from before {correction.of}: {correction.question}")

    def _question(self, rest: str, name: str) -> tuple[str, int | None]:
        """(the question, the number of the correction that is spoken of) of what follows /also or /not."""
        if not rest:
            raise ValueError(f"write /{name} TEXT, or /{name} 12: TEXT for correction 12")
        if named := re.fullmatch(r"(\d+)\s*:\s+(.+)", rest, re.DOTALL):
            return named[2], int(named[1])
        if label := re.fullmatch(r"(\d+)[a-z]", rest.lower()):
            return question_of(self.learner.journal.ledger, label[0]), int(label[1])
        known = [record["id"] for record in self.learner.active()]
        if (begun := re.match(r"(\d+)([a-z]?\s*,|:|$)", rest.lower())) and int(begun[1]) in known:
            meant = f"/{name} {begun[1]}: TEXT, or one label as {begun[1]}a"
            raise ValueError(f"{rest!r} is unclear; write {meant}. To ask just that: /{name} {known[-1]}: {rest}")
        return rest, None

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

    def _learn(self, correction: Correction | Reading, meaning: str = "") -> Iterable[str]:
        ours, theirs = (t.thinking for t in (self.learner.form.template, self.chat.dialogue.template))
        if ours != theirs:
            meaning += f", as for thinking {ours}; this chat has thinking {theirs}, where it may come to another answer"
        number = self.learner.receive(correction)
        yield f"received as correction {number}{meaning}\n"
        yield from self._run(lambda: self._commit(number))

    def _commit(self, number: int) -> str:
        """Learn a received correction; what became of it, also where that is a failure of any kind."""

        def tick(step: int, loss: float) -> None:
            self.chat.status = f"learning correction {number}: step {step}, loss {loss:.3f}"

        self._now = number
        try:
            outcome = self.learner.commit(number, tick)
            self.chat.failures += not outcome.accepted
            return told(outcome)
        except Exception as error:
            self.chat.failures += 1
            self._failed[number] = in_a_line(error)
            return f"{number}: not learnt, nothing was changed: {self._failed[number]}"
        finally:
            self._now, self.chat.status = None, ""

    def _sleep(self, chat: Chat, rest: str) -> Iterable[str]:
        return self._run(self._sleeper.sleep, "sleeping; type anything to end it")

    def _undo(self, chat: Chat, rest: str) -> Iterable[str]:
        ledger = self.learner.journal.ledger
        count, known = number(rest or "1", int), len(ledger.sequence) + len(ledger.waiting)
        if not 1 <= count <= known:
            raise ValueError(f"there are {known} corrections to undo, not {count}")

        def undo() -> str:
            kinds = {record["id"]: record["kind"] for record in self.learner.journal.records}
            forgotten = [f"{n} (a sleep)" if kinds[n] == "slept" else str(n) for n in self.learner.undo(count)]
            theirs = f", and with that {', '.join(forgotten[count:])}" if forgotten[count:] else ""
            return f"forgot {', '.join(forgotten[:count])}{theirs}; the weights are as before"

        return self._run(undo, "taking it back; go on")

    def _history(self, chat: Chat, rest: str) -> Iterable[str]:
        records = list(self.learner.journal.records)  # of one moment
        ledger = Ledger(records)
        marks = dict.fromkeys(ledger.waiting, "waiting")
        learnt = [record for record in ledger.sequence.values() if record["kind"] == "received"]
        old = outdated([item_of(record) for record in learnt])
        marks |= {record["id"]: "outdated by a later one" for record, is_old in zip(learnt, old, strict=True) if is_old}
        failed = {number: why for number, why in self._failed.items() if number in marks} | ledger.refused()
        marks |= {number: "being learnt" for number in [self._now] if number in marks}
        marks |= {number: f"not learnt: {why}" for number, why in failed.items()}
        return ["\n".join(history(records, ledger, marks)) or "nothing was learnt yet"]

    def _diff(self, chat: Chat, rest: str) -> Iterable[str]:
        model, count = self.learner.model, len(self.learner.learnt())
        changes = [f"{name:<32}changed by {share:.2%}" for name, share in self.learner.diff(model).items()]
        last = chat.dialogue.turns[-1].version if chat.dialogue.turns else None
        spoken = f", the last reply is by version {last}" if last else ""
        version = self.learner.weights_of(model)[:8]
        return ["\n".join([f"version {version}, {count} corrections{spoken}", *changes])]

    def _setting(self, name: str, kind: type) -> Setting:
        def change(value: str) -> None:
            self.learner.configure(**{name: number(value, kind) if kind is not str else value})

        return Setting(lambda: getattr(self.learner.config, name), change)

    def _export(self, chat: Chat, rest: str) -> Iterable[str]:
        if not rest:
            raise ValueError("write /export FILE")
        path = Path(rest).expanduser()
        written, waits = self.learner.export(path), len(self.learner.waiting())
        others = len(self.learner.learnt()) - written.chats - written.replaced
        return [exported(written, others, waits, path)]

    def _run(self, job: Callable[[], str], meanwhile: str = "learning; go on") -> Iterable[str]:
        """Do a job in the background; its result, or why it failed, is the answer, or is told when it is there."""
        results = []

        def work() -> None:
            try:
                results.append(job())
            except Exception as error:
                self.chat.failures += 1
                results.append(in_a_line(error))
            if not self.wait:
                self.chat.tell(results[0])

        self.background.submit(work)
        if self.wait:
            self.background.wait()
            self.swap()
            return results
        return [meanwhile]
