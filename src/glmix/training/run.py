"""A training run: from options to a folder with weights, curves and all that is needed to repeat or go on with it."""

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import warnings
from base64 import b64encode
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from glmix import __version__
from glmix.console import say
from glmix.data.check import gaps
from glmix.data.loading import EpochOrder, Prepared, default_workers, make_loader
from glmix.data.samples import DataSet, Source
from glmix.errors import Stopped, UserError
from glmix.files import written_whole
from glmix.models import check_name
from glmix.models.description import Description
from glmix.training.module import Trained
from glmix.training.options import TrainOptions, usual_precision
from glmix.training.processes import started
from glmix.training.progress import EpochRows, write_report
from glmix.training.resuming import ResumePoints, SafeCheckpointIO, occupied, where_to_begin
from glmix.training.task import Task

NAMED = 5  # unusable images of a split, before a run begins


def fit(task: Task, options: TrainOptions) -> Trained:
    """Train, or go on with, the run that `options` describe.

    Raises:
        UserError: the options, the data or a resume point do not go together, or the run was stopped.
    """
    options.check_machine(torch.cuda.is_available())
    out, first = Path(options.out), is_first_process()
    begun_at = where_to_begin(out, options.resume)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(options.seed, verbose=False)
    trainer = make_trainer(options)
    trained, loaders = prepare(task, options, trainer.global_rank, trainer.world_size, bool(begun_at))
    trainer.fit_loop.max_epochs = trained.options.epochs
    try:
        with occupied(out) if first else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on its own internals
            trainer.fit(trained, *loaders, ckpt_path=begun_at, weights_only=False)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise UserError(
            f"{out}: its resume point is of another model or number of classes; is this its data?"
        ) from error
    except UserError as error:  # of a process that loads images, its message ends a traceback
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
    except SystemExit as error:
        status = int(error.code or 0)
        status = status if status > 128 else 130  # a second Ctrl-C, which Lightning makes a 1 of
        if not first:
            raise SystemExit(status) from error
        raise Stopped(f"{out}: stopped; the same command with --resume goes on", status) from error
    if first:
        write_report(out, task.curves)
    return trained


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of several."""
    names = ("SLURM_PROCID", "LOCAL_RANK") if "RANK" not in os.environ else ("RANK",)
    return all(os.environ.get(name, "0") == "0" for name in names)


def prepare(
    task: Task, options: TrainOptions, rank: int = 0, processes: int = 1, goes_on: bool = False
) -> tuple[Trained, tuple[DataLoader, DataLoader]]:
    """What is trained and its loaders, for one of several processes; with its weights to come where the run goes on."""
    name = check_name(options.model, others=True)
    data = task.open(options.data)
    learned, held_out = data.split("train"), data.split("val")
    repeats = getattr(options, "repeats", 1)
    options, order = in_epochs(
        options,
        lambda limit: EpochOrder(
            len(learned), options.batch_size, True, options.seed, rank, processes, repeats, options.accumulate, limit
        ),
    )
    if not order.steps:
        raise UserError(
            f"{options.data}: {len(learned)} training images are fewer than a batch of {order.step_size}; lower --batch-size"
        )
    unusable = checked(task, options, learned, held_out) if rank == 0 else []
    head = options.described_head()
    description = Description(task.name, name, options.model_args, learned.classes, learned.names, head=head)
    model = task.build(description, drop_path_rate=options.drop_path)
    said = task.start(model, options, description)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]
    preparation = task.prepare(options, model)
    description = replace(description, preparation=preparation)
    digests: dict[str, Any] = {}
    if rank == 0:
        digests = {"classes": learned.classes, "train": learned.digest(), "val": held_out.digest()}
        description.info = information(options, data, held_out)
        description.info["validation_images"] = digests["val"]
    source, transform = task.training(options, model, description, learned)
    prepared = Prepared(source, transform, options.seed, replace_bad=True)
    validated = Prepared(held_out, task.evaluation(preparation))
    val_order = EpochOrder(
        len(held_out), options.batch_size, rank=rank, processes=processes, limit=options.limit_val_batches
    )
    workers = default_workers() if options.workers < 0 else options.workers
    loaders = tuple(make_loader(p, o, workers, task.collate) for p, o in ((prepared, order), (validated, val_order)))
    model = model.to(memory_format=torch.channels_last)
    trained = Trained(task, model, options, order, description, digests)
    if rank == 0:
        say_what_is_learned(learned, held_out, ["" if goes_on else said, *map(str, data.left_out), *unusable], trained)
    return trained, loaders  # type: ignore[return-value]


def in_epochs(options: TrainOptions, order: Callable[[int], EpochOrder]) -> tuple[TrainOptions, EpochOrder]:
    """Options and order of a run that is told in steps, in epochs that are as little shorter as makes them whole.

    Args:
        options: with `steps` or without, which changes nothing.
        order: of the training images, by the most batches an epoch may have (0: all).
    """
    whole = order(options.limit_train_batches)
    if not options.steps or not whole.steps:
        return options, whole
    epochs = -(-options.steps // whole.steps)
    return replace(options, epochs=epochs), order(-(-options.steps // epochs) * options.accumulate)


def checked(task: Task, options: TrainOptions, learned: Source, held_out: Source) -> list[str]:
    """Lines on what of the data cannot be used, of which the run makes do without; none where nobody asks.

    Raises:
        UserError: of training or validation images there are no others.
    """
    lines: list[str] = []
    if task.check is None or not getattr(options, "check", False):
        return lines
    classes: list[set[int]] = []
    for split, source in (("training", learned), ("validation", held_out)):
        looked = task.check(source)
        found = looked.unusable
        classes.append(looked.classes)
        lines += map(str, looked.notes)
        if len(found) >= len(source):
            raise UserError(f"{options.data}: no {split} image can be used (first: {found[0]})")
        lines += [f"unusable: {one}" for one in found[:NAMED]]
        if len(found) > NAMED:
            lines.append(f"{len(found) - NAMED} more {split} images are unusable; `glmix check-data` names all")
    return [*lines, *map(str, gaps(learned.classes, *classes))]


def information(options: TrainOptions, data: DataSet, held_out: Source) -> dict[str, Any]:
    """What a checkpoint tells of its training, so that evaluation finds the images that were held out again."""
    info: dict[str, Any] = {"command": shlex.join(["glmix", *sys.argv[1:]]), "batch_size": options.batch_size}
    info |= data.whole.info
    info["held_out"] = ""  # the data says itself which images are for validation
    if data.made:
        prints = np.array(sorted(held_out.fingerprints(sizes=True)), np.uint64)
        info["images"] = len(data.whole)
        info["held_out"] = b64encode(prints.tobytes()).decode()
    return info


def say_what_is_learned(learned: Source, held_out: Source, lines: list[str], trained: Trained) -> None:
    """The data as it was understood, before an hour is spent on it; `lines` come first."""
    options = trained.options
    if options.steps:
        steps = trained.order.steps
        lines.append(f"{options.steps} steps are {options.epochs} epochs of {steps}")
    for line in filter(None, lines):
        say(line)
    if trained.lr != options.lr:
        size = trained.order.step_size
        say(f"lr {options.lr:g} for a batch of {options.lr_batch} becomes {trained.lr:g} for {size}")
    say(f"{len(learned)} training and {len(held_out)} validation images of {len(learned.classes)} classes")
    if isinstance(learned.targets, list):
        unlearned = sorted(set(held_out.targets) - set(learned.targets))
        if unlearned:
            named = ", ".join(learned.classes[i] for i in unlearned[:5])
            say(f"classes without training images, never to be learned: {named}")


def make_trainer(options: TrainOptions) -> pl.Trainer:
    """Lightning's trainer, by `options` and by what torchrun or SLURM say of the processes."""
    interactive = sys.stderr.isatty()
    out = Path(options.out)
    devices, nodes = started() or (options.devices or max(1, torch.cuda.device_count()), 1)
    strategy = options.strategy if options.strategy != "auto" or devices * nodes == 1 else "ddp"
    return pl.Trainer(
        default_root_dir=out,
        max_epochs=options.epochs,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        sync_batchnorm=options.shared_statistics,
        use_distributed_sampler=False,
        precision=lightning_precision(options.precision),
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip_grad or None,
        logger=TensorBoardLogger(out, name="tensorboard", version=""),
        callbacks=[
            ResumePoints(out, options.checkpoint_steps),
            Describe(options, out),
            EpochRows(out),
            *([TQDMProgressBar()] if interactive else []),
        ],
        plugins=[SafeCheckpointIO(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
        enable_progress_bar=interactive,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def lightning_precision(precision: str) -> Any:
    """Lightning's name of a precision."""
    precision = usual_precision() if precision == "auto" else precision
    return {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[precision]


class Describe(pl.Callback):
    """`describe_run`, once it is settled that the run goes on: a refused one must not change its own options."""

    def __init__(self, options: TrainOptions, out: Path) -> None:
        self.options, self.out = options, out

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            describe_run(self.options, self.out)


def describe_run(options: TrainOptions, out: Path) -> None:
    """Write what a person needs to repeat the run: its options, and the versions and state of what ran."""
    texts = {"errors": "surrogateescape", "encoding": "utf-8"}  # a folder's name may be no text
    with written_whole(out / "config.yaml", "w", **texts) as file:
        yaml.safe_dump(vars(replace(options, resume=False)), file, sort_keys=False)
    environment = {
        "glmix": __version__,
        "git": git_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lightning": pl.__version__,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    with written_whole(out / "environment.json", "w") as file:
        json.dump(environment, file, indent=1)


def git_state() -> str:
    """Commit of this package's own repository; '' where it is installed, perhaps inside somebody else's."""
    package = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=package, capture_output=True, text=True).stdout.strip()

    try:
        root = git("rev-parse", "--show-toplevel")
        return git("describe", "--always", "--dirty") if root and Path(root) / "src" / "glmix" == package else ""
    except OSError:
        return ""
