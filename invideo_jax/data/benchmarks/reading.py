"""Annotation files as plain Python values, and nothing but values: no file can run code."""

import csv
import io
import json
import pathlib
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class AnnotationError(ValueError):
    """A file that is not what its name says; the text says where and what is wrong."""


def text_of(path: pathlib.Path) -> str:
    """The file as UTF-8 text, without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise AnnotationError(error.strerror or str(error)) from error


def lines_of(path: pathlib.Path) -> list[str]:
    """Lines that are not empty, without the spaces around them."""
    return [line.strip() for line in text_of(path).split("\n") if line.strip()]


def json_of(path: pathlib.Path, kind: type = list) -> Any:
    """A JSON file whose outermost value is a list, or a dict."""
    try:
        value = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"no JSON ({error})") from error
    if not isinstance(value, kind):
        raise AnnotationError(
            f"its outermost value must be a {kind.__name__}; got {type(value).__name__}"
        )
    return value


def json_lines_of(path: pathlib.Path) -> list[dict]:
    """One JSON object a line."""
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"line {number} is no JSON ({error})") from error
    return rows


def table_of(path: pathlib.Path, delimiter: str = ",") -> list[list[str]]:
    """Rows of cells; a delimiter in quotes belongs to its cell."""
    csv.field_size_limit(1 << 26)
    try:
        rows = list(csv.reader(io.StringIO(text_of(path)), delimiter=delimiter))
    except csv.Error as error:
        raise AnnotationError(str(error)) from error
    return [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]


def records_of(path: pathlib.Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line that names at least these columns."""
    rows = table_of(path)
    header = rows[0] if rows else []
    lacking = [name for name in columns if name not in header]
    if lacking:
        raise AnnotationError(
            f"its first line must name the columns {', '.join(columns)}; {', '.join(lacking)} "
            f"is not among {', '.join(header) or 'nothing'}"
        )
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise AnnotationError(f"row {number} has {len(row)} cells for {len(header)} columns")
    return [dict(zip(header, row)) for row in rows[1:]]


def each(rows: Iterable[Any], make: Callable[[Any], Any]) -> list:
    """`make` of each row; one that lacks something says which row it is.

    Raises:
        AnnotationError: a row without a needed key, or with a value of another kind.
    """
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(make(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise AnnotationError(f"entry {number} {what}: {str(row)[:200]}") from error
    return made


def texts(value: Any) -> tuple[str, ...]:
    """A caption or a list of captions as a tuple.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise ValueError(f"must have a text or a list of texts; got {str(value)[:80]!r}")


def grouped(pairs: Iterable[tuple[str, str]]) -> Mapping[str, list[str]]:
    """(name, text) pairs as name -> its texts, in the order of their first appearance."""
    found: dict[str, list[str]] = {}
    for name, text in pairs:
        found.setdefault(name, []).append(text)
    return found


class _Plain(pickle.Unpickler):
    """Makes dicts, lists, tuples, sets, texts and numbers; nothing that needs an import, so nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        raise AnnotationError(
            f"it is a pickle that asks for {module}.{name}, and only one of plain lists, dicts and texts is read"
        )


def pickle_of(path: pathlib.Path) -> Any:
    """The plain values of a pickle.

    Raises:
        AnnotationError: damaged, or it asks for any class or function.
    """
    try:
        with open(path, "rb") as file:
            # Texts of Python 2 are bytes in UTF-8.
            return _Plain(file, encoding="utf-8", errors="replace").load()
    except AnnotationError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise AnnotationError(f"no pickle ({type(error).__name__}: {error})") from error
