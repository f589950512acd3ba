import numpy as np
import pytest
import torch

from fairdiff_lightning.diffusion import build_training_scheduler
from fairdiff_lightning.diffusion.cosine import cosine_betas


def test_betas_are_those_of_the_authors_code(reference):
    expected = reference("lefusion")["cosine_schedule_T300_s0.008"]
    betas = np.array(cosine_betas(300))
    kept = np.cumprod(1 - betas)
    assert betas.sum() == pytest.approx(expected["sum_betas"], rel=1e-7)
    assert betas[expected["idx"]] == pytest.approx(expected["betas"], rel=1e-7)
    assert kept[expected["idx"]] == pytest.approx(expected["alphas_cumprod"], rel=1e-7)


def test_betas_make_a_training_scheduler():
    betas = cosine_betas(300)
    scheduler = build_training_scheduler("DDPMScheduler", {"trained_betas": betas, "num_train_timesteps": 300})
    torch.testing.assert_close(scheduler.betas, torch.tensor(betas, dtype=torch.float64))


def test_diffusers_differs_in_its_cap_alone():
    libraries = build_training_scheduler(
        "DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300}
    )
    ours = torch.tensor(cosine_betas(300))
    torch.testing.assert_close(libraries.betas[:-1].float(), ours[:-1], rtol=1e-5, atol=1e-8)
    assert (libraries.betas[-1].item(), ours[-1].item()) == pytest.approx((0.999, 0.9999))
    torch.testing.assert_close(
        libraries.betas.float(), torch.tensor(cosine_betas(300, max_beta=0.999)), rtol=1e-5, atol=1e-8
    )
