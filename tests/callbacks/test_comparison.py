import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from fairdiff_lightning.callbacks.comparison import compare_runs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import compare_runs as script

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
    """ES-Dice, Dice and worst group, class by class, in plain pandas."""
    table = sum(t.set_index("id").sort_index()[["dice_rim", "dice_cup"]] for t in tables) / len(tables)
    race = tables[0].set_index("id").sort_index()["race"]
    means = table.groupby(race).mean().loc[list(GROUPS)]
    overall = table.mean()
    es = overall / (1 + (means - overall).abs().sum())
    return [es.mean(), overall.mean(), means.min().mean(), *means.mean(axis=1)]


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


def test_groups_without_cases_have_no_column(tmp_path):
    paths = {"real": [write(tmp_path / "a.csv", np.random.default_rng(0))]}
    found = compare_runs(paths, "race", (*GROUPS, "Hispanic"), num_resamples=50)
    assert found.groups == GROUPS
    assert found.value.tolist() == compare_runs(paths, "race", GROUPS, num_resamples=50).value.tolist()


def test_every_statistic_is_shown_with_its_interval(tmp_path):
    rng = np.random.default_rng(0)
    paths = {name: [write(tmp_path / f"{name}.csv", rng, shift)] for name, shift in (("real", 0.0), ("more", 0.05))}
    found = compare_runs(paths, "race", GROUPS, num_resamples=50)
    header, *lines = found.rows()
    for r, line in enumerate(lines):
        for s, name in enumerate(("ES-Dice", "Dice", "worst group")):
            mean, low, high = (float(given[r, s]) for given in (found.value, found.low, found.high))
            assert low < mean < high
            spread = f" ± {float(found.std[r]):.3f}" if name == "Dice" else ""
            assert line[header.index(name)] == f"{mean:.3f} [{low:.3f}, {high:.3f}]{spread}"


def test_the_interval_of_dice_is_that_of_its_resampled_mean(tmp_path):
    """The percentile interval of a mean of many images is its mean and 1.96 standard errors."""
    rng, per_group = np.random.default_rng(0), 200
    table = pd.DataFrame({"id": [f"c{i:03d}" for i in range(3 * per_group)], "race": list(GROUPS) * per_group})
    table.assign(dice_rim=rng.uniform(0.5, 0.9, len(table))).to_csv(tmp_path / "a.csv", index=False)
    found = compare_runs({"real": [tmp_path / "a.csv"]}, "race", GROUPS)
    dice = pd.read_csv(tmp_path / "a.csv").dice_rim
    reach = 1.96 * dice.std() / len(dice) ** 0.5
    assert found.low[0, 1].item() == pytest.approx(dice.mean() - reach, abs=0.15 * reach)
    assert found.high[0, 1].item() == pytest.approx(dice.mean() + reach, abs=0.15 * reach)


def test_the_gain_is_paired(tmp_path):
    first = write(tmp_path / "a.csv", np.random.default_rng(0))
    second = write(tmp_path / "b.csv", np.random.default_rng(0), 0.05)
    found = compare_runs({"real": [first], "more": [second]}, "race", GROUPS, num_resamples=200)
    assert (found.gain[0], found.low[0, 3], found.high[0, 3]) == (0, 0, 0)
    width = found.high - found.low
    assert float(width[1, 3]) < 0.3 * float(width[1, 0])
    assert float(found.low[1, 3]) > 0


def test_runs_on_other_images_are_refused(tmp_path):
    first = write(tmp_path / "a.csv", np.random.default_rng(0))
    pd.read_csv(first).iloc[1:].to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match=r"run 'more' was tested on other images.*only one of them has 'c"):
        compare_runs({"real": [first], "more": [tmp_path / "b.csv"]}, "race", GROUPS)


def test_the_script_prints_and_saves_the_table_of_the_newest_reports(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.02)):
        path = write(tmp_path / name / "fairness" / "cases.csv", np.random.default_rng(1), shift)
        report = {"attributes": {"race": {"groups": dict.fromkeys(GROUPS, 0)}}}
        path.with_name("fairness.json").write_text(json.dumps(report))
    script.main([f"real={tmp_path / 'a'}", f"more={tmp_path / 'b'}"], output=str(tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    header, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    expected = ["run", "cases", "ES-Dice", "Dice", "worst group", "ES-Dice minus real", "p (Dice)", *GROUPS]
    assert header == expected
    assert [row[:2] for row in rows] == [["real", "22"], ["more", "22"]]
    assert rows[0][6] == "-"
    assert float(rows[1][6]) < 1e-4
    dice = pd.read_csv(tmp_path / "a" / "fairness" / "cases.csv")[["dice_rim", "dice_cup"]].mean(axis=1)
    mean, *interval, _, std = re.findall(r"[\d.]+|±", rows[0][3])
    assert (mean, std) == (f"{dice.mean():.3f}", f"{dice.std():.3f}")
    assert float(interval[0]) < dice.mean() < float(interval[1])
    with pytest.raises(FileNotFoundError, match=r"no fairness.json below '.*nothing'"):
        script.main([f"real={tmp_path / 'nothing'}"])


def test_a_table_without_the_attribute_or_a_class_is_refused_by_name(tmp_path):
    first = write(tmp_path / "a.csv", np.random.default_rng(0))
    pd.read_csv(first).drop(columns="dice_cup").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ValueError, match=r"run 'other' has no column \['dice_cup'\]"):
        compare_runs({"real": [first], "other": [tmp_path / "b.csv"]}, "race", GROUPS)
    with pytest.raises(ValueError, match=r"run 'real' has no column \['gender'\]"):
        compare_runs({"real": [first]}, "gender", GROUPS)


def edited(path, target, **columns):
    """A copy of a table, ordered by id, with other columns."""
    table = pd.read_csv(path).sort_values("id")
    table.assign(**columns).to_csv(target, index=False)
    return target


def test_std_and_p_are_those_of_the_cases_with_a_score(tmp_path):
    rng = np.random.default_rng(0)
    paths = [write(tmp_path / "a.csv", rng), write(tmp_path / "b.csv", rng, 0.05)]
    table = pd.read_csv(paths[1]).sort_values("id")
    rim, cup = table.dice_rim.where(table.id != "c02"), table.dice_cup.where(table.id > "c02")
    paths[1] = edited(paths[1], tmp_path / "c.csv", dice_rim=rim, dice_cup=cup)
    found = compare_runs({"real": paths[:1], "more": paths[1:]}, "race", GROUPS, num_resamples=20)
    per_case = [pd.read_csv(p, index_col="id").sort_index()[["dice_rim", "dice_cup"]].mean(axis=1) for p in paths]
    assert per_case[1].isna().sum() == 1
    assert found.std.tolist() == pytest.approx([dice.std() for dice in per_case])
    expected = wilcoxon(*pd.concat(per_case, axis=1).dropna().to_numpy().T).pvalue
    assert float(found.p[1]) == pytest.approx(expected)
    assert found.p[0].isnan()


def test_equal_cases_do_not_count_for_p(tmp_path):
    first = write(tmp_path / "a.csv", np.random.default_rng(0))
    table = pd.read_csv(first).sort_values("id")
    gain = np.zeros(len(table))
    gain[:5] = [0.01, 0.02, 0.03, 0.04, 0.05]
    more = edited(first, tmp_path / "b.csv", dice_rim=table.dice_rim + gain)
    swapped = edited(first, tmp_path / "c.csv", dice_rim=table.dice_cup, dice_cup=table.dice_rim)
    found = compare_runs({"real": [first], "more": [more], "swapped": [swapped]}, "race", GROUPS, num_resamples=20)
    assert float(found.p[1]) == pytest.approx(2 / 2**5)  # all of five signs agree
    assert found.p[2].isnan()
    assert [row[6] for row in found.rows()] == ["p (Dice)", "-", "0.062", "-"]


def split(path, folder, numeric):
    """The table as two folds below a folder; ``numeric`` names the cases by numbers with leading zeros."""
    table = pd.read_csv(path, dtype=str).sort_values("id")
    table["id"] = table["id"].str.replace("c", "0") if numeric else table["id"]
    reports = {"attributes": {"race": {"groups": dict.fromkeys(GROUPS, 0)}}}
    for fold, part in enumerate([table[::2], table[1::2]]):
        (folder / str(fold)).mkdir(parents=True)
        part.to_csv(folder / str(fold) / "cases.csv", index=False)
        (folder / str(fold) / "fairness.json").write_text(json.dumps(reports))
    return f"{folder}/0,{folder}/1"


@pytest.mark.parametrize("numeric", [False, True])
def test_folds_are_joined(tmp_path, numeric):
    rng = np.random.default_rng(2)
    whole = {"real": [write(tmp_path / "a.csv", rng)], "more": [write(tmp_path / "b.csv", rng, 0.05)]}
    runs = [f"{name}={split(path, tmp_path / name, numeric)}" for name, (path,) in whole.items()]
    script.main(runs, output=str(tmp_path / "table.md"))
    header, _, *lines = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()]
    place = header.index("Dice over folds")
    expected = [["| " + " | ".join(line[:place] + line[place + 1 :]) + " |" for line in [header, *lines]]]
    joined = compare_runs(whole, "race", GROUPS).markdown().splitlines()
    assert [[joined[0], *joined[2:]]] == expected
    for line, (path,) in zip(lines, whole.values(), strict=True):
        dice = pd.read_csv(path).sort_values("id")[["dice_rim", "dice_cup"]].mean(axis=1).to_numpy()
        folds = [dice[::2], dice[1::2]]
        spread = np.sqrt(np.mean([fold.var() for fold in folds]))
        assert line[place] == f"{np.mean([fold.mean() for fold in folds]):.3f} ± {spread:.3f}"


def test_without_attributes_dice_alone_is_compared(tmp_path, capsys):
    rng = np.random.default_rng(3)
    paths = [write(tmp_path / f"{name}" / "cases.csv", rng, shift) for name, shift in (("a", 0.0), ("b", 0.05))]
    for path in paths:
        table = pd.read_csv(path).drop(columns="race")
        table.assign(all="all").to_csv(path, index=False)
        path.with_name("fairness.json").write_text(json.dumps({"attributes": {"all": {"groups": {"all": 0}}}}))
    script.main([f"real={tmp_path / 'a'}", f"more={tmp_path / 'b'}"])
    header, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert header == ["run", "cases", "Dice", "Dice minus real", "p (Dice)"]
    dice = [pd.read_csv(p, index_col="id").sort_index()[["dice_rim", "dice_cup"]].mean(axis=1) for p in paths]
    for line, d in zip(lines, dice, strict=True):
        assert re.fullmatch(rf"{d.mean():.3f} \[0\.\d{{3}}, 0\.\d{{3}}\] ± {d.std():.3f}", line[2])
    gain, interval = lines[1][3].split(" ", 1)
    low, high = json.loads(interval)
    assert float(gain) == pytest.approx((dice[1] - dice[0]).mean(), abs=6e-4)
    assert low < float(gain) < high
    assert float(lines[1][4]) == pytest.approx(wilcoxon(dice[1], dice[0]).pvalue, rel=0.06)


def test_cases_that_stand_twice_or_in_one_run_only_are_refused_by_name(tmp_path):
    folds = split(write(tmp_path / "a.csv", np.random.default_rng(0)), tmp_path / "a", False)
    first, second = folds.split(",")
    with pytest.raises(ValueError, match="run 'real' was tested twice on 11 images, such as 'c00'"):
        script.main([f"real={first},{first}"])
    with pytest.raises(ValueError, match=r"run 'more' was tested on other images.*only one of them has 'c01'"):
        script.main([f"real={folds}", f"more={first}"])
    table = pd.read_csv(f"{second}/cases.csv")
    table.drop(columns="dice_rim").to_csv(f"{second}/cases.csv", index=False)
    with pytest.raises(ValueError, match=r"run 'real' has no column \['dice_rim'\] in '.*/1/cases.csv'"):
        script.main([f"real={folds}"])


@pytest.mark.parametrize("runs", [["a"], ["real=a", "real=b"], ["real=a,"], ["=a"]])
def test_runs_that_are_not_given_as_name_and_folders_are_refused(runs):
    with pytest.raises(SystemExit, match="give each run once as name=folder"):
        script.main(runs)
