"""Prints and saves how tested runs compare: ``python examples/compare_runs.py real=runs/a balanced=runs/b``.

Each folder is a run's ``default_root_dir``; its newest fairness report is read. The first run is the baseline.
"""

from __future__ import annotations

import argparse
import json
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
    """Compare runs given as ``name=folder``."""
    if any("=" not in run for run in runs):
        raise SystemExit(f"{runs}: give each run as name=folder, for example 'real only=runs/fairdiff/real'.")
    reports = {name: newest(folder) for name, folder in (run.split("=", 1) for run in runs)}
    attributes = json.loads(next(iter(reports.values())).read_text())["attributes"]
    attribute = attribute or next(iter(attributes))
    if attribute not in attributes:
        raise SystemExit(f"--attribute {attribute}: the first run reports {', '.join(attributes)}.")
    cases = {name: [report.with_name("cases.csv")] for name, report in reports.items()}
    table = compare_runs(cases, attribute, list(attributes[attribute]["groups"])).markdown()
    print(table)
    if output is not None:
        with atomic_path(Path(output)) as path:
            path.write_text(table + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="name=folder")
    parser.add_argument("--attribute")
    parser.add_argument("--output", help="Markdown file for the table")
    main(**vars(parser.parse_args()))
