"""Will it fit, and how fast? The formulas: bytes of a training step on one device, its operations, what it exchanges.

Nothing runs here and no torch is needed. What autograd keeps is read off sizes.py, bptt.py and loss.py, and
tests/test_plan.py counts it. n = lanes of a device * chunk_len, H = horizon, N = devices, P = parameters;
C, A, F, V, L are n_embd, n_att, n_ffn, vocab_size, n_layer. Bytes of a number: 4; where bfloat16 makes a difference,
r of the residual stream (2 in DeepSpeed's bf16, otherwise 4), m around matrix products (2 in bf16, otherwise 4),
w of a weight (as r).
"""

from rwkv_train.config import FitConfig
from rwkv_train.plan.card import Card
from rwkv_train.plan.sizes import Sizes

PROCESS = {"cpu": 0.425e9, "cuda": 0.5e9}  # Python with torch and Lightning, measured; CUDA's context, assumed
OVERHEAD = {"fp32": 1.15, "bf16": 1.4}  # a step over its matrix products on a CPU, measured
FORWARD = 1 / 3  # of what forward and backward move together
SLICE = {"cpu": 1 << 25, "cuda": 1 << 28}  # logits held at once, as in loss.py
BUCKET = 200_000_000  # gradients that DeepSpeed sends together, by Lightning's setting
LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered at most


class Step:
    """One training step on one device: the numbers that the formulas share, then a method for each part, in bytes."""

    def __init__(self, config: FitConfig, sizes: Sizes, device: str, kernel: bool = True):
        """device: cpu or cuda. kernel: the C++ operator runs, not the one in torch."""
        data, train = config.data, config.train
        self.config, self.sizes, self.device, self.kernel = config, sizes, device, kernel and device == "cpu"
        self.ranks = train.devices * train.nodes
        self.lanes = data.lanes // self.ranks
        self.n = self.lanes * data.chunk_len
        self.zero = int(train.strategy.split("_")[2]) if train.strategy.startswith("deepspeed") else 0
        self.offload = train.strategy.endswith("offload")
        self.fsdp = train.strategy == "fsdp"
        self.ddp = train.strategy == "ddp" or (train.strategy == "auto" and self.ranks > 1)
        self.sweep = data.horizon > 1 and not self.fsdp and self.zero < 3
        bf16 = train.precision == "bf16"
        self.autocast = bf16 and not self.zero
        self.gathers_16 = bf16 and self.fsdp and data.horizon == 1  # the blocks' layers, see train/strategies.py
        self.w = self.r = 2 if bf16 and self.zero else 4
        self.m = 2 if bf16 else 4

    def weights(self) -> float:
        """wP. FSDP has 1/N of it, and gathered: embedding and head, and of the blocks the one at work, the next, and
        the buffer that one arrives in; with a horizon of several chunks all of it (measured). ZeRO-3 has 1/N and up to
        a billion gathered. The sweep keeps what it has cast, 2 bytes for each number that products read."""
        p = self.sizes.parameters
        if self.fsdp and self.ranks > 1:
            blocks = (2 if self.gathers_16 else 4) * min(3, self.sizes.n_layer) * self.sizes.block
            whole = 8 * self.sizes.table + blocks
            return 4 * p / self.ranks + (4 * p if self.config.data.horizon > 1 else min(4 * p, whole))
        cast = 2 * (self.sizes.products + self.sizes.table) if self.autocast and self.sweep else 0
        return self.w * (p / self.ranks + min(p, LIVE) if self.zero == 3 else p) + cast

    def optimizer(self) -> float:
        """AdamW's two means, 8P; DeepSpeed has float32 masters besides, 12P, in 1/N, or on the host."""
        if self.zero:
            return 0 if self.offload else 12 * self.sizes.parameters / self.ranks
        return 8 * self.sizes.parameters / (self.ranks if self.fsdp else 1)

    def gradients(self) -> tuple[float, float]:
        """Before a chunk's backward, and after the last one.

        4P after it; before it only what an earlier batch (accumulate) or chunk (horizon) left. The sweep collects the
        chunks' gradients apart from those of the batches before. DDP's buckets are a second copy. FSDP has 1/N, whole
        those of embedding and head, and two blocks' on their way; with a horizon all of them whole (measured).
        DeepSpeed has two buckets of 200M (ZeRO-3 one) and 1/N; ZeRO-1 collects batches whole.
        """
        s, p = self.sizes, self.sizes.parameters
        earlier = p if self.config.train.accumulate > 1 else 0
        if self.fsdp and self.ranks > 1:
            if self.config.data.horizon > 1:
                return (4 * p,) * 2
            after = 4 * min(p, p / self.ranks + 2 * s.table + 2 * s.block)
            return (after if earlier else 0), after
        if self.zero:
            kept = self.w * (2 * BUCKET + p / self.ranks + (earlier if self.zero == 1 else 0))
            if self.zero == 3:
                kept = self.w * (BUCKET + p / self.ranks)
            return kept + self.w * p * self.sweep, kept + self.w * p * self.sweep
        buckets = 4 * p if self.ddp else 0
        after = 4 * (p + earlier if self.sweep else p)
        return (after if self.sweep else 4 * earlier) + buckets, after + buckets

    def block_saved(self) -> float:
        """What autograd keeps of a block.

        r: the block's input and middle and two layer norms: 4 nC, in torch also two token shifts. m: the mixed inputs;
        k of the channel mix and relu(k)^2: 2 nF (in torch relu(k) instead of k). What the generation's time mix does.
        Dropout: 2 nC masks, of m bytes, on a GPU of 1.
        Under autocast also each matrix in bfloat16, but for the sweep, which has them all, and FSDP, which gathers it.
        """
        s, n = self.sizes, self.n
        kept = self.r * (4 if self.kernel else 6) * n * s.n_embd + self.m * n * (s.mixed * s.n_embd + 2 * s.n_ffn)
        kept += s.saved(self)
        kept += 2 * n * s.n_embd * (self.m if self.device == "cpu" else 1) * (self.config.model.dropout > 0)
        return kept + self.casts()

    def casts(self) -> float:
        return 2 * self.sizes.matrices if self.autocast and not self.sweep and not self.gathers_16 else 0

    def activations(self) -> tuple[float, float]:
        """Of one chunk, at the end of its forward and in the backward of its last block.

        r nC of the embedding, and what the blocks keep. With checkpoint_blocks their inputs, L r nC, and in the
        backward one block.
        """
        x, count = self.r * self.n * self.sizes.n_embd, self.sizes.n_layer
        if self.config.checkpoint_blocks:
            return count * x, count * x + self.block_saved()
        lacks = self.m * self.n * self.sizes.n_embd * self.sizes.first_lacks
        return (x + count * self.block_saved() - lacks,) * 2

    def workspace(self) -> float:
        """What the backward of the last block needs besides, at the fuller of two moments.

        In its channel mix r nC and, where the kernels run, mnF, for one of two gradients takes the place of relu(k)^2;
        in torch three. In its time mix what the generation's needs, when what the channel mix kept is gone.
        """
        s, n = self.sizes, self.n
        x = self.r * n * s.n_embd
        gone = (2 if self.kernel else 4) * x + self.m * n * (2 * s.n_ffn + 4 * s.n_embd)
        return x + max((1 if self.kernel else 3) * self.m * n * s.n_ffn, s.workspace(self) - gone)

    def states(self) -> float:
        """Of a lane H float32 states at chunk boundaries and five at work. Besides H states of the random numbers, and
        the batch: tokens, targets, positions, resets of H chunks."""
        s, data = self.sizes, self.config.data
        state = 4 * s.n_layer * s.state
        return self.lanes * (data.horizon + 5) * state + data.horizon * (5056 + 25 * self.n)

    def logits(self) -> float:
        """The head's loss, at the fullest of three moments; a slice has E logits, in m, a share of dW is mVC.

        Cross entropy: the kernels put the gradient in the place of the logits; torch needs 4E besides, without
        autocast, otherwise 8E. Products: logits, and dW, which in float32 and on CUDA each slice's product adds to; a
        CPU sums shares of 16 bits in float32. With both of these, under autocast, W in bfloat16, if not the sweep has
        it. Backward: dW, and once more scaled.
        Besides 4 r nC: the last block's output, its norm, and the gradient of that, twice.
        """
        s, m, rows = self.sizes, self.m, max(1, SLICE[self.device] // self.sizes.vocab_size)
        e, wide, slices = min(self.n, rows) * s.vocab_size, 4 * s.table, -(-self.n // rows)
        inside = m * e if self.kernel or self.device == "cuda" else (8 if m == 4 else 10) * e
        if m == 4 or self.device == "cuda":
            before, sums = (slices > 1) * wide, wide + 2 * s.table * (self.w == 2)
        else:
            share = m * s.table
            before = (0, share, wide)[min(slices, 3) - 1]
            sums = wide + 2 * share if slices > 1 else share + wide * self.autocast
        forward = max(inside + before, m * e + sums) + 2 * s.table * (self.autocast and not self.sweep)
        return max(forward, 2 * self.w * s.table) + 4 * self.r * self.n * s.n_embd

    def heap(self, temporary: float) -> float:
        """What the C library's heap wastes on a CPU: measured on Linux, not derived.

        Gradients, which stay, are laid between activations, which go, so freed blocks do not join: 0.35 of all that
        comes and goes in a step (0.2 to 0.5 in the cases of tests/tools/plan_check.py); with checkpoint_blocks about
        0.5 of what it saves, which varies from run to run. Blocks of 32 MB and more lie outside the heap.
        """
        if self.device != "cpu" or self.r * self.n * self.sizes.n_embd >= 2**25:
            return 0
        return 0.5 * self.sizes.n_layer * self.block_saved() if self.config.checkpoint_blocks else 0.35 * temporary


def memory(config: FitConfig, sizes: Sizes, device: str, kernel: bool = True) -> dict[str, float]:
    """Bytes of one device by part, at the fullest moment of a step.

    The moments: the loss of a chunk, when the head's gradient is made; the backward of the last block, when all
    activations are still there; that of the first, when almost all gradients are; the optimizer's step.
    """
    s = Step(config, sizes, device, kernel)
    before, after = s.gradients()
    always = {
        "weights": s.weights(),
        "optimizer": s.optimizer(),
        "states at boundaries": s.states(),
        "process": PROCESS[device],
    }
    head, last = s.activations()
    moments = [
        {"gradients": before, "activations": head, "logits": s.logits()},
        {"gradients": max(before, 4 * sizes.table), "activations": last, "workspace": s.workspace()},
        {
            "gradients": max(before, after - 4 * (sizes.table + sizes.block)),
            "activations": s.block_saved(),
            "workspace": s.workspace(),
        },
        {"gradients": after, "workspace": 4 * sizes.parameters / s.ranks if s.zero and not s.offload else 0},
    ]
    fullest = max(moments, key=lambda parts: sum(parts.values()))
    fullest["heap"] = s.heap(sum(fullest.values()))
    parts = ("weights", "gradients", "optimizer", "activations", "states at boundaries", "logits", "workspace", "heap")
    return {name: (always | fullest).get(name, 0.0) for name in (*parts, "process")}


def operations(config: FitConfig, sizes: Sizes) -> float:
    """Floating-point operations of matrix products a trained token: M = matrices of all blocks, VC = the head.

    Forward 2 (M + VC), backward 4 (M + VC). Once more forward: 2 (M + VC) with a horizon of several chunks, where
    weights in pieces make the head's gradients twice too, 4 VC; 2 M with checkpoint_blocks, in RWKV-7 without
    each block's last product.
    """
    data, train = config.data, config.train
    total = 6 * (sizes.products + sizes.table)
    if data.horizon > 1:
        pieces = train.strategy == "fsdp" or train.strategy.startswith("deepspeed_stage_3")
        total += 2 * (sizes.products + sizes.table) + 4 * sizes.table * pieces
    return total + 2 * sizes.repeated * config.checkpoint_blocks


def exchanged(config: FitConfig, sizes: Sizes) -> float:
    """Bytes that a device sends in an optimizer step, and as many that it receives; f = (N - 1) / N.

    DDP: a sum of all gradients, 2 * 4P f. ZeRO 1 and 2: gradients scattered, weights gathered, 2 w P f; ZeRO-2
    scatters after every batch. Weights in pieces are gathered for forward and backward, and gradients scattered:
    ZeRO-3 3 w P f a batch, with a horizon 4 H times; FSDP gathers blocks 2 H times, what is outside them H times, and
    scatters once, 4P f (counted). In bf16, without a horizon, it gathers the blocks' layers in 2 bytes a number.
    """
    train, s = config.train, Step(config, sizes, "cuda")
    share = sizes.parameters * (s.ranks - 1) / s.ranks
    horizon = config.data.horizon
    if s.fsdp:
        blocks = sizes.n_layer * sizes.block
        gathered = 8 * blocks - 4 * (sizes.layers if s.gathers_16 else 0) + 4 * (sizes.parameters - blocks)
        return (4 * share + horizon * gathered * (s.ranks - 1) / s.ranks) * train.accumulate
    if s.zero == 3:
        return s.w * share * train.accumulate * (3 if horizon == 1 else 4 * horizon)
    if s.zero:
        return s.w * share * (1 + (train.accumulate if s.zero == 2 else 1))
    return 8 * share


def moved(config: FitConfig, sizes: Sizes) -> float:
    """Bytes a trained token that a GPU copies in the time that a step takes besides its matrix products.

    LC of the blocks and their WKV, forward once more with a horizon, with checkpoint_blocks; of the loss 3 m V, logits
    read twice and replaced by their gradient. In fp32 twice as much as in bf16, at most. Not counted: casts of weights,
    the optimizer, and small kernels' launches, which are longer than their bytes where a chunk has few tokens.
    """
    again = (config.data.horizon > 1) + config.checkpoint_blocks
    m = 2 if config.train.precision == "bf16" else 4
    blocks = sizes.n_layer * sizes.n_embd * (sizes.between + sizes.wkv) * m / 2
    return blocks * (1 + FORWARD * again) + 3 * m * sizes.vocab_size


def seconds(
    config: FitConfig, sizes: Sizes, card: Card | None, speed: float, link: float
) -> tuple[float, float, float]:
    """(matrix products, whatever else computes, exchanging) in an optimizer step of one device.

    card: None on a CPU. speed in operations and link in bytes a second.
    """
    data, train = config.data, config.train
    tokens = data.lanes * data.chunk_len * data.horizon * train.accumulate / (train.devices * train.nodes)
    products = tokens * operations(config, sizes) / speed
    over = card.over if card else OVERHEAD[train.precision]
    rest = tokens * moved(config, sizes) / card.bandwidth if over is None else (over - 1) * products
    return products, rest, exchanged(config, sizes) / link
