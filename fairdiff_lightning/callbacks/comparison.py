"""Compares tested runs on the same test images: overall, worst-group and equity-scaled Dice, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fairdiff_lightning.metrics.functional import bootstrap_interval, equity_scaled, group_means, worst_group

STATISTICS = ("Dice", "worst group", "ES-Dice")


@dataclass(frozen=True)
class Comparison:
    """Dice of several runs on the same test images.

    Args:
        attribute: whose groups are compared.
        groups: names of the groups.
        runs: names of the runs.
        value: (R, 3 + G) means over the classes of :data:`STATISTICS` and of each group's Dice, as in the report.
        low: lower ends of the 95 % intervals of the statistics, and of ES-Dice minus that of the first run: (R, 4).
        high: upper ends.
        gain: (R,) ES-Dice minus that of the first run.
    """

    attribute: str
    groups: tuple[str, ...]
    runs: tuple[str, ...]
    value: Tensor
    low: Tensor
    high: Tensor
    gain: Tensor

    def rows(self) -> list[list[str]]:
        """The table as text, the header first."""
        header = ["run", *STATISTICS, f"ES-Dice minus {self.runs[0]}", *self.groups]
        lines = [header]
        for r, name in enumerate(self.runs):
            shown = [*self.value[r, :3], self.gain[r]]
            cells = [
                f"{float(v):.3f} [{float(a):.3f}, {float(b):.3f}]"
                for v, a, b in zip(shown, self.low[r], self.high[r], strict=True)
            ]
            lines.append([name, *cells, *(f"{float(v):.3f}" for v in self.value[r, 3:])])
        return lines

    def markdown(self) -> str:
        """The table in Markdown."""
        header, *lines = ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join([header, "|---" * len(self.rows()[0]) + "|", *lines])


def compare_runs(
    runs: Mapping[str, Sequence[Path]], attribute: str, groups: Sequence[str], num_resamples: int = 1000
) -> Comparison:
    """Compare runs by the ``cases.csv`` that ``FairnessReport`` wrote.

    The scores of a run's seeds are averaged for each test image. Intervals resample the test images within their
    groups, the same images for every run: that of the gain is paired.

    Args:
        runs: name -> its ``cases.csv``, one for each seed; the first run is what the others are compared with.
        attribute: whose groups are compared.
        groups: names of its groups.
        num_resamples: of the bootstrap.

    Raises:
        ValueError: when the runs were tested on different images, or a table lacks the attribute or a class.
    """
    tables = {name: [pd.read_csv(path, index_col="id").sort_index() for path in paths] for name, paths in runs.items()}
    first = next(iter(tables.values()))[0]
    columns = [c for c in first.columns if c.startswith("dice_")]
    for name, seeds in tables.items():
        for table in seeds:
            _check_comparable(name, table, first, {attribute, *columns})
    means = [np.mean([table[columns].to_numpy() for table in seeds], axis=0) for seeds in tables.values()]
    scores = torch.from_numpy(np.stack(means, 1))
    names = list(groups)
    group = torch.tensor([names.index(g) if g in names else -1 for g in first[attribute]])

    def statistics(scores: Tensor, group: Tensor) -> Tensor:
        """(R, 4 + G, resamples) from (N, R, C, resamples)."""
        per_group = group_means(scores, group, len(names))
        overall = scores.nanmean(0)
        es_dice = equity_scaled(overall, per_group).nanmean(1)
        worst = worst_group(per_group).nanmean(1)
        shown = [overall.nanmean(1), worst, es_dice, es_dice - es_dice[:1]]
        return torch.cat([torch.stack(shown, 1), per_group.nanmean(2).movedim(0, 1)], 1)

    value = statistics(scores[..., None], group)[..., 0]
    low, high = bootstrap_interval(scores, group, statistics, num_resamples)
    kept = [0, 1, 2, *range(4, value.shape[1])]
    return Comparison(attribute, tuple(groups), tuple(runs), value[:, kept], low[:, :4], high[:, :4], value[:, 3])


def _check_comparable(run: str, table: pd.DataFrame, first: pd.DataFrame, needed: set[str]) -> None:
    if not table.index.equals(first.index):
        raise ValueError(f"run '{run}' was tested on other images than the first run; test both on the same data.")
    lacking = sorted(needed.difference(table.columns))
    if lacking:
        raise ValueError(
            f"run '{run}' has no column {lacking} in its cases.csv, which has {list(table.columns)}; name an attribute "
            "that every run reports, and compare runs of the same classes."
        )
