"""The rows of studies trained side by side on one GPU: dozens of small networks in minutes.

    python scripts/train_many.py imagenette2-160 --out runs/many --jobs short:integration plain:stages fine:stages/all,none
    python scripts/train_many.py --report runs/many

`glmix study` runs `glmix train` for each row, which keeps a large GPU waiting (docs/clusters.md). Here images lie in the
GPU's memory and are cropped, flipped and mixed there, in bfloat16, and a step of each network is one CUDA graph. Networks of one
seed learn from the very same batches, and what they have in common begins alike. Crops are bilinear at twice the size,
then averaged, in place of Pillow's bicubic ones. Without a GPU it runs on the CPU, slowly, to try it.

Each network that is done is a line of `results.jsonl`.
"""

import argparse
import copy
import json
import math
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmix.data.naming import readable_names
from glmix.data.prepare import Preparation
from glmix.models.description import Description
from glmix.models.load import build
from glmix.models.weights import write_checkpoint
from glmix.studies.rows import STUDIES, Row
from glmix.tasks.classify import ClassifyOptions
from glmix.training.optim import parameter_groups, schedule

CANVAS = 240  # pixels: the shorter side of an image is 160 there; of a longer one than this, the middle
EVALUATED = 160
# of `slots`: one network for all grids, as `--slot-grids` and `--slot-distill` train
ANY, DISTILLED = "any", "any-distilled"
GRIDS = (2, 4, 6, 7, 8, 10, 12)


@dataclass(frozen=True)
class Setting:
    """How the networks of a comparison are trained.

    Attributes:
        options: of `glmix train`.
        model_args: of the architecture.
        grown: share of the run from which on images have `image_size`; before it `start_size`.
        teacher: whether all places learn what a teacher of a thousand classes sees there.
    """

    options: ClassifyOptions
    model_args: dict[str, Any] = field(default_factory=dict)
    grown: float = 2 / 3
    teacher: bool = False

    @property
    def sizes(self) -> tuple[tuple[int, float], ...]:
        """Sides of images, and the share of the run from which on they are."""
        o = self.options
        return ((o.start_size, 0.0), (o.image_size, self.grown)) if o.start_size else ((o.image_size, 0.0),)


# of docs/studies.md, and of recipes/small/imagenette_pico.yaml
SHORT = ClassifyOptions(epochs=4, warmup_epochs=1, image_size=96, lr=1.5e-3, crop_scale=0.6, mixup=0, cutmix=0, ema=0)
LONG = ClassifyOptions(epochs=40, start_size=96, image_size=128, eval_size=160, crop_scale=0.3)
USUAL_GRID = (7, 7)  # of glnet_pico
FINE = {"stem_stride": 2}  # four times as many places for as many slots
SETTINGS = {
    "short": Setting(SHORT),
    "plain": Setting(LONG),
    "published": Setting(LONG, {"slot_residual": False}),  # the block of the published variants
    "fine": Setting(replace(LONG, epochs=20), FINE),
    "fine-normed": Setting(replace(LONG, epochs=20), FINE | {"seeds_from": "normed"}),
    "teacher": Setting(LONG, teacher=True),
    "fine-teacher": Setting(replace(LONG, epochs=20), FINE, teacher=True),
}


def rows_of(study: str) -> dict[str, Row]:
    """The rows of a study, and of `slots` two more."""
    rows = dict(STUDIES[study].rows)
    return rows | {ANY: Row({}), DISTILLED: Row({})} if study == "slots" else rows


# --- images


def canvas(path: Path) -> tuple[Tensor, tuple[int, int]]:
    """An image in the corner of a square one, and its height and width."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    factor = EVALUATED / min(image.size)
    if factor != 1:
        image = image.resize([max(EVALUATED, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)
    width, height = (min(side, CANVAS) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.zeros((3, CANVAS, CANVAS), np.uint8)
    pixels[:, :height, :width] = np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)
    return torch.from_numpy(pixels), (height, width)


def read_split(data: Path, split: str, threads: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Canvases (N, 3, 240, 240) in bytes, heights and widths (N, 2), labels (N,), and the classes."""
    classes = sorted(folder.name for folder in (data / split).iterdir())
    files = [(path, i) for i, name in enumerate(classes) for path in sorted((data / split / name).iterdir())]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(canvas, [path for path, _ in files]))
    images = torch.stack([image for image, _ in found])
    return images, torch.tensor([size for _, size in found]), torch.tensor([label for _, label in files]), classes


def normalised(x: Tensor, preparation: Preparation) -> Tensor:
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in preparation.statistics)
    return (x / 255 - mean) / std


def drawn_crops(sizes: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Random crops, flipped by half, as affine maps (B, 2, 3) from [-1, 1] into the canvas."""
    B, device = len(sizes), sizes.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=generator, device=device)

    area = sizes.prod(1) * uniform(smallest, 1.0)
    ratio = torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    height = torch.minimum((area / ratio).sqrt(), sizes[:, 0])
    width = torch.minimum((area * ratio).sqrt(), sizes[:, 1])
    top, left = (sizes[:, 0] - height) * uniform(0, 1), (sizes[:, 1] - width) * uniform(0, 1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(top)
    across = torch.stack([flip * width, zero, 2 * left + width - CANVAS], 1)
    down = torch.stack([zero, height, 2 * top + height - CANVAS], 1)
    return torch.stack([across, down], 1) / CANVAS


def cropped(images: Tensor, crops: Tensor, side: int) -> Tensor:
    """Crops (B, 3, side, side) of canvases in bytes, in float32 and bytes' range."""
    grid = F.affine_grid(crops, [len(crops), 3, 2 * side, 2 * side], align_corners=False)
    return F.avg_pool2d(F.grid_sample(images.float(), grid, align_corners=False, padding_mode="border"), 2)


# --- networks


class Learner:
    """A network that learns from static tensors: images, class targets and, with a teacher, targets of places."""

    def __init__(self, setting: Setting, study: str, row: str, seed: int, classes: list[str], device: str) -> None:
        self.study, self.row, self.seed, self.device, self.options = study, row, seed, device, setting.options
        known = rows_of(study)
        own, base = known[row], known[STUDIES[study].base]
        dense = {"token_labeling": True, "dense_classes": 1000} if setting.teacher else {}
        shared = {} if own.model else setting.model_args | dense
        side = self.options.eval_size or self.options.image_size
        self.description = Description(
            "classify",
            own.model or "glnet_pico",
            shared | own.options,
            classes,
            readable_names(classes),
            preparation=Preparation((side, side), crop=1.0),
        )
        torch.manual_seed(seed)
        model: Any = build(self.description, drop_path_rate=self.options.drop_path)
        if not own.model:  # rows of one seed begin alike: what they have of the base has its values
            torch.manual_seed(seed)
            whole = build(replace(self.description, model_args=shared | base.options)).state_dict()
            there = model.state_dict()
            model.load_state_dict(
                {k: v for k, v in whole.items() if k in there and there[k].shape == v.shape}, strict=False
            )
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.rate = torch.tensor(0.0, device=device)
        self.pull = torch.tensor(0.0, device=device)  # of the moving average
        groups = parameter_groups(self.model, self.options.weight_decay)
        for group in groups:
            del group["lr_scale"]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, capturable=device == "cuda", fused=device == "cuda")
        self.grids = (
            [None] if row not in (ANY, DISTILLED) else [(side, side) for side in range(GRIDS[0], GRIDS[-1] + 1)]
        )
        self.graphs: dict[Any, tuple[Any, dict[str, Tensor], Tensor]] = {}
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def loss(self, inputs: dict[str, Tensor], grid: tuple[int, int] | None) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, self.device == "cuda", cache_enabled=False):
            if self.row == DISTILLED:
                self.model.set_slot_grid(self.grids[-1])
                answers = self.model(inputs["images"]).float()
            if grid is not None:
                self.model.set_slot_grid(grid)
            if "places" not in inputs:
                logits = self.model(inputs["images"]).float()
            else:
                features = self.model.forward_features(inputs["images"])
                logits = self.model.forward_head(features).float()
                places = self.model.forward_dense(features).float()
        if self.row == DISTILLED:
            learned = F.cross_entropy(logits, answers.detach().softmax(1))
            return (F.cross_entropy(answers, inputs["targets"]) + learned) / 2
        loss = F.cross_entropy(logits, inputs["targets"])
        if "places" in inputs:
            loss = loss + 0.5 * F.cross_entropy(places.flatten(0, 1), inputs["places"].flatten(0, 1))
        return loss

    def step(self, inputs: dict[str, Tensor], grid: tuple[int, int] | None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(inputs, grid)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad, foreach=True)
        self.optimizer.step()
        if self.options.ema:
            with torch.no_grad():
                averages, values = self.averaged()
                distance = torch._foreach_sub(values, averages)
                torch._foreach_mul_(distance, self.pull)
                torch._foreach_add_(averages, distance)
        return loss.detach()

    def averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors of the moving average, and of the network."""
        both = zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True)
        pairs = [(a, b.detach()) for a, b in both if a.is_floating_point()]
        return [a for a, _ in pairs], [b for _, b in pairs]

    def capture(self, inputs: dict[str, Tensor]) -> None:
        """Make graphs of the step for images of this size; leaves the network as it was."""
        side = inputs["images"].shape[-1]
        if self.stream is None:
            self.graphs |= {(side, grid): (None, inputs, torch.zeros(())) for grid in self.grids}
            return
        before = self.states()
        torch.cuda.synchronize()  # what was copied is there before a step changes it
        pool = None
        for grid in self.grids:
            graph = torch.cuda.CUDAGraph()
            # its own stream: cuBLAS has one workspace a stream, and graphs that run at once must not share it
            with torch.cuda.stream(self.stream):
                self.step(inputs, grid)
                torch.cuda.synchronize()
                self.optimizer.zero_grad(set_to_none=True)
                graph.capture_begin(pool=pool)
                loss = self.step(inputs, grid)
                graph.capture_end()
            torch.cuda.synchronize()
            pool = graph.pool()  # graphs of one network are never run at the same time
            self.graphs[side, grid] = graph, inputs, loss
        self.begin_anew(before)

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the weights and of their average, for `begin_anew`."""
        return copy.deepcopy((self.model.state_dict(), self.average.state_dict()))

    def begin_anew(self, states: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        """Weights and their average as they were, and the optimiser's state as at first."""
        self.model.load_state_dict(states[0])
        self.average.load_state_dict(states[1])
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def learn(self, side: int, rate: float, pull: float, chance: float) -> Tensor:
        """A step at `side` pixels, on a stream of its own; what it learns from must be there on the current one."""
        grid = self.grids[int(chance * len(self.grids))]
        graph, inputs, loss = self.graphs[side, grid]
        if graph is None or self.stream is None:
            self.rate.fill_(rate)
            self.pull.fill_(pull)
            return self.step(inputs, grid)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.rate.fill_(rate)
            self.pull.fill_(pull)
            graph.replay()
        return loss

    @property
    def used(self) -> nn.Module:
        """The moving average where there is one, in use."""
        return (self.average if self.options.ema else self.model).eval()

    @torch.no_grad()
    def top1(self, images: Tensor, labels: Tensor, grid: tuple[int, int] | None = None) -> float:
        """Accuracy in percent, in float32."""
        net: Any = self.used
        torch.backends.cudnn.benchmark = False  # not worth it for a handful of batches
        if grid is not None:
            net.set_slot_grid(grid)
        pairs = zip(images.split(1024), labels.split(1024), strict=True)
        return 100 * sum((net(x).argmax(1) == y).sum().item() for x, y in pairs) / len(labels)


class Teacher:
    """What EfficientNet-lite0 sees at 7 x 7 places: probabilities of a thousand classes."""

    def __init__(self, weights: str, device: str) -> None:
        import timm

        self.model: Any = timm.create_model("tf_efficientnet_lite0")
        self.model.load_state_dict(torch.load(weights, weights_only=True))
        self.model.eval().requires_grad_(False)
        self.model.to(device).to(memory_format=torch.channels_last)
        self.preparation, self.device = Preparation.of(self.model.pretrained_cfg), device
        self.graph: Any = None

    def see(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, self.device == "cuda", cache_enabled=False), torch.no_grad():
            x = self.model.forward_features(images)
            return F.linear(x.permute(0, 2, 3, 1), self.model.classifier.weight, self.model.classifier.bias).float()

    def __call__(self, images: Tensor, crops: Tensor) -> Tensor:
        """Scores (B, 7, 7, 1000) of crops of canvases."""
        x = normalised(cropped(images, crops, 224), self.preparation).contiguous(memory_format=torch.channels_last)
        if self.device != "cuda":
            return self.see(x)
        if self.graph is None:
            self.images = x.clone(memory_format=torch.channels_last)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.see(self.images)
                self.see(self.images)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.scores = self.see(self.images)
        self.images.copy_(x)
        self.graph.replay()
        return self.scores


class Batches:
    """The batches of one seed, in static tensors: cropped, flipped and mixed, the same for all that learn from them."""

    def __init__(
        self,
        data: Any,
        seed: int,
        setting: Setting,
        device: str,
        teacher: Teacher | None,
        inputs: dict[int, dict[str, Tensor]] | None = None,
    ) -> None:
        self.images, self.sizes, self.labels = data
        self.classes = int(self.labels.max()) + 1
        self.options, self.device, self.teacher = setting.options, device, teacher if setting.teacher else None
        self.generator = torch.Generator(device).manual_seed(seed)
        self.grid = 0.0
        self.chance = np.random.default_rng(seed)
        self.preparation = Preparation()
        self.stride = 32 * setting.model_args.get("stem_stride", 4) // 4
        self.inputs = inputs or {side: self.static(side) for side, _ in setting.sizes}
        self.steps = len(self.labels) // self.options.batch_size

    def static(self, side: int) -> dict[str, Tensor]:
        B, places = self.options.batch_size, side // self.stride
        images = torch.zeros(B, 3, side, side, device=self.device).to(memory_format=torch.channels_last)
        inputs = {"images": images, "targets": torch.full((B, self.classes), 1 / self.classes, device=self.device)}
        if self.teacher is not None:
            inputs["places"] = torch.full((B, places**2, 1000), 0.001, device=self.device)
        return inputs

    def shuffle(self) -> None:
        self.order = torch.randperm(len(self.labels), generator=self.generator, device=self.device)

    def box(self, side: int, share: float, cell: int) -> tuple[slice, slice, float]:
        """A square of `share` of the area around a random centre, cut off at the borders, in steps of `cell` pixels."""
        n = side // cell
        half = int(n * math.sqrt(share)) // 2
        row, column = self.chance.integers(n, size=2).tolist()
        top, bottom, left, right = max(row - half, 0), min(row + half, n), max(column - half, 0), min(column + half, n)
        rows, columns = slice(top * cell, bottom * cell), slice(left * cell, right * cell)
        return rows, columns, (bottom - top) * (right - left) / n**2

    def fill(self, step: int, side: int) -> None:
        """The next batch into the static tensors of this size."""
        o, B = self.options, self.options.batch_size
        chosen = self.order[step * B : (step + 1) * B]
        self.grid = self.chance.random()  # from which those choose that learn all grids
        images, labels = self.images[chosen], self.labels[chosen]
        crops = drawn_crops(self.sizes[chosen].float(), o.crop_scale, self.generator)
        x = normalised(cropped(images, crops, side), self.preparation)
        targets = F.one_hot(labels, self.classes) * (1 - o.label_smoothing) + o.label_smoothing / self.classes
        inputs = self.inputs[side]
        if self.teacher is not None:  # MixToken: a box of whole places comes from the batch in reverse order
            n = side // self.stride
            scores = F.interpolate(self.teacher(images, crops).permute(0, 3, 1, 2), size=(n, n), mode="bilinear")
            maps = scores.softmax(1)
            rows, columns, share = self.box(side, 1 - self.chance.beta(1, 1), self.stride)
            x[..., rows, columns] = x.flip(0)[..., rows, columns]
            of = [slice(s.start // self.stride, s.stop // self.stride) for s in (rows, columns)]
            maps[..., of[0], of[1]] = maps.flip(0)[..., of[0], of[1]]
            inputs["places"].copy_(maps.flatten(2).transpose(1, 2))
            targets = (1 - share) * targets + share * targets.flip(0)
        elif (o.mixup or o.cutmix) and self.chance.random() < o.mix_prob:
            if self.chance.random() < 0.5:
                share = self.chance.beta(o.cutmix, o.cutmix)
                rows, columns, share = self.box(side, share, 1)
                x[..., rows, columns] = x.flip(0)[..., rows, columns]
            else:
                share = self.chance.beta(o.mixup, o.mixup)
                x = torch.lerp(x, x.flip(0), share)
            targets = (1 - share) * targets + share * targets.flip(0)
        inputs["images"].copy_(x)
        inputs["targets"].copy_(targets)


def train(
    job: "Job",
    seeds: list[int],
    learned: Any,
    held_out: dict[int, tuple[Tensor, Tensor]],
    classes: list[str],
    device: str,
    out: Path,
    teacher: Teacher | None,
    limit: int = 0,
    epochs: int = 0,
) -> None:
    """Train the rows of a job with all seeds, in step with each other.

    Args:
        learned: canvases in bytes, heights and widths, labels.
        held_out: images and labels by the side of the images.
        limit: steps at most; 0 for all.
        epochs: at most, or exactly where the job has no seconds; 0 for those of the setting.
    """
    name, study, rows, seconds = job
    setting, o = SETTINGS[name], SETTINGS[name].options
    o = replace(o, epochs=epochs or o.epochs)
    begun = time.perf_counter()
    torch.backends.cudnn.benchmark = device == "cuda"
    batches = {seed: Batches(learned, seed, setting, device, teacher) for seed in seeds}
    learners = [Learner(setting, study, row, seed, classes, device) for seed in seeds for row in rows]
    for learner in learners:
        for inputs in batches[learner.seed].inputs.values():
            learner.capture(inputs)
    per_epoch = batches[seeds[0]].steps
    if seconds:
        states = [learner.states() for learner in learners]
        shares = [share for _, share in setting.sizes] + [1.0]
        step_time = sum(
            (shares[i + 1] - shares[i]) * seconds_of_a_step(learners, batches, side)
            for i, (side, _) in enumerate(setting.sizes)
        )
        for learner, state in zip(learners, states, strict=True):
            learner.begin_anew(state)
        batches = {
            seed: Batches(learned, seed, setting, device, teacher, drawn.inputs) for seed, drawn in batches.items()
        }
        o = replace(o, epochs=max(o.warmup_epochs + 1, min(o.epochs, int(seconds / step_time / per_epoch))))
        print(f"{name} {study}: {1000 * step_time:.1f} ms a step, {o.epochs} epochs", flush=True)
    ready = time.perf_counter()
    steps = min(limit or o.epochs * per_epoch, o.epochs * per_epoch)
    follower = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=o.lr)  # moved by the schedule that all follow
    rates = schedule(follower, o, per_epoch)
    losses: list[Tensor] = []
    for step in range(steps):
        epoch, within = divmod(step, per_epoch)
        side = next(s for s, since in reversed(setting.sizes) if epoch >= since * o.epochs)
        rates.step_update(step)
        pull = 1 - min(o.ema, 1 - (1 + step) ** -0.75)  # timm's warm-up of the average
        for drawn in batches.values():
            if not within:
                drawn.shuffle()
            drawn.fill(within, side)
        losses = all_learn(learners, batches, side, follower.param_groups[0]["lr"], pull)
        if device == "cuda" and step % 16 == 0:
            torch.cuda.current_stream().synchronize()  # launches run ahead no further than this
    if device == "cuda":
        torch.cuda.synchronize()
    trained = time.perf_counter()
    speed = steps * o.batch_size * len(learners) / (trained - ready)
    images, labels = held_out[o.eval_size or o.image_size]
    with open(out / "results.jsonl", "a") as file:
        for learner, loss in zip(learners, losses, strict=True):
            found: dict[str, Any] = {"setting": name, "study": study, "row": learner.row, "seed": learner.seed}
            own = USUAL_GRID if learner.row in (ANY, DISTILLED) else None  # these had another in every step
            found |= {"epochs": o.epochs, "loss": loss.item(), "top1": learner.top1(images, labels, own)}
            if own:
                found["by_grid"] = {n: learner.top1(images, labels, (n, n)) for n in GRIDS}
            file.write(json.dumps(found) + "\n")
            if learner.seed == 0 and learner.row == "all":
                write_checkpoint(out / f"{name}-{learner.row}.safetensors", learner.description, halves(learner.used))
    print(
        f"{name} {study}: {len(learners)} networks; {ready - begun:.0f} s until ready, {steps} steps in "
        f"{trained - ready:.1f} s, {speed:.0f} images/s, {time.perf_counter() - trained:.0f} s of figures",
        flush=True,
    )


def all_learn(
    learners: list[Learner], batches: dict[int, Batches], side: int, rate: float, pull: float
) -> list[Tensor]:
    """A step of each, at the same time; the losses."""
    losses = [learner.learn(side, rate, pull, batches[learner.seed].grid) for learner in learners]
    for learner in learners:
        if learner.stream is not None:
            torch.cuda.current_stream().wait_stream(learner.stream)
    return losses


def seconds_of_a_step(learners: list[Learner], batches: dict[int, Batches], side: int, count: int = 8) -> float:
    """Of all together, batches included."""
    for drawn in batches.values():
        drawn.shuffle()
    for step in range(count + 2):
        if step == 2:
            if learners[0].stream is not None:
                torch.cuda.synchronize()
            begun = time.perf_counter()
        for drawn in batches.values():
            drawn.fill(step % drawn.steps, side)
        all_learn(learners, batches, side, 0.0, 0.0)
    if learners[0].stream is not None:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def halves(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}


# --- figures


def report(out: Path) -> str:
    """Accuracy of each row, and what it is over others of the same seeds."""
    from glmix.studies.report import mean_and_interval, plus_minus

    found: dict[Any, dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    told: list[str] = []
    with open(out / "results.jsonl") as file:
        for line in map(json.loads, file):
            key = line["setting"], line["study"], line["epochs"]
            if math.isfinite(line["loss"]):
                found[key][line["row"]][line["seed"]] = line
            else:
                told.append(
                    "{} {}, {} epochs, {} seed {}: diverged, and left out".format(*key, line["row"], line["seed"])
                )
    for (setting, study, epochs), rows in found.items():
        bases = ("none", "without-third") if study == "stages" else (STUDIES[study].base,)
        for row, runs in rows.items():
            words = f"{setting} {study}, {epochs} epochs, {row}: " + ", ".join(
                f"{runs[seed]['top1']:.2f}" for seed in sorted(runs)
            )
            for base in bases:
                shared = sorted(runs.keys() & rows.get(base, {}).keys())
                if base == row or not shared:
                    continue
                points = [runs[seed]["top1"] - rows[base][seed]["top1"] for seed in shared]
                words += f"; over {base} {plus_minus(*mean_and_interval(points), sign='+')}"
            if row in (ANY, DISTILLED):
                grids = {n: np.mean([run["by_grid"][n] for run in runs.values()]) for n in runs[min(runs)]["by_grid"]}
                words += "; by grid " + " ".join(f"{n}:{figure:.2f}" for n, figure in grids.items())
            told.append(words)
    return "\n".join(told)


class Job(NamedTuple):
    """Rows of a study in a setting, and the seconds that they may take; 0 for all epochs of the setting."""

    setting: str
    study: str
    rows: list[str]
    seconds: float

    @classmethod
    def read(cls, text: str) -> "Job":
        """From SETTING:STUDY[/ROW,ROW][@SECONDS].

        Raises:
            ValueError: it is none, or names what there is not.
        """
        named, _, seconds = text.partition("@")
        named, _, rows = named.partition("/")
        setting, _, study = named.partition(":")
        for name, known in ((setting, SETTINGS), (study, STUDIES)):
            if name not in known:
                raise ValueError(f"{text}: {name!r} is none of {', '.join(known)}")
        chosen = rows.split(",") if rows else list(rows_of(study))
        for row in chosen:
            if row not in rows_of(study):
                raise ValueError(f"{text}: {study} has no row {row!r}; there are {', '.join(rows_of(study))}")
        return cls(setting, study, chosen, float(seconds or 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--out", type=Path, default=Path("runs/many"))
    parser.add_argument(
        "--jobs", nargs="+", default=[], help="SETTING:STUDY[/ROW,ROW][@SECONDS]; settings: " + ", ".join(SETTINGS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", default="", help="weights of timm's tf_efficientnet_lite0")
    parser.add_argument("--threads", type=int, default=16, help="that decode images")
    parser.add_argument("--epochs", type=int, default=0, help="of each job, in place of its setting's")
    parser.add_argument("--limit", type=int, default=0, help="steps of a job at most, to try it")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no job is begun")
    parser.add_argument("--report", type=Path, help="instead, the figures of what is in this folder")
    asked = parser.parse_args()
    if asked.report:
        if not (asked.report / "results.jsonl").is_file():
            parser.error(f"{asked.report}: no results.jsonl is there")
        print(report(asked.report))
        return
    try:
        jobs = [Job.read(text) for text in asked.jobs]
    except ValueError as error:
        parser.error(str(error))
    if not asked.data or not (asked.data / "train").is_dir():
        parser.error(f"{asked.data}: name a folder with train/CLASS and val/CLASS")
    if any(SETTINGS[job.setting].teacher for job in jobs) and not asked.teacher:
        parser.error("a setting with a teacher needs --teacher FILE")
    begun = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked.out.mkdir(parents=True, exist_ok=True)
    splits = {split: read_split(asked.data, split, asked.threads) for split in ("train", "val")}
    *learned, classes = splits["train"]
    learned = [tensor.to(device) for tensor in learned]
    shown, extents, labels, _ = splits["val"]
    middle = [((height - EVALUATED) // 2, (width - EVALUATED) // 2) for height, width in extents.tolist()]
    shown = torch.stack(
        [x[:, top : top + EVALUATED, left : left + EVALUATED] for x, (top, left) in zip(shown, middle, strict=True)]
    )
    held_out = {}
    for side in sorted({s.options.eval_size or s.options.image_size for s in SETTINGS.values()}):
        x = shown.to(device).float()
        if side != EVALUATED:
            x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(0, 255)
        held_out[side] = normalised(x, Preparation()), labels.to(device)
    print(f"{len(learned[2])} and {len(labels)} images after {time.perf_counter() - begun:.1f} s", flush=True)
    teacher = Teacher(asked.teacher, device) if asked.teacher else None
    for job in jobs:
        if time.perf_counter() - begun > asked.deadline:
            print(f"no time left for {job.setting} {job.study}", flush=True)
            continue
        train(job, asked.seeds, learned, held_out, classes, device, asked.out, teacher, asked.limit, asked.epochs)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(report(asked.out))


if __name__ == "__main__":
    main()
