"""The table of a fairness report: its rows and columns, and how a terminal shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fairdiff_lightning.callbacks.fairness_summary import METRIC_NAMES, STATISTICS, Cell, FairnessSummary

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """A table's cell as text: the value, its interval and a remark; absent ones are ``-`` and empty."""

    value: str
    interval: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """A table's row: overall, a group, or (with ``images`` None) a statistic over groups."""

    label: str
    images: int | None
    entries: tuple[Entry, ...]


def columns(summary: FairnessSummary) -> list[tuple[str, int]]:
    """Metric and class index of each column: Dice for every class, then the class means of Dice and IoU."""
    if len(summary.classes) == 2:
        return [("dice", 0), ("iou", 0)]
    return [*(("dice", index) for index in range(len(summary.classes))), ("iou", -1)]


def headers(summary: FairnessSummary) -> list[str]:
    """Names of the columns."""
    return [f"{METRIC_NAMES[metric]} {summary.classes[column]}" for metric, column in columns(summary)]


def rows(summary: FairnessSummary) -> Iterator[Row]:
    """The table's rows, top to bottom; of one group the overall scores alone."""
    shown = columns(summary)
    for index, (label, images) in enumerate(
        zip(("overall", *summary.groups), (summary.images, *summary.group_sizes), strict=True)
    ):
        if index == 0 or summary.compares or summary.unknown:
            yield Row(label, images, tuple(entry(summary.cell(index, *column)) for column in shown))
    for name, label in STATISTICS.items() if summary.compares else ():
        remarks = [summary.worst_name(*column) if name == "worst" else "" for column in shown]
        cells = [summary.statistic(name, *column) for column in shown]
        yield Row(label, None, tuple(entry(cell, remark) for cell, remark in zip(cells, remarks, strict=True)))


def entry(cell: Cell, remark: str = "") -> Entry:
    """Write a cell with three decimals."""
    if math.isnan(cell.value):
        return Entry("-")
    interval = "-" if math.isnan(cell.low + cell.high) else f"{cell.low:.3f}–{cell.high:.3f}"
    return Entry(f"{cell.value:.3f}", interval, remark)


def heading(summary: FairnessSummary) -> str:
    """What a table is of."""
    return f"By {summary.attribute}" if summary.compares else "All images"


def unknown_note(summary: FairnessSummary) -> str:
    """What became of the images whose group is not known; empty when there are none."""
    if not summary.unknown:
        return ""
    return f"Images of unknown {summary.attribute}: {summary.unknown}; they count in the overall scores only."


def terminal_table(summary: FairnessSummary, confidence: float, subset: str = "") -> Table:
    """The table for a terminal, of all images or a subset that is named; intervals stand below the values."""
    from rich.table import Table
    from rich.text import Text

    caption = f"{unknown_note(summary)} Below each value its {confidence * 100:g}% bootstrap interval.".strip()
    title = f"{heading(summary)}, {subset}" if subset else heading(summary)
    table = Table(title=Text(title), caption=Text(caption), title_style="bold")
    table.add_column("")
    for header in ("n", *headers(summary)):
        table.add_column(Text(header), justify="right")
    for index, row in enumerate(rows(summary)):
        texts = []
        for item in row.entries:
            below = "\n".join(line for line in (item.remark, item.interval) if line)
            texts.append(Text.assemble(item.value, (f"\n{below}" if below else "", "dim")))
        images = "" if row.images is None else str(row.images)
        table.add_row(Text(row.label), images, *texts, end_section=index in (0, len(summary.groups)))
    return table
