"""Write mmengine_small*.pth as MMEngine's runner does, and the logits that MMPretrain computes with it.

MMPretrain's Res2Net doubles the channels with every stage; the small model's do not grow, so its stages are rebuilt.
"""

import json
import tempfile
from pathlib import Path

import mmpretrain
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.models.backbones.res2net import Bottle2neck, Res2Layer, Res2Net
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from tests.weights.originals.draw import HERE, images, tensors

SIZES = ((64, 64), (97, 65))


@MODELS.register_module()
class SmallRes2Net(Res2Net):
    """The backbone of the small model, from MMPretrain's stem, blocks and stages."""

    def __init__(self) -> None:
        super().__init__(depth=50, stem_channels=16, base_channels=8, base_width=4)
        channels = 16
        for i, blocks in enumerate((1, 2, 1, 1)):
            stage = Res2Layer(
                Bottle2neck, channels, 32, blocks, stride=1 if i == 0 else 2, base_width=32, base_channels=64
            )
            setattr(self, f"layer{i + 1}", stage)
            channels = 32


class Noise(torch.utils.data.Dataset):
    """Two random images with labels, and metadata that MMEngine copies into checkpoints."""

    def __init__(self) -> None:
        self.metainfo = {"classes": tuple(f"class {i}" for i in range(10))}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> dict:
        return {"inputs": torch.from_numpy(images(64, 64)[i]), "data_samples": DataSample().set_gt_label(i)}


def main() -> None:
    data = dict(
        batch_size=2,
        sampler=dict(type="DefaultSampler"),
        collate_fn=dict(type="pseudo_collate"),
        dataset=Noise(),
    )
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=dict(
                type="mmpretrain.ImageClassifier",
                backbone=dict(type="SmallRes2Net"),
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=10, in_channels=32, loss=dict(type="CrossEntropyLoss")),
            ),
            work_dir=folder,
            train_dataloader=data,
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.0)),
            default_hooks=dict(checkpoint=None),
            default_scope="mmpretrain",
            cfg=Config(dict(default_scope="mmpretrain")),
            log_level="ERROR",
            experiment_name="small",
            randomness=dict(seed=0),
        )
        runner.train()
        values = {name: torch.from_numpy(value) for name, value in tensors("mmengine").items()}
        runner.model.load_state_dict(values, strict=True)
        runner.save_checkpoint(folder, "trained.pth", save_optimizer=False, save_param_scheduler=False)
        checkpoint = torch.load(Path(folder) / "trained.pth", weights_only=False)
    torch.save(checkpoint, HERE / "mmengine_small_trained.pth")
    # MMPretrain's publish_model.py removes all training state, including the message hub, and adds its version.
    meta = {**checkpoint["meta"], "mmpretrain_version": mmpretrain.__version__}
    torch.save({"meta": meta, "state_dict": checkpoint["state_dict"]}, HERE / "mmengine_small.pth")
    model = runner.model.eval()
    with torch.no_grad():
        found = {f"{h}x{w}": model(torch.from_numpy(images(h, w)), mode="tensor").tolist() for h, w in SIZES}
    (HERE / "logits_mmengine.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
