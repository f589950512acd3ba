"""A fairness report as data, and as tables for programs: CSV and strict JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fairdiff_lightning.callbacks.cases import Case, Picture
from fairdiff_lightning.callbacks.fairness_summary import METRICS, STATISTICS, Cell, FairnessSummary
from fairdiff_lightning.data.native import atomic_path


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Args:
        title: of the page.
        summaries: one for each attribute, of all images.
        subsets: name -> the same of some of the images.
        cases: every image.
        worst: the worst cases with their pictures, worst first; None where there is no picture.
        run: module, hyperparameters, date, versions and settings of the bootstrap.
        counts: split -> attribute -> group name -> number of samples; empty when the data module does not tell.
        logged: the run's own test metrics.
        config: text of the run's configuration.
    """

    title: str
    summaries: Sequence[FairnessSummary]
    subsets: Mapping[str, Sequence[FairnessSummary]]
    cases: Sequence[Case]
    worst: Sequence[tuple[Case, Picture | None]]
    run: Mapping[str, Any]
    counts: Mapping[str, Mapping[str, Mapping[str, int]]]
    logged: Mapping[str, Any]
    config: str

    def group_names(self, case: Case) -> dict[str, str]:
        """Attribute -> name of the case's group."""
        names = {summary.attribute: summary.groups for summary in self.summaries}
        return {name: names[name][group] if group >= 0 else "unknown" for name, group in case.groups.items()}


def write_tables(report: Report, directory: Path) -> None:
    """Write ``fairness.csv``, ``cases.csv`` and ``fairness.json`` below ``directory``, each atomically.

    ``fairness.csv`` is tidy: a score of a group is ``metric`` dice or iou with the group's name or ``overall``; a
    statistic over groups is ``worst_dice``, ``gap_iou`` and so on, in group ``overall``, where there are groups to
    compare. ``n`` counts the images with a defined score. ``subset`` is empty for all images together.
    """
    _write_csv(directory / "fairness.csv", _tidy_rows(report))
    _write_csv(directory / "cases.csv", _case_rows(report))
    with atomic_path(directory / "fairness.json") as path:
        text = json.dumps(to_plain(_nested(report)), indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def to_plain(value: Any) -> Any:
    """Turn a value into what strict JSON holds: NaN and infinities become None, what is not data its text."""
    if isinstance(value, torch.Tensor):
        return to_plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _tidy_rows(report: Report) -> Iterator[Sequence[object]]:
    yield "subset", "attribute", "group", "class", "metric", "value", "low", "high", "n"
    for subset, summaries in {"": report.summaries, **report.subsets}.items():
        for summary in summaries:
            yield from ((subset, summary.attribute, *row) for row in _summary_rows(summary))


def _summary_rows(summary: FairnessSummary) -> Iterator[Sequence[object]]:
    for metric in METRICS:
        for column, name in enumerate(summary.classes):
            for row, group in enumerate(("overall", *summary.groups)):
                yield group, name, metric, *_numbers(summary.cell(row, metric, column))
            for key in STATISTICS if summary.compares else ():
                yield "overall", name, f"{key}_{metric}", *_numbers(summary.statistic(key, metric, column))


def _case_rows(report: Report) -> Iterator[Sequence[object]]:
    classes = report.summaries[0].classes[:-1]
    attributes = [summary.attribute for summary in report.summaries]
    surfaces = list(dict.fromkeys(name for case in report.cases for name in case.surfaces))
    yield "id", *attributes, *(f"{metric}_{name}" for metric in (*METRICS, *surfaces) for name in classes)
    absent = (math.nan,) * len(classes)
    for case in report.cases:
        groups = report.group_names(case)
        measured = [score for name in surfaces for score in case.surfaces.get(name, absent)]
        yield case.id, *(groups[name] for name in attributes), *map(_number, (*case.dice, *case.iou, *measured))


def _nested(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "run": report.run,
        "images": len(report.cases),
        "counts": report.counts,
        "logged": report.logged,
        "attributes": _by_attribute(report.summaries),
        "subsets": {name: _by_attribute(summaries) for name, summaries in report.subsets.items()},
        "worst_cases": [
            {"id": case.id, "groups": report.group_names(case), "dice": case.dice, "iou": case.iou}
            for case, _ in report.worst
        ],
    }


def _by_attribute(summaries: Sequence[FairnessSummary]) -> dict[str, Any]:
    return {summary.attribute: _nested_summary(summary) for summary in summaries}


def _nested_summary(summary: FairnessSummary) -> dict[str, Any]:
    def by_class(row: int) -> dict[str, dict[str, dict[str, Any]]]:
        return {
            metric: {name: asdict(summary.cell(row, metric, column)) for column, name in enumerate(summary.classes)}
            for metric in METRICS
        }

    return {
        "images": dict(zip(summary.groups, summary.group_sizes, strict=True)),
        "unknown": summary.unknown,
        "overall": by_class(0),
        "groups": {name: by_class(row) for row, name in enumerate(summary.groups, start=1)},
        **(_over_groups(summary, by_class) if summary.compares else {}),
    }


def _over_groups(summary: FairnessSummary, by_class: Callable[[int], Any]) -> dict[str, Any]:
    return {
        "statistics": {name: by_class(row) for row, name in enumerate(STATISTICS, start=1 + len(summary.groups))},
        "worst_group": {
            metric: {name: summary.worst_name(metric, column) or None for column, name in enumerate(summary.classes)}
            for metric in METRICS
        },
    }


def _numbers(cell: Cell) -> tuple[object, object, object, int]:
    return _number(cell.value), _number(cell.low), _number(cell.high), cell.n


def _number(value: float) -> object:
    return "" if math.isnan(value) else value


def _write_csv(path: Path, rows: Iterator[Sequence[object]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
