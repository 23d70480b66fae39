"""What every training has to be told; tasks add their own by inheritance."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from glmix.errors import UserError
from glmix.models.seeds import MOST_SLOTS
from glmix.ranges import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    Pair,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    ShareAboveZero,
    Workers,
    check_ranges,
)


def usual_precision() -> str:
    """What the precision 'auto' is on this machine: bf16 where the hardware computes in it, else fp32."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported()
    else:
        asked: Any = getattr(torch.cpu, "get_capabilities", dict)  # from PyTorch 2.6 on
        has_bf16 = asked().get("avx512_bf16", False)
    return "bf16" if has_bf16 else "fp32"


@dataclass
class TrainOptions:
    """Options of `glmix train` that every task shares, on the command line and in recipes.

    Args:
        task: what to train for; `glmix train --task TASK --help` shows the options of each.
        data: what to learn from: class folders, a tar of them, shards, a table of files and labels, parquet, hf:OWNER/NAME
            (the guide to data has all); 'scenes' generates images.
        out: folder of the run: checkpoints, logs, curves.
        resume: go on with the run in `out` from its last resume point; with no run there, begin it.
        seed: of weights, order and augmentation.
        model: name of the architecture (`glmix models`).
        model_args: options of the architecture, such as {slot_grid: [7, 7]}.
        init: checkpoint whose weights to start from; its classifier is replaced where the classes differ.
        drop_path: largest rate of stochastic depth.
        slot_grids: sides of the smallest and largest grid of slots, such as 2 12: each step draws one between these, so
            that one model does with any number of slots. Validation has the model's own grid.
        grad_checkpointing: recompute activations in the backward pass, to save memory.
        compile: compile the model with torch.compile.
        epochs: passes over the training images.
        steps: optimiser steps instead of epochs, which are then shortened a little to hold a whole number; 0 for epochs.
        batch_size: images per step and process.
        accumulate: batches whose gradients are added up before the weights move.
        lr: peak learning rate (AdamW) for a global batch of lr_batch images.
        lr_batch: the global batch that lr is meant for; lr is scaled to the real one. 0 takes lr as it is.
        schedule: how the learning rate falls: by a cosine or a polynomial to min_lr, or to a tenth at each milestone.
        min_lr: learning rate at the end of cosine or polynomial.
        milestones: epochs after which the learning rate falls to a tenth.
        poly_power: of the polynomial; 1 for a straight line.
        warmup_epochs: epochs of linear warm-up.
        warmup_steps: steps of linear warm-up instead; 0 for warmup_epochs.
        warmup_lr: learning rate at the first step of the warm-up.
        warmup_prefix: let cosine or polynomial begin when the warm-up ends, not with the run.
        layer_decay: factor on the learning rate from each layer to the one before it; 1 for none.
        weight_decay: of weights; biases, norms and LayerScale are not decayed.
        clip_grad: largest norm of the gradient; 0 for no limit.
        ema: decay of the moving average of the weights; 0 for none.
        ema_warmup: let the decay grow to `ema`; long runs do without.
        val_every: epochs from one validation to the next; the last epoch always has one.
        checkpoint_steps: optimiser steps between resume points within an epoch; 0 for the ends of epochs only.
        limit_train_batches: batches per epoch at most; 0 for all.
        limit_val_batches: validation batches at most, spread over the data; 0 for all.
        precision: auto (bf16 where the hardware has it), bf16, fp16 or fp32.
        workers: processes that load images; -1 chooses.
        devices: processes on this machine; 0 for all GPUs, or one CPU process. Set by torchrun and SLURM themselves.
        strategy: how processes work together: auto, ddp or fsdp.
        sync_bn: batch statistics over all processes (CUDA).
    """

    task: str = "classify"
    data: str = "scenes"
    out: str = "runs/glmix"
    resume: bool = False
    seed: Seed = 0
    model: str = "glnet_pico"
    model_args: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    drop_path: Share = 0.05
    slot_grids: tuple[int, int] | None = None
    grad_checkpointing: bool = False
    compile: bool = False
    epochs: PositiveInt = 30
    steps: NonNegativeInt = 0
    batch_size: Pair = 64
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 2e-3
    lr_batch: NonNegativeInt = 0
    schedule: Literal["cosine", "step", "poly"] = "cosine"
    min_lr: NonNegativeFloat = 1e-5
    milestones: list[int] = field(default_factory=list)
    poly_power: PositiveFloat = 1.0
    warmup_epochs: NonNegativeInt = 2
    warmup_steps: NonNegativeInt = 0
    warmup_lr: NonNegativeFloat = 0.0
    warmup_prefix: bool = True
    layer_decay: ShareAboveZero = 1.0
    weight_decay: NonNegativeFloat = 0.05
    clip_grad: NonNegativeFloat = 5.0
    ema: Decay = 0.999
    ema_warmup: bool = True
    val_every: PositiveInt = 1
    checkpoint_steps: NonNegativeInt = 1000
    limit_train_batches: NonNegativeInt = 0
    limit_val_batches: NonNegativeInt = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    workers: Workers = -1
    devices: NonNegativeInt = 0
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    sync_bn: bool = False

    GROUPS: ClassVar[dict[str, str]] = {  # of --help, by the first option of each
        "task": "the run",
        "model": "the model",
        "epochs": "optimisation",
        "val_every": "validation and safety",
        "precision": "the machine",
    }
    FREE: ClassVar[set[str]] = {  # what may change when a run goes on, as it changes no step already made
        "data", "out", "resume", "epochs", "steps", "val_every", "checkpoint_steps", "limit_val_batches",
        "precision", "workers", "devices", "strategy", "compile", "grad_checkpointing",
    }  # fmt: skip

    given: ClassVar[frozenset[str]] = frozenset()  # options that a person really gave; the command line sets it

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name a folder")
        try:
            self.out.encode()
        except UnicodeEncodeError as error:  # TensorBoard's files cannot have such a name
            raise ValueError(f"out {self.out!a} is no text in UTF-8; choose another folder") from error
        for name in ("min_lr", "warmup_lr"):
            if getattr(self, name) > self.lr:
                raise ValueError(f"{name} {getattr(self, name):g} is above lr {self.lr:g}, the largest of the run")
        if self.slot_grids is not None:
            least, most = self.slot_grids = (self.slot_grids[0], self.slot_grids[1])
            if not 1 <= least < most <= MOST_SLOTS**0.5:
                raise ValueError(f"slot_grids {[least, most]}: the smallest and the largest side, such as 2 12, of "
                                 f"{MOST_SLOTS} slots at most")  # fmt: skip
            if self.compile:
                raise ValueError(
                    "slot_grids changes the network in every step, which compile cannot follow; leave one out"
                )
        if self.schedule == "step" and (not self.milestones or sorted(set(self.milestones)) != self.milestones):
            raise ValueError(f"milestones {self.milestones}: the step schedule needs rising epochs, such as [8, 11]")
        if self.strategy == "fsdp" and self.ema:
            raise ValueError(
                "fsdp shards the weights and cannot keep their moving average; set ema to 0, or strategy to ddp"
            )

    def described_head(self) -> dict[str, Any]:
        """Name and options of the head of a dense task; empty for the network's own."""
        return {}

    @property
    def shared_statistics(self) -> bool:
        """Whether BatchNorm counts over all processes."""
        return self.sync_bn

    def needing_cuda(self) -> dict[str, bool]:
        """What needs a GPU, and whether it was asked for."""
        return {
            "--strategy fsdp": self.strategy == "fsdp",
            "--sync-bn": self.sync_bn,
            "--precision fp16": self.precision == "fp16",
        }

    def check_machine(self, cuda: bool) -> None:
        """Refuse what this machine cannot do, before anything is read.

        Raises:
            UserError: names the option.
        """
        for name, asked in self.needing_cuda().items():
            if asked and not cuda:
                raise UserError(f"{name} needs CUDA, and there is no GPU here; leave it out")
