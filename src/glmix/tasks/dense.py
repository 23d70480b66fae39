"""What detectors and segmenters share."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from glmix.errors import UserError
from glmix.models import load_body, network_of, parts_beside_body
from glmix.models.description import Description
from glmix.ranges import NonNegativeInt, Pair, PositiveFloat
from glmix.training.grids import check_grids
from glmix.training.options import TrainOptions


@dataclass
class DenseOptions(TrainOptions):
    """Options of `glmix train` for dense tasks.

    Args:
        head: what stands on the backbone.
        head_channels: width of the head; 0 for the published one, and 64 on backbones below 6 million parameters.
        backbone_norm: statistics of the backbone's BatchNorm: of each batch (train), of those of all processes (sync,
            CUDA), or as they are in the checkpoint of --init (frozen), for small batches.
        freeze_stages: first stages of the backbone that do not learn, the stem with them.
        check: read all of the data before the run begins, and name what of it cannot be used and is left out.
    """

    # what small networks were trained with here; the published ones' recipes have 1e-4 and below
    batch_size: Pair = 8
    lr: PositiveFloat = 1e-3
    head: str = ""
    head_channels: NonNegativeInt = 0
    backbone_norm: Literal["frozen", "sync", "train"] = "train"
    freeze_stages: NonNegativeInt = 0
    check: bool = True

    GROUPS: ClassVar[dict[str, str]] = TrainOptions.GROUPS | {"head": "the head"}
    FREE: ClassVar[set[str]] = TrainOptions.FREE | {"check"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, asked in (
            ("backbone_norm frozen", self.backbone_norm == "frozen"),
            ("freeze_stages", self.freeze_stages),
        ):
            if asked and not self.init:
                raise ValueError(f"{option}: only with --init, whose weights are then kept")

    @property
    def shared_statistics(self) -> bool:
        return self.sync_bn or self.backbone_norm == "sync"

    def needing_cuda(self) -> dict[str, bool]:
        return super().needing_cuda() | {"--backbone-norm sync": self.backbone_norm == "sync"}

    def described_head(self) -> dict[str, Any]:
        return {"name": self.head, "head_channels": self.head_channels}


def start(model: nn.Module, options: DenseOptions, description: Description) -> str:
    """The weights of `init` in the backbone, and what of it does not learn.

    Raises:
        UserError: more stages are to be frozen than there are.
    """
    if options.slot_grids:
        check_grids(model, options.slot_grids, 0)
    said, net = "", network_of(model)
    if options.init:
        kept = load_body(model, options.init, description.classes) == "head kept"
        said = f"{options.init}: all {len(net.state_dict())} entries of the backbone are taken; the head is "
        said += "taken too" if kept else "new"
        left = [] if kept else parts_beside_body(options.init)
        said += f"; not taken: {', '.join(left)}" if left else ""
    if options.backbone_norm == "frozen":
        for part in net.modules():
            if isinstance(part, _BatchNorm):
                part.requires_grad_(False)
    if options.freeze_stages:
        if options.freeze_stages > len(net.stages):
            raise UserError(f"--freeze-stages {options.freeze_stages}: {description.model} has {len(net.stages)}")
        net.stem.requires_grad_(False)
        net.stages[: options.freeze_stages].requires_grad_(False)
    return said
