"""The cases that come along, by name, and how a set of cases is measured."""

from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_train.bench.correction_cases import Case, load_cases
from rwkv_train.bench.correction_tables import COUNTRIES, OPEN, Targets
from rwkv_train.bench.fact_cases import fact_cases
from rwkv_train.bench.invented_cases import invented_cases

FILES = Path(__file__).parent / "cases"
BY_HAND = {"open": "open_development.jsonl", "open-final": "open_final.jsonl"}
THOUSAND = 1000
SINGLES = 10  # false facts that are learnt alone, for every seed


@dataclass(frozen=True)
class CaseSet:
    """Cases, their targets, and what is measured of them unless told otherwise.

    counts: corrections one after another. controls, control_counts: recipes that do worse, or the best that can be
    done; each after so many corrections. draws: single corrections for every seed; None takes each case once.
    """

    cases: list[Case]
    targets: Targets
    counts: list[int]
    controls: list[str]
    control_counts: list[int]
    draws: int | None = None


def case_set(name: str | None) -> CaseSet:
    """A set that comes along, or a file's; None is the country facts. ValueError for a file that holds no cases."""
    if name is None:
        return _plain(fact_cases())
    if name == "thousand":
        return CaseSet(thousand_cases(), OPEN, [30, 100, 300, 1000], ["naive", "joint"], [1000])
    cases = load_cases(FILES / BY_HAND[name] if name in BY_HAND else name)
    if not any(case.kind for case in cases):
        return _plain(cases)
    return CaseSet(cases, OPEN, [1, 30, 100], ["naive", "joint"], [30])


def _plain(cases: list[Case]) -> CaseSet:
    return CaseSet(cases, COUNTRIES, [1, 10, 100], ["step_factor 0", "naive", "state only"], [10], SINGLES)


def thousand_cases() -> list[Case]:
    """The open cases for development, false facts about countries, and facts about what does not exist, by rule."""
    by_hand = load_cases(FILES / BY_HAND["open"]) + [replace(case, kind="countries") for case in fact_cases()]
    return by_hand + invented_cases(THOUSAND - len(by_hand))
