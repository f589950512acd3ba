"""A table of what processes wrote, that survives a kill: each appends to a part, one merges the parts at the end."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from fairdiff_lightning.data.native import atomic_path

NAME = "manifest.csv"


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
            ValueError: when the folder's table has other columns.
        """
        return {row[self.columns[0]]: row for row in [*self._finished(), *self._unfinished()]}

    def start(self, rank: int, afresh: bool = False) -> None:
        """Begin or go on with this process's part; a line that a kill cut short is dropped."""
        part = self._part(rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        kept = part.read_bytes() if part.exists() and not afresh else b""
        with atomic_path(part) as temporary:
            temporary.write_bytes(kept[: kept.rfind(b"\n") + 1])

    def append(self, rank: int, rows: Iterable[Sequence[object]]) -> None:
        """Add rows to this process's part."""
        with self._part(rank).open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(rows)

    def merge(self, keep: bool = True) -> None:
        """Write ``manifest.csv``, sorted by id and each id once, and remove the parts; for one process at the end.

        Args:
            keep: whether rows of earlier runs stay.
        """
        found = [*self._finished(), *self._unfinished()] if keep else list(self._unfinished())
        table = {row[self.columns[0]]: row for row in found}
        with (
            atomic_path(self.directory / NAME) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self.columns)
            writer.writeheader()
            writer.writerows(table[key] for key in sorted(table))
        for part in self._parts():
            part.unlink()

    def _finished(self) -> Iterable[dict[str, str]]:
        table = self.directory / NAME
        if not table.is_file():
            return
        with table.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(
                    f"'{table}' has the columns {reader.fieldnames}; expected are {list(self.columns)}. It is of "
                    "another run: choose another output_dir."
                )
            yield from reader

    def _unfinished(self) -> Iterable[dict[str, str]]:
        for part in self._parts():
            lines = part.read_bytes()
            text = lines[: lines.rfind(b"\n") + 1].decode()
            for values in csv.reader(text.splitlines()):
                if len(values) == len(self.columns):
                    yield dict(zip(self.columns, values, strict=True))

    def _part(self, rank: int) -> Path:
        return self.directory / f".manifest-{rank}.csv"

    def _parts(self) -> list[Path]:
        return sorted(self.directory.glob(".manifest-*.csv"))
