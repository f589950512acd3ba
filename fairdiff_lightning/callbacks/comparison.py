"""Compares tested runs on the same test images: overall, worst-group and equity-scaled Dice, with tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import wilcoxon
from torch import Tensor

from fairdiff_lightning.metrics.functional import bootstrap_interval, equity_scaled, group_means, worst_group

STATISTICS = ("ES-Dice", "Dice", "worst group")


@dataclass(frozen=True)
class Comparison:
    """Dice of several runs on the same test images.

    Args:
        attribute: whose groups are compared.
        groups: names of the groups.
        runs: names of the runs.
        cases: number of test images.
        value: (R, 3 + G) means over the classes of :data:`STATISTICS` and of each group's Dice, as in the report.
        low: lower ends of the 95 % intervals of the statistics, and of ES-Dice minus that of the first run: (R, 4).
        high: upper ends.
        gain: (R,) ES-Dice minus that of the first run.
        std: (R,) standard deviation (n - 1) over the images of their Dice, a mean over the classes defined there.
        p: (R,) of a two-sided Wilcoxon signed-rank test of that Dice against the first run's. Images where a run has no
            score or both have the same are left out; equal differences share their mean rank. NaN where no image
            remains, as for the first run itself.
    """

    attribute: str
    groups: tuple[str, ...]
    runs: tuple[str, ...]
    cases: int
    value: Tensor
    low: Tensor
    high: Tensor
    gain: Tensor
    std: Tensor
    p: Tensor

    def rows(self) -> list[list[str]]:
        """The table as text, the header first."""
        header = ["run", "cases", *STATISTICS, f"ES-Dice minus {self.runs[0]}", "p (Dice)", *self.groups]
        lines = [header]
        for r, name in enumerate(self.runs):
            shown = [*self.value[r, :3], self.gain[r]]
            cells = [
                f"{float(v):.3f} [{float(a):.3f}, {float(b):.3f}]"
                for v, a, b in zip(shown, self.low[r], self.high[r], strict=True)
            ]
            cells[1] = f"{float(self.value[r, 1]):.3f} ± {float(self.std[r]):.3f}"
            cells.append("-" if self.p[r].isnan() else f"{float(self.p[r]):.2g}")
            lines.append([name, str(self.cases), *cells, *(f"{float(v):.3f}" for v in self.value[r, 3:])])
        return lines

    def markdown(self) -> str:
        """The table in Markdown."""
        header, *lines = ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join([header, "|---" * len(self.rows()[0]) + "|", *lines])


def compare_runs(
    runs: Mapping[str, Sequence[Path]],
    attribute: str,
    groups: Sequence[str],
    num_resamples: int = 1000,
    folds: bool = False,
) -> Comparison:
    """Compare runs by the ``cases.csv`` that ``FairnessReport`` wrote.

    The scores of a run's seeds are averaged for each test image; the test images of its folds are joined. Intervals
    resample the test images within their groups, the same images for every run: that of the gain is paired.

    Args:
        runs: name -> its ``cases.csv``, one for each seed or fold; the first run is what the others are compared with.
        attribute: whose groups are compared.
        groups: names of its groups.
        num_resamples: of the bootstrap.
        folds: whether a run's tables are folds, each with its own test images, instead of seeds.

    Raises:
        ValueError: when the runs were tested on different images, a run has an image twice, or a table lacks the
            attribute or a class.
    """
    header = pd.read_csv(next(iter(runs.values()))[0], nrows=0)
    columns = [c for c in header.columns if c.startswith("dice_")]
    tables = {name: _read(name, paths, [attribute, *columns], folds) for name, paths in runs.items()}
    first = next(iter(tables.values()))[0]
    for name, seeds in tables.items():
        for table in seeds:
            _check_same_images(name, table, first)
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
        shown = [es_dice, overall.nanmean(1), worst, es_dice - es_dice[:1]]
        return torch.cat([torch.stack(shown, 1), per_group.nanmean(2).movedim(0, 1)], 1)

    value = statistics(scores[..., None], group)[..., 0]
    low, high = bootstrap_interval(scores, group, statistics, num_resamples)
    kept = [0, 1, 2, *range(4, value.shape[1])]
    per_case = scores.nanmean(2)
    return Comparison(
        attribute=attribute,
        groups=tuple(groups),
        runs=tuple(runs),
        cases=len(first),
        value=value[:, kept],
        low=low[:, :4],
        high=high[:, :4],
        gain=value[:, 3],
        std=torch.from_numpy(np.nanstd(per_case.numpy(), axis=0, ddof=1)),
        p=torch.tensor([_p_value(run - per_case[:, 0]) for run in per_case.T]),
    )


def _p_value(difference: Tensor) -> float:
    """Wilcoxon's p of paired differences (N,), without those that are NaN, or zero but for rounding."""
    difference = difference.round(decimals=12)
    differing = difference[difference.abs() > 0]
    return float(wilcoxon(differing.numpy()).pvalue) if len(differing) else torch.nan


def _read(run: str, paths: Sequence[Path], needed: list[str], folds: bool) -> list[pd.DataFrame]:
    """The tables of a run's seeds, or the one of all its folds, ordered by image; the attribute leads ``needed``."""
    text = {"id": str, needed[0]: str}
    tables = []
    for path in paths:
        table = pd.read_csv(path, index_col="id", dtype=text, keep_default_na=False, na_values=[""])
        lacking = [column for column in needed if column not in table.columns]
        if lacking:
            raise ValueError(
                f"run '{run}' has no column {lacking} in '{path}', which has {list(table.columns)}; name an attribute "
                "that every run reports, and compare runs of the same classes."
            )
        tables.append(table)
    tables = [pd.concat(tables)] if folds else tables
    for table in tables:
        twice = table.index[table.index.duplicated()]
        if len(twice):
            raise ValueError(
                f"run '{run}' was tested twice on {len(twice)} images, such as '{twice[0]}'; give each fold once, and "
                "folds whose test images differ."
            )
    return [table.sort_index() for table in tables]


def _check_same_images(run: str, table: pd.DataFrame, first: pd.DataFrame) -> None:
    if not table.index.equals(first.index):
        example = table.index.symmetric_difference(first.index)[0]
        raise ValueError(
            f"run '{run}' was tested on other images than the first run: only one of them has '{example}'; test both "
            "on the same data."
        )
