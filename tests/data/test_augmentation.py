import pytest
import torch

from fairdiff_lightning.data import RandomRotateFlip
from fairdiff_lightning.data.augmentation import random_patch


def batch(height=8, width=8, count=64):
    image = torch.rand(1, 1, height, width).expand(count, 2, -1, -1)
    return image, (image[:, :1] * 5).long()


def test_each_sample_moves_on_its_own_and_mask_moves_with_image():
    image, mask = batch()
    moved, labels = RandomRotateFlip(interpolation="nearest")(image, mask)
    assert torch.equal(labels, (moved[:, :1] * 5).long())
    assert len({tuple(m.flatten().tolist()) for m in labels}) > 8
    assert labels.dtype == torch.int64


def test_quarter_turns_and_flips_only_permute_pixels():
    image, mask = batch()
    moved, _ = RandomRotateFlip(p=1.0)(image, mask)
    torch.testing.assert_close(moved.flatten(2).sort(-1)[0], image.flatten(2).sort(-1)[0], atol=1e-4, rtol=0)
    seen = {tuple((m[0] * 1000).round().flatten().int().tolist()) for m in moved}
    assert len(seen) == 4, "four turns and always one flip are the four reflections of the square"


def test_images_that_are_not_square_keep_their_pixels():
    image, mask = batch(6, 10)
    moved, _ = RandomRotateFlip(p=1.0)(image, mask)
    torch.testing.assert_close(moved.flatten(2).sort(-1)[0], image.flatten(2).sort(-1)[0], atol=1e-4, rtol=0)


def test_branches_have_the_papers_probabilities():
    count = 40_000
    matrices = RandomRotateFlip().draw(count, True, torch.Generator().manual_seed(0))
    flipped = torch.linalg.det(matrices) < 0
    still = (matrices - torch.eye(2)).abs().amax((1, 2)) < 1e-6
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert still.float().mean().item() == pytest.approx(0.25 + 0.25 / 40, abs=0.01), "none, or free by 0 degrees"
    angles = torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0])[~flipped].rad2deg().round()
    assert (angles.min(), angles.max()) == (-20, 19)


def test_patches_cover_every_place_and_no_other():
    places = {tuple((s.start, s.stop) for s in random_patch((6, 5), 4)) for _ in range(300)}
    assert places == {((top, top + 4), (left, left + 4)) for top in range(3) for left in range(2)}
    with pytest.raises(ValueError, match="patch_size=6 is larger than the image, 6 x 5"):
        random_patch((6, 5), 6)


def test_a_generator_fixes_the_draws():
    image, mask = batch()
    first = RandomRotateFlip()(image, mask, torch.Generator().manual_seed(3))[0]
    torch.rand(5)
    again = RandomRotateFlip()(image, mask, torch.Generator().manual_seed(3))[0]
    assert torch.equal(first, again)
