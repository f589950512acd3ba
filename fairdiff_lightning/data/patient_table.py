"""A table that says of each file whose it is, compared with the files that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import pandas as pd

from fairdiff_lightning.data.errors import InvalidSampleError

Rows = Mapping[str, Mapping[str, str]]
"""Stem of a file -> what its row says, in the order of the table."""


def rows_by_stem(table: pd.DataFrame, path: Path, suffixes: Sequence[str]) -> dict[str, dict[str, str]]:
    """The rows of a table with ``file`` and ``patient`` by the files' stems, empty cells left out.

    Args:
        table: of text.
        path: of the table, for errors.
        suffixes: that a file may be written with.

    Raises:
        InvalidSampleError: for an empty cell in either column, or a second row of a file.
    """
    stems = [Path(file).stem if Path(file).suffix.lower() in suffixes else file for file in table["file"]]
    for column, cells in (("file", stems), ("patient", table["patient"].tolist())):
        if "" in cells:
            where = f"{path}[{column}], row {cells.index('') + 2}"
            raise InvalidSampleError(where, "nothing", f"a {column} in each row")
    repeated = next((stem for stem, count in Counter(stems).items() if count > 1), None)
    if repeated is not None:
        raise InvalidSampleError(f"{path}[file]", f"{repeated!r} twice", "one row for each file")
    rows = table.to_dict("records")
    return {s: {str(n): v for n, v in row.items() if v} for s, row in zip(stems, rows, strict=True)}


def rows_without_file(path: Path, rows: Rows, stems: Container[str]) -> list[InvalidSampleError]:
    """An error for each row whose file is not there."""
    absent = [(number, stem) for number, stem in enumerate(rows, start=2) if stem not in stems]
    expected = "the name or stem of an image and its mask; correct the row, or take it out"
    return [InvalidSampleError(f"{path}[file], row {number}", f"no file {stem!r}", expected) for number, stem in absent]


def unsure_patients(
    path: Path, rows: Rows, stems: Sequence[str], named: Callable[[str], str | None]
) -> dict[str, InvalidSampleError]:
    """Files without a row whose patient may be in the table under another name, and so on both sides of a split.

    Args:
        path: of the table.
        rows: of the table.
        stems: of the files.
        named: finds the patient within a stem, None where there is none.

    Returns:
        Stem -> its error; nothing where the table and the names of its files agree on all patients.
    """
    other = next((stem for stem in stems if stem in rows and named(stem) != rows[stem]["patient"]), None)
    if other is None:
        return {}
    example = f"while {other!r} is of {rows[other]['patient']!r} by the table"
    expected = "a row for each file, since the table names patients otherwise than the files' names do"
    found = {stem: named(stem) for stem in stems if stem not in rows}
    return {
        stem: InvalidSampleError(path, f"no row for {stem!r}, of {patient!r} by its name, {example}", expected)
        for stem, patient in found.items()
        if patient is not None
    }
