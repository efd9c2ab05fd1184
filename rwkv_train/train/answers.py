"""What the program wants to know of a step's tensors, without letting a GPU wait until it has looked."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    """The value of a tensor that was asked for, and what was said of it."""

    value: float
    about: int


class Answers:
    """Values of scalar tensors, in the order in which they were asked for.

    On a GPU they come one question late: by then the step behind it has long been handed out.
    """

    def __init__(self):
        self._asked = deque()

    def ask(self, x: Tensor, about: int = 0) -> None:
        """x: a scalar of any dtype."""
        there = x.is_cuda
        copy, copied = x.detach().to("cpu", non_blocking=True), torch.cuda.Event() if there else None
        if there:
            copied.record()
        self._asked.append((copy, copied, about))

    def known(self, wait: bool = False) -> list[Answer]:
        """Those that have not been given yet; on a GPU without the last, if not `wait`."""
        found = []
        while self._asked and (wait or len(self._asked) > 1 or self._asked[0][1] is None):
            copy, copied, about = self._asked.popleft()
            if copied is not None:
                copied.synchronize()
            found.append(Answer(copy.item(), about))
        return found
