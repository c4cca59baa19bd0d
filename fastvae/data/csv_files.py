"""Tables in CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import Part

ENDINGS = (".csv", ".tsv")
_LABELS = ("label", "class")
_SEPARATORS = ",;\t"


class Parts(NamedTuple):
    train: Part
    test: Part | None
    columns: tuple[str, ...]
    class_names: tuple[str, ...]


class _Table(NamedTuple):
    path: Path
    values: NDArray[np.float64]  # [N, F]
    labels: list[str] | None
    columns: tuple[str, ...]  # without names, none


def csv_parts(path: Path) -> Parts | None:
    """The content of a .csv file, of a folder with train.csv and perhaps test.csv, or of a folder with one .csv file.
    None if there is no such file. Raises ``ValueError`` and ``OSError``.
    """
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if _is_csv(file)}
        if not files:
            return None
        if "train" not in files and len(files) > 1:
            names = ", ".join(file.name for file in files.values())
            raise ValueError(f"{path} has {names}, expected one .csv file, or train.csv and test.csv")
        train_path, test_path = files.get("train", next(iter(files.values()))), files.get("test")
        test_path = None if test_path == train_path else test_path
    elif _is_csv(path):
        train_path, test_path = path, None
    else:
        return None
    train = _read(train_path)
    test = None if test_path is None else _read(test_path)
    if test is not None and (test.columns, test.labels is None) != (train.columns, train.labels is None):
        raise ValueError(f"{test.path} has other columns than {train.path}, expected the same")
    texts = {text for table in (train, test) if table is not None for text in table.labels or ()}
    numbered = all(_is_integer(text) for text in texts)
    class_names = () if numbered else tuple(sorted(texts))
    numbers = {text: int(text) if numbered else class_names.index(text) for text in texts}

    def part(table: _Table) -> Part:
        labels = None if table.labels is None else np.array([numbers[text] for text in table.labels], np.int64)
        return Part(table.values, str(table.path), labels, f"the labels in {table.path}")

    return Parts(part(train), None if test is None else part(test), train.columns, class_names)


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file()


def _read(path: Path) -> _Table:
    rows = _rows(path)
    _, first = next(rows, (1, []))
    if not first:
        raise ValueError(f"{path} is empty, expected a row for each sample")
    named = not any(map(_is_number, first))
    names = first if named else [f"column {number}" for number in range(1, len(first) + 1)]
    label = next((place for place, name in enumerate(names) if named and name.lower() in _LABELS), None)
    used = [place for place in range(len(names)) if place != label]
    if not used:
        raise ValueError(f"{path} has no column of numbers")
    labels: list[str] = []
    values: list[list[float]] = []
    if not named:
        rows = _rows(path)
    for line, row in rows:
        if len(row) != len(names):
            raise ValueError(f"{path}, line {line}, has {len(row)} cells, expected {len(names)}, as in its first line")
        try:
            values.append([float(row[place]) for place in used])
        except ValueError:
            values.append([math.nan])
        if not all(map(math.isfinite, values[-1])):
            place = next(place for place in used if not _is_number(row[place]))
            raise ValueError(
                f"{path}, line {line}, {names[place]}: expected a finite number, got {row[place]!r} (labels are in a "
                'column of the name "label" or "class")'
            )
        if label is not None:
            labels.append(row[label])
    if not values:
        raise ValueError(f"{path} has names of columns and no rows")
    return _Table(
        path,
        np.array(values, np.float64),
        None if label is None else labels,
        tuple(names[place] for place in used) if named else (),
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not empty, and its number, from 1."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(_SEPARATORS, key=first.count), skipinitialspace=True)
            for row in reader:
                if row:
                    yield reader.line_num, [cell.strip() for cell in row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as .csv: {error}") from error


def _is_number(text: str) -> bool:
    """Whether it is a finite one."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii() and len(text) < 19
