"""The machine's own limits: how fast it copies, and how fast it multiplies the matrices of a training step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkv_train.bench.measure import DTYPES, race


def copy_bandwidth(device: str = "cpu", megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes a second that a large copy moves, read and written counted."""
    source = torch.rand(megabytes * 250_000, device=device)
    goal = torch.empty_like(source)
    times = race({"copy": lambda: goal.copy_(source)}, repeats, device)
    return 2 * source.nbytes / times["copy"].median


def matrices_of(model: nn.Module) -> list[Tensor]:
    """The weights of every matrix product, the head's among them: [out, in], or in RWKV-7's low-rank maps [in, out]."""
    named = model.named_parameters()
    return [p.detach() for name, p in named if p.ndim == 2 and not name.endswith(("emb.weight", ".r_k"))]


def matrix_products(model: nn.Module, tokens: int, precision: str = "fp32") -> Callable[[], None]:
    """The bare matrix products of a step on `tokens` tokens: each linear layer's forward and both backward products.

    Into memory that is there already; weights and their gradients are each layer's own, as in the step.
    """
    dtype = DTYPES[precision]
    weights = [w.to(dtype) for w in matrices_of(model)]
    sizes = {size for w in weights for size in w.shape}
    rows = {size: weights[0].new_empty(tokens, size).normal_() for size in sizes}
    results = {size: torch.empty_like(x) for size, x in rows.items()}
    slopes = [torch.empty_like(w) for w in weights]

    def step() -> None:
        for w in weights:
            torch.mm(rows[w.shape[1]], w.t(), out=results[w.shape[0]])
        for w, slope in zip(reversed(weights), reversed(slopes), strict=True):
            torch.mm(rows[w.shape[0]], w, out=results[w.shape[1]])
            torch.mm(rows[w.shape[0]].t(), rows[w.shape[1]], out=slope)

    return step


def matrix_vectors(model: nn.Module) -> Callable[[], None]:
    """The bare products of one generated token: every linear layer once, in the model's dtype."""
    weights = matrices_of(model)
    columns = {w.shape[1]: w.new_empty(1, w.shape[1]).normal_() for w in weights}

    def step() -> None:
        for w in weights:
            columns[w.shape[1]] @ w.t()

    return step
