"""What `bench gpu` does is cut into jobs, and what it finds into rows: whatever fails ends one job alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Results = dict[str, list[dict[str, object]]]  # the rows so far, by section; plain values, as JSON has them


@dataclass(frozen=True)
class Row:
    """A row of its section's table, and a line of the last table; either may be empty. good: it is as it should be."""

    cells: Mapping[str, object] = field(default_factory=dict)
    what: str = ""
    found: str = ""
    good: bool = True


@dataclass(frozen=True)
class Job:
    """A part of a section that is run by itself.

    run: yields rows, each as soon as it is known. limit: seconds after which it is ended. ours: its failure is ours.
    """

    what: str
    run: Callable[[], Iterable[Row]]
    limit: float = 90.0
    ours: bool = True

    def failed(self, reason: str) -> Row:
        return Row({"what": self.what, "failed": reason}, self.what, f"failed: {reason}", good=not self.ours)

    def ended(self, reason: str) -> Row:
        """That it was not let finish is no mistake."""
        return Row({"what": self.what, "ended": reason}, self.what, f"ended: {reason}")


def row_of(results: Results, sections: tuple[str, ...], **cells) -> dict[str, object]:
    """The first row of some sections with these cells; empty if there is none: it failed, or was left out."""
    rows = (row for section in sections for row in results.get(section, []))
    return next((row for row in rows if all(row.get(name) == x for name, x in cells.items())), {})
