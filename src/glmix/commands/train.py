"""`glmix train`."""

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from glmix import __version__
from glmix.commands.common import default_workers
from glmix.data.loading import Batch, EpochOrder, Prepared, collate, make_loader
from glmix.data.sources import open_split
from glmix.data.token_labels import TokenTransform, collate_tokens, digest_of, open_token_labels, prepare_tokens
from glmix.data.transforms import evaluation_transform, training_transform
from glmix.errors import UserError, needs
from glmix.models import GLNet, check_name, config_of, create_model, load_body
from glmix.models.weights import Checkpoint
from glmix.options import TrainOptions
from glmix.tasks.figures import IDLE

with needs("train"):
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from glmix.tasks.classification import Classifier
    from glmix.tasks.progress import EpochRows, write_report
    from glmix.tasks.resuming import ResumePoints, SafeCheckpointIO, find_resume_point
    from glmix.tasks.token_labeling import TokenLabeler, token_grid


def train(options: TrainOptions) -> None:
    """Train a classifier on your images.

    Args:
        options: see TrainOptions.
    """
    out = Path(options.out)
    resume_from = find_resume_point(out)
    if options.resume and resume_from is None:
        raise UserError(f"{out}: nothing to resume; leave out --resume to start the run")
    if not options.resume and resume_from is not None:
        raise UserError(f"{out}: a run is there already; go on with it by --resume, or choose another --out")
    if resume_from is not None:
        options = as_begun(options, out)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(options.seed, verbose=False)
    trainer = make_trainer(options)
    task, loaders = prepare(options, trainer.global_rank, trainer.world_size)
    if trainer.is_global_zero:
        describe_run(options, out)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on its own internals
            trainer.fit(task, *loaders, ckpt_path=resume_from, weights_only=False)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise UserError(
            f"{out}: its resume point is of another model or number of classes; is this its data?"
        ) from error
    except SystemExit as error:
        raise UserError(f"{out}: stopped; the same command with --resume goes on") from error
    if trainer.is_global_zero:
        write_report(out)
        report(task, out)


FREE = {
    "epochs",
    "data",
    "out",
    "resume",
    "val_every",
    "workers",
    "checkpoint_steps",
    "compile",
    "grad_checkpointing",
    "limit_val_batches",
    "devices",
    "strategy",
    "token_labels",
}  # fmt: skip  (what may change when a run goes on)


def as_begun(options: TrainOptions, out: Path) -> TrainOptions:
    """The options that a run was begun with, and of those given now the ones that are free to change.

    Raises:
        UserError: another option was given that would make it another run.
    """
    path = out / "config.yaml"
    if not path.exists():
        return options
    try:
        begun = TrainOptions(**yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({str(error).splitlines()[0]}); give all options anew, and remove it"
        ) from error
    usual, given = TrainOptions(), {}
    for name, value in vars(options).items():
        if value not in (getattr(usual, name), getattr(begun, name)):
            if name not in FREE:
                raise UserError(
                    f"{out}: was begun with {name} {getattr(begun, name)}, not {value}; leave that option out, "
                    "or start another run by another --out"
                )
            given[name] = value
    return replace(begun, **given | {"out": options.out, "resume": True})


def make_model(options: TrainOptions, classes: int) -> GLNet:
    """The model by `options`: fresh, or with the weights of `init` and a classifier for `classes`."""
    arguments = {"drop_path_rate": options.drop_path} | options.model_args
    try:
        model = create_model(check_name(options.model), num_classes=classes, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"model_args {options.model_args}: {error}") from error
    if options.init:
        load_body(model, options.init)
    if options.linear_probe:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model.to(memory_format=torch.channels_last)


def prepare(options: TrainOptions, rank: int = 0, world_size: int = 1) -> tuple["Classifier", tuple[Any, Any]]:
    """The task and its loaders, by `options`, for one of `world_size` processes."""
    check_name(options.model)
    images = {split: open_split(options.data, split) for split in ("train", "val")}
    classes = images["train"].classes
    global_batch = options.batch_size * options.accumulate * world_size
    if len(images["train"]) < global_batch:
        raise UserError(
            f"{options.data}: {len(images['train'])} training images are fewer than a batch of {global_batch}; lower --batch-size"
        )
    model = make_model(options, len(classes))
    cfg = config_of(model)
    side = options.eval_size or options.image_size
    image = {"input_size": (model.in_chans, side, side), "crop_pct": options.eval_crop}
    image |= {k: cfg[k] for k in ("mean", "std", "interpolation")}
    if model.token_labeling and not options.token_labels and rank == 0:
        print("no --token-labels: the head for places learns from the class label alone", file=sys.stderr)
    kind: type[Classifier] = Classifier
    gather: Callable[[list[Any]], Batch] = collate
    if options.token_labels:
        kind, gather = TokenLabeler, collate_tokens
        tokens = open_token_labels(options.token_labels, images["train"])
        grid = token_grid(model, options.image_size)
        transform = TokenTransform(options, image, grid, len(classes))
        training = prepare_tokens(images["train"], tokens, transform, options.seed)
    else:
        training = Prepared(images["train"], training_transform(options, image), options.seed, replace_bad=True)
    validation = Prepared(images["val"], evaluation_transform(image))
    workers = default_workers() if options.workers < 0 else options.workers
    order = EpochOrder(len(training), True, options.seed, rank, world_size, options.repeats, options.batch_size)
    val_order = EpochOrder(len(validation), False, 0, rank, world_size)
    train_loader = make_loader(training, order, options.batch_size, workers, drop_last=True, gather=gather)
    val_loader = make_loader(validation, val_order, options.batch_size, workers)
    batches = min(len(train_loader), options.limit_train_batches or len(train_loader))
    lr = options.lr * (global_batch / options.lr_batch if options.lr_batch else 1)
    if lr != options.lr and rank == 0:
        print(f"lr {options.lr:g} for a batch of {options.lr_batch} becomes {lr:g} for {global_batch}", file=sys.stderr)
    info = {"command": shlex.join(["glmix", *sys.argv[1:]]), "batch_size": options.batch_size}
    info["validation_images"] = digest_of(images["val"])
    describe = Checkpoint({}, options.model, options.model_args, classes, images["train"].names, image, info)
    task = kind(model, options, lr, max(1, batches // options.accumulate), order, describe)
    unlearned = sorted(set(images["val"].labels) - set(images["train"].labels))
    if rank == 0:
        counts = (len(images[split]) for split in ("train", "val"))
        print("{} training and {} validation images".format(*counts), f"of {len(classes)} classes", file=sys.stderr)
        if unlearned:
            named = ", ".join(classes[i] for i in unlearned[:5])
            print(f"classes without training images, never to be learned: {named}", file=sys.stderr)
    return task, (train_loader, val_loader)


def make_trainer(options: TrainOptions) -> "pl.Trainer":
    """Lightning's trainer, by `options` and by what torchrun or SLURM say of the processes."""
    interactive = sys.stderr.isatty()
    out = Path(options.out)
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        devices = int(environment["LOCAL_WORLD_SIZE"])
        nodes = int(environment["WORLD_SIZE"]) // devices
    elif "SLURM_NTASKS_PER_NODE" in environment:
        devices = int(environment["SLURM_NTASKS_PER_NODE"])
        nodes = int(environment.get("SLURM_NNODES", 1))
    else:
        devices, nodes = options.devices or max(1, torch.cuda.device_count()), 1
    strategy = options.strategy if options.strategy != "auto" or devices * nodes == 1 else "ddp"
    return pl.Trainer(
        default_root_dir=out,
        max_epochs=options.epochs,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        sync_batchnorm=options.sync_bn,
        use_distributed_sampler=False,
        precision=lightning_precision(options.precision),
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip_grad or None,
        check_val_every_n_epoch=options.val_every,
        limit_train_batches=options.limit_train_batches or 1.0,
        limit_val_batches=options.limit_val_batches or 1.0,
        logger=TensorBoardLogger(out, name="tensorboard", version=""),
        callbacks=[
            ResumePoints(out, options.checkpoint_steps),
            EpochRows(out),
            *([TQDMProgressBar()] if interactive else []),
        ],
        plugins=[SafeCheckpointIO(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
        enable_progress_bar=interactive,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


def describe_run(options: TrainOptions, out: Path) -> None:
    """Write what a person needs to repeat the run: its options, and the versions and state of what ran."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(vars(replace(options, resume=False)), sort_keys=False))
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
        git = commit.stdout.strip()
    except OSError:
        git = ""
    environment = {
        "glmix": __version__,
        "git": git,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lightning": pl.__version__,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    (out / "environment.json").write_text(json.dumps(environment, indent=1))


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
    print(f"next: glmix eval --checkpoint {out} --data {shlex.quote(task.options.data)}")
    print(f"      glmix explain --checkpoint {out} --out slots IMAGE…")


def lightning_precision(precision: str) -> Any:
    """Lightning's name of a precision; 'auto' is bf16 where the hardware computes in it, else fp32."""
    if precision == "auto":
        cuda = torch.cuda.is_available()
        has_bf16 = torch.cuda.is_bf16_supported() if cuda else torch.cpu.get_capabilities().get("avx512_bf16", False)
        precision = "bf16" if has_bf16 else "fp32"
    return {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[precision]
