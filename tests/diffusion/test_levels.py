import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from fairdiff_lightning.diffusion.cosine import cosine_betas
from fairdiff_lightning.diffusion.levels import noise_levels

CPU = torch.device("cpu")
PAPER = {"num_train_timesteps": 300, "trained_betas": cosine_betas(300)}


def grid(a, b):
    """The reference's inputs: eight equal steps from a to b."""
    return torch.linspace(a, b, 8).view(1, 1, 2, 2, 2)


def close(found, expected):
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.fixture
def papers():
    return noise_levels(DDPMScheduler(**PAPER), 300, 0.0, CPU)


def test_levels_are_the_training_steps(papers, reference):
    expected = reference("lefusion")["cosine_schedule_T300_s0.008"]
    assert papers.steps.tolist() == list(range(300))
    assert [papers.kept(t) for t in expected["idx"]] == pytest.approx(expected["alphas_cumprod"], rel=1e-7)
    assert [papers.kept(t - 1) for t in expected["idx"]] == pytest.approx(expected["alphas_cumprod_prev"], rel=1e-7)


def test_factors_are_those_of_the_authors_code(papers, reference):
    expected, one = reference("lefusion")["cosine_schedule_T300_s0.008"], torch.ones(1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    for i, t in enumerate(expected["idx"]):
        found = {
            "sqrt_alphas_cumprod": papers.diffuse(one, t, zero),
            "sqrt_one_minus_alphas_cumprod": papers.diffuse(zero, t, one),
            "sqrt_recip_alphas_cumprod": papers.clean(zero, one, t),
            "sqrt_recipm1_alphas_cumprod": -papers.clean(one, zero, t),
            "posterior_mean_coef1": papers.down(one, zero, t, torch.zeros_like),
            "posterior_mean_coef2": papers.down(zero, one, t, torch.zeros_like),
            "posterior_variance": papers.down(zero, zero, t, torch.ones_like) ** 2,
        }
        for name, value in found.items():
            assert value.item() == pytest.approx(expected[name][i], rel=1e-6, abs=1e-9), (name, t)
        log_variance = found["posterior_variance"].clamp(min=1e-20).log()
        assert log_variance.item() == pytest.approx(expected["posterior_log_variance_clipped"][i], rel=1e-5)


def test_forward_noise_and_clean_estimates_are_those_of_the_authors_code(papers, reference):
    for t, expected in zip((0, 150, 299), reference("lefusion")["q_sample"]["out"], strict=True):
        close(papers.diffuse(grid(-1, 1), t, grid(2, -2)), expected)
    for t, expected in zip((0, 150, 299), reference("lefusion")["predict_start_from_noise"]["out"], strict=True):
        close(papers.clean(grid(2, -2), grid(-1, 1), t), expected)


def test_the_last_level_leaves_as_much_noise_as_in_the_authors_code(papers, reference):
    """Of a background of 0 and a prediction of no noise: what is not composed once more keeps that much."""
    expected = reference("lefusion")["final_step_background_residual_std"]
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    left = papers.clean(zero, papers.diffuse(zero, 0, one), 0).item()
    assert left == pytest.approx(expected["value_in_normalised_units_if_bg_eps_pred_is_0"], rel=1e-6)
    assert left * 700 == pytest.approx(expected["in_HU(x700)"], rel=1e-6)


def test_the_posterior_is_that_of_the_authors_code(papers, reference):
    expected = reference("lefusion")["q_posterior"]
    mean = papers.down(grid(-1, 1), grid(2, -2), 150, torch.zeros_like)
    close(mean, expected["mean"])
    spread = papers.down(grid(-1, 1), grid(2, -2), 150, torch.ones_like) - mean
    torch.testing.assert_close(spread**2, torch.full_like(spread, expected["var"]), rtol=1e-5, atol=0)
    assert (spread**2).log().mean().item() == pytest.approx(expected["logvar"], rel=1e-5)


def test_a_composed_step_is_that_of_the_authors_code(papers, reference):
    block = reference("lefusion")["repaint_step_lidc"]
    mask = torch.tensor(block["mask"]).view(1, 1, 2, 2, 2)
    for t, expected in zip(block["t"], block["out"], strict=True):
        around = papers.diffuse(grid(0.8, -0.8), t, torch.full_like(mask, 0.3))
        state = torch.where(mask == 1, grid(-1.5, 1.5), around)
        clean = papers.clean(0.5 * state, state, t).clamp(-1, 1)
        close(papers.down(clean, state, t, lambda like: torch.full_like(like, 0.3)), expected)


def test_a_step_up_is_that_of_the_authors_code(papers, reference):
    block = reference("lefusion")["undo_step"]
    for level, expected in zip(block["beta_index"], block["out"], strict=True):
        state = grid(-1.5, 1.5)
        close(papers.up(state, level - 1, torch.full_like(state, 0.3)), expected)


@pytest.mark.parametrize("num_steps", [300, 50, 7])
def test_ancestral_steps_are_those_of_diffusers(num_steps):
    scheduler = DDPMScheduler(**PAPER, clip_sample=False, prediction_type="sample")
    levels = noise_levels(scheduler, num_steps, 0.0, CPU)
    scheduler.set_timesteps(num_steps)
    clean, noisy = torch.randn(2, 3, 1, 5, 4)
    for level in range(num_steps - 1, -1, -max(1, num_steps // 6)):
        drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
        expected = scheduler.step(clean, levels.steps[level], noisy, generator=torch.Generator().manual_seed(3))
        found = levels.down(clean, noisy, level, lambda like, drawn=drawn: drawn)
        torch.testing.assert_close(found, expected.prev_sample, rtol=2e-4, atol=2e-4)  # 1 - a is float32 there


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps_are_those_of_diffusers(kind, eta):
    scheduler = DDIMScheduler(**PAPER, clip_sample=False, prediction_type=kind)
    levels = noise_levels(scheduler, 20, eta, CPU)
    scheduler.set_timesteps(20)
    predicted, noisy, drawn = torch.randn(3, 3, 1, 5, 4)
    for level in (18, 9, 1, 0):
        step = levels.steps[level]
        expected = scheduler.step(predicted, step, noisy, eta=eta, variance_noise=drawn if eta else None)
        clean = levels.clean(predicted, noisy, level)
        found = levels.down(clean, noisy, level, lambda like: drawn)
        torch.testing.assert_close(clean, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, expected.prev_sample, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_between_uneven_levels_keep_the_marginal_noise(spacing):
    """Of clean 0, the spread after a step from one level is that of the next, however the levels are spaced."""
    levels = noise_levels(DDIMScheduler(**PAPER, timestep_spacing=spacing), 8, 0.6, CPU)
    for level in range(8):
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        carried = levels.down(zero, one, level, torch.zeros_like) * (1 - levels.kept(level)) ** 0.5
        added = levels.down(zero, zero, level, torch.ones_like)
        assert (carried**2 + added**2).item() == pytest.approx(1 - levels.kept(level - 1), abs=1e-12)


def test_a_step_up_keeps_the_marginal_noise():
    levels = noise_levels(DDIMScheduler(**PAPER), 10, 0.0, CPU)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for level in range(9):
        signal = levels.up(levels.diffuse(one, level, zero), level, zero)
        power = levels.up(levels.diffuse(zero, level, one), level, zero) ** 2 + levels.up(zero, level, one) ** 2
        assert signal.item() == pytest.approx(levels.kept(level + 1) ** 0.5)
        assert power.item() == pytest.approx(1 - levels.kept(level + 1))


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
def test_solvers_go_their_own_way_and_start_anew_after_a_step_up(solver):
    scheduler, levels = solver(**PAPER), noise_levels(solver(**PAPER), 10, 0.0, CPU)
    scheduler.set_timesteps(10)
    state = theirs = torch.randn(2, 1, 5, 4)
    estimate = torch.randn(10, 2, 1, 5, 4)

    def noise_of(level, noisy):  # what the library's solver is told, in its own terms
        kept = levels.kept(level)
        return (noisy - kept**0.5 * estimate[level]) / (1 - kept) ** 0.5

    for level, step in zip(range(9, -1, -1), scheduler.timesteps, strict=True):
        state = levels.down(estimate[level], state, level, torch.randn_like)
        theirs = scheduler.step(noise_of(level, theirs), step, theirs).prev_sample
    torch.testing.assert_close(state, theirs, rtol=1e-3, atol=1e-3)

    up = levels.up(state, 4, torch.randn_like(state))
    first, fresh = levels.down(estimate[5], up, 5, torch.randn_like), noise_levels(solver(**PAPER), 10, 0.0, CPU)
    torch.testing.assert_close(first, fresh.down(estimate[5], up, 5, torch.randn_like), rtol=0, atol=0)


def test_levels_of_solvers_are_the_noise_they_assume():
    levels = noise_levels(DPMSolverMultistepScheduler(**PAPER, use_karras_sigmas=True), 12, 0.0, CPU)
    ddpm = noise_levels(DDPMScheduler(**PAPER), 300, 0.0, CPU)
    kept = [levels.kept(level) for level in range(-1, 12)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 1
    assert kept[1] == pytest.approx(ddpm.kept(0), rel=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "eta", "message"),
    [
        (DDPMScheduler(**PAPER), 0.5, "DDPMScheduler has none; take DDIMScheduler"),
        (DDPMScheduler(trained_betas=cosine_betas(300)), 0.0, "num_train_timesteps=1000 but 300 trained_betas"),
        (DDPMScheduler(**PAPER, variance_type="learned"), 0.0, "variance_type='learned'"),
        (DDPMScheduler(**PAPER, prediction_type="score"), 0.0, "prediction_type 'score'"),
        (EulerDiscreteScheduler(**PAPER), 0.0, "EulerDiscreteScheduler cannot inpaint"),
        (HeunDiscreteScheduler(**PAPER), 0.0, "HeunDiscreteScheduler cannot inpaint"),
        (PNDMScheduler(**PAPER), 0.0, "PNDMScheduler cannot inpaint"),
        (DDIMScheduler(**PAPER, timestep_spacing="trailing"), 0.0, "makes 8 levels of num_steps=7"),
    ],
)
def test_schedulers_that_cannot_inpaint_are_refused(scheduler, eta, message):
    with pytest.raises(ValueError, match=message):
        noise_levels(scheduler, 7, eta, CPU)
