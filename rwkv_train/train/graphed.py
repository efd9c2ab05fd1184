"""A training step as one CUDA graph: what a batch launches, forward and backward, is recorded and replayed."""

from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_train.config import FitConfig
from rwkv_train.models.base import RWKV
from rwkv_train.ops.graph import capture


def refuse_graph(config: FitConfig, model: RWKV) -> None:
    """ValueError where a step is not the same launches for every batch."""
    if config.train.cuda_graph and model.initial_wkv is not None:
        raise ValueError(
            f"train.cuda_graph: model.init ({config.model.init}) begins documents in a state of its own, which is set "
            "where they begin, elsewhere in every batch; drop train.cuda_graph"
        )


class GraphedStep:
    """Forward and backward of a batch on tensors that stay: recorded with the first batch, replayed for every one.

    step(*inputs) returns (loss, results): the gradient of the loss is taken, and results, tensors, are handed on. It
    reads the weights where they lie, so whatever changes them must do that in place. What a call returns, and
    `gradients`, lie where the next call puts its own.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], weights: list[Tensor]):
        self._step, self.weights = step, [w for w in weights if w.requires_grad]
        self._inputs: list[Tensor] | None = None
        self.results: tuple[Tensor, ...] = ()
        self.gradients: tuple[Tensor | None, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results for inputs of the same shapes and dtypes every time. ValueError if it cannot be recorded."""
        if self._inputs is None:
            self._inputs = [x.detach().clone() for x in inputs]
            try:
                self._replay = capture(self._run)
            except RuntimeError as error:
                raise ValueError(f"train.cuda_graph: the step cannot be recorded ({error}); drop it") from error
        for mine, x in zip(self._inputs, inputs, strict=True):
            mine.copy_(x, non_blocking=True)
        self._replay()
        return self.results

    def _run(self) -> None:
        self.results = self.gradients = ()  # the memory of the run before
        loss, results = self._step(*self._inputs)
        with torch.autocast(loss.device.type, enabled=False):
            self.gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        self.results = tuple(x.detach() for x in results)

    def give_gradients(self, more_to_come: bool) -> None:
        """Add the gradients of the last call to the weights' own. more_to_come: before another call adds to them."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            if gradient is not None and weight.grad is None:
                weight.grad = gradient.clone() if more_to_come else gradient
            elif gradient is not None:
                weight.grad.add_(gradient)
