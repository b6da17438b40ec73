"""Compare speed and peak memory of scripts/finetune.py and a plain timm loop, interleaved. Run manually.

`python -m tests.training.compare_training [--model res2net50_26w_4s] [--rounds 3] [--mixed-precision bf16]`

The plain loop combines timm's components as its train.py does by default: create_loader,
create_transform with is_training, create_optimizer_v2, create_scheduler_v2, autocast. Both train the
same model on the same pictures with the same settings, loader processes and threads, and the first
steps are timed in both. On a GPU the plain loop has timm's prefetcher.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.pictures import SHAPES, save_shapes

ROOT = Path(__file__).resolve().parents[2]


def plain_loop(args: argparse.Namespace) -> dict[str, float]:
    """Train for some steps with a plain timm loop."""
    import timm
    import torch
    from timm.data import create_dataset, create_loader, resolve_model_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    model = timm.create_model(args.model, num_classes=len(SHAPES)).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    config = resolve_model_data_config(model)
    loader = create_loader(
        create_dataset("", root=str(args.data)),
        batch_size=args.batch_size,
        is_training=True,
        num_workers=args.workers,
        use_prefetcher=device.type == "cuda",
        device=device,
        scale=(0.35, 1.0),
        color_jitter=None,
        persistent_workers=True,
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std")},
    )
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=1, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    criterion = LabelSmoothingCrossEntropy(0.1)
    autocast = contextlib.nullcontext
    if args.mixed_precision == "bf16":
        autocast = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    model.train()
    start, seen = time.perf_counter(), 0
    for step, (images, targets) in enumerate(loader):
        images, targets = images.to(device), targets.to(device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
        seen += len(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"images_per_second": seen / (time.perf_counter() - start), "peak_memory_mb": memory / 2**20}


def finetune(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train with the same settings in scripts/finetune.py, and read its metrics."""
    import csv

    command = [sys.executable, "scripts/finetune.py", "--model", args.model, "--data", str(args.data.parent)]
    command += ["--batch-size", str(args.batch_size), "--workers", str(args.workers), "--threads", str(args.threads)]
    command += ["--mixed-precision", args.mixed_precision, "--lr", "1e-4", "--warmup-epochs", "0", "--epochs", "1"]
    plain = folder.with_name("plain.toml")  # without EMA and jitter of recipes
    plain.touch()
    command += ["--recipe", str(plain), "--tracker", "none", "--no-check", "--overwrite", "--output", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (row,) = csv.DictReader((folder / "metrics.csv").open())
    return {key: float(row[key]) for key in ("images_per_second", "peak_memory_mb")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="res2net50_26w_4s")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--channels-last", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is not None:  # one plain loop, in a separate process
        print(json.dumps(plain_loop(args)))
        return
    with tempfile.TemporaryDirectory() as name:
        args.data = Path(name) / "data" / "train"
        save_shapes(args.data, args.batch_size * args.steps // len(SHAPES))
        save_shapes(Path(name) / "data" / "val", 1)
        found: dict[str, list[dict[str, float]]] = {"plain": [], "plain, channels_last": [], "finetune.py": []}
        for _ in range(args.rounds):
            for kind, results in found.items():
                if kind == "finetune.py":
                    results.append(finetune(args, Path(name) / "model"))
                else:
                    words = [
                        f"--{key.replace('_', '-')}={getattr(args, key)}"
                        for key in vars(args)
                        if key != "channels_last"
                    ]
                    words += ["--channels-last"] * ("channels_last" in kind)
                    out = subprocess.run(
                        [sys.executable, "-m", "tests.training.compare_training", *words],
                        cwd=ROOT, check=True, capture_output=True, text=True,
                    )  # fmt: skip
                    results.append(json.loads(out.stdout.splitlines()[-1]))
                print(kind, {key: round(value, 2) for key, value in results[-1].items()}, flush=True)
    for kind in ("plain", "plain, channels_last"):
        ratios = [
            statistics.median(
                ours[key] / theirs[key] for ours, theirs in zip(found["finetune.py"], found[kind], strict=True)
            )
            for key in ("images_per_second", "peak_memory_mb")
        ]
        print(f"finetune.py over {kind}: {ratios[0]:.2f} of the speed, {ratios[1]:.2f} of the memory (medians)")


if __name__ == "__main__":
    main()
