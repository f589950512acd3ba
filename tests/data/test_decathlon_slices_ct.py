"""Slices of a real CT (IBSI's radiomics phantom), stored as a task of the Medical Segmentation Decathlon."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from fairdiff_lightning.data.decathlon_slices import DecathlonSlices
from fairdiff_lightning.data.edges import ScharrEdges, edges_of, label_contour


@pytest.fixture
def slab(realdata):
    """Three slices through the tumour, their labels and their place."""
    folder = realdata / "IBSI" / "ibsi_1_ct_radiomics_phantom" / "nifti"
    image, mask = (
        nib.load(folder / name / file) for name, file in (("image", "phantom.nii.gz"), ("mask", "mask.nii.gz"))
    )
    labels = np.asarray(mask.dataobj) > 0
    middle = int(labels.sum((0, 1)).argmax())
    return np.asarray(image.dataobj)[..., middle - 1 : middle + 2], labels[..., middle - 1 : middle + 2], image.affine


def samples(root, image, mask, affine):
    """The slices of one case, as a data set gives them."""
    for folder, array in (("imagesTr", image), ("labelsTr", mask.astype(np.uint8))):
        (root / folder).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, affine), root / folder / "lung_001.nii.gz")
    content = {
        "name": "Lung",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "cancer"},
        "training": [{"image": "./imagesTr/lung_001.nii.gz", "label": "./labelsTr/lung_001.nii.gz"}],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    data = DecathlonSlices(root)
    return [data.read(record) for record in data.index(root).records]


def test_copies_of_a_real_ct_in_two_types_are_one_and_carry_its_contours(slab, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIRDIFF_CACHE", str(tmp_path / "cache"))
    image, mask, affine = slab
    found = [samples(tmp_path / dtype.__name__, image.astype(dtype), mask, affine) for dtype in (np.float32, np.int16)]
    for z, (first, second) in enumerate(zip(*found, strict=True)):
        assert torch.equal(first["image"], second["image"])
        levels = image[..., z].astype(np.float64)
        low, high = np.percentile(levels, (0.5, 99.5))
        low = max(low, -256)
        expected = np.sort(np.clip((levels - low) / (high - low), 0, 1).ravel())
        np.testing.assert_allclose(np.sort(first["image"].numpy().ravel()), expected, atol=1e-4)
        assert int((first["mask"] > 0).sum()) == mask[..., z].sum() > 0
    images, masks = (torch.stack([sample[key] for sample in found[0]]) for key in ("image", "mask"))
    edges, contours = edges_of(images, masks, ScharrEdges()), label_contour(masks).bool()
    assert (edges[contours] == 1).all()
    assert 0 < edges[~contours].float().mean() < 0.5
