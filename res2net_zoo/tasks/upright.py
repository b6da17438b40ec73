"""One rule for EXIF orientations: training, evaluation and prediction see an image upright, as its camera was held.

Annotations are for the upright image or for the stored pixels; which of them, their width and height show. Those
for the stored pixels are turned with the image.
"""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from res2net_zoo.data.images import check_mode, open_image, to_mode
from res2net_zoo.tasks.base import NO_IMAGE, reason
from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError

Turn = Image.Transpose

TURNS = {
    **{2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE},
    **{6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90},
}
SIDEWAYS = (Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90)
BACK = {Turn.ROTATE_270: Turn.ROTATE_90, Turn.ROTATE_90: Turn.ROTATE_270}  # the others undo themselves


def turn_of(image: Image.Image) -> Turn | None:
    """Return what turns the stored pixels of an image, which is not decoded yet, upright; None where they are.

    A damaged orientation counts as none, as with other readers.
    """
    # Pillow itself turns a TIFF. Of a PNG without EXIF data before its pixels it would decode these to look for more.
    if image.format == "TIFF" or (image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()):
        return None
    try:
        return TURNS.get(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image in RGB and upright."""
    turn = turn_of(image)
    pixels = to_mode(image, "RGB")
    return pixels if turn is None else pixels.transpose(turn)


def read_rgb(path: Path) -> Image.Image:
    """Read an image in RGB and upright.

    Raises:
        Exception: As `open_image`.
    """
    with open_image(path) as image:
        return to_rgb(image)


def moved(places: np.ndarray, turn: Turn, width: int, height: int) -> np.ndarray:
    """Return where places (..., 2) in an image of this size, counted from its corner, are when it is turned."""
    x, y = places[..., 0], places[..., 1]
    across, down = width - x, height - y
    return np.stack(
        {
            **{Turn.FLIP_LEFT_RIGHT: (across, y), Turn.ROTATE_180: (across, down), Turn.FLIP_TOP_BOTTOM: (x, down)},
            **{Turn.TRANSPOSE: (y, x), Turn.ROTATE_270: (down, x), Turn.TRANSVERSE: (down, across)},
            **{Turn.ROTATE_90: (y, across)},
        }[turn],
        -1,
    )


def moved_box(box: list[float], turn: Turn, width: int, height: int) -> list[float]:
    """Return a box, as left, top, width and height, in an image of this size when that is turned."""
    x, y, w, h = box
    corners = moved(np.array([[x, y], [x + w, y + h]]), turn, width, height)
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    return [left, top, right - left, bottom - top]


class Frames:
    """Compares the sizes of images with those of their annotations, and warns of what orientations make doubtful."""

    def __init__(self) -> None:
        self.stored: list[Path] = []
        self.doubtful: list[Path] = []

    def turn(self, path: Path, size: tuple[int, int], source: object, annotations: str) -> Turn | None:
        """Return what turns the annotations of an image upright; None where they are.

        Args:
            path: The image.
            size: Width and height that its annotations are for.
            source: What names the image, for a message.
            annotations: What has that size, for a message: `its annotations are for`.

        Raises:
            InputError: The image cannot be read, or is of another size.
        """
        try:
            with open_image(path) as image:
                check_mode(image)
                turn = turn_of(image)
                w, h = image.size
        except NO_IMAGE as error:
            raise InputError(f"cannot read {path}, which {source} names: {reason(error, path)}") from error
        upright = (h, w) if turn in SIDEWAYS else (w, h)
        if size == upright:
            if turn is not None and upright == (w, h):
                self.doubtful.append(path)
            return None
        if size == (w, h):
            self.stored.append(path)
            return turn
        turned = "" if upright == (w, h) else f" ({upright[0]} x {upright[1]} by its EXIF orientation)"
        raise InputError(f"{path} is {w} x {h}{turned}; {annotations} {size[0]} x {size[1]}")

    def warn(self) -> None:
        """Warn of the images that have an orientation, once for all of them."""
        if self.stored:
            warn(
                f"{count_of(self.stored)} an EXIF orientation, but annotations of the size of the stored pixels; "
                "image and annotations are turned upright"
            )
        if self.doubtful:
            warn(
                f"{count_of(self.doubtful)} an EXIF orientation that leaves the size as it is; the annotations are "
                "taken for those of the upright image. If they are for the stored pixels, remove the EXIF data"
            )


def count_of(paths: list[Path]) -> str:
    """Return how many images there are and which is the first, with a verb: `2 images such as a.jpg have`."""
    return f"{paths[0]} has" if len(paths) == 1 else f"{len(paths)} images such as {paths[0]} have"
