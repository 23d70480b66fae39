"""The one schema of options: what every task shares, and what training adds."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainOptions:
    """Options of `glmix train`, on the command line and in recipes.

    Args:
        data: folder of class folders, or with train/ and val/ in it, or a tar of one; WebDataset shards (their folder, or
            'shards/train-{0000..0009}.tar'); a .csv of path and label; parquet files; hf:OWNER/NAME[:CONFIG]; 'scenes'
            generates images.
        out: folder of the run: checkpoints, logs, curves.
        model: name of the architecture (`glmix models`).
        model_args: options of the architecture, such as {slot_grid: [7, 7]}.
        init: checkpoint whose weights to start from; its classifier is replaced where the classes differ.
        linear_probe: train the classifier alone.
        epochs: passes over the training images.
        batch_size: images per step and process.
        accumulate: steps whose gradients are added up before the weights move.
        lr: peak learning rate (AdamW) for a global batch of lr_batch images.
        lr_batch: the global batch that lr is meant for; lr is scaled to the real one. 0 takes lr as it is.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear warm-up.
        layer_decay: factor on the learning rate from each layer to the one before it; 1 for none.
        weight_decay: of weights; biases, norms and LayerScale are not decayed.
        clip_grad: largest norm of the gradient; 0 for no limit.
        image_size: side of training images, in pixels.
        start_size: side in the first epoch, growing to image_size by two thirds of the run; 0 for image_size.
        eval_size: side of validation images; 0 for image_size.
        eval_crop: share of the shorter side that validation images keep.
        crop_scale: smallest share of the image that a random crop takes.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation changes (not with auto_augment).
        auto_augment: timm's policy, such as rand-m9-mstd0.5-inc1; none if left out.
        random_interpolation: bilinear or bicubic by chance.
        random_erasing: probability that a rectangle is erased.
        repeats: how often an image comes, augmented anew, in an epoch of unchanged length (repeated augmentation).
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mix_prob: probability that a batch is mixed.
        label_smoothing: share of the label spread over all classes.
        token_labels: folder that `glmix label-tokens` wrote, for models with the head for them; '' for none.
        dense_weight: factor on the loss of all places, with token labels.
        drop_path: largest rate of stochastic depth.
        ema: decay of the moving average of the weights; 0 for none.
        ema_warmup: let the decay grow to `ema`; long runs do without.
        seed: of weights, order and augmentation.
        workers: processes that load images; -1 chooses.
        precision: auto (bf16 where the hardware has it), bf16, fp16 or fp32.
        compile: compile the model with torch.compile.
        grad_checkpointing: recompute activations in the backward pass, to save memory.
        sync_bn: batch statistics over all processes (CUDA).
        strategy: how processes work together: auto, ddp or fsdp.
        devices: processes on this machine; 0 for all GPUs, or one CPU process. Set by torchrun and SLURM themselves.
        checkpoint_steps: optimiser steps between resume points within an epoch; 0 for the ends of epochs only.
        val_every: epochs from one validation to the next.
        limit_train_batches: steps per epoch at most; 0 for all.
        limit_val_batches: validation batches at most; 0 for all.
        resume: go on with the run in `out` from its last resume point.
    """

    data: str = "scenes"
    out: str = "runs/glmix"
    model: str = "glnet_pico"
    model_args: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    linear_probe: bool = False
    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 2e-3
    lr_batch: int = 0
    min_lr: float = 1e-5
    warmup_epochs: int = 2
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    clip_grad: float = 5.0
    image_size: int = 128
    start_size: int = 0
    eval_size: int = 0
    eval_crop: float = 1.0
    crop_scale: float = 0.25
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_interpolation: bool = False
    random_erasing: float = 0.0
    repeats: int = 1
    mixup: float = 0.2
    cutmix: float = 1.0
    mix_prob: float = 0.5
    label_smoothing: float = 0.1
    token_labels: str = ""
    dense_weight: float = 0.5
    drop_path: float = 0.05
    ema: float = 0.999
    ema_warmup: bool = True
    seed: int = 0
    workers: int = -1
    precision: str = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    sync_bn: bool = False
    strategy: str = "auto"
    devices: int = 0
    checkpoint_steps: int = 1000
    val_every: int = 1
    limit_train_batches: int = 0
    limit_val_batches: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name a folder")
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "lr",
            "image_size",
            "repeats",
            "val_every",
            "eval_crop",
            "crop_scale",
            "layer_decay",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("image_size", "start_size", "eval_size"):
            if 0 < getattr(self, name) < 32:
                raise ValueError(f"{name} must be at least 32, the network's stride, not {getattr(self, name)}")
        for name in (
            "hflip",
            "random_erasing",
            "mix_prob",
            "label_smoothing",
            "drop_path",
            "ema",
            "layer_decay",
            "crop_scale",
            "eval_crop",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is between 0 and 1, not {getattr(self, name)}")
        for name, known in (("precision", ("auto", "bf16", "fp16", "fp32")), ("strategy", ("auto", "ddp", "fsdp"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {', '.join(known[:-1])} or {known[-1]}, not {getattr(self, name)}")
        for name in ("color_jitter", "mixup", "cutmix", "weight_decay", "clip_grad", "warmup_epochs", "checkpoint_steps",
                     "limit_train_batches", "limit_val_batches", "devices", "dense_weight"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0, as {getattr(self, name)} is")
        if self.workers < -1:
            raise ValueError(f"workers is a number of processes, or -1, not {self.workers}")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: BatchNorm learns from more than one image")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix, not {self.batch_size}")
        if self.strategy == "fsdp" and self.ema:
            raise ValueError(
                "fsdp shards the weights and cannot keep their moving average; set ema to 0, or strategy to ddp"
            )
