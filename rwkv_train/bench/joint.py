"""All corrections learnt together, as in a sleep: what those that come one after another could be expected to reach."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rwkv_train.bench.correction_cases import Case
from rwkv_train.bench.corrections import Protocol, Tick
from rwkv_train.feedback.correction import Received
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.sleep import LESSONS, Sleep
from rwkv_train.models.base import RWKV


def learnt_together(protocol: Protocol, config: FeedbackConfig, cases: list[Case], seed: int, tick: Tick) -> RWKV:
    """The base after a sleep on all cases, whether it is better or not. tick: called for each case once."""

    def watch(what: str, items: Sequence) -> Iterable:
        for item in items:
            yield item
            if what == LESSONS:
                tick()

    received = [
        Received(number, protocol.correction(case, seed), asdict(config)) for number, case in enumerate(cases, 1)
    ]
    sleep = Sleep(protocol.rehearsal, received, config, watch)
    sleep.go_on()
    return sleep.model
