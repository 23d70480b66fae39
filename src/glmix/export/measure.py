"""Measuring networks in engines: time in turns, memory in a process of its own, multiply-adds."""

import csv
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glmix.data.prepare import Preparation
from glmix.errors import UserError, needs
from glmix.export.files import Terms, open_exported, openvino_run
from glmix.export.write import exported_program, quiet
from glmix.export.write import write as write_file
from glmix.models.description import Description
from glmix.models.fold import optimize_for_inference

ENGINES = ("eager", "fast", "sdpa", "compile", "onnxruntime", "openvino")
PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}  # whose version counts beside PyTorch's
HALF = ("eager", "fast", "sdpa", "compile", "openvino")  # engines with bf16
Forward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Case:
    """One line of a benchmark."""

    model: str
    engine: str
    precision: str
    size: int
    batch: int

    @property
    def same_work(self) -> tuple[str, int, int]:
        """What is run in turns with it."""
        return self.precision, self.size, self.batch

    def images(self) -> Tensor:
        return torch.randn(self.batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))


@dataclass
class Times:
    """Seconds of each round, of a case and of the base in the same round."""

    seconds: list[float]
    base: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return (high - low) / 2 / self.median

    @property
    def ratio(self) -> float:
        """How many times as fast as the base: the median over rounds, so that what slows a round slows both."""
        return statistics.median(b / s for b, s in zip(self.base, self.seconds, strict=True))


def check_name(name: str) -> None:
    """Raise a UserError if timm has no model of that name."""
    if not timm.is_model(name):
        raise UserError(f"no model {name!r} in timm")


def create(name: str, size: int, device: str = "cpu") -> nn.Module:
    """A timm model for images of `size` px, with weights as first drawn, in evaluation mode.

    Raises:
        UserError: timm has none of that name.
    """
    check_name(name)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = timm.create_model(name).eval()
        usual = model.pretrained_cfg
        if not usual.get("fixed_input_size") or tuple(usual["input_size"][1:]) == (size, size):
            return model
        try:  # a network that is laid out for one size, as Swin
            return timm.create_model(name, img_size=size).eval()
        except (TypeError, AssertionError) as error:
            raise UserError(f"{name}: takes no images of {size} px") from error


def prepared(case: Case, threads: int, device: str) -> tuple[Forward, nn.Module | None]:
    """The network of a case in its engine, and the module where it is PyTorch's.

    Raises:
        UserError: the engine is not installed, or has not the precision, or runs on no GPU.
    """
    if case.precision == "bf16" and case.engine not in HALF:
        raise UserError(f"{case.engine} has no bf16 on a CPU; leave it out of --engines, or bf16 out of --precision")
    if device != "cpu" and case.engine in PACKAGES:
        raise UserError(f"{case.engine} is measured on a CPU alone; leave it out of --engines")
    model = create(case.model, case.size, device)
    if case.engine in PACKAGES:
        described = Description("classify", case.model, preparation=Preparation(size=(case.size, case.size)))
        terms = Terms(described, {"onnxruntime": "onnx", "openvino": "openvino"}[case.engine], case.precision)
        terms = replace(terms, size=(case.size, case.size), batch=case.batch)
        with needs("export"):
            run = _engine(model, terms, threads)
        return lambda images: run(images.numpy()), None
    if case.engine != "eager":
        try:
            model = optimize_for_inference(model, sdpa=case.engine == "sdpa")
        except ValueError:  # a network of others: as it is, channels last
            model = model.to(memory_format=torch.channels_last)
    if case.precision == "bf16":
        model = model.bfloat16()
    used = model
    if case.engine == "compile":
        torch._inductor.config.freezing = True
        torch._dynamo.reset()
        used = torch.compile(model)  # type: ignore[assignment]
    kind = torch.bfloat16 if case.precision == "bf16" else torch.float32
    return lambda images: used(images.to(device, kind)), model


def _engine(model: nn.Module, terms: Terms, threads: int) -> Callable[[Any], Any]:
    if terms.format == "openvino":
        import openvino

        with quiet():
            made = openvino.convert_model(exported_program(model, terms))
        return openvino_run(made, terms.precision, threads)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_file(model, terms, path)
        return open_exported(path, threads).run


def in_turns(runs: dict[Case, Forward], base: Case, rounds: int, warm: int = 2) -> dict[Case, Times]:
    """Time all runs of the same work in turns, round by round; the base twice, and the second against the first is noise."""
    images = base.images()
    seconds: dict[Case, list[float]] = {case: [] for case in runs}
    first: list[float] = []
    with torch.inference_mode():
        for run in runs.values():
            for _ in range(warm):
                run(images)
        for _ in range(rounds):
            first.append(clocked(runs[base], images))
            for case, run in runs.items():
                seconds[case].append(clocked(run, images))
    return {case: Times(times, first) for case, times in seconds.items()}


def clocked(run: Callable[..., Any], *inputs: Tensor) -> float:
    """Seconds of one pass."""
    before = time.perf_counter()
    run(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - before


def gmacs(name: str, size: int) -> float:
    """Billions of multiply-adds of one image: convolutions, matrix products, attention, as published figures count."""
    model = create(name, size, "meta")
    try:
        return multiply_adds(model, size)
    except (AssertionError, RuntimeError) as error:  # a network for images of one size
        raise UserError(f"{name}: takes no images of {size} px") from error


def multiply_adds(model: nn.Module, size: int) -> float:
    """Billions of multiply-adds of a model in evaluation mode, for one image of `size` px."""
    return multiply_adds_of(model, torch.empty(1, 3, size, size, device=next(model.parameters()).device))


def multiply_adds_of(run: Callable[[Tensor], Any], images: Tensor) -> float:
    """Billions of multiply-adds of a pass: convolutions, matrix products and attention."""
    # a CPU's fused attention is none of the operations that are counted
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(images)
    return counter.get_total_flops() / 2e9


# --- memory ----------------------------------------------------------------------------------------------------------


def _resident(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


def _measured(answer: Any, threads: int, timed: int, ready: Callable[..., Callable[[], Any]], told: tuple) -> None:
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            run = ready(*told)
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = _resident("VmRSS")
            run()
            peak = _resident("VmHWM") - before
            seconds = [clocked(run) for _ in range(timed)]
        answer.put((peak, statistics.median(seconds) if seconds else 0.0))
    except UserError as error:
        answer.put(error)


def in_own_process(
    ready: Callable[..., Callable[[], Any]], *told: Any, threads: int, timed: int = 0
) -> tuple[float, float]:
    """MiB of a first run over those of what `ready(*told)` has loaded, at its peak; seconds, the median of `timed` more.

    Measured in a process of its own (Linux), so that what was there before does not count. `ready` is a function of a
    module; it does what libraries set up once, and returns what to run.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("memory is measured through /proc, which this system has not")
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_measured, args=(answer, threads, timed, ready, told))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"measuring {' '.join(map(str, told))} ended with {process.exitcode}")
    found = answer.get()
    if isinstance(found, UserError):
        raise found
    return found


def _pass(case: Case, threads: int) -> Callable[[], Any]:
    run, _ = prepared(case, threads, "cpu")
    images = case.images()
    if case.engine in ("eager", "fast", "sdpa"):
        run(images[:1, :, :64, :64])
    return lambda: run(images)


def peak_memory(case: Case, threads: int) -> float:
    """MiB of a forward pass over those of the loaded model: the process's peak, in one of its own (Linux)."""
    return in_own_process(_pass, case, threads, threads=threads)[0]


# --- training --------------------------------------------------------------------------------------------------------


def saved_activations(step: Callable[[], Tensor], model: nn.Module) -> float:
    """MiB that a forward pass keeps for the backward pass, weights apart: each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights) / 2**20


def training_step(case: Case, device: str, fused: bool) -> tuple[Callable[[], Tensor], Callable[[], None], nn.Module]:
    """The forward pass to the loss, and a whole step, of a model in training mode with AdamW."""
    model = create(case.model, case.size, device).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    images = case.images().to(device, memory_format=torch.channels_last)
    labels = torch.arange(case.batch, device=device) % model.num_classes  # type: ignore[operator]

    def kernel() -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()

    def forward() -> Tensor:
        with kernel(), torch.autocast(device, torch.bfloat16, enabled=case.precision == "bf16"):
            return nn.functional.cross_entropy(model(images).float(), labels)

    def step() -> None:
        loss = forward()
        with kernel():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward, step, model


def published_protocol(stack: ExitStack) -> None:
    """The authors': fp32 with TF32, math attention alone."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))


def accuracies() -> dict[str, tuple[float, str]]:
    """Published top-1 on ImageNet-1k, and the paper and table that it stands in, by timm's name."""
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        return {row["model"]: (float(row["top1"]), row["source"]) for row in csv.DictReader(file)}


def versions() -> dict[str, str]:
    """Of what was measured with."""
    found = {"torch": torch.__version__, "timm": timm.__version__}
    for package in PACKAGES.values():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
