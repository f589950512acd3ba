"""Numbers of PIG's own code that diffusers' parts must meet."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fairdiff_lightning.data.native import to_image_tensor
from fairdiff_lightning.diffusion import antithetic_timesteps, build_scheduler, sample_pairs
from fairdiff_lightning.networks.guided_unet import GuidedUNet

RANGE = {"beta_start": 1e-4, "beta_end": 0.02}
SCHEDULES = {
    "linear": lambda steps: {**RANGE, "beta_schedule": "linear"},
    "quad": lambda steps: {**RANGE, "beta_schedule": "scaled_linear"},
    "sigmoid": lambda steps: {**RANGE, "beta_schedule": "sigmoid"},
    "const": lambda steps: {"trained_betas": [0.02] * steps},
    "jsd": lambda steps: {"trained_betas": (1 / np.linspace(steps, 1, steps)).tolist()},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_the_code_is_one_of_diffusers(reference, name):
    expected = reference("pig")["betas"]["schedules"][name]
    short, full = (
        build_scheduler("DDPMScheduler", {"num_train_timesteps": steps, **SCHEDULES[name](steps)})
        for steps in (8, 1024)
    )
    assert short.betas.tolist() == pytest.approx(expected["T8_all"], rel=1e-5)
    places = [0, 1, 2, 511, 1022, 1023]
    assert full.betas[places].tolist() == pytest.approx(expected["T1024_idx_[0,1,2,511,1022,1023]"], rel=1e-5)
    kept = full.alphas_cumprod[[0, 1, 255, 511, 767, 1023]].tolist()
    assert kept == pytest.approx(expected["T1024_alpha_bar_idx_[0,1,255,511,767,1023]"], rel=1e-5, abs=1e-8)
    assert float(full.betas.double().sum()) == pytest.approx(expected["T1024_sum"], rel=1e-5)


def test_the_signal_that_is_left_and_what_it_does_to_errors(reference):
    expected = reference("pig")["alpha_lookup"]
    scheduler = build_scheduler("DDIMScheduler", {"num_train_timesteps": 1024, **SCHEDULES["linear"](1024)})
    kept = torch.stack([scheduler.final_alpha_cumprod, *scheduler.alphas_cumprod[expected["t"][1:]]])
    gains = ((1 - kept) / kept).sqrt()[[1, 3, 4, 5]].tolist()
    assert kept.tolist() == pytest.approx(expected["alpha_bar"], rel=1e-6)
    assert (1 - kept).sqrt().tolist() == pytest.approx(expected["sqrt_1_minus"], rel=1e-5, abs=1e-6)
    assert gains == pytest.approx(expected["x0_error_gain_sqrt((1-a)/a)"], rel=1e-5, abs=1e-6)


def walked(num_steps):
    """The steps that DDIM with the settings of the paper takes a pair through, ascending."""
    scheduler = build_scheduler("DDIMScheduler", {"num_train_timesteps": 1024, **SCHEDULES["linear"](1024)})
    steps, noise = [], torch.zeros(1, 1)
    predict = {"guider": lambda x, y, t: x, "target": lambda y, guide, t: y}
    common = {"x": noise, "y": noise, "scheduler": scheduler, "num_steps": num_steps}
    sample_pairs(**predict, **common, watch=lambda t, *_: steps.append(int(t)))
    return steps[::-1]


@pytest.mark.parametrize("num_steps", [4, 50, 256, 300])
def test_the_steps_of_ddim_are_those_of_the_code(reference, num_steps):
    """The code takes every (T // S)th step of all: more than S, and as many above ours, where S does not divide T."""
    expected = reference("pig")["timestep_lists"]["uniform"][f"T=1024,S={num_steps}"]
    listed = list(range(0, 1024, 1024 // num_steps))
    assert (len(listed), listed[:3], listed[-2:]) == (expected["len"], expected["first3"], expected["last2"])
    assert walked(num_steps) == listed[:num_steps]
    assert (len(listed) == num_steps) == (1024 % num_steps == 0)


def test_times_are_embedded_alike(reference):
    expected = reference("pig")["timestep_embedding"]
    found = GuidedUNet(image_size=32).unet.time_proj(torch.tensor([0, 1, 512, 1023]))
    assert found[1].tolist() == pytest.approx(expected["t=1"], abs=1e-6)
    assert found[3, :4].tolist() == pytest.approx(expected["t=1023_first4"], abs=1e-4)
    assert found[3, 16:20].tolist() == pytest.approx(expected["t=1023_cos_first4"], abs=1e-4)
    assert found.sum(1).tolist() == pytest.approx(expected["sum_per_row"], abs=1e-4)


def test_grey_levels_become_the_papers_units(reference):
    expected = reference("pig")["normalise"]
    grey = [v for v in expected["fwd_in"] if v == int(v) and 0 <= v <= 255]
    found = to_image_tensor(np.array([grey], dtype=np.uint8))[0, 0] * 2 - 1
    wanted = [expected["fwd_out"][expected["fwd_in"].index(v)] for v in grey]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_steps_are_drawn_with_their_mirror_images(reference, monkeypatch):
    blocks = reference("pig")["antithetic_t"]
    for name, expected in blocks.items():
        if name == "explain":
            continue
        size, drawn = int(name[2 : name.index(",")]), [int(v) for v in name.split("[")[1].strip("]").split(",")]
        monkeypatch.setattr(torch, "randint", lambda high, shape, drawn=drawn, **_: torch.tensor(drawn)[: shape[0]])
        assert antithetic_timesteps(torch.zeros(size, 1), 1024).tolist() == expected


@pytest.mark.parametrize("step", [10, 300, 700, 1020])
def test_the_proposition_holds_for_a_gaussian_pair(reference, step):
    """Given x one step back, x now says nothing more of y one step back: its regression coefficient is zero."""
    blocks = reference("pig")["proposition_gaussian"]
    kept = build_scheduler("DDPMScheduler", {"num_train_timesteps": 1024, **SCHEDULES["linear"](1024)}).alphas_cumprod
    before, now = kept[[step - 1, step]].double().tolist()
    share = (now / before) ** 0.5
    pair = torch.tensor([[0.25, 0.2], [0.2, 0.25]], dtype=torch.float64)
    earlier = before * pair + (1 - before) * torch.eye(2, dtype=torch.float64)  # x, y at t - 1
    later = share**2 * earlier + (1 - share**2) * torch.eye(2, dtype=torch.float64)
    between = share * earlier  # of (t - 1) with t
    whole = torch.stack(
        [  # x before, x now, y now
            torch.stack([earlier[0, 0], between[0, 0], between[0, 1]]),
            torch.stack([between[0, 0], later[0, 0], later[0, 1]]),
            torch.stack([between[0, 1], later[0, 1], later[1, 1]]),
        ]
    )
    with_y = torch.stack([earlier[0, 1], between[1, 0], between[1, 1]])
    found = torch.linalg.solve(whole, with_y).tolist()
    assert found == pytest.approx(blocks["coef_[x_prev,x_t,y_t]"][str(step)], rel=1e-5, abs=1e-12)
    shorter = torch.linalg.solve(whole[[0, 2]][:, [0, 2]], with_y[[0, 2]]).tolist()
    assert shorter == pytest.approx(blocks["coef_without_x_t_[x_prev,y_t]"][str(step)], rel=1e-5)


def test_less_noise_is_left_in_every_step():
    for name, arguments in SCHEDULES.items():
        kept = build_scheduler("DDPMScheduler", {"num_train_timesteps": 8, **arguments(8)}).alphas_cumprod.tolist()
        assert all(later < earlier for earlier, later in pairwise(kept)), name
