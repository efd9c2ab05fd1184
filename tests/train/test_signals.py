"""Signals and terminals: what ends a run saves it first; what is ignored stays ignored; printing never ends one."""

import errno
import os
import pty
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from runs import config_of

from rwkv_train.checkpoints.run_checkpoint import run_checkpoints, verify
from rwkv_train.train.callbacks import SIGNALS
from rwkv_train.train.fit import fit
from rwkv_train.train.module import OnlineTrainingModule
from rwkv_train.train.output import LastingStream

ROOT = Path(__file__).parents[2]


def sends(number: int, after: int):
    """A training step that sends a signal to its own process, once."""
    step = OnlineTrainingModule.training_step

    def training_step(self, *args):
        if self.batches_done == after:
            os.kill(os.getpid(), number)
        return step(self, *args)

    return training_step


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_a_signal_saves_and_tells_its_number(store, tmp_path, monkeypatch, heard_signals, number, code):
    monkeypatch.setattr(OnlineTrainingModule, "training_step", sends(number, 4))
    old = signal.getsignal(number)
    assert fit(config_of(store, tmp_path)) == code
    assert [p.name for p in run_checkpoints(tmp_path / "run")] == ["step=00000003"]
    assert signal.getsignal(number) == old


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_stays_ignored(store, tmp_path, monkeypatch, heard_signals, number):
    monkeypatch.setattr(OnlineTrainingModule, "training_step", sends(number, 4))
    signal.signal(number, signal.SIG_IGN)
    assert fit(config_of(store, tmp_path)) == 0
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_terminal_that_is_closed_saves(store, tmp_path, heard_signals):
    config = config_of(store, tmp_path)
    train = replace(config.train, steps=100_000, save_every=10**6, val_every=10**6, log_every=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asdict(replace(config, train=train))))
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "train.py", "fit", "--config", str(tmp_path / "run.yaml")])
    shown = b""
    while b"validation loss" not in shown:  # training has begun
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    (checkpoint,) = run_checkpoints(tmp_path / "run")
    assert verify(checkpoint) is None


def test_output_goes_nowhere_once_its_reader_is_gone():
    """Also what was in the buffer. Other errors, of a full disk, are told."""
    code = (
        "import sys, os; from rwkv_train.train.output import lasting_output\n"
        "with lasting_output():\n    print('first', flush=True); sys.stdin.read()\n"
        "    print('x' * 99999); print('last')\nsys.exit(7)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait() == 7

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space left"):
        LastingStream(Full()).write("x")
