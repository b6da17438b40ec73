"""Limits of the images that people upload, and their decoding."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from res2net_zoo.data.images import FORMATS, open_image, to_mode
from res2net_zoo.utils.errors import InputError, one_line
from res2net_zoo.utils.files import read_bytes

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 50_000_000
ACCEPTED = f"accepted are {', '.join(FORMATS[:-1])} and {FORMATS[-1]}"


def read_upload(path: Path) -> bytes:
    """Return the content of an uploaded image, if it is within the limits and can be decoded.

    Raises:
        InputError: As for `decode_upload`, or the file is missing or too large.
    """
    try:
        content = read_bytes(path, MOST_BYTES)
    except InputError as error:  # whose message has the path on the server
        raise InputError(f"The file is missing, or larger than {MOST_BYTES >> 20} MB; upload it again.") from error
    decode_upload(content, "RGB")
    return content


def decode_upload(content: bytes, mode: str) -> Image.Image:
    """Decode an image, upright.

    Args:
        content: The content of its file.
        mode: PIL mode, `RGB` or `L`.

    Raises:
        InputError: It is animated, too large, damaged, or of another format; the message is one sentence.
    """
    try:
        with open_image(content) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise InputError(
                    f"The image has {width} x {height} pixels; the limit is {MOST_PIXELS // 10**6} million pixels."
                )
            # The second picture of a camera's MPO is a preview, not a frame.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise InputError("The image is animated or has several pages; save one of them as an image.")
            return to_mode(image, mode, upright=True)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"The file is not an image of a supported format; {ACCEPTED}.") from error
    except Exception as error:  # Pillow raises various types for a damaged file
        raise InputError(f"The image is damaged or unsupported: {one_line(error, 100)}.") from error
