from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from fairdiff_lightning.data.airways import find_airways
from fairdiff_lightning.data.phantoms_3d import chest
from fairdiff_lightning.data.rois import candidate_places, lung_mask
from fairdiff_lightning.data.volumes import read_volume


def tube(shape, start, end, radius, spacing):
    """Voxels within ``radius`` mm of the line between two voxels."""
    grid = np.indices(shape).reshape(3, -1).T * spacing
    start, end = np.asarray(start) * spacing, np.asarray(end) * spacing
    along = np.clip((grid - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return (np.linalg.norm(grid - start - along[:, None] * (end - start), axis=1) < radius).reshape(shape)


@cache
def breathing_chest():
    """A chest whose windpipe divides into a bronchus for each lung, open towards it; and the drawn lumen."""
    phantom = chest(np.random.default_rng(1), size=(92, 84, 60), nodules=0)
    scan, spacing = phantom.image, phantom.image.spacing
    fork = (46, 42, 38)
    parts = [((46, 42, 70), fork, 9.0), (fork, (27, 42, 33), 6.5), (fork, (65, 42, 33), 6.5)]
    walls, lumen = (
        np.any([tube(scan.shape, a, b, radius + more, spacing) for a, b, radius in parts], axis=0) for more in (4.5, 0)
    )
    values = np.where(walls & (phantom.lungs.array == 0), 40, scan.array)
    values[lumen] = -995
    return scan.with_array(values.astype(np.int16)), lumen, phantom.lungs.array > 0


def test_the_airways_of_a_drawn_chest_are_no_lung():
    scan, lumen, lungs = breathing_chest()
    dark, _ = ndimage.label(scan.array < -400)
    assert len(np.unique(dark[lumen])) == 1
    assert dark[lumen][0] in dark[lungs]  # so that a threshold alone takes them for lung
    found = lung_mask(scan).array > 0
    outside = lumen & ~ndimage.binary_dilation(lungs, iterations=1)
    assert outside.sum() > 300
    assert not found[outside].any()
    assert 2 * (found & lungs).sum() / (found.sum() + lungs.sum()) > 0.96
    assert (find_airways(scan, -400) & lungs).sum() < 0.03 * lungs.sum()


def test_places_for_lesions_are_never_in_the_windpipe():
    scan, lumen, _ = breathing_chest()
    lesion = np.ones((2, 2, 2), np.uint8)
    places = candidate_places(lung_mask(scan), lesion, 100, seed=0)
    at = (places[:, None] + np.argwhere(lesion)).reshape(-1, 3)
    windpipe = lumen.copy()
    windpipe[:, :, :40] = False
    assert windpipe.any()
    assert not windpipe[tuple(at.T)].any()


def test_without_a_windpipe_nothing_is_cut():
    scan = chest(np.random.default_rng(1), size=(92, 84, 50), nodules=0).image
    values = scan.array.copy()
    values[40:52, 36:48, 30:] = 40
    assert not find_airways(scan.with_array(values), -400).any()
    assert not find_airways(scan.with_array(np.full(scan.shape, 40, np.int16)), -400).any()


def test_a_leak_into_the_lung_stops_the_growth():
    """Lungs as dark as the airways, with bronchi that open into them: the windpipe is cut, the lungs are not."""
    scan, lumen, lungs = breathing_chest()
    emphysema = np.where(lungs & ~lumen, -975, scan.array).astype(np.int16)
    cut = find_airways(scan.with_array(emphysema), -400)
    windpipe = lumen.copy()
    windpipe[:, :, :40] = False
    assert cut[windpipe].mean() > 0.9
    assert (cut & lungs).sum() < 0.03 * lungs.sum()


def test_no_place_lies_in_the_trachea_of_a_real_scan(realdata):
    root = realdata / "IBSI" / "ibsi_1_ct_radiomics_phantom" / "nifti"
    scan = read_volume(root / "image" / "phantom.nii.gz")
    trachea = np.zeros(scan.shape, bool)  # by eye: the box around it above the carina, and the left main bronchus
    trachea[15:42, 110:140, 52:60] = scan.array[15:42, 110:140, 52:60] < -930
    bronchus = np.zeros(scan.shape, bool)
    bronchus[34:64, 104:120, 39:50] = scan.array[34:64, 104:120, 39:50] < -930
    assert 1800 < trachea.sum() < 2300
    lungs = lung_mask(scan)
    assert not lungs.array[trachea].any()
    assert not lungs.array[bronchus].any()
    cut = find_airways(scan, -400)
    assert cut[trachea].all()
    litres = lungs.array.sum() * np.prod(lungs.spacing) / 1e6
    assert litres == pytest.approx(1.230, rel=0.05)  # what it is with the airways
    places = candidate_places(lungs, (3, 3, 1), 400, seed=0)
    inside = ndimage.binary_dilation(trachea, np.ones((3, 3, 1)))
    assert not inside[tuple((places + np.array([1, 1, 0])).T)].any()
