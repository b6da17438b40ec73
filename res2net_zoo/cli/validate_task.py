"""Measure a detection, segmentation, saliency or keypoint model on annotated images.

Usage: res2net-zoo validate-task NAME --data SRC [--split NAME] [--check] [--published DATA]

NAME is a folder written by `res2net-zoo train-task`, local-dir:DIR or hf-hub:ORG/NAME. --check compares the figures
with those of the model's card for this data, or with --published, with those of the paper's Tables 5 to 10 for this
backbone. The check fails if a figure is missing, or worse by more than --tolerance. docs/tasks.md describes what SRC
must contain. Every image is counted exactly once, on any number of processes.

Examples:
  res2net-zoo validate-task outputs/voc --data VOC2012 --check
  res2net-zoo validate-task hf-hub:ORG/NAME --processes 8 --data COCO --published COCO --output figures.json

Exit codes: 0 done; 1 a figure is missing or worse; 2 bad input. `accelerate launch` turns every failure into 1.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from res2net_zoo.cli.command import command, parser_of
from res2net_zoo.cli.options import add_batch_size, add_machine
from res2net_zoo.utils.command_line import within

if TYPE_CHECKING:
    from accelerate import Accelerator


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", metavar="NAME", help="folder, local-dir:DIR or hf-hub:ORG/NAME")
    add(
        "--data", required=True, metavar="SRC", help="annotated images, as docs/tasks.md describes for the model's task"
    )
    add("--split", default="val", help="split of the data (default: %(default)s)")
    add("--check", action="store_true", help="fail if a figure is worse than that of the card, or of --published")
    add("--published", metavar="DATA", help="compare with the paper's figures on this data, such as COCO")
    add("--boxes", type=Path, help="evaluate keypoints in a detector's boxes, in COCO's results format")
    add("--results", type=Path, help="write the predictions in COCO's results format")
    about = (
        "how much worse a figure may be (default: half of the paper's last digit: 0.05 for percentages, else 0.0005)"
    )
    add("--tolerance", type=within(float, 0), help=about)
    add_batch_size(add, 8)
    add_machine(add)
    add("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    args.check = args.check or args.published is not None
    return args


@command(parse_args)
def main(args: argparse.Namespace) -> int:
    from res2net_zoo.utils.files import check_writable_by_main, locked_by_main
    from res2net_zoo.utils.processes import start_processes

    accelerator = start_processes(args.threads, args.mixed_precision)
    for path in (args.output, args.results):
        check_writable_by_main(path, accelerator)
    with locked_by_main(args.output, accelerator), locked_by_main(args.results, accelerator):
        return validate(args, accelerator)


def validate(args: argparse.Namespace, accelerator: "Accelerator") -> int:
    """Measure the model; return the exit code."""
    import torch

    from res2net_zoo.tasks import load
    from res2net_zoo.tasks.base import find_folder
    from res2net_zoo.tasks.evaluation import evaluate, expected_figures, write_json
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import all_or_none, main_first, workers_of

    model: Any = main_first(accelerator, lambda: load(args.model))
    data = open_data(model, args)
    expected: dict[str, float] = {}
    source = None
    if args.check:
        expected, source = all_or_none(
            lambda: expected_figures(model, find_folder(args.model), args.data, args.split, args.published)
        )
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    workers = workers_of(args.workers, accelerator.device)
    score = model.score(data)
    if args.results is not None:
        score.results()  # raises an error now if the task does not support results
    figures = evaluate(model, data, accelerator, args.batch_size, workers, score)
    results = [] if args.results is None else score.results()
    if args.check and not set(expected) & set(figures):
        raise InputError(f"{source} contains no figure for {', '.join(figures)}")
    rows = compare(figures, expected, model, args.tolerance)
    passed = all(row[-1] != "no" for row in rows)
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        print(
            f"{model.task}, {model.settings['head']} on {model.settings['model']}: "
            f"{len(data)} {data.samples} of {args.data}, {args.split}; num_processes {processes}"
        )
        print_figures(rows, source, data, args.check)
        if args.results is not None:
            write_json(args.results, results, indent=None)
        if args.output is not None:
            about = {"model": args.model, "task": model.task, "data": args.data, "split": args.split}
            about |= {} if args.boxes is None else {"boxes": str(args.boxes)}
            measured = {"samples": len(data), "figures": figures, "published": expected, "published_source": source}
            done = {"passed": passed, "num_processes": processes}
            write_json(args.output, [{**about, **measured, **score.details(), **data.remarks(), **done}])
    return 0 if passed else 1


def open_data(model: Any, args: argparse.Namespace) -> Any:
    """Open the annotated images, with the boxes of a detector if --boxes is set."""
    from res2net_zoo.tasks.keypoints import COCOPersons
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.utils.processes import all_or_none

    data = all_or_none(lambda: model.open(args.data, args.split, model.settings["head"], model.settings["classes"]))
    if args.boxes is not None:
        if not isinstance(data, COCOPersons):
            raise InputError(f"--boxes is for keypoints; the task of {args.model} is {model.task}")
        all_or_none(lambda: data.take_boxes(args.boxes))
    if args.published is not None and isinstance(data, COCOPersons) and not data.found:
        raise InputError(
            "published keypoint figures are measured in a detector's boxes, and are lower than in annotated "
            "boxes; name the detections with --boxes"
        )
    return data


def compare(
    figures: Mapping[str, float], expected: Mapping[str, float], model: Any, tolerance: float | None
) -> list[tuple[str, str, str, str]]:
    """Compare figures with the published ones.

    Returns:
        A row per figure: name, measured value, published value, and whether it is reached ("yes", "no" or "-").
    """
    tolerance = model.tolerance if tolerance is None else tolerance
    rows = []
    for name in [*figures, *sorted(expected.keys() - figures.keys())]:
        value, wanted = figures.get(name), expected.get(name)
        reached = "-"
        if wanted is not None:
            # A figure that is missing or NaN is not reached.
            better = -1 if name in model.less_is_better else 1
            reached = "yes" if value is not None and better * (wanted - value) <= tolerance + 1e-9 else "no"
        measured, published = ("-" if number is None else f"{number:.3f}" for number in (value, wanted))
        rows.append((name, measured, published, reached))
    return rows


def print_figures(rows: Sequence[tuple[str, str, str, str]], source: str | None, data: Any, check: bool) -> None:
    """Print the figures as a table, with the published ones if they are checked, and the remarks on the data."""
    from res2net_zoo.utils.console import printable
    from res2net_zoo.utils.markdown import markdown_table

    header = ("figure", "measured", "published", "reached")
    columns = len(header) if check else 2
    print(markdown_table(header[:columns], [row[:columns] for row in rows]))
    if source:
        print(f"published: {source}")
    for name, value in data.remarks().items():
        print(f"{name}: {printable(value)}")
