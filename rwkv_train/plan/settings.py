"""Settings of `plan`: those of a run, and what is known of the machine."""

from dataclasses import dataclass

from rwkv_train.config import FitConfig


@dataclass
class PlanConfig(FitConfig):
    """Tell whether a run would fit and how long it would take, before anything is trained."""

    tokens: float | None = None
    """tokens to train on; those of data.path if not given, which may be missing or not be there yet"""

    memory: float | None = None
    """GB of one device (2^30 bytes); what this machine has if not given"""

    speed: float | None = None
    """TFLOP/s that matrix products reach on one device; measured here in a second if not given"""

    bandwidth: float | None = None
    """TB/s that one GPU copies, read and written counted; if not given a step of a measured GPU is taken, where there
    is one, or what is measured here in a second, or 3.0, an H100's"""

    link: float = 50.0
    """GB/s at which a device exchanges weights and gradients with the others"""

    def __post_init__(self):
        for name in ("tokens", "memory", "speed", "bandwidth", "link"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        self.check_lanes()
