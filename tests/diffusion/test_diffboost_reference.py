"""Numbers of DiffBoost's own code that diffusers' parts must meet."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from tiny_stable_diffusion import SD15_NOISE, SD15_UNET

from fairdiff_lightning.diffusion import build_scheduler, build_training_scheduler
from fairdiff_lightning.diffusion.guidance import guide
from fairdiff_lightning.networks.controlnet import HINT_WIDTHS, build_controlnet

SAMPLER = "DDIMScheduler"


@pytest.fixture
def ddim():
    """As the generator makes it: along the schedule of Stable Diffusion's folder."""
    followed = SimpleNamespace(config={"clip_sample": False, **SD15_NOISE})
    training, sampler = (
        build_training_scheduler("DDPMScheduler", None, followed),
        build_scheduler(SAMPLER, None, followed),
    )
    assert torch.equal(training.alphas_cumprod, sampler.alphas_cumprod)
    sampler.set_timesteps(20)
    return sampler


def test_the_noise_schedule_is_stable_diffusions(reference, ddim):
    expected = reference("diffboost")["noise_schedule"]
    assert expected["betas_formula"].startswith("linspace(sqrt(.00085),sqrt(.012),1000)^2")
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=ddim.betas.dtype)
    torch.testing.assert_close(ddim.betas, roots**2, atol=1e-9, rtol=1e-6)
    for k in (0, 999):
        assert float(ddim.betas[k]) == pytest.approx(expected[f"beta[{k}]"], rel=1e-5)
    for k in (0, 500, 999):
        assert float(ddim.alphas_cumprod[k]) == pytest.approx(expected[f"alpha_bar[{k}]"], rel=1e-5)


def test_twenty_steps_are_the_references(reference, ddim):
    expected = reference("diffboost")["noise_schedule"]
    steps = ddim.timesteps.flip(0)
    assert steps.tolist() == expected["ddim20_timesteps"]
    kept = ddim.alphas_cumprod[steps]
    before = torch.cat([ddim.final_alpha_cumprod.view(1), kept[:-1]])
    assert kept[:3].tolist() == pytest.approx(expected["ddim_alpha_first3"], rel=1e-6)
    assert float(kept[-1]) == pytest.approx(expected["ddim_alpha_last"], rel=1e-4)
    assert before[:3].tolist() == pytest.approx(expected["ddim_alpha_prev_first3"], rel=1e-6)


@pytest.mark.parametrize(("step", "name"), [(951, "t=951->901"), (501, "t=501->451"), (1, "t=1->final(alpha_bar[0])")])
def test_a_step_is_the_references(reference, ddim, step, name):
    expected = reference("diffboost")["ddim_single_step_formula"]
    noisy = torch.ones(1, 1, 1, 1)
    predicted = guide(torch.tensor([0.2, 0.3]).view(2, 1, 1, 1), scale=9)
    assert float(predicted) == pytest.approx(expected["x=1,eps_uncond=0.2,eps_cond=0.3,scale=9 -> eps"])
    assert float(ddim.step(predicted, step, noisy).prev_sample) == pytest.approx(expected[name], abs=1e-6)


def test_the_sampler_adds_no_noise_on_its_way(reference, ddim):
    """A step draws nothing and ends where its equation says: sigma is 0 at all of the twenty."""
    assert reference("diffboost")["noise_schedule"]["sigma_sum"] == 0
    noisy, predicted = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)
    for step in ddim.timesteps.tolist():
        kept, before = ddim.alphas_cumprod[step], ddim.alphas_cumprod[max(step - 50, 0)]
        clean = (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
        found = ddim.step(predicted, step, noisy).prev_sample
        torch.testing.assert_close(found, before.sqrt() * clean + (1 - before).sqrt() * predicted)


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels)
        return unet, vae, build_controlnet(None, unet, 8, 3)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_networks_have_the_references_sizes(reference, full_size):
    """On the meta device."""
    expected, (unet, vae, controlnet) = reference("diffboost")["model_sizes"], full_size
    assert isinstance(controlnet, ControlNetModel)
    assert [count(controlnet), count(unet), count(vae)] == [expected[k] for k in ("controlnet", "unet", "vae")]
    silent = [*(block.out_channels for block in controlnet.controlnet_down_blocks)]
    silent.append(f"mid {controlnet.controlnet_mid_block.out_channels}")
    assert silent == expected["controlnet_zero_conv_channels"]
    assert controlnet.controlnet_cond_embedding.conv_in.out_channels == HINT_WIDTHS[0]
    assert count(controlnet.controlnet_cond_embedding) == expected["controlnet_hint_encoder_params"]


def test_times_are_embedded_alike(reference, full_size):
    """The reference's numbers are of step 951, the first that is sampled."""
    expected = reference("diffboost")["timestep_embedding"]
    for network in (full_size[0], full_size[2]):
        found = network.time_proj(torch.tensor([951]))[0]
        assert found.shape == (320,)
        assert found[:3].tolist() == pytest.approx(expected["first3"], abs=1e-5)
        assert found[160:163].tolist() == pytest.approx(expected["idx160_3"], abs=1e-5)
