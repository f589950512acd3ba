import base64
import csv
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from callback_fakes import NAN, Data, Foreign, sample, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from fairdiff_lightning.callbacks import FairnessReport
from fairdiff_lightning.callbacks.cases import Case, take_picture, worst_cases

SAMPLES = [
    sample("a", 0, (0.8, 0.6), (0.7, 0.5)),
    sample("b", 0, (0.6, NAN), (0.5, NAN)),
    sample("c", 1, (0.4, 0.2), (0.3, 0.1)),
    sample("d", -1, (1.0, 1.0), (1.0, 1.0)),
    sample("e", 1, (0.2, 0.4), (0.1, 0.3)),
]
GAP_RIM, GAP_CUP = 0.7 - 0.3, 0.6 - 0.3
BY_HAND = {
    ("overall", "rim", "dice"): 3.0 / 5,
    ("overall", "cup", "dice"): 2.2 / 4,
    ("overall", "mean", "dice"): (0.6 + 0.55) / 2,
    ("Asian", "rim", "dice"): 0.7,
    ("Asian", "cup", "dice"): 0.6,
    ("Asian", "mean", "dice"): 0.65,
    ("Black", "rim", "dice"): 0.3,
    ("Black", "cup", "dice"): 0.3,
    ("Black", "rim", "iou"): 0.2,
    ("White", "rim", "dice"): NAN,
    ("overall", "rim", "worst_dice"): 0.3,
    ("overall", "rim", "gap_dice"): GAP_RIM,
    ("overall", "mean", "gap_dice"): (GAP_RIM + GAP_CUP) / 2,
    ("overall", "rim", "std_dice"): GAP_RIM / math.sqrt(2),
    ("overall", "rim", "es_dice"): 0.6 / (1 + 0.1 + 0.3),
    ("overall", "cup", "es_dice"): 0.55 / (1 + 0.05 + 0.25),
    ("overall", "mean", "es_dice"): (0.6 / 1.4 + 0.55 / 1.3) / 2,
    ("overall", "rim", "es_std_dice"): 0.6 / (1 + GAP_RIM / math.sqrt(2)),
}


def run(folder, samples=SAMPLES, module=None, datamodule=None, **arguments):
    report = FairnessReport(**({"num_resamples": 200} | arguments))
    tester = trainer(folder, report)
    tester.test(module or Foreign(), datamodule or Data(samples), verbose=False)
    return folder / "fairness"


def read_csv(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


class Page(html.parser.HTMLParser):
    """Tags, texts and links of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.text, self.source = [], [], "", path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_scores_are_those_of_a_hand_calculation(tmp_path):
    rows = read_csv(run(tmp_path) / "fairness.csv")
    found = {(row["group"], row["class"], row["metric"]): row for row in rows}
    for key, expected in BY_HAND.items():
        value = found[key]["value"]
        assert value == "" if math.isnan(expected) else float(value) == pytest.approx(expected, abs=1e-6), key
    assert {row["attribute"] for row in rows} == {"race"}
    assert found["Asian", "rim", "dice"]["n"] == "2"
    assert found["Asian", "cup", "dice"]["n"] == "1"
    assert found["White", "rim", "dice"]["n"] == "0"
    assert found["overall", "cup", "dice"]["n"] == "4"


def test_json_holds_the_numbers_of_the_table_and_the_run(tmp_path):
    folder = run(tmp_path)
    content = strict_json(folder / "fairness.json")
    race = content["attributes"]["race"]
    for row in read_csv(folder / "fairness.csv"):
        if row["metric"] == "dice":
            nested = race["overall"] if row["group"] == "overall" else race["groups"][row["group"]]
            expected = None if row["value"] == "" else float(row["value"])
            assert nested["dice"][row["class"]]["value"] == expected
    assert race["statistics"]["es"]["dice"]["rim"]["value"] == pytest.approx(0.6 / 1.4, abs=1e-6)
    assert race["images"] == {"Asian": 2, "Black": 2, "White": 0}
    assert race["unknown"] == 1
    assert race["worst_group"]["dice"] == {"rim": "Black", "cup": "Black", "mean": "Black"}
    assert content["images"] == 5
    assert content["run"]["module"] == "Foreign"
    assert content["run"]["hparams"] == {"rate": 0.5}
    assert set(content["run"]["versions"]) == {"torch", "lightning", "fairdiff_lightning"}
    assert content["counts"]["train"]["race"]["Black"] == 22
    assert list(content["logged"]) == ["test/dice"]


def test_intervals_are_the_quantiles_of_two_images_and_absent_for_one(tmp_path):
    found = {
        (row["group"], row["class"], row["metric"]): row
        for row in read_csv(run(tmp_path, num_resamples=1000) / "fairness.csv")
    }
    black = found["Black", "rim", "dice"]  # resamples of {0.4, 0.2}: both ends have probability 1/4
    assert (float(black["low"]), float(black["high"])) == pytest.approx((0.2, 0.4))
    assert found["Asian", "cup", "dice"]["low"] == ""  # one image with a cup
    assert found["overall", "cup", "es_dice"]["low"] == ""  # it rests on that image
    assert found["overall", "rim", "es_dice"]["low"] != ""


def test_cases_table_has_a_row_for_each_image(tmp_path):
    rows = read_csv(run(tmp_path) / "cases.csv")
    assert [row["id"] for row in rows] == list("abcde")
    assert [row["race"] for row in rows] == ["Asian", "Asian", "Black", "unknown", "Black"]
    assert rows[1]["dice_cup"] == rows[1]["iou_cup"] == ""
    assert float(rows[0]["iou_cup"]) == 0.5


def test_terminal_shows_every_group_the_unknown_and_the_path(tmp_path, capsys):
    folder = run(tmp_path)
    text = capsys.readouterr().out
    assert re.search(r"White\W+0\W+-", text)
    assert re.search(r"Asian\W+2\W+0\.700", text)
    assert "unknown race: 1" in " ".join(text.split())
    for label in ("worst group", "max gap", "group std", "ES", "ES-std"):
        assert label in text
    assert text.strip().endswith(str((folder / "report.html").resolve()))


def test_page_needs_nothing_else_and_holds_pictures(tmp_path):
    page = Page(run(tmp_path) / "report.html")
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", page.source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    images = [Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) for link in page.links]
    assert len(images) == 1 + 4  # a figure of the attribute, the worst cases of known group
    for text in ("By race", "Asian", "Worst cases", "0.300", "rate", "ES-std"):
        assert text in page.text


def test_text_from_the_data_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&"
    data = Data([sample(evil, 0, (0.1, 0.1)), sample("b", 1, (0.9, 0.9))])
    data.classes = ("background", "<i>rim", "cup")
    data.attribute_groups = {"race": ["<b>Asian", "[bold]Black"]}
    page = Page(run(tmp_path, datamodule=data, title="<u>Title") / "report.html")
    assert evil in page.text
    assert "<b>Asian" in page.text
    assert not {"script", "i", "u"} & set(page.tags)
    assert "<b>Asian" not in page.source


def test_configuration_of_the_run_is_shown_when_it_was_saved(tmp_path):
    (tmp_path / "config.yaml").write_text("model: <Segmenter>\n")
    assert "model: <Segmenter>" in Page(run(tmp_path) / "report.html").text


def test_report_lies_in_the_loggers_folder_or_where_asked(tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs")
    trainer(tmp_path, FairnessReport(num_resamples=20), logger=logger).test(Foreign(), Data(SAMPLES), verbose=False)
    assert (tmp_path / "logs/lightning_logs/version_0/fairness/report.html").is_file()
    run(tmp_path, output_dir=str(tmp_path / "mine"))
    written = {path.name for path in (tmp_path / "mine").iterdir()}
    assert written == {"report.html", "fairness.csv", "fairness.json", "cases.csv"}


def test_names_have_fallbacks_without_a_data_module(tmp_path):
    tester = trainer(tmp_path, FairnessReport(num_resamples=20))
    tester.test(Foreign(), Data(SAMPLES).test_dataloader(), verbose=False)
    rows = read_csv(tmp_path / "fairness" / "fairness.csv")
    assert {row["group"] for row in rows} == {"overall", "group 0", "group 1"}
    assert {row["class"] for row in rows} == {"class 1", "class 2", "mean"}


def test_group_beyond_the_named_ones_is_still_reported(tmp_path):
    rows = read_csv(run(tmp_path, [*SAMPLES, sample("f", 4, (0.5, 0.5))]) / "fairness.csv")
    assert {row["group"] for row in rows} == {"overall", "Asian", "Black", "White", "group 3", "group 4"}


def test_all_groups_unknown_gives_overall_scores_only(tmp_path):
    rows = read_csv(run(tmp_path, [sample("a", -1, (0.5, 0.7)), sample("b", -1, (0.7, 0.7))]) / "fairness.csv")
    values = {(row["group"], row["metric"]): row["value"] for row in rows if row["class"] == "rim"}
    assert float(values["overall", "dice"]) == pytest.approx(0.6)
    assert values["Asian", "dice"] == values["overall", "es_dice"] == ""


def test_one_foreground_class_has_no_column_of_means(tmp_path, capsys):
    data = Data([sample("a", 0, (0.5,)), sample("b", 1, (0.7,))])
    data.classes = ("background", "lesion")
    run(tmp_path, datamodule=data)
    text = capsys.readouterr().out
    assert "Dice lesion" in text
    assert "mean" not in text


def test_repeated_id_counts_once_and_is_said(tmp_path):
    with pytest.warns(UserWarning, match="an id came twice"):
        folder = run(tmp_path, [*SAMPLES, SAMPLES[0]])
    assert strict_json(folder / "fairness.json")["images"] == 5


def test_second_test_forgets_the_first(tmp_path):
    tester = trainer(tmp_path, FairnessReport(num_resamples=20))
    for samples in (SAMPLES, SAMPLES[:2]):
        tester.test(Foreign(), Data(samples), verbose=False)
    assert len(read_csv(tmp_path / "fairness" / "cases.csv")) == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2), r"Mine\.test_step gave Tensor\. Missing: 'prediction'.*'dice'.*'iou'"),
        (None, r"Mine\.test_step gave NoneType"),
        (
            {"loss": 0.0, "dice": 1},
            r"Mine\.test_step gave a dict with the keys \['dice', 'loss'\]\. Missing: 'prediction'",
        ),
    ],
)
def test_module_that_returns_something_else_is_named_with_its_keys(tmp_path, returned, message):
    class Mine(Foreign):
        def test_step(self, batch, batch_idx):
            return returned

    with pytest.raises(ValueError, match=message):
        run(tmp_path, module=Mine())


def test_scores_of_another_shape_are_refused(tmp_path):
    class Mean(Foreign):
        def test_step(self, batch, batch_idx):
            return super().test_step(batch, batch_idx) | {"dice": batch["dice"].mean(1)}

    with pytest.raises(ValueError, match=r"outputs\['dice'\] has shape \(2,\), expected \(2, C\)"):
        run(tmp_path, module=Mean())


def test_without_attributes_all_images_are_one_group_and_nothing_is_compared(tmp_path, capsys):
    folder = run(tmp_path, [item | {"attributes": {}} for item in SAMPLES])
    rows = read_csv(folder / "fairness.csv")
    assert {row["attribute"] for row in rows} == {"all"}
    assert {row["metric"] for row in rows} == {"dice", "iou"}, "no statistics over groups"
    found = {(row["group"], row["class"], row["metric"]): float(row["value"]) for row in rows}
    assert found["overall", "rim", "dice"] == found["all", "rim", "dice"] == pytest.approx(3.0 / 5)
    content = strict_json(folder / "fairness.json")
    assert list(content["attributes"]["all"]["groups"]) == ["all"]
    assert not {"statistics", "worst_group"} & content["attributes"]["all"].keys()
    assert [case["id"] for case in content["worst_cases"]] == ["c", "e", "b", "a"]
    assert [row["all"] for row in read_csv(folder / "cases.csv")] == ["all"] * 5
    for text in (Page(folder / "report.html").text, capsys.readouterr().out):
        assert "All images" in text
        assert "overall" in text
        assert not re.search("worst group|max gap|ES-Dice|Largest gap", text)


CENTRES = [
    sample(
        f"{centre}{race}{i}", 0, (dice, dice), attributes={"race": torch.tensor(race), "centre": torch.tensor(centre)}
    )
    for centre, race, dices in ((0, 0, (0.9, 0.7)), (0, 1, (0.5, 0.3)), (1, 0, (0.2,)), (-1, 1, (0.6,)))
    for i, dice in enumerate(dices)
]


def named_centres():
    data = Data(CENTRES)
    data.attribute_groups = {"race": ["Asian", "Black"], "centre": ["A", "B", "C"]}
    return data


def test_subsets_repeat_the_tables_within_each_group_beside_those_of_all(tmp_path, capsys):
    pooled = read_csv(run(tmp_path / "pooled", datamodule=named_centres()) / "fairness.csv")
    folder = run(tmp_path / "subsets", datamodule=named_centres(), subsets="centre")
    rows = read_csv(folder / "fairness.csv")
    assert [row for row in rows if row["subset"] == ""] == pooled
    assert {row["subset"] for row in rows} == {"", "centre A", "centre B"}, "centre C has no case"
    found = {(row["subset"], row["group"], row["metric"]): row["value"] for row in rows if row["class"] == "rim"}
    assert {row["attribute"] for row in rows if row["subset"]} == {"race"}
    assert float(found["centre A", "Asian", "dice"]) == pytest.approx(0.8)
    assert float(found["centre A", "overall", "es_dice"]) == pytest.approx(0.6 / (1 + 0.2 + 0.2))
    assert float(found["centre B", "overall", "dice"]) == pytest.approx(0.2)
    assert found["centre B", "Black", "dice"] == ""
    subsets = strict_json(folder / "fairness.json")["subsets"]
    assert subsets["centre A"]["race"]["images"] == {"Asian": 2, "Black": 2}
    assert subsets["centre A"]["race"]["statistics"]["es"]["dice"]["rim"]["value"] == pytest.approx(0.6 / 1.4)
    assert "By race, centre A" in capsys.readouterr().out
    page = Page(folder / "report.html").text
    assert page.index("By race") < page.index("Only centre A") < page.index("Only centre B")


def test_subsets_of_the_only_attribute_show_overall_scores(tmp_path):
    rows = read_csv(run(tmp_path, subsets="race") / "fairness.csv")
    chosen = [row for row in rows if (row["attribute"], row["group"], row["class"]) == ("all", "overall", "rim")]
    found = {row["subset"]: float(row["value"]) for row in chosen if row["metric"] == "dice"}
    assert found == {"race Asian": pytest.approx(0.7), "race Black": pytest.approx(0.3)}
    with pytest.raises(ValueError, match=r"subsets='centre', but the test batch has the attributes \['race'\]"):
        run(tmp_path, subsets="centre")


def test_distances_of_surfaces_are_columns_of_the_cases(tmp_path):
    class Measured(Foreign):
        def test_step(self, batch, batch_idx):
            return super().test_step(batch, batch_idx) | {"hd95": 10 * batch["dice"], "assd": batch["dice"]}

    rows = read_csv(run(tmp_path, module=Measured()) / "cases.csv")
    assert list(rows[0])[2:] == [f"{m}_{c}" for m in ("dice", "iou", "hd95", "assd") for c in ("rim", "cup")]
    assert [float(rows[0][name]) for name in ("hd95_rim", "assd_cup")] == pytest.approx([8, 0.6])
    assert rows[1]["hd95_cup"] == ""


def test_failure_while_writing_keeps_the_old_files_and_leaves_no_temporary(tmp_path, monkeypatch):
    folder = run(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("fairdiff_lightning.callbacks.report_files.json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)
    assert {path.name for path in folder.iterdir()} == set(before)
    assert (folder / "fairness.json").read_bytes() == before["fairness.json"]


def test_worst_cases_are_the_lowest_dice_whatever_the_batches(tmp_path):
    dice = [0.7, 0.2, NAN, 0.9, 0.1, 0.4, 0.3, 0.8]
    samples = [sample(f"s{i}", -1 if i == 4 else i % 2, (d, d)) for i, d in enumerate(dice)]
    for batch_size in (1, 3, 8):
        folder = run(tmp_path, datamodule=Data(samples, batch_size), num_worst=3)
        worst = [case["id"] for case in strict_json(folder / "fairness.json")["worst_cases"]]
        assert worst == ["s1", "s6", "s5"]  # s4 has no group, s2 no score


def test_worst_cases_of_each_attribute_are_kept():
    cases = [Case(str(i), {"race": -1 if i < 2 else 0, "sex": 0}, (i / 10,), (0.0,)) for i in range(6)]
    assert [case.id for case in worst_cases(cases, 1)] == ["0", "2"]


def test_pictures_are_small_and_show_the_region_of_the_image():
    truth = torch.zeros(1, 600, 900, dtype=torch.int64)
    truth[:, 100:200, 250:350] = 1
    batch = {
        "image": torch.rand(1, 3, 64, 64),
        "mask": torch.zeros(1, 1, 64, 64),
        "native_mask": [truth],
        "region": torch.tensor([[0, 150, 600, 600]]),
    }
    picture = take_picture({"prediction": [truth]}, batch, 0)
    assert picture.image.shape == (3, 256, 256)
    rows, columns = picture.truth[0].nonzero()
    scale = 256 / 600
    assert (rows.min(), rows.max() + 1) == pytest.approx((100 * scale, 200 * scale), abs=1)
    assert (columns.min(), columns.max() + 1) == pytest.approx((100 * scale, 200 * scale), abs=1)
    assert (picture.prediction == picture.truth).all()


def test_volumes_show_three_planes_through_the_lesion_to_scale():
    image, mask = torch.zeros(1, 1, 8, 10, 4), torch.zeros(1, 1, 8, 10, 4, dtype=torch.int64)
    mask[..., 2:4, 5:9, 1:3] = 1
    image[mask > 0] = 1
    batch = {"image": image, "mask": mask, "spacing": torch.tensor([[1.0, 1.0, 2.0]])}
    picture = take_picture({"prediction": mask}, batch, 0)
    assert picture.image.shape == (1, 8, 10 + 10 + 8)
    assert picture.truth.sum() == 2 * 4 + 4 * 4 + 2 * 4, "depth of 2 voxels is 4 wide at twice the spacing"
    assert np.array_equal(picture.truth, picture.prediction)
    assert np.array_equal(picture.image[0] > 0.5, picture.truth[0] > 0)


def test_predictions_at_native_size_are_shown_where_the_network_looked():
    native = torch.zeros(1, 1, 12, 12, 8, dtype=torch.int64)
    native[..., 5:7, 5:7, 3:5] = 1
    affine, moved = torch.eye(4, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None].clone()
    moved[0, :3, 3] = 2
    block = native[..., 2:10, 2:10, 2:8]
    batch = {"image": block.float(), "mask": block, "native_mask": native, "affine": moved, "native_affine": affine}
    picture = take_picture({"prediction": native}, batch, 0)
    assert picture.truth.any()
    assert np.array_equal(picture.truth, picture.prediction)
