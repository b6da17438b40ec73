"""Make hub/datasets/digits: the UCI optical handwritten digits as Parquet, in fixed splits.

Usage: python hub/datasets/make_digits.py [--output DIR]
Needs scikit-learn, which contains the images: pip install -e '.[test]'
"""

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # so that errors are printed on one line
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "digits", help="folder to write into")
    return parser.parse_args()


def main(output: Path) -> None:
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(d) for d in range(10)])}
    )
    # Pixels are counts from 0 to 16; each is mapped to a distinct grey value.
    images = [Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)) for pixels in digits.images]
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    splits = whole.train_test_split(test_size=0.2, stratify_by_column="label", seed=0)
    (output / "data").mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("test", "validation")):
        splits[split].flatten_indices().to_parquet(output / "data" / f"{name}-00000-of-00001.parquet")
        print(f"{name}: {len(splits[split])} images")


if __name__ == "__main__":
    main(parse_args().output)
