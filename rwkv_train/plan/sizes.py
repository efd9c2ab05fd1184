"""What a plan knows of each generation: its parameters, its state, and what its time mix keeps for the backward.

Read off models/rwkv4.py, models/rwkv7.py and the operators they call; tests/test_plan.py counts it. The letters are
those of plan.py, besides N the head size.
"""

from dataclasses import dataclass

CHUNK, ANCHOR = 16, 64  # tokens between states of WKV-7: kept by the C++ kernel, made by CUDA's in its backward


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, as in its generation's config, and what follows from them.

    A generation is a subclass. It has its `name`; `mixed`, the inputs that its token shifts mix; `first_lacks`, the
    nC in m that the first block does not save; numbers in the `matrices` and the `vectors` of a block, and in the
    `state` of a layer and lane; bytes that a block has `saved` besides what all generations do, and that the
    backward of a time mix needs besides (`workspace`), of a `Step` of plan.py. On a GPU, in bf16, forward and
    backward of a block move `between` bytes for each token and channel between matrix products and WKV, and WKV
    takes as long as copying `wkv` bytes for each.
    """

    n_layer: int
    n_embd: int
    n_ffn: int
    vocab_size: int

    @property
    def block(self) -> int:
        return self.matrices + self.vectors

    @property
    def table(self) -> int:
        """The embedding, and as many again in the head."""
        return self.vocab_size * self.n_embd

    @property
    def products(self) -> int:
        """Numbers in the matrices of all blocks."""
        return self.n_layer * self.matrices

    @property
    def layers(self) -> int:
        """Numbers in the linear layers of all blocks."""
        return self.products

    @property
    def repeated(self) -> int:
        """Those of the products that checkpoint_blocks does again."""
        return self.products

    @property
    def parameters(self) -> int:
        return self.products + self.n_layer * self.vectors + 2 * self.table + 4 * self.n_embd


@dataclass(frozen=True)
class RWKV4Sizes(Sizes):
    n_att: int

    name = "RWKV-4"
    mixed = 5
    first_lacks = 0
    between = 213  # counted by tests/tools/traffic.py
    wkv = 64  # 12 forward at 60% of a copy's bandwidth, 20 backward at 45%: aims, not measured

    @property
    def matrices(self) -> int:
        """Key, value, receptance, output of the time mix; key, value, receptance of the channel mix."""
        return self.n_embd * (4 * self.n_att + 2 * self.n_ffn + self.n_embd)

    @property
    def vectors(self) -> int:
        return 9 * self.n_embd + 2 * self.n_att

    @property
    def state(self) -> int:
        return 2 * self.n_embd + 3 * self.n_att

    def saved(self, step) -> float:
        """m: r and value of the channel mix, 2 nC; r of the time mix and its product with y, 2 nA.

        The operator: k and v in m, y and the log denominators in float32, and y again in m if that is another; in torch
        k and v in float32, too.
        """
        operator = 8 + 2 * (step.m if step.kernel else 4) + (step.m if step.m != 4 else 0)
        return step.n * (step.m * 2 * (self.n_embd + self.n_att) + operator * self.n_att)

    def workspace(self, step) -> float:
        """2 nA in m, for one of the gradients of k, v and y takes the place of the gate's; in torch 8 nA float32."""
        return (2 * step.m if step.kernel else 32) * step.n * self.n_att


@dataclass(frozen=True)
class RWKV7Sizes(Sizes):
    head_size: int
    rank_w: int
    rank_a: int
    rank_v: int
    rank_g: int

    name = "RWKV-7"
    mixed = 7
    first_lacks = 2  # the value residual
    between = 322  # counted by tests/tools/traffic.py
    wkv = 358  # 8 ms for as many at 3.0 TB/s, bound by instructions: an aim, not measured

    @property
    def ranks(self) -> int:
        return self.rank_w + self.rank_a + self.rank_v + self.rank_g

    @property
    def matrices(self) -> int:
        """Receptance, key, value, output, low-rank pairs of the time mix; key, value of the channel mix. That of
        the value residual is counted, which the first block has not: see `products`."""
        return self.n_embd * (4 * self.n_embd + 2 * self.ranks + 2 * self.n_ffn)

    @property
    def vectors(self) -> int:
        """Seven mixes, two layer norms, the heads' norm, w0, a0, v0, k_k, k_a, r_k."""
        return 19 * self.n_embd

    @property
    def products(self) -> int:
        return super().products - 2 * self.n_embd * self.rank_v

    @property
    def layers(self) -> int:
        """Without the low-rank pairs, which are no layers of their own."""
        return self.n_layer * self.n_embd * (4 * self.n_embd + 2 * self.n_ffn)

    @property
    def repeated(self) -> int:
        """Without dropout nothing needs the result of a block's last product."""
        return self.products - self.n_layer * self.n_embd * self.n_ffn

    @property
    def parameters(self) -> int:
        return super().parameters - self.n_embd

    @property
    def state(self) -> int:
        return (2 + self.head_size) * self.n_embd

    def saved(self, step) -> float:
        """With the C++ kernels, m: three inputs of sigmoids, v and k before and after, r, y, g, what goes into the last
        product: 11 nC; float32: the decay, a and b, what each token removed: 4 nC, and the state before every 16 tokens
        and the first.

        In torch, m: v_first - v, k, y, y normalised, g, y * g, and with casts r: 6 or 7 nC. float32: the decay's
        sigmoid; kk before and after its norm, the operator's decay, a and b: 6 nC; numbers of heads, 5 nC / N. r: the
        other two sigmoids, two factors of k, r * k, y with its bonus; r, k, v of the operator: 9 nC. CUDA's kernel
        keeps what each token removed. Without it all are padded to 16 tokens, and chunks of matrix products keep about
        23 + 6 * 16 / N + 2 N / 16 instead of the operator's six, and r, k and v apart.

        Inside the low-rank maps n ranks of m.
        """
        n, c, m, size = step.n, self.n_embd, step.m, self.head_size
        chunks = step.lanes * -(-step.config.data.chunk_len // CHUNK)
        if step.kernel:
            return m * n * (11 * c + self.ranks) + 16 * n * c + 4 * (chunks + step.lanes) * size * c
        kept = m * n * ((6 if m == step.r else 7) * c + self.ranks)
        kept += n * c * (4 * (6 + 5 / size) + 9 * step.r)
        if step.device == "cuda":
            return kept + 4 * n * c + 4 * step.lanes * size * c
        return kept + 4 * (23 + 6 * CHUNK / size + 2 * size / CHUNK) * chunks * CHUNK * c - 12 * n * c

    def workspace(self, step) -> float:
        """Gradients: three of the operator's inputs twice, its three others, g's, less two that take the place of what
        is no longer needed: 6 nC in m, 3 nC float32; in torch, fitted, 72 nC bytes."""
        return (6 * step.m + 12 if step.kernel else 72) * step.n * self.n_embd
