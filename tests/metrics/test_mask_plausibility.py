import pytest
import torch

from fairdiff_lightning.metrics.mask_plausibility import MaskPlausibility, mask_histograms
from fairdiff_lightning.metrics.noise_levels import LossByNoise


def squares(*places, size=(32, 48), side=4):
    mask = torch.zeros(1, 1, *size, dtype=torch.int64)
    for row, column in places:
        mask[..., row : row + side, column : column + side] = 1
    return mask


def test_histograms_tell_area_number_and_place():
    masks = torch.cat([squares(), squares((0, 0)), squares((0, 0), (20, 40)), squares((4, 4), (8, 8))])
    found = mask_histograms(masks)
    assert {name: int(h.sum()) for name, h in found.items()} == {"area": 4, "count": 4, "location": 3}
    assert found["count"].tolist()[:4] == [1, 2, 1, 0]  # corners connect
    shares = [16 / 1536, 32 / 1536, 32 / 1536]
    assert found["area"].nonzero().flatten().tolist() == sorted({0, *(1 + int(16 * s**0.5) for s in shares)})
    assert found["location"][0] == 1  # centroid (1.5, 1.5)


def test_equal_sets_agree_and_others_do_not():
    torch.manual_seed(0)
    metric = MaskPlausibility()
    real = torch.cat([squares((int(r), int(c))) for r, c in torch.randint(0, 28, (40, 2))])
    metric.update(real, real=True)
    metric.update(real.flip(0), real=False)
    assert {name: float(v) for name, v in metric.compute().items()} == pytest.approx(
        {"area": 1, "count": 1, "location": 1}
    )
    metric.reset()
    metric.update(real, real=True)
    metric.update(squares(), real=False)
    found = metric.compute()
    assert found["area"] == 0
    assert found["count"] == 0
    assert found["location"].isnan()


def test_shares_count_not_numbers():
    metric = MaskPlausibility()
    metric.update(torch.cat([squares((0, 0)), squares((0, 0), (20, 20))]), real=True)
    for _ in range(3):
        metric.update(squares((0, 0)), real=False)
    assert float(metric.compute()["count"]) == pytest.approx(0.5)


def test_losses_are_averaged_within_ranges_of_steps():
    metric = LossByNoise(num_steps=8, num_levels=4)
    metric.update(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 1, 7]))
    metric.update(torch.tensor([7.0]), torch.tensor([6]))
    found = metric.compute()
    assert found[[0, 3]].tolist() == [2.0, 6.0]
    assert found[1:3].isnan().all()
