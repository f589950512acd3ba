import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_lightning.data import Record
from fairdiff_lightning.data.patch_merge import PartnerIndex, PatchMerge, joint_minmax, merge_partners


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def records(count, source=None):
    return [
        Record(f"{source or 'real'}-{i}", {}, {}, f"p{i}", synthetic=bool(source), source=source) for i in range(count)
    ]


@pytest.mark.parametrize("patch", [1, 16, 32, 64, 96, 128, 384])
def test_masks_of_every_patch_size_are_the_authors(reference, patch):
    check = reference("diffboost")["merge_mask"]["by_patch_alpha0.6"][f"patch{patch}"]
    mask = PatchMerge(check["expected_real_fraction"], patch).mask((8, 1, 384, 384), seeded())
    cells = mask[0, 0, ::patch, ::patch]
    assert (list(cells.shape), cells.numel()) == (check["grid"], check["cells_per_image"])
    assert mask.float().mean().item() == pytest.approx(check["seed0_N8_real_fraction"], abs=1e-6)
    assert mask.float().mean((1, 2, 3)).tolist() == pytest.approx(check["seed0_N8_per_image"], abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_masks_of_every_alpha_are_the_authors(reference, alpha):
    check = reference("diffboost")["merge_mask"]["by_alpha_patch64"][f"alpha{alpha}"]
    mask = PatchMerge(alpha).mask((8, 2, 384, 384), seeded())
    cells = mask[..., ::64, ::64]
    assert (cells.sum().item(), cells.numel()) == (check["seed0_N8_real_cells"], check["of"])
    assert mask.float().mean().item() == pytest.approx(check["real_fraction"], abs=1e-6)


def test_first_mask_is_the_authors_and_constant_on_its_patches(reference):
    check = reference("diffboost")["merge_mask"]["grid_image0_patch64_alpha0.6_seed0"]
    torch.manual_seed(0)
    mask = PatchMerge().mask((8, 1, 384, 384))
    assert mask[0, 0, ::64, ::64].int().tolist() == check
    assert torch.equal(mask, mask[..., ::64, ::64].repeat_interleave(64, 2).repeat_interleave(64, 3))


def test_patches_are_stretched_over_a_size_that_is_no_multiple(reference):
    expected = reference("diffboost")["merge_mask"]["patch100_non_divisible_seed0_alpha0.5"]
    mask = PatchMerge(0.5, 100).mask((1, 1, 384, 384), seeded())
    assert torch.equal(mask, mask[..., ::128, ::128].repeat_interleave(128, 2).repeat_interleave(128, 3))
    assert mask.float().mean().item() == pytest.approx(expected["real_fraction"], abs=1e-6)


def test_share_of_real_pixels_has_the_binomial_mean_and_spread(reference):
    check = reference("diffboost")["merge_mask"]["stats_20000_images_patch64_alpha0.6_seed1"]
    share = PatchMerge(0.6, 1).mask((20_000, 1, 6, 6), seeded(1)).float().mean((1, 2, 3))
    assert share.mean().item() == pytest.approx(check["mean"], abs=1e-5)
    assert share.std().item() == pytest.approx(check["std"], abs=1e-5)
    assert share.std().item() == pytest.approx(math.sqrt(0.6 * 0.4) / 6, abs=0.003)


@pytest.mark.parametrize("patch", [1, 16, 32, 64, 96, 128, 384])
def test_shares_of_every_patch_size_spread_as_the_theory_says(reference, patch):
    """The cells alone, since a cell of one pixel weighs what a patch of many does."""
    check = reference("diffboost")["merge_mask"]["by_patch_alpha0.6"][f"patch{patch}"]
    side, count = check["grid"][0], 100 if patch == 1 else 4000
    share = PatchMerge(0.6, 1).mask((count, 1, side, side), seeded(1)).float().mean((1, 2, 3))
    expected = check["theoretical_std_per_image"]
    assert math.sqrt(0.6 * 0.4) / side == pytest.approx(expected, abs=1e-6)
    assert share.std().item() == pytest.approx(expected, rel=0.2 if patch == 1 else 0.05)
    assert share.mean().item() == pytest.approx(0.6, abs=0.025)


@given(
    size=st.lists(st.integers(3, 9), min_size=2, max_size=3),
    patch=st.integers(1, 3),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_pixel_is_the_real_or_the_synthetic_one(size, patch, alpha, seed):
    real, synthetic = torch.rand(2, 3, 2, *size)
    merge = PatchMerge(alpha, patch)
    mask = merge.mask(real.shape, seeded(seed))
    merged = merge(real, synthetic, seeded(seed))
    expected = mask.float() * real + (1 - mask.float()) * synthetic
    assert mask.shape == (3, 1, *size)
    assert torch.equal(merged, expected)


def test_a_sample_merged_with_itself_stays_and_the_ends_of_alpha_take_one_side():
    real, synthetic = torch.rand(2, 2, 1, 8, 8)
    assert torch.equal(PatchMerge(0.5, 2)(real, real), real)
    assert torch.equal(PatchMerge(1.0, 2)(real, synthetic), real)
    assert torch.equal(PatchMerge(0.0, 2)(real, synthetic), synthetic)


def test_thin_volumes_take_a_side_for_each_axis():
    mask = PatchMerge(0.5, (4, 4, 2)).mask((2, 1, 8, 8, 4), seeded())
    cells = torch.rand(2, 1, 2, 2, 2, generator=seeded()) < 0.5
    assert torch.equal(mask, cells.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(2, 4))


def test_gradients_of_logits_flow_through_their_own_patches():
    real, synthetic = torch.rand(2, 2, 3, 8, 8).requires_grad_().unbind(0)
    real.retain_grad(), synthetic.retain_grad()
    merge = PatchMerge(0.5, 4, level="logits")
    merge(real, synthetic, seeded()).sum().backward()
    mask = merge.mask(real.shape, seeded()).expand_as(real).float()
    assert 0 < mask.mean() < 1
    assert torch.equal(real.grad, mask)
    assert torch.equal(synthetic.grad, 1 - mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.01}, r"alpha=1.01: expected the probability"),
        ({"alpha": -0.1}, r"alpha=-0.1"),
        ({"alpha": math.nan}, r"alpha=nan"),
        ({"patch_size": 0}, r"patch_size=0: expected at least 1"),
        ({"patch_size": (4, 0)}, r"patch_size=\(4, 0\)"),
        ({"level": "image"}, r"level='image': expected one of \['input', 'logits'\]"),
        ({"num_synthetic": -1}, r"num_synthetic=-1"),
        ({"joint_range": (1.0, 0.0)}, r"joint_range=\(1.0, 0.0\)"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchMerge(**arguments)


def test_images_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="patch_size=64 is larger than the image, 96 x 48"):
        PatchMerge().mask((1, 1, 96, 48))
    with pytest.raises(ValueError, match=r"patch_size=\(4, 4\) for images of size \(8, 8, 8\)"):
        PatchMerge(patch_size=(4, 4)).mask((1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"real has shape \(1, 1, 8, 8\), synthetic \(1, 1, 8, 9\)"):
        PatchMerge(patch_size=4)(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 9))


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [("case1 real[-1,1] synth[-.5,.25]", -0.5, 0.25), ("case2 real[-1,1] synth[-1.25,.625]", -1.25, 0.625)],
)
def test_joint_minmax_is_the_authors(reference, case, low, high):
    check = reference("diffboost")["joint_minmax"][case]
    real, synthetic = joint_minmax(
        torch.linspace(-1, 1, 16).view(1, 1, 4, 4), torch.linspace(low, high, 16).view(1, 1, 4, 4)
    )
    assert [real.min().item(), real.max().item()] == pytest.approx(check["real"], abs=1e-6)
    assert [synthetic.min().item(), synthetic.max().item()] == pytest.approx(check["synth"], abs=1e-6)


def test_joint_minmax_scales_each_pair_by_itself_and_a_constant_pair_is_finite():
    real, synthetic = torch.rand(2, 3, 2, 4, 4) * torch.tensor([1.0, 10.0, 0.0]).view(3, 1, 1, 1)
    both = torch.stack(joint_minmax(real, synthetic, 0, 1), 1)
    assert both[:2].flatten(1).aminmax(dim=1).min.tolist() == [0, 0]
    assert both[:2].flatten(1).aminmax(dim=1).max.tolist() == [1, 1]
    assert torch.equal(both[2], torch.zeros_like(both[2]))


def batch(count=2):
    image, partner = torch.rand(2, count, 1, 8, 8)
    return {
        "image": image,
        "partner": partner,
        "mask": torch.zeros(count, 1, 8, 8).long(),
        "attributes": {},
        "id": ["a", "b"],
    }


def test_a_batch_is_merged_at_the_input_and_keeps_its_masks():
    given_batch = batch()
    merged = merge_partners(given_batch, PatchMerge(0.5, 2), seeded())
    expected = PatchMerge(0.5, 2)(given_batch["image"], given_batch["partner"], seeded())
    assert torch.equal(merged["image"], expected)
    assert merged["mask"] is given_batch["mask"]
    assert "partner" not in merged
    assert "partner" in given_batch, "the caller's batch is not changed"


def test_a_batch_for_logits_keeps_both_images_rescaled_on_request():
    given_batch = batch()
    kept = merge_partners(given_batch, PatchMerge(0.5, 2, "logits"), seeded())
    assert torch.equal(kept["image"], given_batch["image"])
    assert torch.equal(kept["partner"], given_batch["partner"])
    rescaled = merge_partners(given_batch, PatchMerge(0.5, 2, "logits", joint_range=(-1, 1)))
    expected = joint_minmax(given_batch["image"], given_batch["partner"])
    assert torch.equal(torch.stack([rescaled["image"], rescaled["partner"]]), torch.stack(expected))


def test_a_batch_without_partners_is_named():
    alone = {key: value for key, value in batch().items() if key != "partner"}
    with pytest.raises(ValueError, match=r"no 'partner', only \['attributes', 'id', 'image', 'mask'\]"):
        merge_partners(alone, PatchMerge(patch_size=2))


def test_partners_are_those_of_the_source_and_no_more_than_asked():
    real = records(2)
    index = PartnerIndex(real, records(9, "real-0") + records(3, "real-1"), num_synthetic=5)
    assert [r.id for r in index.partners(real[0])] == [f"real-0-{i}" for i in range(5)]
    assert [r.id for r in index.partners(real[1])] == [f"real-1-{i}" for i in range(3)]
    assert index.alone == []


def test_draws_are_uniform_over_the_epochs_and_known_from_seed_epoch_and_id():
    real, made = records(2), records(4, "real-0") + records(4, "real-1")
    index, again = PartnerIndex(real, made), PartnerIndex(real[::-1], made[::-1])
    drawn = [index.draw(real[0], epoch).id for epoch in range(800)]
    assert drawn == [again.draw(real[0], epoch).id for epoch in range(800)], "whatever the order of the files"
    counts = [drawn.count(f"real-0-{i}") for i in range(4)]
    assert sum(counts) == 800
    assert all(150 < count < 250 for count in counts)
    assert drawn[:20] != [PartnerIndex(real, made, seed=1).draw(real[0], epoch).id for epoch in range(20)]
    assert [d[-1] for d in drawn[:20]] != [index.draw(real[1], epoch).id[-1] for epoch in range(20)]


def test_real_samples_without_a_partner_are_counted_and_stay_alone():
    real = records(3)
    with pytest.warns(UserWarning, match="2 of 3 real training samples, 'real-0' the first, have no synthetic partner"):
        index = PartnerIndex(real, records(1, "real-1"))
    assert index.alone == ["real-0", "real-2"]
    assert index.draw(real[0], 0) is None
    assert index.draw(real[1], 0).id == "real-1-0"


def test_no_synthetic_samples_on_request_is_no_warning(recwarn):
    real = records(2)
    index = PartnerIndex(real, records(3, "real-1"), num_synthetic=0)
    assert [index.draw(record, 0) for record in real] == [None, None]
    assert not recwarn.list


def test_a_synthetic_sample_of_another_split_is_a_leak():
    with pytest.raises(
        ValueError, match=r"synthetic sample 'held-out-0' was made from 'held-out'; .* 2 cases of the training"
    ):
        PartnerIndex(records(2), records(1, "real-0") + records(1, "held-out"))
    nameless = Record("made", {}, {}, "made", synthetic=True)
    with pytest.raises(ValueError, match="synthetic sample 'made' names no source"):
        PartnerIndex(records(2), [nameless])
