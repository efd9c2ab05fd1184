"""Corrections while the server talks: one thread that learns for all profiles, and what is told of it meanwhile."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

from rwkv_train.feedback import Correction, Learner, Outcome, Slept
from rwkv_train.feedback.background import Background, half_the_threads, in_a_line
from rwkv_train.feedback.correction import item_of, outdated
from rwkv_train.feedback.extent import another_wording, kept_question
from rwkv_train.models.base import RWKV

KINDS = ("answer", "good", "bad", "also", "keep")
BASE = "base"  # the name of the model without corrections

Tell = Callable[[str, int | None, str, dict], None]


class Stopped(BaseException):
    """The server stops, and what is being prepared waits for the next start. No `Exception`: nothing has failed."""


class Teaching:
    """The profiles of a server, by name, and the thread that teaches them.

    tell(profile, number, event, data): called in that thread, or in the one that submits; number: of the correction
    that is spoken of, None for what belongs to none.
    """

    def __init__(self, learners: dict[str, Learner], tell: Tell):
        self.learners, self._tell = learners, tell
        self.now: tuple[str, int] | None = None  # what is being learnt
        self._failed: dict[tuple[str, int], str] = {}  # of those whose failure could not be recorded either
        self._versions: WeakKeyDictionary[RWKV, str] = WeakKeyDictionary()
        self._ending = threading.Event()
        for name, learner in learners.items():
            learner.watch = lambda what, items, name=name: self._watch(name, what, items)
        self._background = Background(lambda error: tell("", None, "error", {"message": in_a_line(error)}))

    def begin(self) -> None:
        """Get to know the models, and learn what was received before, as before a crash."""
        for name, learner in self.learners.items():
            self._submit(lambda learner=learner: learner.rehearsal)
            for record in learner.waiting():
                self._submit(lambda name=name, number=record["id"]: self._commit(name, number))

    def end(self) -> None:
        """Begin nothing more. What waits stays in the journal, and is learnt after the next start."""
        self._ending.set()

    def close(self) -> None:
        """Begin nothing more, and finish what is being learnt."""
        self.end()
        self._background.close()

    def model(self, name: str) -> tuple[RWKV, str]:
        """(the newest model of a profile, its version). name: BASE is the first one's, without corrections."""
        learner = next(iter(self.learners.values())) if name == BASE else self.learners[name]
        model = learner.base if name == BASE else learner.model
        if model not in self._versions:
            base = learner.journal.records[0]["base"][:8]
            self._versions[model] = f"{base}-{learner.weights_of(model)[:8]}"
        return model, self._versions[model]

    def receive(self, name: str, kind: str, correction: Correction, response: str | None = None) -> int:
        """Keep a correction, on the disk, and have it learnt; its number. ValueError, OSError as `Learner.receive`."""
        about = {"kind": kind, "response": response, "time": int(time.time())}
        number = self.learners[name].receive(correction, about)
        self._tell(name, number, "received", {"id": number})
        self._submit(lambda: self._commit(name, number))
        return number

    def also(self, name: str, text: str, of: int | None) -> Correction:
        """Another way to ask a correction. Raises ValueError if there is none."""
        return another_wording(self.learners[name].journal, text, of)

    def keep(self, name: str, text: str, of: int | None) -> Correction:
        """A question that keeps the answer from before a correction. Raises ValueError if there is none."""
        return kept_question(self.learners[name].journal, text, of)

    def configure(self, name: str, changes: dict) -> None:
        """Change settings for the corrections to come. Raises ValueError, changing nothing."""
        self.learners[name].configure(**changes)

    def undo(self, name: str, number: int) -> Future:
        """Take a correction back when it is its turn; the numbers of all that went with it."""
        return self._call(lambda: self._undone(name, number))

    def sleep(self, name: str) -> None:
        """Learn all corrections together when it is their turn; `slept` tells what it came to."""
        self._submit(lambda: self._tell(name, None, "slept", self._slept(name)))

    def waiting(self, name: str) -> int:
        """Corrections of a profile that were received and not tried yet."""
        return len(self.learners[name].journal.ledger.waiting)

    def export(self, name: str) -> str:
        """The corrections as chats, a line of JSON each."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corrections.jsonl"
            self.learners[name].export(path)
            return path.read_text(encoding="utf-8")

    def corrections(self, name: str) -> list[dict]:
        """All corrections of a profile, oldest first, as the API shows them."""
        learner = self.learners[name]
        records = [r for r in list(learner.journal.records) if r["kind"] == "received" and "question" in r]
        learnt = [r for r in learner.learnt() if "question" in r]
        old = {r["id"] for r, is_old in zip(learnt, outdated(list(map(item_of, learnt))), strict=True) if is_old}
        return [self._shown(name, record, old) for record in records]

    def one(self, name: str, number: int) -> dict | None:
        """One of them; None if there is none of that number."""
        return next((shown for shown in self.corrections(name) if shown["id"] == number), None)

    def _shown(self, name: str, record: dict, old: set[int]) -> dict:
        number, ledger = record["id"], self.learners[name].journal.ledger
        about, how = record.get("about", {}), ledger.committed.get(number)
        usual = (
            "keep" if record.get("keeps") else "also" if record.get("of") else "answer" if record["answer"] else "bad"
        )
        status, outcome = "waiting", None
        if number in ledger.undone:
            status = "undone"
        elif self.now == (name, number):
            status = "learning"
        elif how:
            status = "outdated" if number in old else "learnt" if how["accepted"] else "refused"
            status = status if "steps" in how else "failed"
        elif (name, number) in self._failed:
            status = "failed"
        if how:
            outcome = {k: how.get(k) for k in OUTCOME} | {"version": (how.get("weights") or "")[:8] or None}
            outcome["paraphrases"], outcome["contrasts"] = how.get("paraphrases") or [], how.get("contrasts") or []
        elif status == "failed":
            why = {"accepted": False, "why": self._failed[name, number], "version": None}
            outcome = dict.fromkeys(OUTCOME) | {"paraphrases": [], "contrasts": []} | why
        return {
            "id": number,
            "object": "feedback",
            "model": name,
            "kind": about.get("kind", usual),
            "status": status,
            "question": record["question"],
            "answer": ledger.sequence.get(number, record)["answer"],
            "rejected": record["rejected"],
            "of": record.get("of"),
            "response_id": about.get("response"),
            "created_at": about.get("time"),
            "outcome": outcome,
        }

    def _submit(self, work: Callable[[], object]) -> None:
        def run() -> None:
            with suppress(Stopped):
                if not self._ending.is_set():
                    work()

        self._background.submit(run)

    def _commit(self, name: str, number: int) -> None:
        learner = self.learners[name]
        if number not in learner.journal.ledger.waiting:  # it was taken back before its turn
            return
        self.now = name, number
        try:
            tick = lambda step, loss: self._tell(name, number, "step", {"step": step, "loss": loss})  # noqa: E731
            outcome = learner.commit(number, tick)
            self.model(name)  # the hash of many weights takes a moment: not when the next one talks
            self._tell(name, number, "gate", gate(outcome))
        except Exception as error:
            self._failed[name, number] = in_a_line(error)
        finally:
            self.now = None
        self._tell(name, number, "done", self.one(name, number))

    def _undone(self, name: str, number: int) -> list[int]:
        with half_the_threads():
            ids = self.learners[name].forget([number])
        self.model(name)
        for each in ids:
            if shown := self.one(name, each):  # a sleep is no correction
                self._tell(name, each, "done", shown)
        return ids

    def _slept(self, name: str) -> dict:
        try:
            with half_the_threads():
                slept = self.learners[name].sleep(self._ending.is_set)
            self.model(name)
            return told_of(slept) if slept else {"accepted": False, "why": "left for a correction; ask again"}
        except Exception as error:
            return {"accepted": False, "why": in_a_line(error)}

    def _call(self, work: Callable[[], object]) -> Future:
        """The work's result, when it was its turn; whatever it raises is raised from that."""
        future: Future = Future()

        def run() -> None:
            try:
                if self._ending.is_set():
                    raise Stopped
                future.set_result(work())
            except Stopped:
                future.set_exception(ValueError("the server is stopping; ask again when it is back"))
            except Exception as error:
                future.set_exception(error)

        self._background.submit(run)
        return future

    def _watch(self, name: str, what: str, items: Sequence) -> Iterable:
        number = self.now[1] if self.now and self.now[0] == name else None
        for n, item in enumerate(items):
            if self._ending.is_set():
                raise Stopped
            self._tell(name, number, "watch", {"what": what, "n": n, "of": len(items)})
            yield item


OUTCOME = (
    *("accepted", "why", "loss_before", "loss_after", "answer_before", "answer_after", "steps", "share"),
    *("paraphrases", "contrasts", "drift", "seconds", "note"),
)
SLEPT = (
    *("accepted", "why", "right_before", "right_after", "count"),
    *("drift_before", "drift_after", "lost", "seconds"),
)


def gate(o: Outcome) -> dict:
    return {"accepted": o.accepted, "why": o.why, "share": o.share, "drift": o.drift}


def told_of(s: Slept) -> dict:
    return {name: getattr(s, name) for name in SLEPT}
