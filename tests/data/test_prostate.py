import hashlib

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.phantoms_pelvis import SCANNERS, STAGES, Tissue, ct, grid_affine, mr, pelvis
from fairdiff_lightning.data.prostate import PHANTOM_SIZE, Prostate
from fairdiff_lightning.data.rtstruct import read_structures, write_structures
from fairdiff_lightning.data.sample import validate
from fairdiff_lightning.data.splits import check_disjoint, split_records
from fairdiff_lightning.data.volumes import Volume, read_volume, write_volume

SIZE = (8, 9, 5)
AFFINE = np.array([[-2.0, 0, 0, 7], [0, -1.5, 0, 20], [0, 0, 3, -40], [0, 0, 0, 1]])
"""Of axes that run to the left, back and head."""
HEADER = "id,image,mask,t_stage,centre,patient,split"


def store(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def scan(k=0):
    return (np.arange(8 * 9 * 5, dtype=np.int16).reshape(SIZE) - 200) + 10 * k


def target():
    mask = np.zeros(SIZE, np.uint8)
    mask[1:4, 2:7, 1:3], mask[2, 3:5, 2] = 1, 2  # GTV in CTV
    return mask


def tree(root, *rows, header=HEADER):
    for k, name in enumerate("abc"):
        store(root / "ct" / f"{name}.nii.gz", scan(k))
        store(root / "rt" / f"{name}.nii.gz", target())
    (root / "cases.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


def row(name, *rest, mask=None):
    return ",".join([name, f"ct/{name[0]}.nii.gz", f"rt/{name[0]}.nii.gz" if mask is None else mask, *rest])


def test_the_table_says_groups_patients_and_splits(tmp_path):
    data = Prostate(targets=(1, 2))
    root = tree(
        tmp_path, row("a", "T3", "B", "p1", "train"), row("b", "", "A", "p2", "test"), row("c", "T1", "", "", "")
    )
    index = data.index(root)
    assert [(r.id, r.unit, r.split, r.attributes) for r in index.records] == [
        ("a", "p1", "train", {"t_stage": 2, "centre": 1}),
        ("b", "p2", "test", {"t_stage": -1, "centre": 0}),
        ("c", "c", None, {"t_stage": 0, "centre": -1}),
    ]
    assert (index.errors, index.left_out) == ([], {})
    assert data.backgrounds(root) == []
    image, mask = data.read_arrays(index.records[0])
    assert (image.dtype, mask.dtype) == (np.float32, np.uint8)
    assert np.array_equal(image, scan()[::-1, ::-1])  # turned to RAS
    assert np.array_equal(mask, (target() > 0)[::-1, ::-1])  # CTV and GTV in one
    sample = data.read(index.records[0])
    np.testing.assert_allclose(sample["image"][0], np.clip((image + 200) / 450, 0, 1), atol=1e-6)
    validate(sample, num_classes=2, attributes=list(data.attributes.values()), intensity_range=(0, 1))


def test_attributes_have_any_number_of_groups_and_classes_stay_apart_where_asked(tmp_path):
    data = Prostate({"psa": ("<10", "10-20", ">20"), "site": ("x", "y", "z", "u", "v")}, ("none", "CTV", "GTV"), None)
    root = tree(tmp_path, "a,ct/a.nii.gz,rt/a.nii.gz,>20,v", header="id,image,mask,psa,site")
    (record,) = data.index(root).records
    assert record.attributes == {"psa": 2, "site": 4}
    assert [len(spec) for spec in data.attributes.values()] == [3, 5]
    assert np.unique(data.read_mask(record)).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"targets=\(1,\) with the classes \['a', 'b', 'c'\]; expected are two"):
        Prostate(classes=("a", "b", "c"))
    for targets in ((), (0, 1), (256,)):
        with pytest.raises(ValueError, match="expected are values of a mask from 1 to 255"):
            Prostate(targets=targets)


@pytest.mark.parametrize("window", [(250, -200), (0, 0), (float("nan"), 1)])
def test_a_window_that_shows_nothing_is_an_error(window):
    with pytest.raises(ValueError, match=r"window=\(.*\); expected are two finite intensities, the lower one first"):
        Prostate(window=window)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([-1, 0, 3]))
def test_a_written_sample_reads_back(tmp_path, seed, synthetic, stage):
    data, root = Prostate(), tmp_path / f"{seed}-{synthetic}-{stage}"
    draws = np.random.default_rng(seed)
    affine = np.diag([2.0, 1.5, 3, 1])
    made = {
        "image": torch.from_numpy(draws.uniform(0, 1, (1, *SIZE)).astype(np.float32)),
        "mask": torch.from_numpy(draws.integers(0, 2, (1, *SIZE))),
        "attributes": {"t_stage": torch.tensor(stage), "centre": torch.tensor(1)},
        "id": "made-1",
        "affine": torch.from_numpy(affine),
        "synthetic": torch.tensor(synthetic),
        "source": "A001" if synthetic else "",
    }
    assert data.write(root, made) == root / "images" / "made-1.nii.gz"
    (record,) = data.index(root).records
    assert (record.id, record.synthetic, record.source) == ("made-1", synthetic, "A001" if synthetic else None)
    read = data.read(record)
    validate(read, num_classes=2, attributes=list(data.attributes.values()), intensity_range=(0, 1))
    torch.testing.assert_close(read["image"], made["image"], atol=0.5 / 450 + 1e-6, rtol=0)  # whole HU
    assert torch.equal(read["mask"], made["mask"])
    assert read["attributes"] == made["attributes"]
    np.testing.assert_allclose(read["affine"], affine)


def test_predictions_are_written_voxel_for_voxel_as_the_images_file(tmp_path):
    data = Prostate(targets=(1, 2))
    (record,) = data.index(tree(tmp_path, row("a", "T1", "A", "", ""))).records
    path = data.write_prediction(tmp_path / "out", record, data.read_mask(record))
    stored = nib.load(path)
    assert path == tmp_path / "out" / "masks" / "a.nii.gz"
    assert stored.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(stored.dataobj), target() > 0)  # not turned
    np.testing.assert_allclose(stored.affine, AFFINE)
    with pytest.raises(ValueError, match="an array of"):
        data.write_prediction(tmp_path / "out", record, np.zeros((2, 2, 2), np.uint8))
    apart = Prostate(classes=("none", "CTV", "GTV"), targets=None)
    alone = nib.load(apart.write_mask(tmp_path / "out", "b", target(), AFFINE))
    assert np.array_equal(np.asarray(alone.dataobj), target())


def test_predictions_take_the_place_from_the_images_header_and_nothing_else(tmp_path):
    root = tree(tmp_path, row("a", "T1", "A", "", ""))
    scanned = nib.load(root / "ct" / "a.nii.gz")
    turned = AFFINE.copy()
    turned[:3, :3] = turned[:3, :3] @ np.diag([-1, 1, 1])  # another place than that of the sform
    header = scanned.header
    header.set_qform(turned, 1)
    header.set_sform(AFFINE, 4)
    header.set_xyzt_units("mm", "sec")
    header["cal_min"], header["cal_max"], header["descrip"] = -1000, 400, b"CT of J. Doe"
    header["aux_file"], header["db_name"] = b"doe.txt", b"doe"
    header.set_intent("estimate", (), "a scan")
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b'{"fairdiff_lightning": {"id": "J. Doe"}}'))
    nib.save(nib.Nifti1Image(scan(), None, header), root / "ct" / "a.nii.gz")
    data = Prostate(targets=(1, 2))
    (record,) = data.index(root).records
    path = data.write_prediction(tmp_path / "out", record, data.read_mask(record))
    made = nib.load(path).header
    assert (int(made["qform_code"]), int(made["sform_code"]), made.get_xyzt_units()[0]) == (1, 4, "mm")
    np.testing.assert_allclose(made.get_sform(), AFFINE, atol=1e-5)
    np.testing.assert_allclose(made.get_qform(), turned, atol=1e-5)
    assert (float(made["cal_min"]), float(made["cal_max"]), made.get_intent()[0]) == (0, 0, "none")
    assert [bytes(made[name].tobytes()).strip(b"\0") for name in ("descrip", "aux_file", "db_name")] == [b""] * 3
    assert len(made.extensions) == 0
    import gzip

    assert b"oe" not in gzip.decompress(path.read_bytes())


@pytest.mark.parametrize("targets", [(1,), (255,), (2, 7)])
def test_only_the_values_that_are_named_are_the_target(tmp_path, targets):
    data, root = Prostate(targets=targets), tree(tmp_path, row("a", "T1", "A", "", ""))
    (record,) = data.index(root).records
    values = np.zeros(SIZE, np.uint8)
    values[2, 3, 1], values[5, 4, 2] = targets[0], targets[-1]
    store(root / "rt" / "a.nii.gz", values)
    found = data.read_mask(record)
    assert np.array_equal(found, (values > 0)[::-1, ::-1])
    data.write_volumes(tmp_path / "made", "m", data.read_image(record), Volume(found, data.read_image(record).affine))
    assert set(np.unique(nib.load(tmp_path / "made" / "masks" / "m.nii.gz").dataobj)) == {0, targets[0]}
    assert np.array_equal(data.read_mask(data.index(tmp_path / "made").records[0]), found)
    values[0, 0, 0] = 9
    store(root / "rt" / "a.nii.gz", values)
    with pytest.raises(InvalidSampleError, match=r"rt/a.nii.gz: mask values \[9\]. Expected 0 and the targets"):
        data.read_mask(record)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden", "a\\b", ""])
def test_ids_that_lead_elsewhere_are_not_written(tmp_path, name):
    with pytest.raises(InvalidSampleError, match="Expected the name of a file, without a slash or a leading dot"):
        Prostate().write_mask(tmp_path / "out" / "in", name, target() > 0)
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_rows_without_files_are_errors_of_their_own_and_rows_without_a_mask_are_left_out(tmp_path):
    rows = [row("a", "T1", "A", "", ""), row("x", "T1", "A", "", ""), row("b", "T1", "A", "", "", mask="")]
    rows.append(row("c", "T1", "A", "", "", mask="rt/none.nii.gz"))
    index = Prostate().index(tree(tmp_path, *rows))
    assert [r.id for r in index.records] == ["a"]
    assert index.left_out == {"images without a mask, which are for prediction alone": 1}
    image, mask = map(str, index.errors)
    assert "cases.csv, row 3, image: no file" in image
    assert "ct/x.nii.gz" in image
    assert "cases.csv, row 5, mask: no file" in mask


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row("a", "T5", "A", "", "")],
            r"cases.csv\[t_stage\], row 2: 'T5'. Expected one of T1, T2, T3, T4, or nothing",
        ),
        ([row("a", "T1", "C", "", "")], r"\[centre\], row 2: 'C'. Expected one of A, B"),
        ([row("a", "T1", "A", "", "val")], r"\[split\], row 2: 'val'. Expected one of train, test"),
        (["../../escaped" + row("a", "T1", "A", "", "")[1:]], r"cases.csv\[id\], row 2: the id '../../escaped'"),
        (
            [row("a", "T1", "A", "", ""), "b/c" + row("b", "T1", "A", "", "")[1:]],
            r"cases.csv\[id\], row 3: the id 'b/c'",
        ),
        ([row("a", "T1", "A", "", "")] * 2, r"\[id\]: 'a' twice"),
        (["a,,rt/a.nii.gz,T1,A,,"], r"\[image\], row 2: nothing"),
    ],
)
def test_what_a_table_cannot_say_is_named(tmp_path, rows, message):
    with pytest.raises(InvalidSampleError, match=message):
        Prostate().index(tree(tmp_path, *rows))


def test_wrong_trees_and_columns_are_named(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"no cases.csv with images, nothing in .*\n.*\n  cases.csv"):
        Prostate().index(tmp_path)
    with pytest.raises(DatasetNotFoundError, match="no such folder"):
        Prostate().index(tmp_path / "none")
    root = tree(tmp_path, "a,ct/a.nii.gz,rt/a.nii.gz,T1", header="id,image,mask,t_stage")
    with pytest.raises(InvalidSampleError, match="the columns centre too"):
        Prostate().index(root)
    for folder, names in (("images", "ab"), ("masks", "bc")):
        for name in names:
            store(tmp_path / "pairs" / folder / f"{name}.nii.gz", scan())
    index = Prostate().index(tmp_path / "pairs")
    assert [r.id for r in index.records] == ["b"]
    assert ["c.nii.gz: no images" in str(e) for e in index.errors] == [True]
    assert index.left_out == {"images without a mask, which are for prediction alone": 1}
    assert [r.files for r in Prostate().unlabelled(tmp_path / "pairs").records] == [
        {"image": str(tmp_path / "pairs" / "images" / "a.nii.gz")}
    ]


def test_volumes_that_do_not_fit_are_named(tmp_path):
    data, root = Prostate(targets=(1, 2)), tree(tmp_path, row("a", "T1", "A", "", ""))
    (record,) = data.index(root).records
    moved = AFFINE.copy()
    moved[0, 3] += 5
    store(root / "rt/a.nii.gz", target(), moved)
    with pytest.raises(InvalidSampleError, match=r"rt/a.nii.gz: image and mask lie up to 5 mm off"):
        data.read_arrays(record)
    there = Prostate(targets=(1, 2), ignore_mask_affine=True).read_arrays(record)[1]
    assert np.array_equal(there, (target() > 0)[::-1, ::-1])
    store(root / "rt/a.nii.gz", target().astype(np.int16) - 1)
    with pytest.raises(InvalidSampleError, match=r"mask values \[-1\]. Expected 0 and the targets 1, 2"):
        data.read_mask(record)
    store(root / "rt/a.nii.gz", target() / np.float32(4))
    with pytest.raises(InvalidSampleError, match=r"mask values \[0.25, 0.5\]"):
        data.read_mask(record)
    store(root / "rt/a.nii.gz", target())
    with pytest.raises(InvalidSampleError, match=r"mask values \[0, 1, 2\]. Expected classes 0 to 1"):
        Prostate(targets=None).read_mask(record)
    store(root / "ct/a.nii.gz", np.zeros((*SIZE, 2), np.int16))
    with pytest.raises(InvalidSampleError, match=r"ct/a.nii.gz: 4-D data"):
        data.read_arrays(record)
    store(root / "ct/a.nii.gz", scan() + np.int16(1024))
    with pytest.raises(InvalidSampleError, match="give hu_offset=-1024"):
        data.read_arrays(record)
    assert np.array_equal(Prostate(hu_offset=-1024).read_image(record).array[::-1, ::-1], scan())


def planned(root):
    """A DICOM series and its structure set, listed in a table."""
    mask = Volume(target(), np.diag([1.5, 1.5, 3, 1]))
    write_volume(root / "p1" / "ct", mask.with_array(scan()))
    series = read_volume(root / "p1" / "ct")
    names = {1: "CTV prostate", 2: "GTV"}
    write_structures(root / "p1" / "rs.dcm", mask, series, names)
    (root / "cases.csv").write_text("id,image,mask,t_stage,centre\n1,p1/ct,p1/rs.dcm,T2,A\n")
    return root


def test_structures_are_joined_on_the_grid_of_their_series(tmp_path):
    root = planned(tmp_path)
    (record,) = Prostate().index(root).records
    for structures, classes in ((("CTV.*", "gtv"), (1, 2)), (("CTV.*", "PTV.*"), (1,)), (("GTV",), (2,))):
        data = Prostate(structures=structures)
        image, mask = data.read_volumes(record)
        assert np.array_equal(image.array, scan())
        assert np.array_equal(mask.array, np.isin(target(), classes))
        assert np.array_equal(data.read_mask(record), mask.array)
    with pytest.raises(InvalidSampleError, match=r"rs.dcm.*no structure that matches \['PTV'\].*GTV"):
        Prostate(structures=["PTV"]).read_volumes(record)
    written = data.write_prediction(tmp_path / "out", record, mask.array)
    again = read_structures(written, image, ["target"])
    assert np.array_equal(again.array, mask.array), "a prediction for structures is a structure"


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("prostate")
    Prostate().write_phantom(root, seed=0)
    return root


def test_the_phantom_has_unequal_stages_and_a_test_set_of_each_centre(phantom):
    data = Prostate()
    index = data.index(phantom)
    splits = split_records(index.records, (0.8, 0.2, 0), 0)
    check_disjoint(splits)
    train = [r.attributes["t_stage"] for r in index.records if r.split == "train"]
    assert [train.count(stage) for stage in range(4)] == [3, 12, 7, 2]
    for centre in (0, 1):
        stages = [r.attributes["t_stage"] for r in splits["test"] if r.attributes["centre"] == centre]
        assert (len(stages), set(stages)) == (8, {0, 1, 2, 3})
    assert {r.attributes["centre"] for r in splits["train"] + splits["val"]} == {0}


def test_the_phantoms_target_grows_with_the_stage_and_its_centres_differ(phantom):
    data = Prostate()
    sizes, levels, spacings = {}, {0: [], 1: []}, {0: set(), 1: set()}
    for record in data.index(phantom).records:
        image, mask = data.read_volumes(record)
        sizes.setdefault(record.attributes["t_stage"], []).append(mask.array.sum() * image.spacing.prod())
        core = ndimage.binary_erosion(mask.array, iterations=2)  # the gland, without the fat around it
        levels[record.attributes["centre"]].append(float(image.array[core].mean()))
        spacings[record.attributes["centre"]].add(tuple(image.spacing.round(3)))
        assert image.axes == ("R", "A", "S")
    assert np.all(np.diff([np.mean(sizes[stage]) for stage in range(4)]) > 0)
    assert 20 < np.mean(levels[1]) - np.mean(levels[0]) < 40  # HU; the scanners differ by 30
    assert spacings == {0: {(4, 4, 3)}, 1: {(4.8, 4.8, 3)}}


def test_anatomies_hold_every_tissue_and_each_stage_holds_the_one_before():
    for seed in range(5):
        affine = grid_affine(PHANTOM_SIZE, SCANNERS[seed % 2].spacing)
        drawn = pelvis(np.random.default_rng(seed), PHANTOM_SIZE, affine)
        assert set(np.unique(drawn.tissue)) == set(Tissue)
        prostate = drawn.tissue >= Tissue.PERIPHERAL_ZONE
        assert np.array_equal(drawn.targets[0], prostate)
        counts = [int(stage.sum()) for stage in drawn.targets]
        assert sorted(set(counts)) == counts
        for smaller, larger in zip(drawn.targets, drawn.targets[1:], strict=False):
            assert not (smaller & ~larger).any()
        vesicles = drawn.tissue == Tissue.VESICLE
        shares = [(stage & vesicles).sum() / vesicles.sum() for stage in drawn.targets]
        assert shares[0] == 0
        assert shares[1] < shares[2] < shares[3] == 1
        assert not (drawn.targets[:3] & (drawn.tissue == Tissue.URINE)).any()
        assert (drawn.targets[3] & (drawn.tissue == Tissue.URINE)).any()
        assert not (drawn.targets & np.isin(drawn.tissue, (Tissue.BONE, Tissue.GAS))).any()
    assert len(drawn.targets) == len(STAGES)


def test_scanners_show_tissues_in_their_order():
    affine = grid_affine(PHANTOM_SIZE, SCANNERS[0].spacing)
    tissue = pelvis(np.random.default_rng(3), PHANTOM_SIZE, affine).tissue
    image = ct(np.random.default_rng(0), tissue, SCANNERS[0])
    mean = {kind: image[tissue == kind].mean() for kind in Tissue}
    assert mean[Tissue.AIR] < mean[Tissue.FAT] < mean[Tissue.URINE] < mean[Tissue.MUSCLE] < mean[Tissue.BONE]
    inside = ndimage.binary_erosion(tissue == Tissue.MUSCLE, iterations=2)
    one, other = (ct(np.random.default_rng(0), tissue, scanner)[inside] for scanner in SCANNERS)
    assert other.mean() - one.mean() == pytest.approx(SCANNERS[1].offset - SCANNERS[0].offset, abs=1)
    assert (one.std(), other.std()) == pytest.approx((SCANNERS[0].noise, SCANNERS[1].noise), rel=0.1)
    values = mr(np.random.default_rng(0), tissue)
    assert values.shape == (*PHANTOM_SIZE, 2)
    t2, adc = values[tissue == Tissue.PERIPHERAL_ZONE].mean(0) - values[tissue == Tissue.TRANSITION_ZONE].mean(0)
    assert min(t2, adc) > 0  # the peripheral zone is bright in both


def test_the_same_seed_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("fairdiff_lightning.data.prostate.PHANTOM_CASES", (("A", "train", 1), ("B", "test", 1)))
    digests = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        Prostate().write_phantom(tmp_path / name, seed)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests[name] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert len(digests["one"]) == 5
    assert digests["one"] == digests["again"] != digests["other"]
