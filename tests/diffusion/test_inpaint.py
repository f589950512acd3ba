from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from fairdiff_lightning.diffusion.cosine import cosine_betas
from fairdiff_lightning.diffusion.inpaint import inpaint
from fairdiff_lightning.diffusion.lesion_box import group_by_shape, lesion_boxes
from fairdiff_lightning.diffusion.lesion_channels import class_masks, merge_classes
from fairdiff_lightning.diffusion.visits import visit_list

PAPER = {"num_train_timesteps": 300, "trained_betas": cosine_betas(300)}
KEPT = (1 - torch.tensor(cosine_betas(300), dtype=torch.float64)).cumprod(0)
SHORT = {"num_train_timesteps": 20, "trained_betas": cosine_betas(20)}


def grid(a, b):
    return torch.linspace(a, b, 8).view(1, 1, 2, 2, 2)


class OrderedNoise:
    """The reference's draws: the k-th one is 1.2 sin(1.7 k + 0.9 i)."""

    def __init__(self):
        self.count = 0

    def __call__(self, like):
        index = torch.arange(like.numel(), dtype=torch.float64)
        drawn = (1.2 * torch.sin(1.7 * self.count + 0.9 * index)).float().view(like.shape)
        self.count += 1
        return drawn


def stub(noisy, step, condition):
    return noisy * (1 - KEPT[step]).sqrt().float()


def scene(*shape, channels=1):
    """A background, a lesion of another size in each sample, and seeds."""
    background = torch.rand(shape[0], channels, *shape[1:]) * 2 - 1
    mask = torch.zeros(shape[0], 1, *shape[1:], dtype=torch.int64)
    for sample in range(shape[0]):
        mask[sample, 0, 2 : 4 + sample, 1:3] = 1 + sample
    return {"background": background, "mask": mask, "seeds": torch.arange(shape[0]) + 40}


def shrink(noisy, step, condition):
    """A prediction that looks at its neighbours, so that a wrong place would show."""
    return 0.4 * noisy + 0.3 * noisy.roll(1, -1) + 0.01 * step / 20


@pytest.mark.parametrize("jumps", [1, 2, 5])
def test_the_chain_is_that_of_the_authors_code(reference, jumps):
    block = reference("lefusion")["full_loop_ordered_noise"]
    expected = block["runs"][f"T300_L{jumps}_n{jumps}"]
    lidc, emidec = (torch.tensor(block[name]).view(1, 1, 2, 2, 2) for name in ("mask", "label"))
    start = torch.cat([grid(-1.5, 1.5), torch.tensor(block["init_ch1"]).view(1, 1, 2, 2, 2)], 1)
    masks = class_masks(emidec.long(), (3, 4))
    cases = {"lidc": (grid(0.8, -0.8), lidc, start[:, :1]), "emidec": (grid(0.8, -0.8).expand_as(start), None, start)}
    for name, (background, mask, begin) in cases.items():
        noise = OrderedNoise()
        found = inpaint(
            stub,
            background=background,
            mask=masks.any(1, keepdim=True) if mask is None else mask,
            scheduler=DDPMScheduler(**PAPER),
            num_steps=300,
            jump_length=jumps,
            jump_n_sample=jumps,
            compose="before",
            final_composite=False,
            noise=noise,
            start=begin,
        )
        if name == "emidec":
            found = merge_classes(found, masks, found[:, :1])
        torch.testing.assert_close(found.flatten(), torch.tensor(expected[name]), rtol=0, atol=2e-6)
        assert noise.count == expected["number_of_gaussian_draws"]


def test_without_the_last_composition_the_background_is_noisy(reference):
    expected = reference("lefusion")["final_step_background_residual_std"]
    background = torch.zeros(1, 1, 40, 50, 30)
    mask = torch.zeros_like(background)
    mask[..., 0, 0, 0] = 1
    found = inpaint(
        lambda noisy, step, condition: torch.zeros_like(noisy),
        background=background,
        mask=mask,
        scheduler=DDPMScheduler(**PAPER),
        visit_list=visit_list(300),
        seeds=torch.tensor([1]),
        clip=None,
        final_composite=False,
    )
    spread = found[mask == 0].std().item()
    assert spread == pytest.approx(expected["value_in_normalised_units_if_bg_eps_pred_is_0"], rel=0.02)
    assert spread * 700 == pytest.approx(expected["in_HU(x700)"], rel=0.02)


@pytest.mark.parametrize("compose", ["before", "after"])
@pytest.mark.parametrize("roi", ["volume", "lesion"])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**SHORT),
        DDIMScheduler(**SHORT),
        DPMSolverMultistepScheduler(**SHORT),
        UniPCMultistepScheduler(**SHORT),
    ],
    ids=["ddpm", "ddim", "dpm", "unipc"],
)
def test_outside_of_the_lesion_every_bit_is_the_background(compose, roi, scheduler):
    given = scene(2, 9, 8, 5, channels=2)
    found = inpaint(
        shrink, **given, scheduler=scheduler, num_steps=6, jump_length=2, jump_n_sample=2, compose=compose, roi=roi,
        context=1, stride=2,
    )  # fmt: skip
    outside = (given["mask"] == 0).expand_as(found)
    assert torch.equal(found[outside], given["background"][outside])
    assert (found[~outside] != given["background"][~outside]).all()
    assert found.isfinite().all()
    assert found[~outside].abs().max() < 3


@pytest.mark.parametrize("shape", [(3, 12), (3, 9, 7), (3, 9, 7, 4), (3, 6, 5, 4, 3)])
def test_any_number_of_spatial_axes(shape):
    background = torch.rand(shape[0], 2, *shape[1:])
    mask = (torch.rand(shape[0], 2, *shape[1:]) > 0.5).double()
    found = inpaint(shrink, background=background, mask=mask, scheduler=DDPMScheduler(**SHORT), num_steps=4)
    assert torch.equal(found == background, mask == 0)


@pytest.mark.parametrize("roi", ["volume", "lesion"])
@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(**SHORT), DPMSolverMultistepScheduler(**SHORT, algorithm_type="sde-dpmsolver++")],
    ids=["ddpm", "sde"],
)
def test_a_sample_depends_on_its_own_seed_alone(roi, scheduler):
    given, condition = scene(3, 9, 8, 5), torch.rand(3, 4)

    def network(noisy, step, condition):
        return shrink(noisy, step, condition) * condition.sum(1).view(-1, 1, 1, 1, 1)

    def paint(samples):
        chosen = {name: part[samples] for name, part in given.items()}
        return inpaint(
            network, **chosen, condition=condition[samples], scheduler=scheduler, num_steps=5, jump_length=2,
            jump_n_sample=2, roi=roi, context=1, stride=2,
        )  # fmt: skip

    together = paint([0, 1, 2])
    for samples in ([0], [2, 1]):
        assert torch.equal(paint(samples), together[samples])
    given["seeds"] = given["seeds"] + torch.tensor([0, 1, 0])
    again = paint([0, 1, 2])
    assert torch.equal(again[0], together[0])
    assert not torch.equal(again[1], together[1])


def test_generators_elsewhere_do_not_matter():
    given = scene(2, 9, 8, 5)
    torch.manual_seed(1)
    first = inpaint(shrink, **given, scheduler=DDPMScheduler(**SHORT), num_steps=5)
    torch.manual_seed(2)
    assert torch.equal(first, inpaint(shrink, **given, scheduler=DDPMScheduler(**SHORT), num_steps=5))


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_perfect_network_paints_what_it_knows(scheduler):
    """Of one possible volume, the noise is known exactly; every sampler must lead there, with jumps or without."""
    truth = torch.rand(1, 1, 5, 4, 3) * 1.8 - 0.9
    mask = torch.zeros_like(truth)
    mask[..., 1:3, 1:, :2] = 1

    def network(noisy, step, condition):
        kept = KEPT[step]
        return ((noisy - kept.sqrt() * truth) / (1 - kept).sqrt()).float()

    for jumps in ({}, {"jump_length": 3, "jump_n_sample": 3}):
        found = inpaint(
            network, background=truth * (1 - mask), mask=mask, scheduler=scheduler(**PAPER), num_steps=12, **jumps
        )
        torch.testing.assert_close(found, truth, rtol=0, atol=2e-3)


@pytest.mark.parametrize("compose", ["before", "after"])
def test_the_network_sees_the_background_at_the_level_of_the_step(compose):
    seen = []

    def network(noisy, step, condition):
        seen.append((int(step), noisy.flatten()[1:].mean().item(), noisy.flatten()[1:].var().item()))
        return torch.zeros_like(noisy)

    background = torch.full((1, 1, 40, 30, 20), 0.7)
    mask = torch.zeros_like(background)
    mask[0, 0, 0, 0, 0] = 1
    inpaint(
        network, background=background, mask=mask, scheduler=DDIMScheduler(**PAPER), num_steps=10, jump_length=2,
        jump_n_sample=2, compose=compose, seeds=torch.tensor([5]),
    )  # fmt: skip
    steps = [30 * level for level, then in pairwise(visit_list(10, 2, 2)) if then < level]
    assert [step for step, _, _ in seen] == steps
    for step, mean, var in seen[1:]:
        assert mean == pytest.approx(0.7 * KEPT[step].sqrt().item(), abs=0.03)
        assert var == pytest.approx(1 - KEPT[step].item(), rel=0.05)


def test_a_lesions_box_shows_no_more_than_its_context():
    given, shapes = scene(3, 24, 16, 7), []

    def network(noisy, step, condition):
        shapes.append(tuple(noisy.shape))
        return shrink(noisy, step, condition)

    inpaint(
        network,
        **given,
        scheduler=DDPMScheduler(**SHORT),
        num_steps=2,
        roi="lesion",
        context=(3, 2, 0),
        stride=(4, 4, 1),
    )
    assert sorted(set(shapes)) == [(1, 1, 12, 8, 7), (2, 1, 8, 8, 7)]


@pytest.mark.parametrize("scheduler", [DDPMScheduler(**SHORT), DPMSolverMultistepScheduler(**SHORT)])
def test_context_up_to_the_borders_is_the_volume(scheduler):
    given = scene(3, 9, 8, 5, channels=2) | {"scheduler": scheduler, "num_steps": 5}
    given |= {"jump_length": 2, "jump_n_sample": 2, "stride": 4}
    whole = inpaint(shrink, **given)
    assert torch.equal(inpaint(shrink, **given, roi="lesion", context=(9, 8, 5)), whole)
    outside = (given["mask"] == 0).expand_as(whole)
    for context in (0, 1, (3, 0, 2)):
        found = inpaint(shrink, **given, roi="lesion", context=context)
        assert found.shape == whole.shape
        assert torch.equal(found[outside], given["background"][outside])
        assert not torch.equal(found, whole)


def test_boxes_hold_the_lesion_with_its_context():
    lesion = torch.zeros(2, 20, 16, 9, dtype=torch.bool)
    lesion[0, 9:11, 15, 4] = lesion[1, 0, 3:6, 8] = True
    boxes = lesion_boxes(lesion, context=2, stride=(4, 8, 1))
    assert boxes == [(slice(4, 16), slice(8, 16), slice(2, 7)), (slice(0, 4), slice(0, 8), slice(6, 9))]
    assert group_by_shape([*boxes, boxes[0]]) == [[0, 2], [1]]
    with pytest.raises(ValueError, match=r"stride=0; expected is one whole number of at least 1, or 3"):
        lesion_boxes(lesion, 2, 0)
    with pytest.raises(ValueError, match=r"context=.*or 3, one for each axis"):
        lesion_boxes(lesion, (1, 2), 1)


def test_classes_merge_without_seams():
    label = torch.randint(0, 5, (3, 1, 6, 5, 4))
    volumes, background = torch.rand(3, 2, 6, 5, 4), torch.rand(3, 1, 6, 5, 4)
    merged = merge_classes(volumes, class_masks(label, (3, 4)), background)
    expected = torch.where(label == 3, volumes[:, :1], torch.where(label == 4, volumes[:, 1:], background))
    assert torch.equal(merged, expected)


def test_half_precision_backgrounds_keep_their_bits():
    given = scene(2, 9, 8, 5)
    given["background"] = given["background"].bfloat16()
    found = inpaint(shrink, **given, scheduler=DDPMScheduler(**SHORT), num_steps=4)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[given["mask"] == 0], given["background"][given["mask"] == 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.zeros(2, 1, 9, 8, 5)}, "the mask of sample 0, 1 is empty"),
        ({"mask": torch.ones(2, 1, 9, 8, 4)}, r"mask has shape \(2, 1, 9, 8, 4\) and background \(2, 1, 9, 8, 5\)"),
        ({"mask": torch.ones(2, 3, 9, 8, 5)}, "or one channel in the mask"),
        ({"mask": torch.ones(2, 9, 8, 5)}, r"mask has shape \(2, 9, 8, 5\)"),
        ({"background": torch.ones(2, 1, 9, 8, 5, dtype=torch.int16)}, "background is torch.int16"),
        ({"jump_length": 2}, "jump_length=2 has no effect with jump_n_sample=1"),
        ({"jump_length": 9, "jump_n_sample": 2}, "has no effect on 4 steps"),
        ({"jump_n_sample": 9, "max_visits": 40}, "visit 53 noise levels, more than max_visits=40"),
        ({"visit_list": [3, 2, 1, 0, -1]}, "visit_list is given beside num_steps"),
        ({"num_steps": None}, "neither visit_list nor num_steps"),
        ({"num_steps": None, "visit_list": [3, 2, 0, -1]}, "goes from 2 to 0"),
        ({"compose": "during"}, "compose='during'; expected is before or after"),
        ({"roi": "organ"}, "roi='organ'"),
        ({"noise": torch.randn_like}, "seeds and noise are both given"),
        ({"seeds": torch.tensor([1])}, "seeds is for 1 samples and background has 2"),
        ({"condition": torch.ones(3, 4)}, "condition is for 3 samples"),
        ({"start": torch.ones(2, 1, 9, 8, 4)}, "start has shape"),
        ({"eta": 0.5}, "DDPMScheduler has none"),
        ({"context": -1}, "context=-1; expected is one whole number of at least 0, or 3, one for each axis"),
        ({"context": (2, 2.5, 2), "roi": "lesion"}, r"context=\(2, 2.5, 2\); expected is one whole number"),
    ],
)
def test_what_cannot_be_painted_is_refused(changes, message):
    arguments = scene(2, 9, 8, 5) | {"scheduler": DDPMScheduler(**SHORT), "num_steps": 4} | changes
    with pytest.raises(ValueError, match=message):
        inpaint(shrink, **arguments)
