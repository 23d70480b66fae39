"""Classification: the Lightning module, and what surrounds it in a run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from glmix.data.loading import Batch, EpochOrder, seeded
from glmix.errors import UserError
from glmix.models import GLNet
from glmix.models.slot_maps import slot_maps
from glmix.models.weights import Checkpoint, write_checkpoint
from glmix.options import TrainOptions
from glmix.tasks.evaluation import Scores
from glmix.tasks.optim import cosine, parameter_groups
from glmix.tasks.resuming import position


class Classifier(pl.LightningModule):
    """Trains `model` by `options`; validates the moving average of its weights where there is one.

    Args:
        model: returns logits (B, classes).
        options: of the run.
        lr: peak learning rate, scaled to the real batch.
        steps_per_epoch: optimiser steps.
        order: of the training images; told where to go on when the run is resumed.
        describe: checkpoint without tensors: what `write_checkpoint` puts beside the weights.
    """

    def __init__(
        self,
        model: GLNet,
        options: TrainOptions,
        lr: float,
        steps_per_epoch: int,
        order: EpochOrder,
        describe: Checkpoint,
    ) -> None:
        super().__init__()
        self.model = model
        self.options, self.lr, self.steps_per_epoch = options, lr, steps_per_epoch
        self.order, self.describe = order, describe
        self.ema: ModelEmaV3 | None = None
        if options.ema:
            self.ema = ModelEmaV3(model, options.ema, use_warmup=options.ema_warmup, warmup_power=3 / 4)
            self.ema.requires_grad_(False)  # it never gets gradients, and DDP must not wait for them
        if options.compile:
            model.compile()
        classes, o = len(describe.classes), options
        self.mix: Mixup | None = None
        if o.mixup or o.cutmix:
            smoothing = {"label_smoothing": o.label_smoothing, "num_classes": classes}
            self.mix = Mixup(o.mixup, o.cutmix, prob=o.mix_prob, **smoothing)
        self.scores = Scores(classes)
        self.best = -1.0
        self.validated_epoch = -1
        self.skipped: set[str] = set()
        self.slot_health: dict[str, float] = {}

    @property
    def averaged(self) -> GLNet:
        """The weights that are validated and kept."""
        return cast(GLNet, self.ema.module) if self.ema is not None else self.model

    def configure_optimizers(self) -> Any:
        o = self.options
        optimizer = torch.optim.AdamW(parameter_groups(self.model, o.weight_decay, o.layer_decay), lr=self.lr)
        scheduler = cosine(optimizer, o.epochs, self.steps_per_epoch, o.warmup_epochs, o.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)

    def size_now(self) -> int:
        """Side of training images in this epoch, a multiple of 16."""
        o = self.options
        if not o.start_size or self.current_epoch >= o.epochs * 2 / 3:
            return o.image_size
        grown = o.start_size + (o.image_size - o.start_size) * self.current_epoch / (o.epochs * 2 / 3)
        return int(grown) // 16 * 16

    def check_readable(self, batch: Batch) -> None:
        """Stop where nothing of a batch can be read: the data is gone, and what was learned must not be lost."""
        if not len(batch.labels) and len(batch.skipped) > 1:
            raise UserError(
                f"no image of a whole batch can be read any more ({batch.skipped[0]}); "
                f"bring {self.options.data} back, then the same command with --resume goes on"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.check_readable(batch)
        # everything random in a step hangs on the seed and the step alone, so a cut run repeats it
        step = batch_idx * self.trainer.world_size + self.global_rank
        with seeded(self.options.seed, self.current_epoch, step), self.attention_kernel():
            images, side = batch.images, self.size_now()
            if images.shape[-1] != side:
                images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
            loss = self.loss_of(images.contiguous(memory_format=torch.channels_last), batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} in epoch {self.current_epoch + 1}, batch {batch_idx + 1}; "
                f"the last good checkpoint is kept in {self.options.out}; lower --lr, or --precision fp32"
            )
        self.skipped.update(batch.skipped)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def loss_of(self, images: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of `images` (those of the batch, at the size of this epoch), mixed and smoothed as asked."""
        if self.mix is not None and len(images) % 2 == 0:
            images, targets = self.mix(images, batch.labels)
        else:
            targets = F.one_hot(batch.labels, len(self.describe.classes)).float()
            targets = targets * (1 - self.options.label_smoothing) + self.options.label_smoothing / targets.shape[1]
        return F.cross_entropy(self.model(images).float(), targets)

    def attention_kernel(self) -> AbstractContextManager:
        """On a CPU the plain form of attention, which trains 15 to 25 % faster than the fused kernel."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.attention_kernel():  # gradient checkpointing runs blocks again here
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:  # here, not after the batch: a resume point must hold the step's average too
            self.ema.update(self.model, step=self.global_step + 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.check_readable(batch)
        self.skipped.update(batch.skipped)
        if not len(batch.labels):
            return
        with torch.autocast(batch.images.device.type, enabled=False):  # as `glmix eval` will, so that the numbers agree
            logits = self.averaged(batch.images.contiguous(memory_format=torch.channels_last))
        self.scores.update(logits, batch.labels)
        if batch_idx == 0:
            self.look_at_slots(batch.images)

    def look_at_slots(self, images: Tensor) -> None:
        """Normalised entropies (1: idle) and scales of the slots of every block."""
        self.slot_health = {}
        for maps, mixer in zip(
            slot_maps(self.averaged, images[:32]), self.averaged.slot_mixers().values(), strict=True
        ):
            self.slot_health[f"slots/{maps.block}/assignment_entropy"] = maps.entropy("assignment").mean().item()
            self.slot_health[f"slots/{maps.block}/clustering_entropy"] = maps.entropy("clustering").mean().item()
            self.slot_health[f"slots/{maps.block}/scale"] = mixer.similarity.scale.item()

    def on_validation_epoch_end(self) -> None:
        values = {f"val_{name}": value for name, value in self.scores.compute().items()}
        self.scores.reset()
        self.validated_epoch = self.current_epoch
        self.log_dict(values, prog_bar=True)
        self.log_dict(self.slot_health)
        if self.trainer.sanity_checking or not self.trainer.is_global_zero:
            return
        info = self.describe.info | {"epoch": self.current_epoch + 1} | values
        checkpoint = replace(self.describe, info=info, state_dict=self.averaged.state_dict())
        write_checkpoint(Path(self.options.out) / "last.safetensors", checkpoint)
        if values["val_top1"] > self.best:
            self.best = values["val_top1"]
            write_checkpoint(Path(self.options.out) / "best.safetensors", checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["best"]
        epoch, batches = position(checkpoint, self.steps_per_epoch * self.options.accumulate)
        self.order.resume_at(epoch, batches * self.options.batch_size)
