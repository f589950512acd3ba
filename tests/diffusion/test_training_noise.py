import pytest
import torch
from diffusers import DDPMScheduler

from fairdiff_lightning.diffusion import add_noise, build_training_scheduler, denoise, generators, training_target
from fairdiff_lightning.diffusion.schedulers import signal_power

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 100}
TRAINABLE = ["DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "LMSDiscrete"]
TRAINABLE += ["HeunDiscrete", "KDPM2Discrete"]


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_scheduler_trains_with_the_same_noise(name, kind):
    scheduler = build_training_scheduler(f"{name}Scheduler", {**BETAS, "prediction_type": kind})
    clean, noise, steps = torch.rand(3, 2, 5), torch.randn(3, 2, 5), torch.tensor([1, 50, 99])
    reference = DDPMScheduler(**BETAS)
    torch.testing.assert_close(add_noise(scheduler, clean, noise, steps), reference.add_noise(clean, noise, steps))
    target = reference.get_velocity(clean, noise, steps) if kind == "v_prediction" else noise
    torch.testing.assert_close(training_target(scheduler, clean, noise, steps), target)


def test_the_schedule_follows_to_the_device_once():
    scheduler = build_training_scheduler("DDPMScheduler", BETAS)
    steps = torch.tensor([3], device="meta")
    assert signal_power(scheduler, steps).device.type == "meta"
    moved = scheduler.alphas_cumprod
    signal_power(scheduler, steps)
    assert scheduler.alphas_cumprod is moved


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("EDMEulerScheduler", {}),
        ("ScoreSdeVeScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
    ],
)
def test_a_scheduler_of_other_noise_cannot_be_trained_with(name, arguments):
    with pytest.raises(ValueError, match=f"'{name}' cannot be trained with.*Train with DDPMScheduler"):
        build_training_scheduler(name, arguments)


def test_an_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match="'flow_prediction'; expected is epsilon"):
        build_training_scheduler("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"})


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DPMSolverMultistep", "EulerDiscrete"])
def test_denoising_finds_what_a_perfect_prediction_knows(name):
    clean, start = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    arguments = {**BETAS, "num_train_timesteps": 1000, "prediction_type": "sample", "timestep_spacing": "trailing"}
    if name in ("DDPM", "DDIM"):
        arguments["clip_sample"] = False
    sampler = build_training_scheduler(f"{name}Scheduler", arguments)
    seen = []

    def predict(noisy, step):
        seen.append((noisy.shape, step.dim()))
        return clean

    found = denoise(sampler, predict, start, 5, generators(torch.tensor([1, 2])))
    torch.testing.assert_close(found, clean, atol=0.05, rtol=0)
    assert seen == [((2, 3, 4), 0)] * 5
