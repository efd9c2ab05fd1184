"""Which directions of a matrix matter to a text: Kronecker-factored curvature.

A gradient step moves the predictions on everything else by about <D, A D C>, where D is the change of a matrix
[out,in], C the second moment of its inputs and A that of the gradients at its outputs (of the log probability of
tokens that the model itself sampled, which makes it the Fisher information; Martens and Grosse 2015). Of all steps
that gain as much on a correction, A^-1 G C^-1 moves everything else least. Most of that is C's: G C^-1 leaves alone
what all inputs have in common, through which a plain step moves every prediction.
"""

import torch
from torch import Tensor, nn

from rwkv_train.feedback.trainable import opened
from rwkv_train.models.base import RWKV
from rwkv_train.ops.products import as_wide

DAMPING = 0.03  # of the mean eigenvalue: trust in a curvature that was measured on little text
LANES = 32  # rows measured at once
LOGITS = 1 << 26  # numbers that these may predict, or fewer of them are


class Curvature:
    """Of some matrices of a model: C^-1 [in,in], of some A^-1 [out,out] too, and the diagonals of C and A, float32.

    The inverses are of C and A over the mean of their diagonals. tensors: all, in one dict, as they are kept in a file.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self._avoided: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def measure(cls, model: RWKV, names: list[str], both: list[str], rows: list[list[int]]) -> "Curvature":
        """On rows of tokens that the model wrote, begin to end; names are of weights of linear layers.

        both: those of which A is measured as well as C. The model itself is not touched: it may be in use meanwhile.
        """
        reader, layers = _watched(model, names, both)
        sizes = {(name, "in"): layers[name].weight.shape[1] for name in names}
        sizes |= {(name, "out"): layers[name].weight.shape[0] for name in both}
        factors = {key: torch.zeros(size, size, device=model.device) for key, size in sizes.items()}
        rows, count = sorted(rows, key=len), 0
        lanes = max(1, min(LANES, LOGITS // (len(rows[-1]) * model.config.vocab_size)))
        for i in range(0, len(rows), lanes):
            tokens, real = pad(rows[i : i + lanes])
            tokens, real = tokens.to(model.device), real.to(model.device)[:, 1:]
            with torch.enable_grad():
                logits = reader(tokens[:, :-1])[0].float()
                nll = nn.functional.cross_entropy(logits[real], tokens[:, 1:][real], reduction="sum")
            nll.backward()
            for (name, side), factor in factors.items():
                part = (layers[name].given if side == "in" else layers[name].output.grad)[real].float()
                factor += part.t() @ part
            count += int(real.sum())
        tensors = {}
        for name, side in list(factors):  # of a large model not all of them and all inverses at once
            factor = factors.pop((name, side))
            factor /= count
            tensors[f"{name}.{side}.diagonal"] = factor.diagonal().clone()
            factor /= factor.diagonal().mean().clamp(min=1e-12)
            factor.diagonal().add_(DAMPING)
            tensors[f"{name}.{side}.inverse"] = torch.cholesky_inverse(torch.linalg.cholesky(factor)).contiguous()
        return cls(tensors)

    @torch.no_grad()
    def avoiding(self, inputs: dict[str, Tensor], weight: float) -> "Curvature":
        """The same with some inputs [N,in] of each matrix added to C, weighing `weight` times what C was measured on.

        K^T K is added, of K [N,in]; by Woodbury's identity (C + K^T K)^-1 = C^-1 - A^T (I + A K^T)^-1 A, A = K C^-1.
        """
        both = Curvature(self.tensors)
        for name, given in inputs.items():
            mean = self.tensors[f"{name}.in.diagonal"].mean().clamp(min=1e-12)
            k = given.float() * (weight / (len(given) * mean)).sqrt()
            a = k @ self.tensors[f"{name}.in.inverse"]
            m = a @ k.t()
            m.diagonal().add_(1)
            both._avoided[name] = a.t(), torch.cholesky_solve(a, torch.linalg.cholesky(m))
        return both

    def precondition_kfac(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients as directions in which everything else moves least: A^-1 G C^-1."""
        found = {}
        for name, gradient in self.precondition_input(gradients).items():
            scale = self.tensors[f"{name}.out.diagonal"].mean() * self.tensors[f"{name}.in.diagonal"].mean()
            found[name] = self.tensors[f"{name}.out.inverse"] @ gradient / scale.clamp(min=1e-12)
        return found

    def precondition_input(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients as directions that avoid what the inputs have in common: G C^-1, in the gradients' own scale."""
        ways = {name: g @ self.tensors[f"{name}.in.inverse"] for name, g in gradients.items()}
        for name, (a, rest) in self._avoided.items():
            ways[name] -= (gradients[name] @ a) @ rest
        return ways

    def precondition_rms(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients over their root mean square, weight by weight, as far as it is above its own mean."""
        sides = {name: [self.tensors[f"{name}.{side}.diagonal"].sqrt() for side in ("out", "in")] for name in gradients}
        scales = {name: torch.outer(*pair) for name, pair in sides.items()}
        return {name: g / (scales[name] + scales[name].mean()) for name, g in gradients.items()}


class _Watched(nn.Module):
    """A linear layer that remembers what it was last given, and if told so the gradient at its output."""

    def __init__(self, layer: nn.Module, differentiated: bool):
        super().__init__()
        self.layer, self.differentiated = layer, differentiated

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        self.given, output = x.detach(), as_wide(self.layer(x))  # what follows, and its gradient, are float32, too
        if self.differentiated:
            # A leaf, so that nothing before it is differentiated.
            output = output if output.requires_grad else output.detach().requires_grad_()
            output.retain_grad()
        self.output = output
        return output


def _watched(model: RWKV, names: list[str], both: list[str]) -> tuple[RWKV, dict[str, _Watched]]:
    """(a twin of a model whose layers of these names are watched, those layers); it shares all weights."""
    twin, layers = opened(model), {}
    for name in names:
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        parent = twin.get_submodule(path)
        layers[name] = _Watched(getattr(parent, leaf), name in both)
        setattr(parent, leaf, layers[name])
    return twin, layers


def pad(rows: list[list[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor [R,T] int64, and where it holds them [R,T] bool."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    real = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    return tokens, real
