import pytest
import torch

from fairdiff_lightning.diffusion.cosine import cosine_betas
from fairdiff_lightning.diffusion.lesion_channels import class_masks
from fairdiff_lightning.losses.lesion import lesion_noise_loss


def grid(a, b):
    return torch.linspace(a, b, 8).view(1, 1, 2, 2, 2)


def predicted(noise):
    """The reference's stand-in for a network at step 150: half of the noisy volume."""
    kept = (1 - torch.tensor(cosine_betas(300), dtype=torch.float64)).cumprod(0)[150].item()
    return 0.5 * (kept**0.5 * grid(-1, 1) + (1 - kept) ** 0.5 * noise)


def test_losses_of_one_class_are_those_of_the_authors_code(reference):
    block = reference("lefusion")["loss_lidc"]
    noise, mask = grid(2, -2), torch.tensor(block["mask"]).view(1, 1, 2, 2, 2)
    for name in ("l1", "l2"):
        found = lesion_noise_loss(predicted(noise), noise, mask, name, "volume")
        assert found.item() == pytest.approx(block[name], rel=1e-5)
    normalised = block["l1_if_normalised_by_mask_voxels (NOT official)"]
    assert lesion_noise_loss(predicted(noise), noise, mask).item() == pytest.approx(normalised, rel=1e-5)


def test_losses_of_two_classes_are_those_of_the_authors_code(reference):
    block = reference("lefusion")["loss_emidec"]
    second = torch.tensor(block["noise_ch1"]).view(1, 1, 2, 2, 2)
    noise, label = torch.cat([grid(2, -2), second], 1), torch.tensor(block["label"]).view(1, 1, 2, 2, 2)
    masks = class_masks(label.long(), (3, 4))
    for name in ("l1", "l2"):
        found = lesion_noise_loss(predicted(noise), noise, masks, name, "volume")
        assert found.item() == pytest.approx(block[name], rel=1e-5)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_mean_is_over_lesions_whatever_their_size(loss):
    errors, mask = torch.tensor([0.5, 2.0, 3.0]), torch.zeros(3, 2, 7, 5, 3)
    mask[0, 0, :1, :2, :1], mask[1, 0, :6], mask[1, 1, 3:] = 1, 1, 1  # the last sample has no lesion at all
    noise = torch.randn(3, 2, 7, 5, 3)
    guess = noise + errors.view(3, 1, 1, 1, 1)
    power = 1 if loss == "l1" else 2
    expected = (0.5**power + 2.0**power) / 2 + 2.0**power
    assert lesion_noise_loss(guess, noise, mask, loss).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalise", ["volume", "lesion"])
def test_the_loss_is_the_mean_that_a_loop_over_voxels_finds(normalise):
    noise, guess, mask = torch.randn(3, 2, 4, 3), torch.randn(3, 2, 4, 3), torch.rand(3, 2, 4, 3) > 0.6
    mask[2, 1] = False
    total = 0.0
    for channel in range(2):
        sums = [
            sum(
                abs(float(noise[b, channel, i, j] - guess[b, channel, i, j]))
                for i in range(4)
                for j in range(3)
                if mask[b, channel, i, j]
            )
            for b in range(3)
        ]
        sizes = [int(mask[b, channel].sum()) for b in range(3)]
        if normalise == "volume":
            total += sum(sums) / (3 * 4 * 3)
        else:
            means = [s / n for s, n in zip(sums, sizes, strict=True) if n]
            total += sum(means) / len(means)
    found = lesion_noise_loss(guess, noise, mask, normalise=normalise)
    assert found.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("normalise", ["volume", "lesion"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_an_empty_mask_costs_nothing_and_teaches_nothing(loss, normalise):
    guess = torch.randn(2, 1, 4, 3, 2, requires_grad=True)
    found = lesion_noise_loss(guess, torch.randn(2, 1, 4, 3, 2), torch.zeros(2, 1, 4, 3, 2), loss, normalise)
    found.backward()
    assert found.item() == 0
    assert torch.equal(guess.grad, torch.zeros_like(guess))


def test_nothing_outside_of_the_lesion_counts():
    guess, noise = torch.randn(2, 1, 4, 3, requires_grad=True), torch.randn(2, 1, 4, 3)
    mask = torch.zeros(2, 1, 4, 3, dtype=torch.int64)
    mask[:, :, 1] = 3
    lesion_noise_loss(guess, noise, mask).backward()
    assert torch.equal(guess.grad != 0, mask != 0)


def test_low_precision_sums_are_in_float32():
    guess = torch.ones(1, 1, 300, 100, dtype=torch.bfloat16)
    found = lesion_noise_loss(guess, torch.zeros_like(guess), torch.ones(1, 1, 300, 100))
    assert found.dtype == torch.float32
    assert found.item() == 1


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 1, 4, 3), (2, 1, 4, 4), (2, 1, 4, 3)), {}, "predicted has shape"),
        (((2, 2, 4, 3), (2, 2, 4, 3), (2, 3, 4, 3)), {}, "or one channel in the mask"),
        (((2, 1, 4, 3), (2, 1, 4, 3), (1, 1, 4, 3)), {}, "mask"),
        (((2, 1, 4, 3), (2, 1, 4, 3), (2, 4, 3)), {}, "mask"),
        (((2, 1, 4, 3),) * 3, {"loss": "huber"}, "loss='huber'; expected is l1 or l2"),
        (((2, 1, 4, 3),) * 3, {"normalise": "batch"}, "normalise='batch'; expected is volume or lesion"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        lesion_noise_loss(*(torch.ones(shape) for shape in shapes), **options)
