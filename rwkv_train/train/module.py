"""The LightningModule: lanes in, one loss a step, the detached state carried on."""

from dataclasses import replace

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from rwkv_train.bptt import chunked_loss, rng_states, set_rng_states
from rwkv_train.config import FitConfig
from rwkv_train.data.lanes import LaneBatches
from rwkv_train.evaluate import Score, Scorer
from rwkv_train.models.adapters import STATE
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State
from rwkv_train.program import command
from rwkv_train.train.answers import Answers
from rwkv_train.train.graphed import GraphedStep
from rwkv_train.train.optim import make_optimizer, number_by_model, put_in_force
from rwkv_train.train.resume import refuse_changes
from rwkv_train.train.strategies import is_deepspeed, is_fsdp, part_of_step_mean, shard


class OnlineTrainingModule(L.LightningModule):
    """Training step n reads horizon * chunk_len tokens of every lane and starts from where step n-1 stopped.

    The lane state is a plain attribute: as a buffer, DDP would overwrite every rank's with rank 0's.
    """

    def __init__(
        self,
        model: RWKV,
        config: FitConfig,
        train: LaneBatches,
        val: LaneBatches | None,
        byte_lengths: np.ndarray | None = None,
        layout: dict | None = None,
    ):
        """layout: what the optimizer's groups were made of in the checkpoint to go on from, where it is known."""
        super().__init__()
        self.layout = layout or {}
        self.model, self.config = model, config
        self.train_batches, self.val_batches, self.byte_lengths = train, val, byte_lengths
        self.lane_state: State | None = None
        self.batches_done = 0
        self.grad_norm = torch.zeros(())
        self.skipped = self.skipped_in_a_row = 0  # optimizer steps whose loss or gradient was no finite number
        self._broken_steps = Answers()
        self._graphed = GraphedStep(self._recorded, list(model.parameters())) if config.train.cuda_graph else None
        self._resumed_rng: list[Tensor] | None = None
        self.reset_sums()

    def setup(self, stage: str) -> None:
        """Take this rank's share of the lanes."""
        for batches in (self.train_batches, self.val_batches):
            if batches is not None:
                batches.take(self.global_rank, self.trainer.world_size)

    def configure_model(self) -> None:
        gather_16 = self.config.train.precision == "bf16" and self.config.data.horizon == 1
        shard(self.model, self.trainer.strategy, gather_16)

    def reset_sums(self) -> None:
        """Start a new mean of the training loss: self.sums = nats and trained tokens of this rank."""
        self.sums = torch.zeros(2, dtype=torch.float64)

    def training_step(self, batch: dict[str, Tensor], _) -> Tensor:
        inputs = batch["tokens"], batch["targets"], batch["reset"]
        if self._graphed:
            state = self.lane_state or self.model.zero_state(len(inputs[0]))
            loss, tokens, *state = self._graphed(*inputs, batch["step_tokens"], *state)
            state = State(*state)
        else:
            loss, tokens, state = self._loss(*inputs, self.lane_state)
        self.lane_state = state.detach()
        self.batches_done += 1
        sums = torch.stack([loss.detach().double(), tokens.double()])
        self.sums = self.sums.to(loss.device) + torch.where(sums.isfinite().all(), sums, 0.0)
        return part_of_step_mean(loss, batch["step_tokens"], self.trainer)

    def _loss(self, tokens: Tensor, targets: Tensor, reset: Tensor, state: State | None):
        config = self.config
        more = {"z_loss": config.optim.z_loss, "checkpoint_blocks": config.checkpoint_blocks}
        return chunked_loss(self.model, tokens, targets, state, reset, config.data.chunk_len, **more)

    def _recorded(self, tokens: Tensor, targets: Tensor, reset: Tensor, step_tokens: Tensor, *state: Tensor):
        """What a graph does: the loss as it goes into the backward, and (loss, trained tokens, state)."""
        loss, n, state = self._loss(tokens, targets, reset, State(*state))
        part = part_of_step_mean(loss, step_tokens, self.trainer) / self.trainer.accumulate_grad_batches
        return part, (loss, n, *state)

    def backward(self, loss: Tensor) -> None:
        if self._graphed:  # has done it
            self._graphed.give_gradients(more_to_come=self.trainer.accumulate_grad_batches > 1)
        else:
            loss.backward()

    def configure_optimizers(self):
        steps, then = self.trainer.max_steps, replace(self.config.optim, **self.layout)
        self._asked = make_optimizer(self.model, self.config.optim, steps)
        optimizer, scheduler = make_optimizer(self.model, then, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip, keep the norm before it, and let gradients that are no finite numbers change nothing.

        (Lightning's own clipping refuses fused optimizers under bfloat16; DeepSpeed clips by itself.)
        """
        if is_deepspeed(self.trainer.strategy):
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        broken = ~self.grad_norm.isfinite()
        # A fused AdamW then leaves weights, moments and its count of steps as they are.
        self.trainer.optimizers[0].found_inf = broken.float()
        self._mend_state(broken)
        self._broken_steps.ask(broken, about=self.batches_done)
        self.count_skips()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.config.model.tune == "state":
            self.model.repair_initial_state()
        if is_deepspeed(self.trainer.strategy):
            self.grad_norm = torch.tensor(self.trainer.model.get_global_grad_norm() or 0.0)
            if not self.grad_norm.isfinite():
                then = "DeepSpeed has taken it; resume from the last checkpoint with"
                raise ValueError(self._broken("", then, self.batches_done))

    def _mend_state(self, broken: Tensor) -> None:
        """After a broken step no lane goes on with a state that is no number."""
        sound = torch.stack([part.flatten(1).isfinite().all(1) for part in self.lane_state]).all(0) | ~broken
        empty = self.model.zero_state(len(sound))
        parts = zip(self.lane_state, empty, strict=True)
        self.lane_state = State(*(torch.where(sound.view(-1, *[1] * (s.ndim - 1)), s, e) for s, e in parts))

    def count_skips(self, wait: bool = False) -> None:
        """Count the steps that changed nothing, as far as it is known or until now; give up after too many in a row."""
        for broken, batches in self._broken_steps.known(wait):
            self.skipped, self.skipped_in_a_row = self.skipped + broken, (self.skipped_in_a_row + 1) * broken
            if self.skipped_in_a_row >= self.config.train.max_skips:
                went = f"{self.skipped_in_a_row} steps in a row, which changed nothing; the last is"
                raise ValueError(self._broken(went, "the last checkpoint is sound: --resume it with", batches))

    def _broken(self, which: str, then: str, batches: int) -> str:
        """What to tell of steps without a finite gradient, after so many batches."""
        step = batches // self.trainer.accumulate_grad_batches
        documents = ", ".join(map(str, self.train_batches.documents_in(batches - 1)[:20]))
        look = command("inspect", "--run", self.trainer.default_root_dir, "--step", step)
        return (
            f"the loss or its gradient was no finite number in {which} step {step}, with documents {documents} "
            f"(`{look}` shows it); {then} a lower optim.lr"
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_batches, sampler=_From(self.batches_done, len(self.train_batches)))

    def _loader(self, batches: LaneBatches, **kwargs) -> DataLoader:
        """A loader with random numbers of its own: it draws some, and a validation must not change dropout after it.

        Its batches lie where a GPU can fetch them while it works.
        """
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(batches, batch_size=None, generator=torch.Generator(), pin_memory=on_gpu, **kwargs)

    def on_train_start(self) -> None:
        loaded = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        put_in_force(self._asked, loaded, regroup=not is_deepspeed(self.trainer.strategy))
        self._asked = None
        if self._resumed_rng is not None:
            set_rng_states(self._resumed_rng, self.device)
        elif self.global_rank:  # every rank its own dropout
            torch.manual_seed(self.config.seed + self.global_rank)

    def forward(self, scorer: Scorer, batch: dict[str, Tensor]) -> None:
        """Score a batch. A forward of the module, so that strategies that keep weights in pieces collect them."""
        scorer.add(batch)

    @torch.no_grad()
    def validate(self) -> Score:
        """Score the held-out text, all ranks together."""
        self.model.eval()
        scorer = Scorer(self.model, self.byte_lengths)
        with self.trainer.precision_plugin.forward_context():
            for batch in self._loader(self.val_batches):
                self.trainer.model(scorer, {name: x.to(self.device, non_blocking=True) for name, x in batch.items()})
        self.model.train()
        return scorer.score(self.add_over_ranks)

    def add_over_ranks(self, x: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(x.to(self.device), reduce_op="sum")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Lane states and random state of all ranks go with the weights; only rank 0's dict is written."""
        self.count_skips(wait=True)
        strategy = self.trainer.strategy
        if not is_deepspeed(strategy) and not is_fsdp(strategy):
            groups, states = self.trainer.optimizers[0].param_groups, checkpoint["optimizer_states"]
            states[0] = number_by_model(states[0], groups, self.parameters())
        checkpoint["rwkv_train"] = {
            "batches_done": self.batches_done,
            "lane_state": None if self.lane_state is None else [self._gather(s) for s in self.lane_state],
            "rng": [self._gather(s[None].to(self.device)) for s in rng_states(self.device)],
            "skipped": [self.skipped, self.skipped_in_a_row],
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = checkpoint["rwkv_train"]
        if self.config.model.tune == "state":  # runs of before trained an RWKV-7's shifts, too, and go on so
            moments = [of for optimizer in checkpoint.get("optimizer_states", []) for of in optimizer.get("state", [])]
            if len(moments) == len(STATE):
                self.model.initial_shift.requires_grad_(True)
        refuse_changes(saved.get("order", {}), self._order(), self.trainer.default_root_dir)
        self.batches_done = saved["batches_done"]
        self.skipped, self.skipped_in_a_row = saved["skipped"]
        if saved["lane_state"] is not None:
            rows = slice(self.train_batches.first, self.train_batches.first + self.train_batches.lanes)
            self.lane_state = State(*saved["lane_state"]).select(rows).to(self.device)
        kinds = saved["rng"][: len(rng_states(self.device))]
        self._resumed_rng = [states[min(self.global_rank, len(states) - 1)].cpu() for states in kinds]

    def _order(self) -> dict[str, int]:
        """What decides what batch n is, as checkpoints have kept it that know no settings."""
        data, train = self.config.data, self.train_batches
        return {
            "seed": self.config.seed,
            "data.lanes": data.lanes,
            "data.chunk_len * data.horizon": train.width,
            "the number of training documents": len(train.documents),
            "the number of training tokens": train.documents.tokens,
        }

    def _gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks, in order, on the CPU."""
        return self.all_gather(x).flatten(0, 1).cpu() if self.trainer.world_size > 1 else x.cpu()


class _From(Sampler):
    """Indices start, ..., total - 1. Its length is the whole run's: Lightning counts resumed batches as fetched."""

    def __init__(self, start: int, total: int):
        self.start, self.total = start, total

    def __iter__(self):
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total
