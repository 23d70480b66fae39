"""The contract of a timm model, and of what builds on it: torchvision, transformers, segmentation-models-pytorch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import group_parameters
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FeaturePyramidNetwork
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    TimmBackbone,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from glmix.models.glnet import MODEL_NAMES, PUBLISHED, GLNet
from glmix.training.optim import parameter_groups

SMALL: dict[str, Any] = {"dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1)}
FAMILIES = ["glnet_pico", "glnet_stl", "glnet_stl_paramslot", "glnet_16g", "glnet_4g_tklb"]
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
PUBLISHED_SIZES = {
    "glnet_stl": 30296786,
    "glnet_stl_paramslot": 30481106,
    "glnet_4g": 27001593,
    "glnet_9g": 60010617,
    "glnet_16g": 106055161,
    "glnet_4g_tklb": 27514593,
    "glnet_9g_tklb": 60779617,
    "glnet_16g_tklb": 107080161,
}


def small(variant: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(variant, **{**SMALL, **options})


def on_meta(variant: str, **options: Any) -> GLNet:
    return timm.create_model(variant, device="meta", **options)


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- every variant, without allocating its weights -------------------------------------------------------------------


def test_names() -> None:
    assert set(timm.list_models("glnet_*")) == set(MODEL_NAMES)
    assert set(PUBLISHED_SIZES) | {"glnet_pico", "glnet_pico_tklb", "glnet_nano"} == set(MODEL_NAMES)
    assert set(PUBLISHED) == set(PUBLISHED_SIZES) - {"glnet_16g_tklb"}


def test_timm_knows_which_weights_are_here() -> None:
    """Those in the package, and no others: they are for their authors to give."""
    assert timm.list_models("glnet_*", pretrained=True) == ["glnet_pico_tklb.imagenette"]
    assert timm.is_model_pretrained("glnet_pico_tklb") and not timm.is_model_pretrained("glnet_4g")
    assert timm.create_model("glnet_pico_tklb.imagenette", pretrained=True).num_classes == 10


@pytest.mark.parametrize("variant", PUBLISHED_SIZES)
def test_published_sizes(variant: str) -> None:
    """The paper's table counts in millions."""
    size = sum(p.numel() for p in on_meta(variant).parameters())
    assert size == PUBLISHED_SIZES[variant]
    if variant in PUBLISHED:
        assert abs(size / 1e6 - PUBLISHED[variant]["params_m"]) < 0.8


@pytest.mark.parametrize("variant", MODEL_NAMES)
def test_configuration(variant: str) -> None:
    model = on_meta(variant)
    cfg = model.pretrained_cfg
    assert model.default_cfg is cfg
    for key in ("num_classes", "input_size", "pool_size", "crop_pct", "interpolation", "mean", "std", "license"):
        assert cfg[key], key
    assert cfg["architecture"] == variant
    assert cfg["first_conv"] == "stem.0"
    names = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert names == (("head.fc", "aux_head") if "tklb" in variant else ("head.fc",))
    for name in names:
        assert model.get_submodule(name).out_features == cfg["num_classes"]
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == cfg["input_size"]


@pytest.mark.parametrize("variant", MODEL_NAMES)
def test_shapes(variant: str) -> None:
    """Features, pooled features and logits of the whole variant, and of its feature extractor."""
    model = on_meta(variant)
    x = torch.empty(2, 3, 224, 160, device="meta")
    widths = [info["num_chs"] for info in model.feature_info]
    features = model.forward_features(x)
    assert features.shape == (2, widths[-1], 7, 5)
    assert model.forward_head(features, pre_logits=True).shape == (2, widths[-1])
    assert model(x).shape == (2, model.num_classes)
    extractor = on_meta(variant, features_only=True)
    assert extractor.feature_info.channels() == widths
    assert extractor.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(f.shape) for f in extractor(x)] == [
        (2, w, 224 // r, 160 // r) for w, r in zip(widths, (4, 8, 16, 32), strict=True)
    ]
    assert [f.shape[1] for f in on_meta(variant, features_only=True, out_indices=(1, 3))(x)] == [widths[1], widths[3]]


@pytest.mark.parametrize("variant", MODEL_NAMES)
def test_groups_of_layers(variant: str) -> None:
    """Every parameter is in a group; groups follow the depth, each block after the one before it."""
    model = on_meta(variant)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert groups.keys() == {name for name, _ in model.named_parameters()}
        depth_of_block = [groups[n] for n in groups if n.endswith("mlp.fc1.weight")]
        assert depth_of_block == sorted(depth_of_block)
        assert groups["stem.0.weight"] == 0
        assert groups["stem.0.weight"] < depth_of_block[0]
        assert depth_of_block[-1] <= groups["norm.weight"] <= groups["head.fc.weight"]
        if not coarse:
            assert groups["norm.weight"] == depth_of_block[-1]  # as timm has it, with the layer before it
            assert len(set(depth_of_block)) == sum(len(stage.blocks) for stage in model.stages)


@pytest.mark.parametrize("variant", MODEL_NAMES)
def test_layer_wise_learning_rates(variant: str) -> None:
    model = small(variant, num_classes=5)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert scale.keys() == {id(p) for p in parameters.values()}
    assert scale[id(parameters["stem.0.weight"])] < scale[id(parameters["stages.3.blocks.0.mlp.fc1.weight"])]
    assert scale[id(parameters["head.fc.weight"])] == 1
    assert decay[id(parameters["head.fc.weight"])] == 0.05
    for name, parameter in parameters.items():
        if parameter.ndim == 1:
            assert decay[id(parameter)] == 0, name


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_4g"])
def test_decay_of_the_slot_scale(variant: str) -> None:
    """Raised first values would be pulled to zero."""
    assert bool(on_meta(variant).no_weight_decay()) == (variant == "glnet_pico")


@pytest.mark.parametrize("variant", MODEL_NAMES)
def test_unknown_options_are_refused(variant: str) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        on_meta(variant, no_such_option=1)
    with pytest.raises(TypeError, match="slot_gird"):  # also where no block would meet it
        on_meta(variant, slot_gird=(3, 3), mixers=("attention",) * 4)


@pytest.mark.parametrize("variant", MODEL_NAMES)
@pytest.mark.parametrize("in_chans", [1, 4])
def test_channels_of_the_image(variant: str, in_chans: int) -> None:
    model = on_meta(variant, in_chans=in_chans)
    assert model.stem[0].in_channels == model.in_chans == in_chans
    assert model(torch.empty(1, in_chans, 64, 64, device="meta")).shape == (1, model.num_classes)


@pytest.mark.parametrize("variant", MODEL_NAMES)
def test_device_and_dtype(variant: str) -> None:
    """Made there, not moved there; also what is made anew for another number of classes."""
    model = timm.create_model(variant, device="meta", dtype=torch.bfloat16)
    model.reset_classifier(0)
    model.reset_classifier(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "meta", name
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point(), name


@pytest.mark.parametrize("variant", MODEL_NAMES)
def test_drop_path_grows_to_its_rate(variant: str) -> None:
    model = on_meta(variant, drop_path_rate=0.3)
    rates = [block.drop_path1.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])
    assert rates == [block.drop_path2.drop_prob for stage in model.stages for block in stage.blocks]
    assert all(block.drop_path1.drop_prob == 0 for stage in on_meta(variant).stages for block in stage.blocks)


# --- numbers, on small models of every kind --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_the_parts_make_the_whole(variant: str) -> None:
    model = small(variant).eval()
    features = model.forward_features(IMAGE)
    torch.testing.assert_close(model.forward_head(features), model(IMAGE))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    final, stages = model.forward_intermediates(IMAGE)
    torch.testing.assert_close(final, features)
    assert [tuple(s.shape[2:]) for s in stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    _, normed = model.forward_intermediates(IMAGE, norm=True)
    torch.testing.assert_close(normed[-1], features)
    torch.testing.assert_close(normed[0], stages[0])
    for indices, wanted in ((2, stages[2:]), ([0, 2], [stages[0], stages[2]]), ([-1], stages[-1:])):
        given = model.forward_intermediates(IMAGE, indices=indices, intermediates_only=True)
        torch.testing.assert_close(given, wanted)
    last, early = model.forward_intermediates(IMAGE, indices=[0, 1], stop_early=True)
    torch.testing.assert_close(early, stages[:2])
    torch.testing.assert_close(last, stages[1])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(IMAGE, output_fmt="NLC")


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
@torch.no_grad()
def test_feature_extractors(variant: str, feature_cls: str) -> None:
    model = small(variant).eval()
    extractor = small(variant, features_only=True, feature_cls=feature_cls).eval()
    features = extractor(IMAGE)
    if isinstance(features, dict):
        features = list(features.values())
    torch.testing.assert_close(list(features), model.forward_intermediates(IMAGE, intermediates_only=True))
    assert extractor.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("last", range(4))
@torch.no_grad()
def test_pruning(variant: str, last: int) -> None:
    model = small(variant).eval()
    stages = model.forward_intermediates(IMAGE, intermediates_only=True)
    pruned = copy.deepcopy(model)
    assert list(pruned.prune_intermediate_layers([last], prune_norm=True)) == [last]
    torch.testing.assert_close(pruned.forward_features(IMAGE), stages[last])
    assert len(pruned.stages) == last + 1
    assert pruned.num_features == pruned.head_hidden_size == SMALL["dims"][last]
    pruned.reset_classifier(7, "avg")
    assert pruned(IMAGE).shape == (2, 7)
    if last == 3:
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers([3], prune_head=False)
        torch.testing.assert_close(kept(IMAGE), model(IMAGE))


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_classifier_and_pooling(variant: str) -> None:
    model = small(variant).eval()
    features = model.forward_features(IMAGE)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    assert model(IMAGE).shape == (2, 7)
    model.reset_classifier(7, "max")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(0, "catavgmax")
    assert model(IMAGE).shape == (2, model.head_hidden_size) == (2, 256)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(IMAGE), features)
    assert not model.training
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_pooling_by_option(variant: str) -> None:
    grid = small(variant, num_classes=0, global_pool="").eval()(IMAGE)
    assert grid.shape == (2, 128, 2, 3)
    largest = small(variant, num_classes=0, global_pool="max").eval()
    torch.testing.assert_close(largest(IMAGE), grid.amax((2, 3)))
    assert isinstance(largest.head.global_pool, SelectAdaptivePool2d)
    assert small(variant, global_pool="catavgmax", num_classes=7).eval()(IMAGE).shape == (2, 7)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("extractor", [False, True])
def test_checkpointed_gradients_are_the_same(variant: str, extractor: bool) -> None:
    model = small(variant, features_only=extractor, **({} if extractor else {"drop_path_rate": 0.2})).train()

    def loss(m: nn.Module) -> Tensor:
        torch.manual_seed(1)  # the same drop path
        output = m(IMAGE)
        return sum(f.square().mean() for f in output) if extractor else output.square().mean()

    used = [name for name, p in model.named_parameters()]
    expected = gradients(model, loss)
    model.set_grad_checkpointing(True)
    checkpointed = gradients(model, loss)
    assert list(expected) == list(checkpointed) == used
    for name in used:
        torch.testing.assert_close(checkpointed[name], expected[name])


@torch.no_grad()
def test_drop_path_drops_whole_images() -> None:
    """Of each image both branches of a block, one or none; what is kept is raised, so that the mean stays."""
    rate = 0.4
    block = small("glnet_4g", drop_path_rate=rate, overlap=False).train().stages[-1].blocks[-1]
    x = torch.randn(1, 2, 3, SMALL["dims"][-1])
    mixed = block.mixer(x, x) / (1 - rate)
    after = {(a, b): x + a * mixed + b * block.mlp(x + a * mixed) / (1 - rate) for a in (0, 1) for b in (0, 1)}
    seen = dict.fromkeys(after, 0)
    for y in block(x.expand(400, -1, -1, -1)):
        seen[next(kept for kept, wanted in after.items() if torch.allclose(y, wanted[0], rtol=1e-4, atol=1e-5))] += 1
    for (a, b), count in seen.items():
        share = (1 - rate if a else rate) * (1 - rate if b else rate)
        assert abs(count / 400 - share) < 0.1, (a, b)
    block.eval()
    torch.testing.assert_close(block(x), x + block.mixer(x, x) + block.mlp(x + block.mixer(x, x)))


def test_drop_path_reaches_the_network() -> None:
    model = small("glnet_4g", drop_path_rate=0.9, num_classes=0).train()
    torch.manual_seed(0)
    assert not torch.equal(model(IMAGE), model(IMAGE))
    model.eval()
    assert torch.equal(model(IMAGE), model(IMAGE))


@pytest.mark.parametrize(
    ("variant", "options"),
    [("glnet_pico", {}), ("glnet_4g", {}), ("glnet_stl_paramslot", {}), ("glnet_4g_tklb", {})]
    + [("glnet_pico", {"assignment": assignment}) for assignment in ("hard", "static")],
)
@torch.no_grad()
def test_torchscript(variant: str, options: dict[str, Any]) -> None:
    model = small(variant, **options).eval()
    scripted = torch.jit.script(model)
    for size in ((64, 96), (97, 131)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(scripted(x), model(x))
    extractor = small(variant, features_only=True, **options).eval()
    torch.testing.assert_close(torch.jit.script(extractor)(IMAGE), extractor(IMAGE))


@pytest.mark.parametrize("variant", ["glnet_pico", "glnet_4g"])
@torch.no_grad()
def test_torchvision_feature_extraction(variant: str) -> None:
    """FX with timm's list of functions that are not traced into; sizes stay free."""
    model = small(variant).eval()
    options = {
        "leaf_modules": timm.models.get_notrace_modules(),
        "autowrap_functions": timm.models.get_notrace_functions(),
    }
    _, nodes = get_graph_node_names(model, tracer_kwargs=options)
    block = next(n for n in nodes if n.startswith("stages.1.blocks.0"))
    assert block
    traced = create_feature_extractor(model, {"stages.1": "level", "head": "logits"}, tracer_kwargs=options)
    for size in ((64, 96), (97, 131)):
        x = torch.randn(2, 3, *size)
        output = traced(x)
        torch.testing.assert_close(output["logits"], model(x))
        torch.testing.assert_close(output["level"], model.forward_intermediates(x)[1][1])


@pytest.mark.parametrize("variant", FAMILIES)
@torch.no_grad()
def test_torchvision_feature_extraction_as_it_is(variant: str) -> None:
    """Without a word on what not to trace into; in training mode too, and at other sizes."""
    model = small(variant, drop_path_rate=0.2)
    nodes = {"stages.1": "level", "head": "logits"}
    for mode in (model.eval(), model.train()):
        traced = create_feature_extractor(mode, nodes).eval()
        for size in ((64, 96), (97, 131)):
            x = torch.randn(2, 3, *size)
            output = traced(x)
            torch.testing.assert_close(output["level"], model.eval().forward_intermediates(x)[1][1])
            torch.testing.assert_close(output["logits"], model.head(model.forward_features(x)))
    learning = create_feature_extractor(model, nodes).train()
    with torch.enable_grad():
        learning(IMAGE)["logits"].square().mean().backward()
    assert model.stages[0].blocks[0].mixer.similarity.scale.grad.isfinite()


# --- what builds on timm ---------------------------------------------------------------------------------------------


def test_feature_pyramid() -> None:
    """torchvision's FPN, as its BackboneWithFPN builds it, trains through the extractor."""
    extractor = small("glnet_4g", features_only=True).train()
    pyramid = FeaturePyramidNetwork(extractor.feature_info.channels(), 16)
    levels = pyramid({str(i): feature for i, feature in enumerate(extractor(IMAGE))})
    assert [tuple(level.shape) for level in levels.values()] == [(2, 16, 16 // 2**i, 24 // 2**i) for i in range(4)]
    sum(level.square().mean() for level in levels.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in extractor.parameters())


def test_segmentation_models() -> None:
    """smp's decoders on the stages; Unet takes sides that no stride divides, its UPerNet images that are filled up."""
    odd = torch.randn(1, 3, 75, 101)
    with torch.no_grad():
        assert smp.Unet("tu-glnet_stl", encoder_weights=None, classes=3).eval()(odd).shape == (1, 3, 75, 101)
        filled = F.pad(odd, (0, 128 - 101, 0, 96 - 75))
        assert smp.UPerNet("tu-glnet_stl", encoder_weights=None, classes=3).eval()(filled).shape == (1, 3, 96, 128)


def backbone_config(*stages: int) -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone="glnet_pico", use_pretrained_backbone=False, out_indices=stages)


def test_transformers_upernet() -> None:
    config = UperNetConfig(backbone_config=backbone_config(0, 1, 2, 3), hidden_size=32, num_labels=5,
                           auxiliary_in_channels=128, auxiliary_channels=16)  # fmt: skip
    model = UperNetForSemanticSegmentation(config)
    found = model(pixel_values=IMAGE, labels=torch.randint(0, 5, (2, *IMAGE.shape[2:])))
    found.loss.backward()
    assert found.logits.shape == (2, 5, *IMAGE.shape[2:]) and found.loss.isfinite()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("backbone"))


def test_transformers_mask2former() -> None:
    config = Mask2FormerConfig(
        backbone_config=backbone_config(0, 1, 2, 3), feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=4,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        num_labels=5, train_num_points=64,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    masks, classes = [torch.ones(1, *IMAGE.shape[2:])] * 2, [torch.tensor([1])] * 2
    found = model(pixel_values=IMAGE, mask_labels=masks, class_labels=classes)
    found.loss.backward()
    assert found.loss.isfinite()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".stages." in name)


def test_transformers_rt_detr() -> None:
    """From random weights its norms must learn: by default it freezes those of any backbone."""
    config = RTDetrConfig(
        backbone_config=backbone_config(1, 2, 3), encoder_in_channels=[64, 128, 256], encoder_hidden_dim=32, d_model=32,
        encoder_ffn_dim=32, decoder_in_channels=[32] * 3, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, decoder_layers=1, num_queries=8, num_denoising=0, num_labels=5,
        freeze_backbone_batch_norms=False,
    )  # fmt: skip
    model = RTDetrForObjectDetection(config)
    wanted = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    found = model(pixel_values=IMAGE, labels=wanted)
    found.loss.backward()
    assert found.loss.isfinite() and found.pred_boxes.shape == (2, 8, 4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.weight.grad is not None]
    assert len(norms) > 5


def test_transformers_backbone() -> None:
    config = TimmBackboneConfig(backbone="glnet_pico", use_pretrained_backbone=False, out_indices=(0, 1, 2, 3))
    backbone = TimmBackbone(config).eval()
    assert backbone.channels == [32, 64, 128, 256]
    with torch.no_grad():
        features = backbone(IMAGE).feature_maps
    assert [tuple(f.shape) for f in features] == [(2, 32, 16, 24), (2, 64, 8, 12), (2, 128, 4, 6), (2, 256, 2, 3)]
