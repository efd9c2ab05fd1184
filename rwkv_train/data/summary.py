"""What became of everything that `prepare` was given: counted on the way, told at the end, nothing left out."""

from collections import Counter
from dataclasses import dataclass, field

from rwkv_train.data.encode import Encoded
from rwkv_train.data.sources import Passed, described
from rwkv_train.data.store import Store
from rwkv_train.files import counted
from rwkv_train.program import command

LISTED = 10  # bad records that are named
KINDS = {"text": "text", "pairs": "pair", "messages": "chat"}


@dataclass
class Tally:
    """Counts of records. bad, listed: how many were left out, and "where: what" of the first of them. kinds: of the
    others. unused: fields. remarks: what else is said of records. notes: sentences about sources and settings."""

    passed: list[Passed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: int = 0
    listed: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    def add_bad(self, where: str, error: str) -> None:
        self.bad += 1
        if len(self.listed) < LISTED:
            self.listed.append(f"{where}: {error}")

    def add(self, encoded: Encoded) -> None:
        self.kinds[encoded.about.kind] += 1
        self.unused.update(name or "(without a name)" for name in encoded.about.unused)
        self.remarks.update(encoded.about.remarks)

    def lines(self) -> list[str]:
        """The summary's first lines: all that is not in the store."""
        found = []
        if self.listed:
            more = ["  ..."] * (self.bad > len(self.listed))
            found += [f"{self.bad:,} bad records left out:", *(f"  {line}" for line in self.listed), *more]
        if self.passed:
            found.append(f"passed over: {described(self.passed)}")
        found += self.notes
        if self.unused:
            found.append(f"not used: {counted(self.unused, 'record')}")
        if self.unused["history"] and self.kinds["pairs"]:
            found.append('  pairs are trained without their "history"; write them as chats to train with it')
        return found + [f"{what} ({count:,} record{'s' * (count > 1)})" for what, count in self.remarks.items()]


def print_summary(out: str, store: Store, tally: Tally) -> None:
    """Print what was left out, the store's figures, and the command that comes next."""
    m = store.manifest
    size = sum(file.stat().st_size for file in store.path.iterdir())
    lines = [
        *tally.lines(),
        f"{store.path}: {size / 1e6:,.1f} MB, tokenizer {m['tokenizer']['name']}",
        f"  documents       {m['documents']:>15,}",
        f"  tokens          {m['tokens']:>15,}",
        f"  trained tokens  {m['trained_tokens']:>15,}  ({m['trained_tokens'] / m['tokens']:.0%})",
        f"  bytes per token {m['text_bytes'] / max(1, m['tokens'] - m['documents']):>15.2f}",
        f"Next: {command('fit', '--config', 'configs/quickstart.yaml', '--data.path', out)}",
    ]
    for line in lines:  # a file's name may hold bytes that are no text
        print(line.encode(errors="backslashreplace").decode())
