import pytest
import torch
from tiny_stable_diffusion import SD15_NOISE

from fairdiff_lightning.diffusion import build_scheduler
from fairdiff_lightning.diffusion.guidance import guide
from fairdiff_lightning.diffusion.weighting import min_snr_weights

GAMMA = 5.0
DDIM = {name: value for name, value in SD15_NOISE.items() if name != "skip_prk_steps"}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_clean_sample_s_error_by_the_bounded_ratio_under_every_parametrisation(kind):
    scheduler = build_scheduler("DDPMScheduler", {"prediction_type": kind})
    steps = torch.tensor([0, 10, 250, 600, 999])
    kept = scheduler.alphas_cumprod[steps].double()
    snr = kept / (1 - kept)
    # an error e of the clean sample is an error e * factor of what is predicted
    factor = {"epsilon": snr, "v_prediction": 1 / (1 - kept), "sample": torch.ones(5)}[kind]
    weight_of_clean_sample = min_snr_weights(scheduler, steps, GAMMA).double() * factor
    torch.testing.assert_close(weight_of_clean_sample, snr.clamp(max=GAMMA), rtol=1e-4, atol=1e-6)


def test_min_snr_is_finite_where_no_signal_is_left():
    scheduler = build_scheduler("DDPMScheduler", {"rescale_betas_zero_snr": True})
    assert float(min_snr_weights(scheduler, torch.tensor([999]), GAMMA)) == pytest.approx(1.0)


def test_min_snr_names_an_unknown_prediction_type():
    scheduler = build_scheduler("DDPMScheduler", {"prediction_type": "epsilon"})
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow'; expected is epsilon"):
        min_snr_weights(scheduler, torch.tensor([3]), GAMMA)


def test_guidance_of_scale_one_is_the_conditional_half_and_zero_the_unconditional():
    both = torch.randn(6, 2, 3, 5)
    torch.testing.assert_close(guide(both, 1), both[3:])
    assert torch.equal(guide(both, 0), both[:3])
    torch.testing.assert_close(guide(both, 9), 9 * both[3:] - 8 * both[:3])


@pytest.mark.parametrize(("index", "step"), [("19", 951), ("10", 501), ("0", 1)])
def test_ddim_with_guidance_reproduces_the_reference_step(reference, index, step):
    """cn02; the reference's factors are in float32, which moves its own numbers by up to 3e-7."""
    expected = reference("fairdiff")["cn02_ddim_step"]["expected"][index]
    sampler = build_scheduler("DDIMScheduler", DDIM)
    sampler.set_timesteps(20)
    assert int(sampler.timesteps[19 - int(index)]) == expected["timestep"] == step
    predicted = guide(torch.tensor([[0.25], [0.3]], dtype=torch.float64), 9.0)
    moved = sampler.step(predicted, step, torch.tensor([[0.7]], dtype=torch.float64))
    assert float(moved.prev_sample) == pytest.approx(expected["x_prev"], rel=0, abs=3e-7)
    assert float(moved.pred_original_sample) == pytest.approx(expected["pred_x0"], rel=0, abs=3e-7)


@pytest.mark.parametrize(("index", "step", "x_prev_within"), [("19", 951, 5e-8), ("10", 501, 1e-9), ("0", 1, 1e-9)])
def test_ddim_with_the_reference_s_float32_factors_is_its_step(reference, index, step, x_prev_within):
    """cn02, in its precision: float32 factors of our schedule, float64 latents.

    Its x_prev at step 951 alone is farther off: its root of 1 - alpha_bar at step 901 has another last bit, 6e-8.
    """
    expected = reference("fairdiff")["cn02_ddim_step"]["expected"][index]
    sampler = build_scheduler("DDIMScheduler", DDIM)
    kept, before = sampler.alphas_cumprod[step], sampler.alphas_cumprod[max(step - 50, 0)]
    noise_share = float((1 - kept).sqrt().float())
    kept, before = kept.float(), before.float()
    predicted = guide(torch.tensor([0.25, 0.3], dtype=torch.float64), 9.0)
    clean = (0.7 - noise_share * predicted) / float(kept.sqrt())
    moved = float(before.sqrt()) * clean + float((1 - before).sqrt()) * predicted
    assert float(clean) == pytest.approx(expected["pred_x0"], rel=0, abs=1e-9)
    assert float(moved) == pytest.approx(expected["x_prev"], rel=0, abs=x_prev_within)


def test_the_schedule_is_the_reference_s(reference):
    """cn01."""
    expected = reference("fairdiff")["cn01_schedule"]["expected"]
    sampler = build_scheduler("DDIMScheduler", DDIM)
    kept, close = sampler.alphas_cumprod, {"rel": 0, "abs": 1e-9}
    for step, value in expected["alphas_cumprod"].items():
        assert float(kept[int(step)]) == pytest.approx(value, **close)
    assert sampler.betas[[0, -1]].tolist() == pytest.approx(expected["beta_first_last"], **close)
    sampler.set_timesteps(20)
    steps = sampler.timesteps.flip(0)
    assert steps.tolist() == expected["ddim20_timesteps"]
    assert kept[steps[[0, -1]]].tolist() == pytest.approx(expected["ddim_alpha_first_last"], **close)
    before = [float(sampler.final_alpha_cumprod), float(kept[steps[-2]])]
    assert before == pytest.approx(expected["ddim_alpha_prev_first_last"], **close)
