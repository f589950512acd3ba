import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from test_rtstruct import write_scan

from fairdiff_lightning.data import Prostate, read_volume
from fairdiff_lightning.data.dicom_seg import read_segmentation
from fairdiff_lightning.data.rtstruct import read_structures, structure_names, write_structures


@pytest.mark.parametrize("kind", ["rtstruct", "nifti"])
def test_predictions_for_dicom_series_are_dicom(tmp_path, kind):
    series = write_scan(tmp_path / "ct")
    image = read_volume(series)
    mask = np.zeros(image.shape, np.uint8)
    mask[4:9, 3:8, 1:4] = 1
    truth = image.with_array(mask)
    if kind == "rtstruct":
        write_structures(tmp_path / "mask.dcm", truth, image, {1: "CTV"})
        file = "mask.dcm"
    else:
        nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "mask.nii.gz")
        file = "mask.nii.gz"
    row = {"id": "p1", "image": "ct", "mask": file, "t_stage": "T2", "centre": "A"}
    pd.DataFrame([row]).to_csv(tmp_path / "cases.csv", index=False)
    dataset = Prostate(hu_offset=-1000)
    (record,) = dataset.index(tmp_path).records
    assert np.array_equal(dataset.read_volumes(record)[1].array, mask)
    made = dataset.write_prediction(tmp_path / "made", record, mask)
    if kind == "rtstruct":
        assert structure_names(made) == ["target"]
        assert np.array_equal(read_structures(made, image, ["target"]).array, mask)
    else:
        assert np.array_equal(read_segmentation(made, image).array, mask)
