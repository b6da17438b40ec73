"""Lists and annotations: text that others wrote, of which each name and number is checked before it is used."""

import math
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from res2net_zoo.utils.console import warn
from res2net_zoo.utils.errors import InputError
from res2net_zoo.utils.files import read_json, read_text

LARGEST_JSON = 4 * 2**30  # bytes of annotations; COCO's instances_train2017.json has 450 MB
LARGEST_LIST = 2**28  # bytes of a list of images
LONGEST_LINE = 8200  # characters: two paths as long as Linux takes them
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80

FLAGS = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True}  # JSON's own are 0 and 1


def shown(value: Any) -> str:
    """Return a value of a file for a message, as JSON has it, cut short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return SHORT.repr(value)


def member(record: Any, key: str) -> Any:
    """Return what a record of an annotation file holds.

    Raises:
        ValueError: It is not a record, or is without that.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it must be a JSON object, not {shown(record)}")
    if key not in record:
        raise ValueError(f"its {key} is missing")
    return record[key]


def number(value: Any, what: str) -> float:
    """Return a finite number of an annotation; text and truth values are none.

    Raises:
        ValueError: It is something else.
    """
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"its {what} {shown(value)} is not a finite number")


def numbers(values: Any, what: str, count: int) -> list[float]:
    """Return so many finite numbers of an annotation.

    Raises:
        ValueError: They are others.
    """
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"its {what} {shown(values)} must be {count} numbers")
    return [number(value, what) for value in values]


def whole(value: Any, what: str) -> int:
    """Return a positive whole number, which may be written as 128.0.

    Raises:
        ValueError: It is something else.
    """
    found = number(value, what)
    if found < 1 or found != int(found):
        raise ValueError(f"its {what} {shown(value)} is not a positive whole number")
    return int(found)


def number_in(text: str | None, what: str) -> float:
    """Return a finite number of an XML element's text, None where it is missing.

    Raises:
        ValueError: It is something else.
    """
    if text is None or not text.strip():
        raise ValueError(f"its {what} is {'missing' if text is None else 'empty'}")
    try:
        return number(float(text), what)
    except ValueError:
        raise ValueError(f"its {what} {shown(text.strip())} is not a finite number") from None


def flag(value: Any, what: str) -> bool:
    """Return a truth value, which may be written as 0 or 1, false or true.

    Raises:
        ValueError: It is something else.
    """
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float) or key not in FLAGS:
        raise ValueError(f"its {what} {shown(value)} must be 0 or 1")
    return FLAGS[key]


def identifier(value: Any, what: str) -> Any:
    """Return an id: a whole number or a text.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, str) and (type(value) not in (int, float) or value % 1 != 0):
        raise ValueError(f"its {what} {shown(value)} must be a whole number or a text")
    return value


def find_by_id(known: dict[Any, Any], record: Any, key: str, what: str) -> Any:
    """Return what a record refers to by an id.

    Args:
        known: What there is, by id.
        record: An annotation.
        key: Name of the id, such as `image_id`.
        what: What it is, for a message: image or category.

    Raises:
        ValueError: There is no such.
    """
    value = identifier(member(record, key), key)
    if value not in known:
        other = next((one for one in known if str(one) == str(value)), None)
        kinds = {True: "a text", False: "a number"}
        why = ""
        if other is not None:
            why = f": {key} is {kinds[isinstance(value, str)]} and the id there {kinds[isinstance(other, str)]}"
        raise ValueError(f"its {what} {shown(value)} is not in the list{why}")
    return known[value]


def read_coco(path: Path, *lists: str) -> dict[str, list[Any]]:
    """Read a file of COCO's: a JSON object with these lists.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    content = read_json(path, LARGEST_JSON)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a file of COCO's: it must be a JSON object with {', '.join(lists)}")
    for name in lists:
        if not isinstance(content.get(name), list):
            state = "is missing" if name not in content else "is not a list"
            raise InputError(f"{path} is not a file of COCO's: {name} {state}")
    return content


def coco_images(path: Path, records: list[Any]) -> dict[Any, tuple[str, int, int]]:
    """Return file name, width and height of the images of a file of COCO's, by id.

    Raises:
        InputError: One is not described so, or two have the same id.
    """
    found: dict[Any, tuple[str, int, int]] = {}
    for place, record in enumerate(records, 1):
        try:
            key, name = identifier(member(record, "id"), "id"), member(record, "file_name")
            if not isinstance(name, str) or not name:
                raise ValueError(f"its file_name {shown(name)} must be a text")
            if key in found:
                raise ValueError(f"its id {shown(key)} is that of another image")
            found[key] = (name, whole(member(record, "width"), "width"), whole(member(record, "height"), "height"))
        except ValueError as error:
            raise InputError(f"{path}, image {place}: {error}") from error
    return found


def inside(folder: Path, place: Path, name: str, source: Path) -> Path:
    """Return the file that an annotation names, which must be below the data's folder by its name.

    Folders there may be links, which the data's owner has made.

    Args:
        folder: The data's folder.
        place: Where in it the name begins.
        name: A path from there; an absolute one must lead below the data's folder too.
        source: What names it, for a message.

    Raises:
        InputError: It leads out of the folder.
    """
    if os.sep not in name and name not in ("", ".", "..") and "\0" not in name:
        return place / name
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(os.path.abspath(place), name))
    if "\0" in name or not path.startswith(root.rstrip(os.sep) + os.sep):
        raise InputError(f"{source} names {name}, which is not below the data's folder {folder}")
    return folder / os.path.relpath(path, root)


def is_file(folder: Path, place: Path, name: str, source: Path) -> bool:
    """Return whether an annotation names a file in this place; raises as `inside`."""
    return os.path.isfile(inside(folder, place, name, source))


def named(record: Any, place: int) -> str:
    """Return which annotation it is, for a message: by its id if it has one, else by its place in the list."""
    key = record.get("id") if isinstance(record, dict) else None
    return f"annotation {place} of the list" if key is None else f"annotation {shown(key)}"


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text that are not empty, without the space around them.

    Raises:
        InputError: It cannot be read, is not such a text, or has a line too long for names of files.
    """
    text = read_text(path, LARGEST_LIST).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if max(map(len, lines), default=0) > LONGEST_LINE:
        raise InputError(f"{path} has a line of more than {LONGEST_LINE:,} characters; a list has a name a line")
    return lines


def read_classes(path: Path) -> list[str]:
    """Return the names of classes, of which a list has one a line.

    Raises:
        InputError: As `read_lines`, or there are none, or two are the same.
    """
    names = read_lines(path)
    if not names:
        raise InputError(f"{path} lists no classes")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} lists the class {twice[0]} twice")
    return names


def pairs_in(line: str) -> list[tuple[str, str]]:
    """Return what a line of a list can be as an image and its annotation, whose names may hold spaces too."""
    glue = "\t" if "\t" in line else " "
    words = [word.strip() for word in line.split(glue) if word.strip()]
    splits = [(glue.join(words[:i]), glue.join(words[i:])) for i in range(1, len(words))]
    return [
        (one, other) for one, other in splits if suffix_of(one) in SUFFIXES and suffix_of(other) in (*SUFFIXES, ".xml")
    ]


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def find_file(folder: Path, place: Path, name: str, suffixes: Sequence[str], source: Path) -> Path | None:
    """Return the file that a name in a list means, or None.

    Args:
        folder: The data's folder, which a leading slash means too.
        place: Folder in it where names begin; they may begin at the data's folder as well.
        name: With or without its suffix.
        suffixes: Of files that are named without.
        source: The list, for a message.

    Raises:
        InputError: The name leads out of the data's folder, or means two files.
    """
    if not os.path.normpath(name).startswith(os.path.abspath(folder) + os.sep):
        name = name.lstrip("/")
    for start in (place, folder):
        base = inside(folder, start, name, source)
        tries = [base] * bool(suffix_of(name)) + [base.with_name(base.name + suffix) for suffix in suffixes]
        found = [path for path in tries if os.path.isfile(path)]
        if len(found) > 1:
            raise InputError(f"{source} names {name}, which can be {found[0]} or {found[1]}; name it with its suffix")
        if found:
            return found[0]
    return None


Pair = tuple[Path, Path]  # of an image and its mask or annotation


def read_list(
    source: Path, single: Callable[[str], Pair | None], pair: Callable[[str, str], Pair | None]
) -> list[Pair]:
    """Read a list of images, or of images and their annotations; which of them a line is, the files there show.

    Args:
        source: The list.
        single: From the name of an image to its files; None where there is no such image.
        pair: From the names of both; None where one is missing.

    Returns:
        Images with their annotations, each once; of repeated lines it warns.

    Raises:
        InputError: It cannot be read, or a line means no files or several.
    """
    pairs = []
    for line in read_lines(source):
        twos = pairs_in(line)
        found = list(dict.fromkeys(x for x in (single(line), *(pair(*two) for two in twos)) if x is not None))
        if len(found) > 1:
            meanings = " or ".join(f"{image} with {about}" for image, about in found[:2])
            raise InputError(f"{source} names {line}, which can be {meanings}; rename the files")
        if not found:
            both = ", nor both files of a pair" * bool(twos)
            raise InputError(f"there is no image {line}, which {source} names{both}")
        pairs += found
    if not pairs:
        raise InputError(f"{source} lists no images")
    return without_repeats(source, pairs)


def without_repeats(source: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """Return images with their annotations, each once, and warn of those that a list repeats.

    Raises:
        InputError: An image is listed with two annotations.
    """
    kept: dict[Path, Path] = {}
    repeats = []
    for image, about in pairs:
        if image in kept:
            repeats.append(image)
        if kept.setdefault(image, about) != about:
            raise InputError(f"{source} lists {image} with both {kept[image]} and {about}")
    if repeats:
        lines = (
            f"a line that repeats {repeats[0]}"
            if len(repeats) == 1
            else f"{len(repeats)} lines that repeat images, such as {repeats[0]}"
        )
        warn(f"{source} has {lines}; each image is taken once")
    return list(kept.items())
