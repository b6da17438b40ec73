"""Images per second compared with timm's loader and loop. Run manually: pytest -m slow -s."""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config

from res2net_zoo.data.labels import match_classes
from res2net_zoo.data.sources import open_source
from res2net_zoo.evaluation import evaluate
from res2net_zoo.utils.processes import default_workers, start_processes

NAME, BATCH, ROUNDS = "res2net50_26w_4s", 32, 5


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Images of a typical ImageNet size."""
    rng = np.random.default_rng(0)
    for i in range(128):
        folder = tmp_path / "val" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return tmp_path / "val"


def timms_loop(model: torch.nn.Module, folder: Path, memory_format: torch.memory_format) -> float:
    """Validate like timm's validate.py, with one worker per core; return images per second."""
    config = resolve_model_data_config(model)
    loader = create_loader(
        create_dataset("", root=str(folder)),
        input_size=config["input_size"],
        batch_size=BATCH,
        is_training=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        num_workers=2,
        device=torch.device("cpu"),
    )
    model = model.to(memory_format=memory_format)
    start = time.perf_counter()
    correct = 0
    with torch.inference_mode():
        for images, targets in loader:
            output = model(images.contiguous(memory_format=memory_format))
            correct += (output.topk(5)[1] == targets[:, None]).any(1).sum().item()
    return len(loader.dataset) / (time.perf_counter() - start)


@pytest.mark.slow
def test_throughput_against_timm(photographs):
    accelerator = start_processes()
    theirs = timm.create_model(NAME).eval()
    ours = timm.create_model(NAME)
    ours.load_state_dict(theirs.state_dict())
    ours = ours.eval().to(memory_format=torch.channels_last)
    source = open_source(str(photographs))
    classes = match_classes(None, 1000)
    rates: dict[str, list[float]] = {"timm": [], "timm --channels-last": [], "zoo": []}
    for _ in range(ROUNDS):
        rates["timm"].append(timms_loop(theirs, photographs, torch.contiguous_format))
        rates["timm --channels-last"].append(timms_loop(theirs, photographs, torch.channels_last))
        counts = evaluate(
            ours, source, classes, accelerator, batch_size=BATCH, workers=default_workers(accelerator.device)
        )
        rates["zoo"].append(counts.samples / counts.seconds)
    for name, values in rates.items():
        print(f"\n{name}: {', '.join(f'{v:.1f}' for v in values)} images/s, median {statistics.median(values):.1f}")
    for name in ("timm", "timm --channels-last"):
        ratios = [zoo / theirs for zoo, theirs in zip(rates["zoo"], rates[name], strict=True)]
        print(f"zoo / {name}: {', '.join(f'{r:.2f}' for r in ratios)}, median {statistics.median(ratios):.2f}")
        if name == "timm":
            assert statistics.median(ratios) >= 1.2
