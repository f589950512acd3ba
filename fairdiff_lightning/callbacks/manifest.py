"""A table of what processes wrote, that survives a kill: each appends to a part, one merges the parts at the end."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from fairdiff_lightning.data.native import atomic_path, sweep
from fairdiff_lightning.data.requests import MANIFEST


class Manifest:
    """Rows by id, in ``manifest.csv`` of finished runs and in hidden parts of those that are not.

    Args:
        directory: folder of the table.
        columns: names of the columns; the first is the id.
    """

    def __init__(self, directory: Path, columns: Sequence[str]) -> None:
        self.directory, self.columns = directory, tuple(columns)

    def rows(self) -> dict[str, dict[str, str]]:
        """Id -> row of everything that was written, by finished and by killed runs.

        Raises:
            ValueError: when the folder's table, or the part of a killed run, has other columns.
        """
        return self._by_id([self.directory / MANIFEST, *self._parts()])

    def start(self, rank: int, afresh: bool = False) -> None:
        """Begin or go on with this process's part; a line that a kill cut short is dropped."""
        part = self._part(rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        kept = "" if afresh else _whole_lines(part)
        with atomic_path(part) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            stream.write(kept)
            if not kept:
                csv.writer(stream).writerow(self.columns)

    def append(self, rank: int, rows: Iterable[Sequence[object]]) -> None:
        """Add rows to this process's part."""
        with self._part(rank).open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)

    def merge(self, keep: bool = True) -> None:
        """Write ``manifest.csv``, sorted by id and each id once, and remove the parts; for one process at the end.

        What killed runs left of files that they were writing goes too: nobody writes any more.

        Args:
            keep: whether rows of earlier runs stay.
        """
        table = self.rows() if keep else self._by_id(self._parts())
        with (
            atomic_path(self.directory / MANIFEST) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self.columns)
            writer.writeheader()
            writer.writerows(table[key] for key in sorted(table))
        for part in self._parts():
            part.unlink()
        sweep(self.directory)

    def _by_id(self, tables: Sequence[Path]) -> dict[str, dict[str, str]]:
        return {row[self.columns[0]]: row for table in tables for row in self._read(table)}

    def _read(self, table: Path) -> list[dict[str, str]]:
        header, *lines = list(csv.reader(io.StringIO(_whole_lines(table), newline=""))) or [list(self.columns)]
        if tuple(header) != self.columns:
            raise ValueError(
                f"'{table}' has the columns {list(header)}; expected are {list(self.columns)}. It is of another run: "
                "choose another output_dir."
            )
        return [dict(zip(self.columns, values, strict=True)) for values in lines if len(values) == len(self.columns)]

    def _part(self, rank: int) -> Path:
        return self.directory / f".manifest-{rank}.csv"

    def _parts(self) -> list[Path]:
        return sorted(self.directory.glob(".manifest-*.csv"))


def _whole_lines(table: Path) -> str:
    """The text of a table, without the line that a kill cut short in an unfinished one; empty when there is none."""
    content = table.read_bytes() if table.is_file() else b""
    end = len(content) if table.name == MANIFEST else content.rfind(b"\n") + 1
    return content[:end].decode()
