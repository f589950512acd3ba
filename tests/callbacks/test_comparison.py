import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fairdiff_lightning.callbacks.comparison import compare_runs

GROUPS = ("Asian", "Black", "White")
RACE = ["Asian"] * 4 + ["Black"] * 5 + ["White"] * 12 + ["unknown"]


def write(path, rng, shift=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = np.clip(rng.uniform(0.6, 0.9, (len(RACE), 2)) + shift, 0, 1)
    table = pd.DataFrame({"id": [f"c{i:02d}" for i in range(len(RACE))], "race": RACE})
    table["dice_rim"], table["dice_cup"] = scores.T
    table.sample(frac=1, random_state=int(rng.integers(99))).to_csv(path, index=False)
    return path


def plain(tables, race=None):
    """Dice, worst group and ES-Dice, class by class, in plain pandas."""
    table = sum(t.set_index("id").sort_index()[["dice_rim", "dice_cup"]] for t in tables) / len(tables)
    race = tables[0].set_index("id").sort_index()["race"]
    means = table.groupby(race).mean().loc[list(GROUPS)]
    overall = table.mean()
    es = overall / (1 + (means - overall).abs().sum())
    return [overall.mean(), means.min().mean(), es.mean(), *means.mean(axis=1)]


def test_scores_are_those_of_the_tables(tmp_path):
    rng = np.random.default_rng(0)
    paths = {
        "real": [write(tmp_path / f"a{i}.csv", rng) for i in range(3)],
        "more": [write(tmp_path / "b.csv", rng, 0.05)],
    }
    found = compare_runs(paths, "race", GROUPS, num_resamples=200)
    for r, seeds in enumerate(paths.values()):
        expected = plain([pd.read_csv(path) for path in seeds])
        assert found.value[r].tolist() == pytest.approx(expected)
    assert (found.low[:, :3] <= found.value[:, :3]).all()
    assert (found.value[:, :3] <= found.high[:, :3]).all()


def test_the_gain_is_paired(tmp_path):
    first = write(tmp_path / "a.csv", np.random.default_rng(0))
    second = write(tmp_path / "b.csv", np.random.default_rng(0), 0.05)
    found = compare_runs({"real": [first], "more": [second]}, "race", GROUPS, num_resamples=200)
    assert (found.gain[0], found.low[0, 3], found.high[0, 3]) == (0, 0, 0)
    width = found.high - found.low
    assert float(width[1, 3]) < 0.3 * float(width[1, 2])
    assert float(found.low[1, 3]) > 0


def test_runs_on_other_images_are_refused(tmp_path):
    first = write(tmp_path / "a.csv", np.random.default_rng(0))
    pd.read_csv(first).iloc[1:].to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match="run 'more' was tested on other images"):
        compare_runs({"real": [first], "more": [tmp_path / "b.csv"]}, "race", GROUPS)


def test_the_script_prints_and_saves_the_table_of_the_newest_reports(tmp_path, capsys):
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import compare_runs as script

    for name, shift in (("a", 0.0), ("b", 0.02)):
        path = write(tmp_path / name / "fairness" / "cases.csv", np.random.default_rng(1), shift)
        report = {"attributes": {"race": {"groups": dict.fromkeys(GROUPS, 0)}}}
        path.with_name("fairness.json").write_text(json.dumps(report))
    script.main([f"real={tmp_path / 'a'}", f"more={tmp_path / 'b'}"], output=str(tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    header, _, *rows = table.splitlines()
    assert header.endswith("| Asian | Black | White |")
    assert [row.split(" | ")[0] for row in rows] == ["| real", "| more"]
    with pytest.raises(FileNotFoundError, match=r"no fairness.json below '.*nothing'"):
        script.main([f"real={tmp_path / 'nothing'}"])


def test_a_table_without_the_attribute_or_a_class_is_refused_by_name(tmp_path):
    first = write(tmp_path / "a.csv", np.random.default_rng(0))
    pd.read_csv(first).drop(columns="dice_cup").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match=r"run 'other' has no column \['dice_cup'\]"):
        compare_runs({"real": [first], "other": [tmp_path / "b.csv"]}, "race", GROUPS)
    with pytest.raises(ValueError, match=r"run 'real' has no column \['gender'\]"):
        compare_runs({"real": [first]}, "gender", GROUPS)
