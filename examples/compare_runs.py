"""Prints and saves how tested runs compare: ``python examples/compare_runs.py real=runs/a balanced=runs/b``.

Each folder is a run's ``default_root_dir``; its newest fairness report is read. The first run is the baseline. The
folds of a run are separated by commas: ``real=runs/f0/a,runs/f1/a balanced=runs/f0/b,runs/f1/b``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from fairdiff_lightning.callbacks.comparison import compare_runs
from fairdiff_lightning.data.native import atomic_path


def newest(folder: str) -> Path:
    """The newest fairness report below a folder."""
    found = sorted(Path(folder).rglob("fairness.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no fairness.json below '{folder}': run `fairdiff test` with this default_root_dir.")
    return found[-1]


def main(runs: list[str], attribute: str | None = None, output: str | None = None) -> None:
    """Compare runs given as ``name=folder``, or ``name=folder,folder`` with one for each fold."""
    given = dict(run.split("=", 1) for run in runs if re.fullmatch("[^=]+=[^,]+(,[^,]+)*", run))
    if len(given) < len(runs):
        raise SystemExit(
            f"{runs}: give each run once as name=folder, for example 'real only=runs/fairdiff/real', and folds as "
            "name=folder,folder."
        )
    reports = {name: [newest(folder) for folder in folders.split(",")] for name, folders in given.items()}
    attributes = json.loads(next(iter(reports.values()))[0].read_text())["attributes"]
    attribute = attribute or next(iter(attributes))
    if attribute not in attributes:
        raise SystemExit(f"--attribute {attribute}: the first run reports {', '.join(attributes)}.")
    cases = {name: [fold.with_name("cases.csv") for fold in folds] for name, folds in reports.items()}
    table = compare_runs(cases, attribute, list(attributes[attribute]["groups"]), folds=True).markdown()
    print(table)
    if output is not None:
        with atomic_path(Path(output)) as path:
            path.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="name=folder[,folder]")
    parser.add_argument("--attribute")
    parser.add_argument("--output", help="Markdown file for the table")
    main(**vars(parser.parse_args()))
