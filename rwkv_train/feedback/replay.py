"""The weights of a profile as they follow from its journal: from the base, or from a snapshot on the way."""

import sys
from collections.abc import Callable

from rwkv_train.feedback.background import Watch, in_a_line
from rwkv_train.feedback.correction import Received, received_of
from rwkv_train.feedback.journal import Journal
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.sleep import Sleep
from rwkv_train.feedback.snapshots import Snapshots, weights_hash
from rwkv_train.feedback.trainable import between, changed
from rwkv_train.models.base import RWKV


class Replay:
    """Learns again what a journal says was learnt.

    learn(model, received, earlier): the model after all steps of a correction. sleep(received, config): a sleep on
    corrections, about to begin. watch: see `Learner`.
    """

    def __init__(
        self,
        journal: Journal,
        snapshots: Snapshots,
        learn: Callable[[RWKV, Received, list[Received]], RWKV],
        sleep: Callable[[list[Received], FeedbackConfig], Sleep],
        watch: Watch,
    ):
        self._journal, self._snapshots = journal, snapshots
        self._learn, self._sleep, self._watch = learn, sleep, watch
        self._received: dict[int, Received] = {}  # what was read of the journal's records

    def sequence(self) -> list[dict]:
        """Records of what the weights follow from, in that order: corrections, and sleeps on all before them."""
        return list(self._journal.ledger.sequence.values())

    def received(self, sequence: list[dict]) -> list[Received]:
        """What the corrections in a sequence are; each record is read once."""
        records = [record for record in sequence if record["kind"] == "received"]
        self._received |= {r["id"]: received_of(r) for r in records if r["id"] not in self._received}
        return [self._received[record["id"]] for record in records]

    def model_after(self, sequence: list[dict]) -> RWKV:
        """The model that follows from corrections and sleeps in this order; told if any is learnt again."""
        done, model = self._snapshots.nearest(sequence)
        asleep = max((n for n, r in enumerate(sequence) if r["kind"] == "slept"), default=-1)
        begin = max(done, asleep)  # a sleep is from the base, so that what lies before it need not be done
        if done < len(sequence):
            again = len(self.received(sequence[0 if begin == asleep else begin :]))
            print(f"{self._journal.path.parent}: {again} corrections are learnt again", file=sys.stderr)
        for n in self._watch("learnt again", range(begin, len(sequence))):
            model = self._again(model, sequence[:n], sequence[n])
            self._snapshots.save(model, sequence[: n + 1], self.sequence())
        if begin < len(sequence):
            self._compare(model, sequence)
        return model

    def _compare(self, model: RWKV, sequence: list[dict]) -> None:
        """Tell if what was learnt again comes to other weights than it did at first."""
        ledger, last = self._journal.ledger, sequence[-1]["id"]
        first = ledger.committed.get(last, sequence[-1])["weights"]
        as_then = sequence == self.sequence()[: len(sequence)] and last not in ledger.unlike
        if as_then and first != weights_hash(changed(model, self._snapshots.base)):
            folder = self._journal.path.parent
            print(
                f"{folder}: that gives other weights than before, as another version or another kind of machine "
                "does; see whether it still answers as it was taught",
                file=sys.stderr,
            )

    def keep(self, model: RWKV) -> None:
        """Keep a snapshot of the weights in use, or say that there is none: they follow from the journal, too."""
        try:
            self._snapshots.save(model, self.sequence())
        except OSError as error:
            print(f"{self._journal.path.parent}: no snapshot was kept: {in_a_line(error)}", file=sys.stderr)

    def _again(self, model: RWKV, earlier: list[dict], record: dict) -> RWKV:
        """The model after a record that comes after earlier ones."""
        if record["kind"] == "slept":
            sleep = self._sleep(self.received(earlier), FeedbackConfig(**record["config"]))
            sleep.go_on()
            return sleep.model
        (received,), how = self.received([record]), self._journal.ledger.committed[record["id"]]
        if "kept" in how and not how["steps"]:  # it was answered so already
            return model
        return between(model, self._learn(model, received, self.received(earlier)), how["share"])
