"""The backbone of OpenMMLab's projects, built by a config and mmengine's registry."""

import importlib
from typing import Any

import pytest
import timm
import torch

from res2net_zoo.utils.errors import InputError
from tests.conftest import SHIPPED_MODEL, SMALL, import_mmengine, spread

mmengine = import_mmengine()
from mmengine.config import Config  # noqa: E402  not before the skip
from mmengine.registry import MODELS  # noqa: E402

IMPORT = 'custom_imports = dict(imports=["res2net_zoo.integrations.openmmlab"])\n'
TINY = "res2net_tiny"


def build(model_name: str = TINY, **settings: Any) -> Any:
    config = Config.fromstring(
        IMPORT + f"backbone = {dict(type='Res2NetZoo', model_name=model_name, **settings)}", ".py"
    )
    return MODELS.build(config.backbone)


@pytest.mark.parametrize("name", [name for name in SMALL if "29" not in name])
def test_maps_are_the_last_four_of_timm(name):
    ours = spread(build(name, **SMALL[name])).eval()
    theirs = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), **SMALL[name]).eval()
    theirs.load_state_dict(ours.features.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = ours(image)
        assert isinstance(maps, tuple) and [64 // m.shape[-1] for m in maps] == [4, 8, 16, 32]
        assert all(torch.equal(a, b) for a, b in zip(maps, theirs(image), strict=True))
        (last,) = spread(build(name, out_indices=(3,), **SMALL[name])).eval()(image)
        assert torch.equal(last, maps[3])


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (-1, []),
        (0, ["conv1", "bn1"]),
        (1, ["conv1", "bn1", "layer1"]),
        (4, ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_frozen_stages(stages, expected):
    model = build(frozen_stages=stages, norm_eval=False).train()
    parts = {name: part for name, part in model.features.named_children() if list(part.parameters())}
    for name, part in parts.items():
        frozen = name in expected
        assert all(parameter.requires_grad != frozen for parameter in part.parameters()), name
        assert all(module.training != frozen for module in part.modules()), name


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_keeps_statistics_and_trains_affine_parameters(norm_eval):
    model = build(frozen_stages=1, norm_eval=norm_eval).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 64, 64))[-1].sum().backward()
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert bool(changed) != norm_eval and not any("layer1" in name or "conv1.1" in name for name in changed)
    assert model.features.layer2[0].bn1.weight.grad is not None
    assert model.features.layer1[0].bn1.weight.grad is None


def test_weights_of_a_folder_survive_the_initialization_of_mmengine():
    name = f"local-dir:{SHIPPED_MODEL}"
    model = build(name, pretrained=True)
    model.init_weights()
    expected = timm.create_model(name, pretrained=True).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.features.state_dict().items())


def test_init_cfg_loads_a_checkpoint(tmp_path):
    trained = spread(build())
    state = {f"backbone.{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "epoch_12.pth")
    cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "epoch_12.pth"), prefix="backbone.")
    model = build(init_cfg=cfg)
    model.init_weights()
    assert all(torch.equal(tensor, trained.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_arguments_of_the_model_pass_through():
    maps = build(output_stride=8, in_channels=1)(torch.randn(1, 1, 64, 64))
    assert [64 // m.shape[-1] for m in maps] == [4, 8, 8, 8]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(depth=50, norm_cfg=dict(type="BN")), "_delete_=True"),
        (dict(pretrained=True, init_cfg=dict(type="Pretrained", checkpoint="a.pth")), "mutually exclusive"),
        (dict(pretrained="open-mmlab://res2net101_v1d_26w_4s"), "model_name"),
        (dict(frozen_stages=5), "frozen_stages is 5"),
        (dict(out_indices=(1, 4)), "out_indices"),
        (dict(model_name="res2net50_26w_5s"), "res2net50_26w_4s"),
    ],
)
def test_bad_settings_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        build(**settings)


def import_models(project: str) -> None:
    """Import the models of a project, which need mmcv's operators and old versions of others, or skip the test."""
    try:
        importlib.import_module(f"{project}.models")
    except Exception as error:
        pytest.skip(f"{project} is not installed, or not with what it needs: {error!r}")


def detector() -> Any:
    """Return a small RetinaNet of MMDetection."""
    import_models("mmdet")
    from mmdet.registry import MODELS as detectors
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    config = Config.fromstring(
        IMPORT
        + """
model = dict(
    type="RetinaNet",
    data_preprocessor=dict(type="DetDataPreprocessor", mean=[0, 0, 0], std=[255, 255, 255], pad_size_divisor=32),
    backbone=dict(type="Res2NetZoo", model_name="res2net_tiny", frozen_stages=1, norm_eval=True),
    neck=dict(type="FPN", in_channels=[64, 128, 256, 384], out_channels=32, num_outs=5),
    bbox_head=dict(type="RetinaHead", num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(nms_pre=100, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10),
)
""",
        ".py",
    )
    return detectors.build({**config.model, "_scope_": "mmdet"})


def test_a_detector_of_mmdetection_learns():
    model = detector()
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    model.init_weights()
    model.train()
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), batch_input_shape=(64, 64), pad_shape=(64, 64)))
    sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))
    losses = model.loss(torch.rand(1, 3, 64, 64), [sample])
    sum(sum(value) for value in losses.values()).backward()
    assert model.backbone.features.layer1[0].conv1.weight.grad is None
    assert model.backbone.features.layer4[0].bn3.weight.grad.abs().max() > 0


@pytest.mark.parametrize("project", ["mmseg", "mmpretrain", "mmdet"])
def test_registries_of_the_projects_find_the_backbone(project):
    import_models(project)
    registry = importlib.import_module(f"{project}.registry").MODELS
    build()
    assert registry.build(dict(type="Res2NetZoo", model_name=TINY))(torch.randn(1, 3, 64, 64))[3].shape[-1] == 2


def test_the_backbone_for_timm_in_mmpretrain_takes_the_names_of_the_zoo():
    import_models("mmpretrain")
    from mmpretrain.registry import MODELS as models

    Config.fromstring('custom_imports = dict(imports=["res2net_zoo"])', ".py")
    config = dict(type="TIMMBackbone", model_name=f"local-dir:{SHIPPED_MODEL}", features_only=True, pretrained=True)
    image = torch.randn(1, 3, 64, 64)
    backbone = models.build(config)
    backbone.eval()  # it returns nothing
    with torch.no_grad():
        maps = backbone(image)
        expected = timm.create_model(config["model_name"], pretrained=True, features_only=True).eval()(image)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
