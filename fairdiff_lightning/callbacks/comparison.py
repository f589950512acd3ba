"""Compares tested runs on the same test images: overall, worst-group and equity-scaled Dice, with tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import wilcoxon
from torch import Tensor

from fairdiff_lightning.data.folds import cross_fold_summary
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
        value: (R, 3 + G) means over the classes of :data:`STATISTICS` and of each group's Dice, as in the report. Of
            one group all are its Dice, and the table shows that alone.
        low: lower ends of the 95 % intervals of the statistics, and of ES-Dice minus that of the first run: (R, 4).
        high: upper ends.
        gain: (R,) ES-Dice minus that of the first run.
        std: (R,) standard deviation (n - 1) over the images of their Dice, a mean over the classes defined there.
        p: (R,) of a two-sided Wilcoxon signed-rank test of that Dice against the first run's. Images where a run has no
            score or both have the same are left out; equal differences share their mean rank. NaN where no image
            remains, as for the first run itself.
        folds: (R, 2) mean and spread of that Dice over the folds, as DiffBoost reports them, see
            :func:`~fairdiff_lightning.data.folds.cross_fold_summary`; None where a run has one table.
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
    folds: Tensor | None = None

    def rows(self) -> list[list[str]]:
        """The table as text, the header first; of one group without what compares groups.

        A statistic comes as mean and 95 % interval, ``0.890 [0.876, 0.901]``; overall Dice also with its ``± std``.
        """
        compares = len(self.groups) > 1
        folds = ["Dice over folds"] if self.folds is not None else []
        gain, groups = f"{'ES-' if compares else ''}Dice minus {self.runs[0]}", self.groups if compares else ()
        header = ["run", "cases", *(STATISTICS if compares else ["Dice"]), *folds, gain, "p (Dice)", *groups]
        return [header, *(self._row(r, compares) for r in range(len(self.runs)))]

    def _row(self, r: int, compares: bool) -> list[str]:
        es_dice, overall, worst, *groups = self.value[r].tolist()
        intervals = list(zip(self.low[r].tolist(), self.high[r].tolist(), strict=True))
        dice = f"{_cell(overall, intervals[1])} ± {float(self.std[r]):.3f}"
        shown = [_cell(es_dice, intervals[0]), dice, _cell(worst, intervals[2])] if compares else [dice]
        folds = [] if self.folds is None else ["{:.3f} ± {:.3f}".format(*self.folds[r].tolist())]
        p_value = "-" if self.p[r].isnan() else f"{float(self.p[r]):.2g}"
        cells = [*shown, *folds, _cell(float(self.gain[r]), intervals[3]), p_value]
        return [self.runs[r], str(self.cases), *cells, *(f"{value:.3f}" for value in groups if compares)]

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
        groups: names of its groups; those without cases are left out.
        num_resamples: of the bootstrap.
        folds: whether a run's tables are folds, each with its own test images, instead of seeds.

    Raises:
        ValueError: when the runs were tested on different images, a run has an image twice, or a table lacks the
            attribute or a class.
    """
    header = pd.read_csv(next(iter(runs.values()))[0], nrows=0)
    columns = [c for c in header.columns if c.startswith("dice_")]
    parts = {name: _read(name, paths, [attribute, *columns]) for name, paths in runs.items()}
    tables = {name: _join(name, found, folds) for name, found in parts.items()}
    first = next(iter(tables.values()))[0]
    for name, seeds in tables.items():
        for table in seeds:
            _check_same_images(name, table, first)
    means = [np.mean([table[columns].to_numpy() for table in seeds], axis=0) for seeds in tables.values()]
    scores = torch.from_numpy(np.stack(means, 1))
    names = [name for name in groups if name in set(first[attribute])] or list(groups)
    group = torch.tensor([names.index(g) if g in names else -1 for g in first[attribute]])

    def statistics(scores: Tensor, group: Tensor) -> Tensor:
        """(R, 4 + G, resamples) from (N, R, C, resamples)."""
        overall = scores.nanmean(0)
        per_group = group_means(scores, group, len(names)) if len(names) > 1 else overall[None]
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
        groups=tuple(names),
        runs=tuple(runs),
        cases=len(first),
        value=value[:, kept],
        low=low[:, :4],
        high=high[:, :4],
        gain=value[:, 3],
        std=torch.from_numpy(np.nanstd(per_case.numpy(), axis=0, ddof=1)),
        p=torch.tensor([_p_value(run - per_case[:, 0]) for run in per_case.T]),
        folds=_over_folds(parts.values(), columns)
        if folds and all(len(found) > 1 for found in parts.values())
        else None,
    )


def _over_folds(runs: Iterable[Sequence[pd.DataFrame]], columns: Sequence[str]) -> Tensor:
    """Mean and spread (R, 2) over each run's folds of the Dice of their images, whose std is taken with n."""
    found = []
    for folds in runs:
        dice = [fold[columns].mean(axis=1) for fold in folds]
        found.append(cross_fold_summary([float(d.mean()) for d in dice], [float(d.std(ddof=0)) for d in dice]))
    return torch.tensor(found, dtype=torch.float64)


def _cell(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _p_value(difference: Tensor) -> float:
    """Wilcoxon's p of paired differences (N,), without those that are NaN, or zero but for rounding."""
    difference = difference.round(decimals=12)
    differing = difference[difference.abs() > 0]
    return float(wilcoxon(differing.numpy()).pvalue) if len(differing) else torch.nan


def _read(run: str, paths: Sequence[Path], needed: list[str]) -> list[pd.DataFrame]:
    """The tables of a run; the attribute leads ``needed``."""
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
    return tables


def _join(run: str, tables: Sequence[pd.DataFrame], folds: bool) -> list[pd.DataFrame]:
    """The tables of a run's seeds, or the one of all its folds, ordered by image."""
    joined = [pd.concat(tables)] if folds else list(tables)
    for table in joined:
        twice = table.index[table.index.duplicated()]
        if len(twice):
            raise ValueError(
                f"run '{run}' was tested twice on {len(twice)} images, such as '{twice[0]}'; give each fold once, and "
                "folds whose test images differ."
            )
    return [table.sort_index() for table in joined]


def _check_same_images(run: str, table: pd.DataFrame, first: pd.DataFrame) -> None:
    if not table.index.equals(first.index):
        example = table.index.symmetric_difference(first.index)[0]
        raise ValueError(
            f"run '{run}' was tested on other images than the first run: only one of them has '{example}'; test both "
            "on the same data."
        )
