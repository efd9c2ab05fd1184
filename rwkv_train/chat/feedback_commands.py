"""Corrections in a chat: the commands that teach, and the thread that learns."""

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import fields

from rwkv_train.chat.session import Chat, Command, Setting, number
from rwkv_train.feedback import Correction, FeedbackConfig, Learner, Outcome, Reading
from rwkv_train.feedback.background import Background, half_the_threads
from rwkv_train.files import read_text


class Teacher:
    """What the feedback commands of one chat share: the learner and its thread. A context: it ends with the chat.

    wait: answer a command only when it is done, as scripts expect; otherwise at once, and tell the outcome later.
    """

    def __init__(self, chat: Chat, learner: Learner, wait: bool):
        self.chat, self.learner, self.wait = chat, learner, wait
        self._ending = ExitStack()

    def __enter__(self) -> "Teacher":
        if not self.wait:
            self._ending.enter_context(half_the_threads())
        self.background = Background()
        self._ending.callback(self.background.close)
        if not self.wait:
            self.background.submit(self._prepare)
        return self

    def __exit__(self, *error) -> None:
        self._ending.close()

    def commands(self) -> dict[str, Command]:
        """For the chat, by name."""
        listed = [
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
        return {name: Command(usage, phrase, run) for name, usage, phrase, run in listed}

    def settings(self) -> dict[str, Setting]:
        """How corrections are learnt, for the chat, by name."""
        return {f.name: self._setting(f.name, type(f.default)) for f in fields(FeedbackConfig)}

    def swap(self) -> None:
        """Between replies: go on with the newest weights, on the same transcript."""
        if self.learner.model is not self.chat.dialogue.model:
            self.chat.dialogue.reread(self.learner.model, self.learner.weights[:8])

    def _prepare(self) -> None:
        """Make guards, so that the first correction finds them there; what is wrong with them it will tell."""
        self.chat.status = "getting to know the model"
        with suppress(ValueError, OSError):
            self.learner.guards  # noqa: B018
        self.chat.status = ""

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
            self.swap()
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
