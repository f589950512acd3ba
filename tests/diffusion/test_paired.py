from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddim

from fairdiff_lightning.diffusion import clean_estimate, generators, paired, sample_guide, sample_guided, sample_pairs
from fairdiff_lightning.diffusion.paired import guide_transform

PAPER = {"num_train_timesteps": 1024, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
COVARIANCE = torch.tensor([[0.25, 0.2], [0.2, 0.25]], dtype=torch.float64)  # correlation 0.8


def wave(shape, phase, amplitude=1.0):
    """The inputs of the reference: amplitude * sin(0.7 i + phase)."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (amplitude * torch.sin(0.7 * index + phase)).float().view(shape)


def ddim(num_train=1024, **changes):
    return DDIMScheduler(**{**PAPER, "num_train_timesteps": num_train, "clip_sample": False, **changes})


def linear_guider(x, y, t):
    return 0.9 * x + 0.05 * y + 0.02 * t / 1024


def linear_target(y, guide, t):
    return 0.85 * y - 0.1 * guide + 0.03 * t / 1024


def start():
    return {"x": wave((2, 1, 8, 8), 0.5, 1.2), "y": wave((2, 1, 8, 8), 1.7, 1.1)}


def relative_binary(clean):
    """The reference's guide: smoothed over 5 x 5, cut at three quarters of each sample's range."""
    smooth = torch.nn.functional.avg_pool2d(clean.clamp(-1, 1), 5, 1, 2, count_include_pad=False)
    cut = 0.75 * smooth.amax((1, 2, 3), keepdim=True) + 0.25 * smooth.amin((1, 2, 3), keepdim=True)
    return torch.where(smooth > cut, 1.0, -1.0)


@pytest.mark.parametrize(
    ("name", "num_train", "num_steps", "guide"),
    [
        ("linear_nets_T8_all_steps_raw_guide", 8, 8, "raw"),
        ("linear_nets_T8_all_steps_binary_guide", 8, 8, relative_binary),
        ("linear_nets_T1024_S=4_raw_guide", 1024, 4, "raw"),
        ("linear_nets_T1024_S=4_binary_guide", 1024, 4, relative_binary),
        ("linear_nets_T1024_S=256_binary_guide", 1024, 256, relative_binary),
    ],
)
def test_linear_networks_lead_where_the_papers_code_leads(reference, name, num_train, num_steps, guide):
    expected, firsts = reference("pig")["joint_sampler"][name], []
    x0, y0 = sample_pairs(
        linear_guider,
        linear_target,
        **start(),
        scheduler=ddim(num_train),
        num_steps=num_steps,
        guide=guide,
        watch=lambda t, x, y, x0, y0: firsts.append((x0, y0)),
    )
    close = {"rel": 1e-5, "abs": 1e-6} if num_train == 8 else {"rel": 2e-4, "abs": 1e-5}
    assert x0[0].flatten()[:4].tolist() == pytest.approx(expected["x_end_item0"], **close)
    assert y0[0].flatten()[:4].tolist() == pytest.approx(expected["y_end_item0"], **close)
    assert float(x0.abs().sum()) == pytest.approx(expected["x_end_abs_sum"], **close)
    assert float(y0.abs().sum()) == pytest.approx(expected["y_end_abs_sum"], **close)
    first_x0, first_y0 = firsts[0]
    assert first_x0[0].flatten()[:4].tolist() == pytest.approx(expected["x0_first_item0"], **close)
    assert first_y0[0].flatten()[:4].tolist() == pytest.approx(expected["y0_first_item0"], **close)
    assert len(firsts) == expected["lens_[xts,yts,x0s,y0s]"][-1]


def test_one_step_and_the_last_one_are_the_papers(reference):
    blocks = reference("pig")["joint_sampler"]
    noises, seen = [wave((2, 1, 8, 8), *drawn).double() for drawn in ((2.2, 0.9), (3.3, 0.7))], {}
    sample_pairs(
        lambda x, y, t: noises[0],
        lambda y, guide, t: noises[1],
        **_at(304, *noises),
        scheduler=ddim(),
        num_steps=256,
        watch=lambda t, *found: seen.update({int(t): [part[0].flatten()[:4].tolist() for part in found]}),
    )
    single, both = blocks["fixed_nets_single_step_304_to_300"], blocks["fixed_nets_t_list=[300,304]"]
    close = {"rel": 1e-5, "abs": 1e-6}
    assert seen[300][0] == pytest.approx(single["x_next_item0"], **close)
    assert seen[300][1] == pytest.approx(single["y_next_item0"], **close)
    assert seen[304][2] == pytest.approx(single["x0_item0"], **close)
    assert seen[304][3] == pytest.approx(single["y0_item0"], **close)
    assert seen[300][2] == pytest.approx(both["x_end_item0"], **close)
    assert seen[300][3] == pytest.approx(both["y_end_item0"], **close)


def _at(step, noise_x, noise_y):
    """Starts, in doubles, from which chains of constant noise come by the reference's states at a step."""
    kept = ddim().alphas_cumprod.double()

    def back(state, noise):
        clean = (state - (1 - kept[step]).sqrt() * noise) / kept[step].sqrt()
        return kept[1020].sqrt() * clean + (1 - kept[1020]).sqrt() * noise

    return {"x": back(start()["x"], noise_x), "y": back(start()["y"], noise_y)}


def gaussian_networks(kept):
    """The best predictors of both noises for a jointly Gaussian pair; the target sees the estimate of x, not x_t."""

    def weights(t):
        a = kept[t.long()].double()
        return a.sqrt(), (1 - a).sqrt(), torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2, dtype=torch.float64))

    def guider(x, y, t):
        _, spread, precision = weights(t)
        return spread * (precision[0, 0] * x + precision[0, 1] * y)

    def target(y, guide, t):
        signal, spread, precision = weights(t)
        own, other = (1 - spread**2 * precision[0, 0]) / signal, -(spread**2) * precision[0, 1] / signal
        x = (guide - other * y) / own  # the guide is own * x_t + other * y_t
        return spread * (precision[1, 0] * x + precision[1, 1] * y)

    return guider, target


def sampled_covariance(scheduler, num_steps, **arguments):
    """Exact: the way from noise to pairs is linear, so two unit vectors tell all of it."""
    unit = torch.eye(2, dtype=torch.float64)
    networks = gaussian_networks(scheduler.alphas_cumprod)
    x0, y0 = sample_pairs(
        *networks, x=unit[:, :1], y=unit[:, 1:], scheduler=scheduler, num_steps=num_steps, **arguments
    )
    way = torch.cat([x0, y0], 1).T
    return way @ way.T


def error(covariance):
    return float((covariance - COVARIANCE).norm() / COVARIANCE.norm())


def correlation(covariance):
    return float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())


def test_gaussian_pairs_have_the_covariance_of_their_networks():
    assert correlation(sampled_covariance(ddim(), 256)) == pytest.approx(0.8051, abs=2e-4)  # as the paper's sampler
    assert correlation(sampled_covariance(ddim(), 1024)) == pytest.approx(0.8015, abs=3e-4)
    errors = [error(sampled_covariance(ddim(), steps)) for steps in (16, 64, 256, 1024)]
    assert all(later < 0.3 * earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(**PAPER, use_lu_lambdas=True),
        DPMSolverMultistepScheduler(**PAPER, solver_order=3, timestep_spacing="trailing"),
        UniPCMultistepScheduler(**PAPER, timestep_spacing="trailing"),
    ],
    ids=["second order", "third order", "unipc"],
)
def test_multi_step_solvers_keep_a_history_for_each_variable(scheduler):
    """With one history for both, these errors are above a half."""
    assert error(sampled_covariance(scheduler, 64)) < 0.02
    assert error(sampled_covariance(scheduler, 64, order="y_first")) < 0.02


def test_thirty_two_steps_of_the_best_solver_reach_two_hundred_and_fifty_six_of_ddim():
    best = DPMSolverMultistepScheduler(**PAPER, use_lu_lambdas=True)
    assert error(sampled_covariance(best, 32)) <= error(sampled_covariance(ddim(), 256))


def test_velocity_and_clean_predictions_lead_to_the_same_pairs():
    expected = sampled_covariance(ddim(), 16)
    for kind in ("v_prediction", "sample"):
        scheduler = ddim(prediction_type=kind)
        guider, target = gaussian_networks(scheduler.alphas_cumprod)

        def converted(network, scheduler=scheduler, kind=kind):
            def predict(noisy, other, t):
                kept = scheduler.alphas_cumprod[t].double()
                noise = network(noisy, other, t)
                clean = (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()
                return clean if kind == "sample" else kept.sqrt() * noise - (1 - kept).sqrt() * clean

            return predict

        unit = torch.eye(2, dtype=torch.float64)
        x0, y0 = sample_pairs(
            converted(guider), converted(target), x=unit[:, :1], y=unit[:, 1:], scheduler=scheduler, num_steps=16
        )
        way = torch.cat([x0, y0], 1).T
        torch.testing.assert_close(way @ way.T, expected, rtol=1e-4, atol=1e-5)


def test_y_first_swaps_the_variables():
    x, y = start().values()
    common = {"scheduler": ddim(), "num_steps": 8}
    x0, y0 = sample_pairs(linear_guider, linear_target, x=x, y=y, **common)
    swapped = sample_pairs(linear_guider, linear_target, x=y, y=x, order="y_first", **common)
    assert torch.equal(swapped[0], y0)
    assert torch.equal(swapped[1], x0)


def test_a_given_guide_needs_no_guider():
    guide, y = wave((2, 1, 4, 6), 0.1), wave((2, 1, 4, 6), 1.1)
    alone = sample_guided(linear_target, guide=guide, y=y, scheduler=ddim(), num_steps=16)
    _, expected = sample_pairs(
        linear_guider, linear_target, x=guide, y=y, scheduler=ddim(), num_steps=16, guide=lambda clean: guide
    )
    assert torch.equal(alone, expected)


def test_a_given_guide_draws_the_target_of_its_distribution():
    """Given x, y is normal with mean 0.8 x and variance 0.09: the way is linear, so two starts tell both exactly."""
    kept, unit = ddim().alphas_cumprod.double(), torch.eye(2, dtype=torch.float64)

    def target(y, guide, t):
        return (1 - kept[t]).sqrt() * (y - kept[t].sqrt() * 0.8 * guide) / (0.09 * kept[t] + 1 - kept[t])

    starts = {"guide": unit[:, :1], "y": unit[:, 1:]}
    errors = []
    for steps in (64, 256, 1024):
        mean, deviation = sample_guided(target, **starts, scheduler=ddim(), num_steps=steps)[:, 0].tolist()
        errors.append(max(abs(mean - 0.8), abs(deviation - 0.3)))
    assert errors[-1] < 2e-3
    assert all(later < 0.3 * earlier for earlier, later in pairwise(errors))


def moments_given_partner(kept, eta):
    """Mean for a partner of 1, and variance, after steps of DDIM (Song et al. 2021, equation 12), estimates exact."""
    mean, variance = 0.0, 1.0
    for now, before in pairwise([*kept, 1.0]):
        joint = now * COVARIANCE + (1 - now) * torch.eye(2, dtype=torch.float64)
        own, other = (now**0.5 * torch.linalg.solve(joint, COVARIANCE[0])).tolist()  # of x_t, y_t in E[x0 | x_t, y_t]
        fresh = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
        kept_noise = ((1 - before - fresh) / (1 - now)) ** 0.5
        share = before**0.5 - kept_noise * now**0.5  # of the estimate in the next state
        mean = (kept_noise + share * own) * mean + share * other * now**0.5
        variance = (kept_noise + share * own) ** 2 * variance + (share * other) ** 2 * (1 - now) + fresh
    return mean, variance


def sampled_moments(monkeypatch, num_steps, eta):
    """Exact: each draw of noise is a one in a sample of its own, so the squares of the samples sum to the variance."""
    count = 2 * num_steps + 2
    units = iter(torch.eye(count, dtype=torch.float64)[..., None])
    monkeypatch.setattr(paired, "gaussian", lambda *_: next(units))
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *_, **__: next(units))
    guider, _ = gaussian_networks(ddim().alphas_cumprod)
    start, y0 = next(units), torch.zeros(count, 1, dtype=torch.float64)
    y0[-1] = 1
    found = sample_guide(guider, x=start, y0=y0, scheduler=ddim(), num_steps=num_steps, eta=eta)
    return float(found[-1]), float(found[:-1].square().sum())


@pytest.mark.parametrize("num_steps", [16, 64, 256])
def test_a_given_partner_draws_the_guide_after_it(monkeypatch, num_steps):
    """Less closely than by regression (0.8 and 0.09), and noise on the way helps, as the docstring says."""
    kept = ddim().alphas_cumprod.double()[:: 1024 // num_steps].flip(0).tolist()
    plain, noisy = (sampled_moments(monkeypatch, num_steps, eta) for eta in (0.0, 1.0))
    assert plain == pytest.approx(moments_given_partner(kept, 0.0), rel=1e-5)
    assert noisy == pytest.approx(moments_given_partner(kept, 1.0), rel=1e-5)
    assert 0.3 < plain[0] < noisy[0] < 0.8
    assert abs(noisy[1] - 0.09) < abs(plain[1] - 0.09)


def test_a_pair_depends_on_its_own_seed_alone():
    seeds = torch.tensor([5, 6, 7])

    def draw(chosen):
        x, y = (wave((3, 1, 4, 4), p)[chosen] for p in (0.3, 2.0))
        arguments = {"scheduler": ddim(), "num_steps": 8, "eta": 1.0, "generator": generators(seeds[chosen])}
        return sample_pairs(linear_guider, linear_target, x=x, y=y, **arguments)

    together = draw([0, 1, 2])
    for k in range(3):
        for whole, alone in zip(together, draw([k]), strict=True):
            torch.testing.assert_close(alone[0], whole[k])
    assert not torch.equal(together[0], draw([1, 0, 2])[0])


def test_full_noise_of_ddim_is_ancestral_sampling():
    x, y = start().values()
    arguments = {"x": x, "y": y, "num_steps": 1024}
    ancestral = DDPMScheduler(**PAPER, clip_sample=False)
    one, other = (
        sample_pairs(linear_guider, linear_target, **arguments, **given, generator=generators(torch.arange(2)))
        for given in ({"scheduler": ddim(), "eta": 1.0}, {"scheduler": ancestral})
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_guides_keep_clean_masks_apart():
    clean = torch.tensor([-300.0, -1.0, -0.2, 0.0, 0.3, 1.0, 200.0])
    assert torch.equal(guide_transform("raw")(clean), clean)
    assert guide_transform("clamped")(clean).tolist() == pytest.approx([-1, -1, -0.2, 0, 0.3, 1, 1])
    assert guide_transform("binary")(clean).tolist() == [-1, -1, -1, -1, 1, 1, 1]
    soft = guide_transform("soft")(clean)
    assert (soft.diff() > 0).all()
    assert soft.abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guide": "hard"}, "guide 'hard'; expected is raw, clamped, binary, soft"),
        ({"order": "z_first"}, "order 'z_first'; expected is x_first or y_first"),
        ({"eta": 0.5, "scheduler": DDPMScheduler()}, "eta=0.5: DDPMScheduler has none; take DDIMScheduler"),
        ({"scheduler": EulerDiscreteScheduler()}, "EulerDiscreteScheduler samples between training steps"),
        (
            {
                "scheduler": DPMSolverMultistepScheduler(100, use_lu_lambdas=True, rescale_betas_zero_snr=True),
                "num_steps": 20,
            },
            "20 steps of DPMSolverMultistepScheduler begin twice at step 99 of 100",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_pairs(linear_guider, linear_target, **{**start(), "scheduler": ddim(), "num_steps": 3, **arguments})


def test_clean_estimates_undo_noise():
    clean, noise, steps = wave((2, 3), 0.2), wave((2, 3), 1.0), torch.tensor([10, 900])
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(**PAPER, prediction_type=kind)
        noisy = scheduler.add_noise(clean, noise, steps)
        said = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, steps)}[kind]
        torch.testing.assert_close(clean_estimate(scheduler, said, noisy, steps), clean, rtol=1e-3, atol=1e-3)


def test_a_partner_is_noised_along_schedulers_with_steps_of_any_type():
    scheduler = EulerDiscreteScheduler(**PAPER, timestep_spacing="trailing")
    x, y = start().values()
    assert sample_guide(linear_guider, x=x, y0=y, scheduler=scheduler, num_steps=4).isfinite().all()
