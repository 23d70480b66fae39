"""`glmix train`."""

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from glmix.data.loading import EpochOrder, Prepared, make_loader
from glmix.data.sources import open_split
from glmix.data.transforms import evaluation_transform, training_transform
from glmix.errors import UserError, needs
from glmix.models import check_name, config_of, create_model
from glmix.models.weights import Checkpoint
from glmix.options import TrainOptions
from glmix.tasks.explain import IDLE

with needs("train"):
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from glmix.tasks.classification import Classifier
    from glmix.tasks.progress import EpochLines, plot_curves


def train(options: TrainOptions) -> None:
    """Train a classifier on your images.

    Args:
        options: see TrainOptions.
    """
    out = Path(options.out)
    resume_from = out / "resume.ckpt"
    if options.resume and not resume_from.is_file():
        raise UserError(f"{out}: nothing to resume; leave out --resume to start the run")
    if not options.resume and resume_from.is_file():
        raise UserError(f"{out}: a run is there already; go on with it by --resume, or choose another --out")
    pl.seed_everything(options.seed, verbose=False)
    task, loaders = prepare(options)
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k != "resume"}
    (out / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    trainer = make_trainer(options, task.steps_per_epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on its own internals
        trainer.fit(task, *loaders, ckpt_path=str(resume_from) if options.resume else None)
    if trainer.is_global_zero:
        if trainer.interrupted:
            raise UserError(f"{out}: interrupted; go on with `glmix train` and the same options and --resume")
        plot_curves(out / "metrics.csv", out / "curves.png")
        report(task, out)


def prepare(options: TrainOptions) -> tuple["Classifier", tuple[Any, Any]]:
    """The task and its loaders, by `options`."""
    check_name(options.model)
    images = {split: open_split(options.data, split) for split in ("train", "val")}
    classes = images["train"].classes
    if len(images["train"]) < options.batch_size:
        raise UserError(
            f"{options.data}: {len(images['train'])} training images are fewer than a batch; --batch-size {options.batch_size} is too large"
        )
    arguments = {"drop_path_rate": options.drop_path} | options.model_args
    try:
        model = create_model(options.model, num_classes=len(classes), **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model_args {options.model_args}: {error}") from error
    cfg = config_of(model)
    side = options.eval_size or options.image_size
    image = {"input_size": (model.in_chans, side, side), "crop_pct": 1.0}
    image |= {k: cfg[k] for k in ("mean", "std", "interpolation")}
    training = Prepared(images["train"], training_transform(options, image), options.seed, replace_bad=True)
    validation = Prepared(images["val"], evaluation_transform(image))
    workers = options.workers if options.workers >= 0 else min(8, max(1, (os.cpu_count() or 1) // 2))
    order = EpochOrder(len(training), shuffle=True, seed=options.seed)
    train_loader = make_loader(training, order, options.batch_size, workers, drop_last=True)
    val_loader = make_loader(validation, EpochOrder(len(validation), shuffle=False), options.batch_size, workers)
    steps = min(len(train_loader), options.limit_train_batches or len(train_loader))
    info = {"command": shlex.join(["glmix", *sys.argv[1:]]), "batch_size": options.batch_size}
    describe = Checkpoint({}, options.model, options.model_args, classes, images["train"].names, image, info)
    return Classifier(model.to(memory_format=torch.channels_last), options, steps, describe), (train_loader, val_loader)


def make_trainer(options: TrainOptions, steps: int) -> "pl.Trainer":
    """Lightning's trainer, by `options`."""
    out = Path(options.out)
    interactive = sys.stderr.isatty()
    return pl.Trainer(
        default_root_dir=out,
        max_epochs=options.epochs,
        precision=lightning_precision(options.precision),
        gradient_clip_val=options.clip_grad or None,
        check_val_every_n_epoch=options.val_every,
        limit_train_batches=options.limit_train_batches or 1.0,
        limit_val_batches=options.limit_val_batches or 1.0,
        logger=[CSVLogger(out, name="", version=""), TensorBoardLogger(out, name="tensorboard", version="")],
        callbacks=[
            ModelCheckpoint(out, filename="resume", enable_version_counter=False),
            EpochLines(),
            *([TQDMProgressBar()] if interactive else []),
        ],
        enable_progress_bar=interactive,
        num_sanity_val_steps=0,
        log_every_n_steps=min(50, steps),
        enable_model_summary=False,
    )


def report(task: "Classifier", out: Path) -> None:
    """What came out of the run, and what to type next."""
    idle = [k.split("/")[1] for k, v in task.slot_health.items() if k.endswith("assignment_entropy") and v >= IDLE]
    if idle:
        print(
            f"slots are idle (assignment close to uniform) in {', '.join(idle)}: see model_args slot_scale and slot_residual"
        )
    if task.skipped:
        print(f"skipped {len(task.skipped)} unusable images:", *sorted(task.skipped), sep="\n  ")
    print(f"best validation top-1 {task.best:.1f} %; weights, curves.png and logs in {out}")
    print(f"next: glmix eval --checkpoint {out} --data {task.options.data}")
    print(f"      glmix explain --checkpoint {out} --out slots IMAGE…")


def lightning_precision(precision: str) -> Any:
    """Lightning's name of a precision; 'auto' is bf16 where the hardware computes in it, else fp32."""
    if precision == "auto":
        cuda = torch.cuda.is_available()
        has_bf16 = torch.cuda.is_bf16_supported() if cuda else torch.cpu.get_capabilities().get("avx512_bf16", False)
        precision = "bf16" if has_bf16 else "fp32"
    return {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[precision]
