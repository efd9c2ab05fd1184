"""Print a conversation with the starter model, as it stands in the README: python tests/tools/transcript.py"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINES = [
    "What does snorble mean?",
    "/fix To snorble is to laugh with a full mouth.",
    "What does snorble mean?",
    "Tell me, what does snorble mean?",
    "What does flimble mean?",
    "/undo",
    "What does snorble mean?",
]


def transcript(folder: str) -> str:
    """Each line as typed, and the answer to it."""
    argv = [sys.executable, "train.py", "chat", "--plain", "--temperature=0", f"--folder={folder}"]
    done = subprocess.run(argv, cwd=ROOT, input="\n".join(LINES) + "\n", capture_output=True, text=True, check=True)
    blocks = done.stdout.rstrip("\n").split("\n\n")
    return "\n".join(f"> {line}\n{block}\n" for line, block in zip(LINES, blocks, strict=True))


def without_figures(text: str) -> str:
    """For comparing: figures, and the questions that a model comes by, may differ from machine to machine."""
    text = re.sub(r"^(also asked as|kept as before): .*$", r"\1: ...", text, flags=re.MULTILINE)
    return re.sub(r"\d+(\.\d+)?", "0", text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(transcript(folder), end="")
