"""Parsing and validation of image lists and annotation files."""

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
LONGEST_LINE = 8200  # characters: two paths of the maximum length on Linux
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80

FLAGS = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True}  # also matches JSON's booleans


def format_value(value: Any) -> str:
    """Return a value of a file for a message, in JSON's notation and truncated."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return SHORT.repr(value)


def require_field(record: Any, key: str) -> Any:
    """Return the value of a key in a record of an annotation file.

    Raises:
        ValueError: The record is not a JSON object, or the key is missing.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it must be a JSON object, not {format_value(record)}")
    if key not in record:
        raise ValueError(f"its {key} is missing")
    return record[key]


def number(value: Any, what: str) -> float:
    """Return a value of an annotation that must be a finite number, not a string or a boolean.

    Raises:
        ValueError: The value is invalid.
    """
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"its {what} {format_value(value)} is not a finite number")


def numbers(values: Any, what: str, count: int) -> list[float]:
    """Return a value of an annotation that must be a list of `count` finite numbers.

    Raises:
        ValueError: The value is invalid.
    """
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"its {what} {format_value(values)} must be {count} numbers")
    return [number(value, what) for value in values]


def positive_integer(value: Any, what: str) -> int:
    """Return a value that must be a positive integer, which may be written as 128.0.

    Raises:
        ValueError: The value is invalid.
    """
    found = number(value, what)
    if found < 1 or found != int(found):
        raise ValueError(f"its {what} {format_value(value)} is not a positive whole number")
    return int(found)


def number_from_text(text: str | None, what: str) -> float:
    """Return the finite number in an XML element's text, which is None if the element is missing.

    Raises:
        ValueError: The value is invalid.
    """
    if text is None or not text.strip():
        raise ValueError(f"its {what} is {'missing' if text is None else 'empty'}")
    try:
        return number(float(text), what)
    except ValueError:
        raise ValueError(f"its {what} {format_value(text.strip())} is not a finite number") from None


def boolean(value: Any, what: str) -> bool:
    """Return a boolean, which may be written as 0 or 1, false or true.

    Raises:
        ValueError: The value is invalid.
    """
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float) or key not in FLAGS:
        raise ValueError(f"its {what} {format_value(value)} must be 0 or 1")
    return FLAGS[key]


def identifier(value: Any, what: str) -> Any:
    """Return a value that must be an id: an integer or a string.

    Raises:
        ValueError: The value is invalid.
    """
    if not isinstance(value, str) and (type(value) not in (int, float) or value % 1 != 0):
        raise ValueError(f"its {what} {format_value(value)} must be a whole number or a string")
    return value


def find_by_id(known: dict[Any, Any], record: Any, key: str, what: str) -> Any:
    """Return the object that a record refers to by its id.

    Args:
        known: Objects by id.
        record: An annotation.
        key: Name of the id, such as `image_id`.
        what: Name of the object for a message: image or category.

    Raises:
        ValueError: The id is invalid or unknown.
    """
    value = identifier(require_field(record, key), key)
    if value not in known:
        other = next((one for one in known if str(one) == str(value)), None)
        kinds = {True: "a string", False: "a number"}
        why = ""
        if other is not None:
            why = f": {key} is {kinds[isinstance(value, str)]} and the id there {kinds[isinstance(other, str)]}"
        raise ValueError(f"its {what} {format_value(value)} is not in the list{why}")
    return known[value]


def read_coco(path: Path, *lists: str) -> dict[str, list[Any]]:
    """Read an annotation file in COCO's format: a JSON object with these lists.

    Raises:
        InputError: The file cannot be read, or is not in this format.
    """
    content = read_json(path, LARGEST_JSON)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a COCO annotation file: it must be a JSON object with {', '.join(lists)}")
    for name in lists:
        if not isinstance(content.get(name), list):
            state = "is missing" if name not in content else "is not a list"
            raise InputError(f"{path} is not a COCO annotation file: {name} {state}")
    return content


def coco_images(path: Path, records: list[Any]) -> dict[Any, tuple[str, int, int]]:
    """Return file name, width and height of each image in a COCO annotation file, by id.

    Raises:
        InputError: A field is missing or invalid, or two images have the same id.
    """
    found: dict[Any, tuple[str, int, int]] = {}
    for place, record in enumerate(records, 1):
        try:
            key, name = identifier(require_field(record, "id"), "id"), require_field(record, "file_name")
            if not isinstance(name, str) or not name:
                raise ValueError(f"its file_name {format_value(name)} must be a string")
            if key in found:
                raise ValueError(f"another image has the same id {format_value(key)}")
            found[key] = (
                name,
                positive_integer(require_field(record, "width"), "width"),
                positive_integer(require_field(record, "height"), "height"),
            )
        except ValueError as error:
            raise InputError(f"{path}, image {place}: {error}") from error
    return found


def path_inside(folder: Path, place: Path, name: str, source: Path) -> Path:
    """Return the file that an annotation names, whose path must be inside the data folder.

    The check is lexical: symbolic links inside the data folder are followed.

    Args:
        folder: The data folder.
        place: Folder that a relative name is relative to.
        name: A relative or absolute path; both must be inside the data folder.
        source: The file that names it, for a message.

    Raises:
        InputError: The path is outside the data folder.
    """
    if os.sep not in name and name not in ("", ".", "..") and "\0" not in name:
        return place / name
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(os.path.abspath(place), name))
    if "\0" in name or not path.startswith(root.rstrip(os.sep) + os.sep):
        raise InputError(f"{source} names {name}, which is outside the data folder {folder}")
    return folder / os.path.relpath(path, root)


def is_file(folder: Path, place: Path, name: str, source: Path) -> bool:
    """Return whether the file that an annotation names exists; raises like `path_inside`."""
    return os.path.isfile(path_inside(folder, place, name, source))


def annotation_name(record: Any, place: int) -> str:
    """Return an annotation's name for a message: its id if present, else its position in the list."""
    key = record.get("id") if isinstance(record, dict) else None
    return f"annotation number {place}" if key is None else f"annotation {format_value(key)}"


def read_lines(path: Path) -> list[str]:
    """Return the stripped, non-empty lines of a UTF-8 text file.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or has a line longer than two paths.
    """
    text = read_text(path, LARGEST_LIST).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if max(map(len, lines), default=0) > LONGEST_LINE:
        raise InputError(f"{path} has a line of more than {LONGEST_LINE:,} characters; a list has one name per line")
    return lines


def read_classes(path: Path) -> list[str]:
    """Return the class names in a file with one name per line.

    Raises:
        InputError: See `read_lines`; or the file is empty, or lists a class twice.
    """
    names = read_lines(path)
    if not names:
        raise InputError(f"{path} lists no classes")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} lists the class {twice[0]} twice")
    return names


def pairs_in(line: str) -> list[tuple[str, str]]:
    """Return the possible splits of a line into an image and its annotation; names may contain spaces."""
    glue = "\t" if "\t" in line else " "
    words = [word.strip() for word in line.split(glue) if word.strip()]
    splits = [(glue.join(words[:i]), glue.join(words[i:])) for i in range(1, len(words))]
    return [
        (one, other) for one, other in splits if suffix_of(one) in SUFFIXES and suffix_of(other) in (*SUFFIXES, ".xml")
    ]


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a file name, including the dot."""
    return os.path.splitext(name)[1].lower()


def find_file(folder: Path, place: Path, name: str, suffixes: Sequence[str], source: Path) -> Path | None:
    """Return the file that a name in a list refers to, or None if it does not exist.

    Args:
        folder: The data folder, which a leading slash also refers to.
        place: Subfolder that names are relative to; they may also be relative to the data folder.
        name: File name with or without suffix.
        suffixes: Suffixes to try for a name without one.
        source: The list, for a message.

    Raises:
        InputError: The path is outside the data folder, or the name is ambiguous.
    """
    if not os.path.normpath(name).startswith(os.path.abspath(folder) + os.sep):
        name = name.lstrip("/")
    for start in (place, folder):
        base = path_inside(folder, start, name, source)
        tries = [base] * bool(suffix_of(name)) + [base.with_name(base.name + suffix) for suffix in suffixes]
        found = [path for path in tries if os.path.isfile(path)]
        if len(found) > 1:
            raise InputError(f"{source} names {name}, which matches {found[0]} and {found[1]}; add the suffix")
        if found:
            return found[0]
    return None


Pair = tuple[Path, Path]  # image and its mask or annotation


def read_list(
    source: Path, single: Callable[[str], Pair | None], pair: Callable[[str, str], Pair | None]
) -> list[Pair]:
    """Read a list whose lines name an image, or an image and its annotation, depending on which files exist.

    Args:
        source: The list.
        single: Returns the files for the name of an image; None if the image is missing.
        pair: Returns the files for both names; None if one is missing.

    Returns:
        Images with their annotations, without duplicates; repeated lines cause a warning.

    Raises:
        InputError: The list cannot be read, or a line matches no files or several.
    """
    pairs = []
    for line in read_lines(source):
        splits = pairs_in(line)
        found = list(dict.fromkeys(x for x in (single(line), *(pair(*split) for split in splits)) if x is not None))
        if len(found) > 1:
            meanings = " or ".join(f"{image} with {about}" for image, about in found[:2])
            raise InputError(f"{source} names {line}, which matches {meanings}; rename the files")
        if not found:
            both = ", alone or as a pair of files" * bool(splits)
            raise InputError(f"cannot find the image {line}, which {source} names{both}")
        pairs += found
    if not pairs:
        raise InputError(f"{source} lists no images")
    return without_repeats(source, pairs)


def without_repeats(source: Path, pairs: Sequence[Pair]) -> list[Pair]:
    """Return images with their annotations without duplicates, and warn about duplicates.

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
        warn(f"{source} has {lines}; each image is used once")
    return list(kept.items())
