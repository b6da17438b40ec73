"""Reads hostile files in a process with limited memory: `python -m tests.weights.fuzz_worker READER`.

Each line of the standard input is the path of a file or folder; the answer is one line: `read`, `refused MESSAGE`
if the reader raised an error that programs print on one line, or `failed ERROR` for any other exception.
"""

import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXTRA = 2 * 2**30  # bytes of address space in addition to that of imports


def weights(path: Path) -> None:
    """Convert a weight file, whose suffix defines its format."""
    from res2net_zoo.weights.convert import convert

    convert(path, path.suffix[1:], {})


def model_folder(path: Path) -> None:
    """Verify a folder; if it passes, it must load and classify an image."""
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.weights.pretrained import create_model
    from res2net_zoo.weights.verification import verify

    if any(check.passed is False for check in verify(path)):
        raise InputError("verify has found something else than expected")
    try:
        model: Any = create_model(f"local-dir:{path}").eval()
    except InputError as error:
        raise AssertionError(f"verify passes what loading refuses: {error}") from error
    config = resolve_model_data_config(model)
    blank = Image.new("RGB" if config["input_size"][0] == 3 else "L", (300, 300))
    image = create_transform(**config, is_training=False)(blank)
    with torch.no_grad():
        assert model(image[None]).isfinite().all()


def bill(path: Path) -> None:
    """Compare a folder with its bill of materials, and write a new one."""
    from res2net_zoo.utils.errors import InputError
    from res2net_zoo.weights.bill_of_materials import check, write

    result = check(path)
    write(path)
    if check(path).passed is not True:
        raise AssertionError("the new bill does not describe the folder")
    if result.passed is False:
        raise InputError(result.found)


def annotations(path: Path) -> None:
    """Read COCO annotations of objects or persons, depending on the file name."""
    from res2net_zoo.tasks.instances import Instances
    from res2net_zoo.tasks.keypoints import COCOPersons

    if (path / "annotations" / "instances_train.json").is_file():
        Instances(path, "train", masks=True)[0]
    else:
        COCOPersons(path, "train")[0]


def image(path: Path) -> None:
    """Decode an image as a sample of a data set."""
    from res2net_zoo.data.images import Samples, read_named
    from res2net_zoo.utils.errors import InputError

    sample = Samples(lambda image: image.size, "RGB", lambda label, path: 0, read_named)  # type: ignore[arg-type]
    if reason := sample("image 0", {"image": {"bytes": None, "path": str(path)}}).corrupt:
        raise InputError(reason)


READERS: dict[str, Callable[[Path], None]] = {
    "weights": weights,
    "model_folder": model_folder,
    "bill": bill,
    "annotations": annotations,
    "image": image,
}


def main() -> None:
    """Print a result for each path."""
    import timm  # noqa: F401
    import torch

    from res2net_zoo.utils.errors import InputError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + EXTRA, taken + EXTRA))
    read = READERS[sys.argv[1]]
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            read(Path(line.rstrip("\n")))
            answer = "read"
        except InputError as error:
            answer = f"refused {error}"
        except BaseException:
            answer = f"failed {traceback.format_exc()}"
        print(answer.encode("unicode_escape").decode(), flush=True)


if __name__ == "__main__":
    main()
