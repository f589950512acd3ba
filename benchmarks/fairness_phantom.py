"""How fair are plain training, oversampling, FEBS, MoE and dMoE on the phantom? A table, as it comes out.

``python benchmarks/fairness_phantom.py``: every method gets the same network, optimizer and number of steps; FEBS, as
in its paper, spends the last quarter of them fine-tuning. Scores are averaged over the seeds for each test image, and
the intervals (95 %) resample the test images within their groups.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timing import machine
from torch import Tensor

from fairdiff_lightning.cli import main, newest_checkpoint
from fairdiff_lightning.metrics.functional import bootstrap_interval, equity_scaled, group_means, worst_group

CONFIGS = Path(__file__).parents[1] / "configs" / "demo"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
ARGUMENTS = {
    "plain": ["plain"],
    "oversampled": ["plain", "--data.init_args.balance=oversample"],
    "FEBS": ["plain", "--model.init_args.loss=febs"],
    "MoE": ["dmoe", "--model.init_args.routing=shared"],
    "dMoE": ["dmoe"],
}
ATTRIBUTES = {"fairseg": "race", "ham10000": "age"}


def train_and_test(dataset: str, method: str, seed: int, steps: int, folder: Path) -> pd.DataFrame:
    """Scores of every test image, indexed by id."""
    kind, *extra = ARGUMENTS[method]
    common = ["--config", str(CONFIGS / f"{dataset}_{kind}.yaml"), f"--seed_everything={seed}", *QUIET]
    common += [f"--data.init_args.seed={seed}", f"--trainer.default_root_dir={folder}"]
    length = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
    if method == "FEBS":
        first = folder / "before"
        before = [*common, f"--trainer.default_root_dir={first}"]
        main(["fit", *before, f"--trainer.max_steps={steps - steps // 4}", "--trainer.max_epochs=-1"])
        length = [f"--trainer.max_steps={steps // 4}", "--trainer.max_epochs=-1"]
        extra += [f"--model.init_args.init_from={newest_checkpoint(first, 'last')}"]
        extra += ["--model.init_args.optimizer.lr=0.0005"]
    main(["fit", *common, *extra, *length])
    main(["test", *common, *extra, "--ckpt_path", str(newest_checkpoint(folder, "last")), "--verbose=false"])
    newest = max(folder.rglob("cases.csv"), key=lambda path: path.stat().st_mtime)
    return pd.read_csv(newest, index_col="id")


def summary(tables: list[pd.DataFrame], attribute: str, names: list[str]) -> list[str]:
    """Dice, worst group and ES-Dice, each with its interval, then the mean Dice of each group."""
    columns = [c for c in tables[0].columns if c.startswith("dice_")]
    scores = torch.from_numpy(np.mean([table[columns].to_numpy() for table in tables], axis=0))
    group = torch.tensor([names.index(g) if g in names else -1 for g in tables[0][attribute]])
    means = partial(group_means, num_groups=len(names))

    def dice(scores: Tensor, group: Tensor) -> Tensor:
        return scores.nanmean(0).mean(0)

    def worst(scores: Tensor, group: Tensor) -> Tensor:
        return worst_group(means(scores, group).mean(1))

    def es_dice(scores: Tensor, group: Tensor) -> Tensor:
        return equity_scaled(scores.nanmean(0), means(scores, group)).mean(0)

    cells = []
    for statistic in (dice, worst, es_dice):
        low, high = bootstrap_interval(scores, group, statistic)
        cells.append(f"{float(statistic(scores[..., None], group)[0]):.3f} [{float(low):.3f}, {float(high):.3f}]")
    return cells + [f"{float(mean):.3f}" for mean in means(scores, group).mean(1)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=sorted(ATTRIBUTES), default="fairseg")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "fairness_phantom")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    attribute = ATTRIBUTES[args.dataset]
    from fairdiff_lightning.data import HAM10000, FairSeg

    names = list({"fairseg": FairSeg, "ham10000": HAM10000}[args.dataset]().attributes[attribute].groups)
    start, lines = time.time(), []
    for method in ARGUMENTS:
        tables = [
            train_and_test(args.dataset, method, seed, args.steps, args.folder / args.dataset / method / str(seed))
            for seed in range(args.seeds)
        ]
        lines.append(f"| {method} | " + " | ".join(summary(tables, attribute, names)) + " |")
        print(lines[-1], flush=True)
    setting = f"{args.dataset} phantom, {args.seeds} seeds, {args.steps} steps each"
    print(f"\n{machine()}; {setting}, {time.time() - start:.0f} s\n")
    print("| method | Dice | worst group | ES-Dice | " + " | ".join(names) + " |")
    print("|---" * (4 + len(names)) + "|")
    print("\n".join(lines))
