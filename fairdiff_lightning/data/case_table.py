"""Checks of a table of cases: ids that name files, and groups that the attributes have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.volume_dataset import check_id


def check_groups(table: pd.DataFrame, name: str, groups: Sequence[str], path: Path) -> None:
    """Check that a column, where the table has it, holds nothing but groups and empty cells.

    Raises:
        InvalidSampleError: with the row and the value found.
    """
    for number, group in enumerate(table[name] if name in table.columns else ()):
        if group and group not in groups:
            where = f"{path}[{name}], row {number + 2}"
            raise InvalidSampleError(where, f"{group!r}", f"one of {', '.join(groups)}, or nothing")


def check_ids(table: pd.DataFrame, path: Path) -> None:
    """Check that the ids of a table are names of files, each of one row.

    Raises:
        InvalidSampleError: with the row and the id found.
    """
    for number, name in enumerate(table["id"]):
        check_id(name, f"{path}[id], row {number + 2}")
    repeated = table["id"][table["id"].duplicated()]
    if len(repeated):
        raise InvalidSampleError(f"{path}[id]", f"{repeated.iloc[0]!r} twice", "one row for each case")
