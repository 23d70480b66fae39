"""`Trained`, the Lightning module of every task."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from glmix.data.loading import Batch, EpochOrder, seeded
from glmix.data.samples import Skipped
from glmix.errors import UserError
from glmix.models import GLNet, network_of
from glmix.models.description import Description
from glmix.models.slot_maps import slot_maps
from glmix.models.weights import write_checkpoint
from glmix.training.grids import drawn_grid, own_grid, set_grid
from glmix.training.optim import parameter_groups, schedule
from glmix.training.options import TrainOptions
from glmix.training.processes import gathered
from glmix.training.resuming import NEWEST, Position
from glmix.training.task import Task

SEEN = 32  # images whose slots are looked at in a validation


class Trained(pl.LightningModule):
    """Trains `model` for `task`; validates its weights, and their moving average where there is one; keeps the best.

    Args:
        task: loss, metrics, and which of these chooses the best weights.
        model: to be trained.
        options: of the run.
        order: of the training images; told where to go on when the run is resumed.
        description: what `write_checkpoint` puts beside the weights.
        data: what the run learns from, by name: digests of its splits. A resume point of other data is refused.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        options: TrainOptions,
        order: EpochOrder,
        description: Description,
        data: dict[str, Any],
    ) -> None:
        super().__init__()
        self.task, self.model, self.options = task, model, options
        self.order, self.description, self.data = order, description, data
        self.lr = options.lr * (order.step_size / options.lr_batch if options.lr_batch else 1)
        self.ema: ModelEmaV3 | None = None
        if options.ema:
            self.ema = ModelEmaV3(model, options.ema, use_warmup=options.ema_warmup, warmup_power=3 / 4)
            self.ema.requires_grad_(False)  # it never gets gradients, and DDP must not wait for them
        if options.compile:
            model.compile()
        self.loss = task.loss(options, model, description)
        self.metrics = nn.ModuleDict({kind or "raw": task.metrics(description) for kind in self.kinds})
        self.best = dict.fromkeys(self.kinds, float("-inf"))
        self.validated_epoch = -1
        self.steps_before = 0  # of the schedule, where the run goes on
        self.skipped: set[Skipped] = set()
        self.slot_health: dict[str, float] = {}
        self.grid = own_grid(model)

    @property
    def kinds(self) -> dict[str, nn.Module]:
        """The weights that are validated and kept, by what their figures' and files' names end in."""
        return {"": self.model} | ({"_ema": self.ema.module} if self.ema is not None else {})

    @property
    def averaged(self) -> nn.Module:
        """The moving average where there is one, else the weights themselves."""
        return self.ema.module if self.ema is not None else self.model

    def train(self, mode: bool = True) -> "Trained":
        """As always, but parts none of whose weights learn stay as in use: their norms and drop path stand still."""
        super().train(mode)
        for part in self.model.modules():
            weights = list(part.parameters())
            if part is not self.model and weights and not any(weight.requires_grad for weight in weights):
                part.eval()
        if self.ema is not None:
            self.ema.eval()
        return self

    # --- optimisation

    def configure_optimizers(self) -> Any:
        o = self.options
        groups = parameter_groups(self.model, o.weight_decay, o.layer_decay, self.task.spare_scalars)
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        scheduler = schedule(optimizer, o, self.order.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def steps_done(self) -> int:
        """Steps of the schedule: whole epochs and what is done of this one, however many steps these really took."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.current_epoch * self.order.steps + batches // self.options.accumulate

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.steps_done())

    def on_train_start(self) -> None:
        self.train()  # Lightning leaves modules as they are
        scheduler: Any = self.lr_schedulers()
        scheduler.step_update(num_updates=self.steps_before)
        self.validate_last()

    def on_train_epoch_start(self) -> None:
        self.validate_last()

    def validate_last(self) -> None:
        """Validation every `val_every` epochs, and always in the last: what was trained is always measured and kept."""
        last = self.current_epoch + 1 == self.options.epochs
        self.trainer.check_val_every_n_epoch = 1 if last else self.options.val_every

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:  # here, not after the batch: a resume point must hold the step's average too
            self.ema.update(self.model, step=self.global_step + 1)

    # --- steps

    def check_readable(self, batch: Batch) -> None:
        """Stop where nothing of a batch can be read: the data is gone, and what was learned must not be lost."""
        if not len(batch) and len(batch.skipped) > 1:
            raise UserError(
                f"no image of a whole batch can be read any more ({batch.skipped[0]}); "
                f"bring {self.options.data} back, then the same command with --resume goes on"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.check_readable(batch)
        if self.options.slot_grids:
            set_grid(self.model, drawn_grid(self.options.slot_grids, self.options.seed, self.current_epoch, batch_idx))
        # everything random in a step hangs on the seed and the step alone, so a cut run repeats it
        step = batch_idx * self.trainer.world_size + self.global_rank
        with seeded(self.options.seed, self.current_epoch, step), self.attention_kernel():
            loss = self.loss(self.model, batch, self.current_epoch)
        if not torch.isfinite(loss):
            out = Path(self.options.out)
            kept = f"from the weights that are kept, by --init {out}" if (out / "best.safetensors").exists() else "anew"
            images = ", ".join(batch.names[:3]) + (f" and {len(batch) - 3} more" if len(batch) > 3 else "")
            go_on = (
                "go on by --resume --precision fp32, or " if (out / NEWEST).exists() else "try --precision fp32, or "
            )
            raise UserError(
                f"the loss is {loss.item()} in epoch {self.current_epoch + 1}, batch {batch_idx + 1} ({images}); "
                f"{'' if self.trainer.precision == '32-true' else go_on}begin {kept}, with a lower --lr and another --out"
            )
        self.skipped.update(batch.skipped)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch), sync_dist=True)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        if self.options.slot_grids and self.grid:  # after the backward pass, which may run blocks again
            set_grid(self.model, self.grid)

    def attention_kernel(self) -> AbstractContextManager:
        """On a CPU the plain form of attention, which trains 15 to 25 % faster than the fused kernel."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.attention_kernel():  # gradient checkpointing runs blocks again here
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.check_readable(batch)
        self.skipped.update(batch.skipped)
        if not len(batch):
            return
        for model, metrics in zip(self.kinds.values(), self.metrics.values(), strict=True):
            with torch.autocast(batch.images.device.type, enabled=False):  # as `glmix eval`, so that the numbers agree
                outputs = self.task.forward(model, batch)
            metrics.update(outputs, batch.targets)  # type: ignore[operator]
        if batch_idx == 0:
            self.look_at_slots(batch.images)

    def look_at_slots(self, images: Tensor) -> None:
        """Normalised entropies (1: idle) and scales of the slots of every block."""
        self.slot_health = {}
        net = network_of(self.averaged)
        mixers = net.slot_mixers() if isinstance(net, GLNet) else {}
        if not mixers:
            return
        for maps, mixer in zip(slot_maps(self.averaged, images[:SEEN]), mixers.values(), strict=True):
            self.slot_health[f"slots/{maps.block}/assignment_entropy"] = maps.entropy("assignment").mean().item()
            self.slot_health[f"slots/{maps.block}/clustering_entropy"] = maps.entropy("clustering").mean().item()
            self.slot_health[f"slots/{maps.block}/scale"] = mixer.similarity.scale.item()

    def on_validation_epoch_end(self) -> None:
        found: dict[str, dict[str, float]] = {}
        for kind, metrics in zip(self.kinds, self.metrics.values(), strict=True):
            found[kind] = metrics.compute()  # type: ignore[operator]
            metrics.reset()  # type: ignore[operator]
            self.log_dict({f"val{kind}_{name}": value for name, value in found[kind].items()}, prog_bar=True)
        self.validated_epoch = self.current_epoch
        self.log_dict(self.slot_health)
        if not self.trainer.is_global_zero:
            return
        for kind, model in self.kinds.items():
            figures = {f"val_{name}": value for name, value in found[kind].items()}
            about = self.description.info | {"epoch": self.current_epoch + 1, "headline": self.task.headline} | figures
            self.keep(kind, replace(self.description, info=about), found[kind][self.task.headline], model.state_dict())

    def keep(self, kind: str, described: Description, figure: float, tensors: dict[str, Tensor]) -> None:
        """Write the weights of a validation, and where they are the best of their kind, these too."""
        out = Path(self.options.out)
        write_checkpoint(out / f"last{kind}.safetensors", described, tensors)
        if figure > self.best[kind]:
            self.best[kind] = figure
            write_checkpoint(out / f"best{kind}.safetensors", described, tensors)

    def on_train_end(self) -> None:
        """Every process tells what it skipped, and the first one says it."""
        self.skipped = set().union(*gathered(self.skipped))

    # --- resume points

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["best"] = self.best
        checkpoint["data"] = self.data
        checkpoint["position"] = vars(Position.now(self.trainer, self.order))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_data(checkpoint.get("data", {}))
        self.steps_before = Position.of(checkpoint, self.order).go_on(checkpoint, self.order, self.options)
        best = checkpoint["best"]
        if not isinstance(best, dict):  # of an older run, which measured and kept the average alone where it had one
            kind = list(self.kinds)[-1]
            best = {kind: best}
            for name in ("best", "last"):
                kept = Path(self.options.out) / f"{name}.safetensors"
                if kind and kept.exists() and self.trainer.is_global_zero:
                    os.replace(kept, kept.with_name(f"{name}{kind}.safetensors"))
        self.best |= best

    def check_data(self, before: dict[str, Any]) -> None:
        """Refuse to go on with other data than the run was begun with.

        Raises:
            UserError: classes, training or validation images are others.
        """
        kinds = {"classes": "other classes", "train": "other training images", "val": "other validation images"}
        for key, kind in kinds.items():
            if key in before and key in self.data and before[key] != self.data[key]:
                count = key == "classes" and len(before[key]) != len(self.data[key])
                raise UserError(
                    f"{self.options.data}: {kind} than those that the run in {self.options.out} was begun with"
                    + (", so its resume point is of another model or number of classes" if count else "")
                    + f"; bring those back, or start another run by --out with --init {self.options.out}"
                )
