import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.diffusion import build_scheduler, gaussian, generators, timesteps, training_target


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=5, unique=True), st.randoms())
def test_noise_belongs_to_its_seed_whatever_the_batch(seeds, shuffler):
    order = list(range(len(seeds)))
    shuffler.shuffle(order)
    together, apart = generators(torch.tensor(seeds)), generators(torch.tensor([seeds[i] for i in order]))
    for _ in range(2):  # two draws in a row
        first = gaussian(torch.empty(len(seeds), 3, 2), together)
        second = gaussian(torch.empty(len(seeds), 3, 2), apart)
        assert torch.equal(first[order], second)
    assert torch.equal(timesteps(first, 1000, together)[order], timesteps(second, 1000, apart))


def test_noise_is_standard_normal_and_steps_are_uniform():
    random = generators(torch.arange(200))
    noise = gaussian(torch.empty(200, 50), random)
    assert float(noise.mean().abs()) < 0.03
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    steps = timesteps(noise, 4, random)
    assert steps.dtype == torch.int64
    assert torch.bincount(steps, minlength=4).min() > 25
    assert set(timesteps(noise, 4).tolist()) == {0, 1, 2, 3}


def test_a_sampling_scheduler_follows_the_training_noise():
    training = build_scheduler("DDPMScheduler", {"beta_end": 0.01, "prediction_type": "v_prediction"})
    sampling = build_scheduler("DPMSolverMultistepScheduler", {"solver_order": 3}, like=training)
    assert torch.allclose(sampling.alphas_cumprod, training.alphas_cumprod)
    assert (sampling.config.prediction_type, sampling.config.solver_order) == ("v_prediction", 3)


def test_unknown_schedulers_and_arguments_are_named():
    with pytest.raises(ValueError, match=r"scheduler 'DDPM' is not known; .*DDIMScheduler"):
        build_scheduler("DDPM")
    with pytest.raises(ValueError, match=r"DDIMScheduler takes no argument \['steps'\]; it takes .*beta_start"):
        build_scheduler("DDIMScheduler", {"steps": 3})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_recovers_the_clean_sample(kind):
    scheduler = build_scheduler("DDIMScheduler", {"prediction_type": kind, "clip_sample": False})
    clean, noise, steps = torch.rand(3, 2, 5), torch.randn(3, 2, 5), torch.tensor([7, 700, 340])
    noisy, target = scheduler.add_noise(clean, noise, steps), training_target(scheduler, clean, noise, steps)
    scheduler.set_timesteps(1000)
    for i, step in enumerate(steps):
        found = scheduler.step(target[i], int(step), noisy[i]).pred_original_sample
        torch.testing.assert_close(found, clean[i], atol=1e-3, rtol=1e-3)
