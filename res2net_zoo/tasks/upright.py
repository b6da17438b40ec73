"""EXIF orientation: training, evaluation and prediction apply it to every image.

Annotations refer to the upright image or to the stored pixels; their width and height determine which. Annotations of
the stored pixels are transposed with the image.
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


def exif_transposition(image: Image.Image) -> Turn | None:
    """Return the transposition that makes an opened, not yet decoded image upright; None if it is upright.

    An invalid orientation is ignored, as by other readers.
    """
    # Pillow transposes a TIFF itself, and decodes a PNG whose EXIF data do not precede the pixels to look for them.
    if image.format == "TIFF" or (image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()):
        return None
    try:
        return TURNS.get(image.getexif().get(0x0112, 1))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image in RGB and upright."""
    turn = exif_transposition(image)
    pixels = to_mode(image, "RGB")
    return pixels if turn is None else pixels.transpose(turn)


def read_rgb(path: Path) -> Image.Image:
    """Read an image in RGB and upright.

    Raises:
        Exception: See `open_image`.
    """
    with open_image(path) as image:
        return to_rgb(image)


def transpose_points(places: np.ndarray, turn: Turn, width: int, height: int) -> np.ndarray:
    """Return points (..., 2), from the upper left corner of an image of this size, after its transposition."""
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


def transpose_box(box: list[float], turn: Turn, width: int, height: int) -> list[float]:
    """Return a box (left, top, width, height) in an image of this size after the image's transposition."""
    x, y, w, h = box
    corners = transpose_points(np.array([[x, y], [x + w, y + h]]), turn, width, height)
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    return [left, top, right - left, bottom - top]


class Frames:
    """Compares image sizes with those of their annotations, and warns of ambiguous orientations."""

    def __init__(self) -> None:
        self.stored: list[Path] = []
        self.doubtful: list[Path] = []

    def turn(self, path: Path, size: tuple[int, int], source: object, annotations: str) -> Turn | None:
        """Return the transposition that makes the annotations of an image upright; None if they are upright.

        Args:
            path: The image.
            size: Width and height that the annotations refer to.
            source: The list that names the image, for a message.
            annotations: Start of the message about that size, such as `its annotations are for`.

        Raises:
            InputError: The image cannot be read, or has a different size.
        """
        try:
            with open_image(path) as image:
                check_mode(image)
                turn = exif_transposition(image)
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
        """Print one warning about all images with an EXIF orientation."""
        if self.stored:
            warn(
                f"{count_with_verb(self.stored)} an EXIF orientation, but annotations for the stored pixels; "
                "image and annotations are rotated upright"
            )
        if self.doubtful:
            warn(
                f"{count_with_verb(self.doubtful)} an EXIF orientation that does not change the size; annotations "
                "are assumed to be for the upright image. If they are for the stored pixels, remove the EXIF data"
            )


def count_with_verb(paths: list[Path]) -> str:
    """Return the number of images and the first one, with a verb: `2 images such as a.jpg have`."""
    return f"{paths[0]} has" if len(paths) == 1 else f"{len(paths)} images such as {paths[0]} have"
