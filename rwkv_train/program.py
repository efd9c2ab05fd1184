"""How the program was called, for hints that can be pasted; what its process held, and how its threads wait; where
what comes along with it lies.

rwkv_train/starter and rwkv_train/configs are links into the clone; in a wheel they are folders of that name.
"""

import ctypes
import os
import re
import resource
import shlex
import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
STARTER = HERE / "starter"  # the small model that `chat` opens
CONFIGS = HERE / "configs"
SCRIPT, INSTALLED = "train.py", "rwkv-train"
# How OpenMP's threads wait for each other: asleep, after some 10 us (iterations, which only GNU's library counts).
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300"}
CHOSEN = {*WAITING, "KMP_BLOCKTIME", "KMP_LIBRARY"}  # whoever sets one of these has chosen otherwise


def name() -> str:
    """train.py in a clone and rwkv-train where it is installed: what begins a line of error."""
    return SCRIPT if _script() else INSTALLED


def command(*words: object) -> str:
    """A command line of this program as a shell takes it, called as it was called this time."""
    return " ".join([_called(), *(shlex.quote(str(word)) for word in words)])


def shipped_config(path: str) -> Path | None:
    """The file that comes along under this name, as configs/quickstart.yaml."""
    found = CONFIGS / Path(path).name
    return found if Path(path) == Path("configs") / found.name and found.is_file() else None


def _script() -> Path | None:
    """The train.py that was called, or that of this clone where something else called us; None where installed."""
    called = Path(sys.argv[0])
    if called.name == SCRIPT:
        return called
    return Path(SCRIPT) if called.name != INSTALLED and (HERE.parent / SCRIPT).is_file() else None


def _called() -> str:
    script = _script()
    if script is None:
        called = sys.argv[0]
        return _typed(called, INSTALLED) if Path(called).name == INSTALLED else INSTALLED
    return f"{_typed(sys.executable, 'python')} {shlex.quote(str(script))}"


def _typed(path: str, short: str) -> str:
    """`short` where a shell would find this program under it, and its whole path elsewhere."""
    found = shutil.which(short)
    here = found and os.path.dirname(os.path.abspath(found)) == os.path.dirname(os.path.abspath(path))
    return short if here else shlex.quote(path)


def let_threads_sleep() -> None:
    """Beside other busy processes set WAITING, before torch loads the OpenMP library, which reads it then.

    Left alone, GNU's threads wait in a loop for milliseconds, and hold a core that another process or the very thread
    they wait for could use: beside two busy processes on two cores training is then far below its fair share
    (tests/tools/beside.py). On a machine of its own the loop is faster: a step of 128 tokens takes 1.6 times as long
    with threads that sleep. Nothing is set where anything is CHOSEN. Whoever imports the library sets the two in front
    of Python: nothing is done at import.
    """
    if "torch" not in sys.modules and not CHOSEN & os.environ.keys() and others_run():
        os.environ.update(WAITING)


def others_run() -> bool:
    """Whether another process was running, or ready to, each of a few times; False where nobody can tell."""
    load = Path("/proc/loadavg")  # "0.31 0.28 0.25 2/345 678": two are running, this process among them
    for _ in range(3):
        if not load.exists() or int(load.read_text().split()[3].partition("/")[0]) < 2:
            return False
        time.sleep(0.003)
    return True


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    # Linux hands ru_maxrss of the parent on to what it starts; VmHWM belongs to this program alone.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim_heap() -> None:
    """Give the system back what was freed, which GNU's C library keeps; elsewhere nothing is done."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def told(text: str) -> None:
    """Say something of what is unknown or overridden, if it is anything, on standard error."""
    if text:
        print(f"note: {text}", file=sys.stderr)
