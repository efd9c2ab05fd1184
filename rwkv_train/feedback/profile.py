"""The folder of a profile: its lock, its journal, and its settings, which the journal says."""

import sys
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from rwkv_train.checkpoints.opener import dtype_of
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import compare_templates
from rwkv_train.feedback.journal import Journal
from rwkv_train.feedback.memory import fitting, memory_of, told_of
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.snapshots import weights_hash
from rwkv_train.feedback.trainable import curved_names, localised_names
from rwkv_train.models.base import RWKV
from rwkv_train.program import command, told


class OtherModel(ValueError):
    """A profile that was begun with another model, or one in another dtype. base: the hash of this one."""

    def __init__(self, folder: Path, base: str, dtype: str, begun: str):
        again = command("feedback", "--model", "MODEL", "--dtype", dtype, "--file", folder, "--profile", "NEW")
        other = "another model" if dtype == begun else f"a model in {begun}, and this one is in {dtype}"
        same = "" if dtype == begun else f"open it with --dtype {begun}, or "
        super().__init__(
            f"{folder} was begun with {other}; {same}name another profile for this one, which can learn the same "
            f"corrections anew: {again}"
        )
        self.base = base


class Profile:
    """One process at a time may use it. config: settings of the corrections to come; begun_with: of the first ones.

    template: as which all of them are written.
    """

    def __init__(self, folder: Path, base: RWKV, config: FeedbackConfig, memory: int | None, template: Template):
        """config, template: of a profile that is new; that another template is not taken is told. memory: bytes that
        corrections may take, None for most of the device's.

        Raises ValueError for a folder that is in use, damaged, or of another model, and for a memory of nothing.
        """
        if memory is not None and memory <= 0:
            raise ValueError(f"memory must be above 0 bytes, found {memory}; leave it out for most of the device's")
        self.folder, self.base, self.config, self.template = folder, base, config, template
        self._memory = memory_of(base.device) if memory is None else memory
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "lock", thread_local=False)  # closed in whichever thread
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{folder} is in use by another process; close it, or use another profile") from None
        try:
            self.journal = Journal(folder / "journal.jsonl")
            self._check_base()
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        self.journal.close()
        self._lock.release()

    def configure(self, config: FeedbackConfig) -> None:
        """Other settings for the corrections to come; they are kept. Raises ValueError, changing nothing."""
        if config.layers > (most := len(localised_names(self.base))):
            raise ValueError(f"layers must be at most {most}, the upper half of this model's, found {config.layers}")
        if config.rank > (most := min(self.base.get_parameter(localised_names(self.base)[0]).shape)):
            raise ValueError(f"rank must be at most {most}, what this model's matrices have, found {config.rank}")
        known = curved_names(self.base, self.begun_with.trainable, self.begun_with.layers)[0]
        if set(curved_names(self.base, config.trainable, config.layers or len(self.base.blocks))[0]) - set(known):
            begun = f"trainable {self.begun_with.trainable} and layers {self.begun_with.layers}"
            raise ValueError(f"{self.folder} was begun with {begun}, and knows no more; begin another profile for more")
        self.journal.append("settings", config=asdict(config))
        if (config.trainable, config.layers) != (self.config.trainable, self.config.layers):
            self._tell_memory(config)
        self.config = config

    def _check_base(self) -> None:
        """A journal belongs to the model it was begun with, and says what its settings are."""
        base, dtype = weights_hash(self.base.state_dict()), dtype_of(self.base)
        if not self.journal.records:
            self.config = fitting(self.base, self.config, self._memory)
            written = self.template.as_dict()
            self.journal.append("base", base=base, dtype=dtype, config=asdict(self.config), template=written)
        first = self.journal.records[0]
        if first.get("base") != base:
            raise OtherModel(self.folder, base, dtype, first.get("dtype", "fp32"))
        chosen = [r["config"] for r in self.journal.records if r["kind"] in ("base", "settings")]
        self.config, self.begun_with = FeedbackConfig(**chosen[-1]), FeedbackConfig(**first["config"])
        self._tell_memory(self.config)
        begun = Template(**first["template"]) if "template" in first else self.template.as_before()
        if other := compare_templates(self.folder, begun, "this model, as it is opened,", self.template):
            told(f"{other}. Its corrections go on as they began; another profile has its own")
        self.template = begun

    def _tell_memory(self, config: FeedbackConfig) -> None:
        if memory := told_of(self.base, config, self._memory):
            print(memory, file=sys.stderr)
