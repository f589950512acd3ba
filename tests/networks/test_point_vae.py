import argparse
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_lightning.modules import PointDiffusion
from fairdiff_lightning.networks import CheckpointMismatchError, PointVAE
from fairdiff_lightning.networks.point_vae import gaussian_entropy, standard_normal_log_density


def wave(*shape, factor, function=torch.sin):
    return function(factor * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


def indices(weight):
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in weight.shape)
    return rows[:, None], columns


@pytest.fixture
def closed_form():
    """The network with the reference's closed-form weights, rounded to float32, in float64."""
    network = PointVAE()
    with torch.no_grad():
        for i, layer in enumerate(network.denoiser.layers, 1):
            for role, linear in enumerate((layer.linear, layer.gate, layer.shift)):
                row, column = indices(linear.weight)
                angle = 0.7 * i + 1.3 * role + 0.11 * row + 0.07 * column
                linear.weight.copy_(angle.sin() / math.sqrt(linear.in_features))
                if linear.bias is not None:
                    linear.bias.copy_(0.1 * torch.cos(0.5 * i + role + 0.2 * row[:, 0]))
        for i, network_of_layer in enumerate(network.flow.networks, 1):
            for k, linear in enumerate(network_of_layer[::2]):
                row, column = indices(linear.weight)
                angle = 0.3 * i + 0.9 * k + 1.7 * row + 2.3 * column + 0.013 * row * column
                linear.weight.copy_(0.5 * angle.sin() / math.sqrt(linear.in_features))
                linear.bias.copy_(0.05 * torch.cos(0.4 * i + k + 0.1 * row[:, 0]))
    return network.double().requires_grad_(False)


def test_parameters_are_the_references(reference):
    expected, network = reference("fairdiff")["pd01_params"]["expected"], PointVAE()
    found = {
        name: sum(p.numel() for p in getattr(network, name).parameters()) for name in ("encoder", "flow", "denoiser")
    }
    assert found | {"total": sum(p.numel() for p in network.parameters())} == expected


def test_denoiser_is_the_references(reference, closed_form):
    expected = reference("fairdiff")["pd03_denoiser"]["expected"]
    betas = torch.linspace(1e-4, 0.02, 100)[torch.tensor(expected["t"]) - 1].double()
    out = closed_form(wave(2, 5, 3, factor=0.37), betas, wave(2, 256, factor=0.05, function=torch.cos))
    assert list(out.shape) == expected["shape"]
    assert out.flatten()[:6].tolist() == pytest.approx(expected["out_first6"], abs=1e-6)
    assert [float(out.sum()), float(out.abs().sum())] == pytest.approx([expected["sum"], expected["abs_sum"]], abs=1e-6)


def test_flow_and_entropy_are_the_references(reference, closed_form):
    expected = reference("fairdiff")["pd06_flow_prior"]["expected"]
    latent = wave(2, 256, factor=0.13)
    noise, log_determinant = closed_form.flow(latent)
    assert noise[0, :4].tolist() == pytest.approx(expected["w_first4"], rel=1e-6)
    assert float(noise.sum()) == pytest.approx(expected["w_sum"], rel=1e-6)
    assert (-log_determinant).tolist() == pytest.approx(expected["delta_logp"], rel=1e-6)
    too_low = 255 * 128 * math.log(2 * math.pi)  # the reference adds the constant once for each dimension
    assert (closed_form.log_prior(latent) - too_low).tolist() == pytest.approx(expected["log_pz"], rel=1e-9)
    entropy = gaussian_entropy(0.5 * wave(2, 256, factor=0.02, function=torch.cos))
    assert entropy.tolist() == pytest.approx(expected["entropy"], rel=1e-6)


def test_losses_are_the_references(reference, closed_form):
    checks, module = reference("fairdiff"), PointDiffusion(reference_behaviour=True)
    module.network = closed_form
    clean, noise = wave(2, 5, 3, factor=0.37), wave(2, 5, 3, factor=0.91, function=torch.cos)
    context, steps = wave(2, 256, factor=0.05, function=torch.cos), torch.tensor([49, 6])  # ours start at 0
    prediction = module(module.scheduler.add_noise(clean, noise, steps), steps, context)
    log_variance = 0.5 * wave(2, 256, factor=0.02, function=torch.cos)
    losses = module.objective(prediction, noise, log_variance, closed_form.log_prior(wave(2, 256, factor=0.13)))
    expected = checks["pd06_flow_prior"]["expected"]
    assert float(losses["noise"]) == pytest.approx(checks["pd04_loss"]["expected"], abs=1e-6)
    assert float(losses["entropy"]) == pytest.approx(expected["entropy_loss"], rel=1e-6)
    assert float(losses["prior"]) == pytest.approx(expected["prior_loss"], rel=1e-6)
    assert float(losses["loss"]) == pytest.approx(checks["pd07_total_loss"]["expected"], abs=1e-6)


def test_densities_are_pytorchs():
    mean, log_variance = torch.zeros(3, 7), torch.randn(3, 7)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, (0.5 * log_variance).exp()), 1)
    torch.testing.assert_close(gaussian_entropy(log_variance), normal.entropy())
    standard = torch.distributions.Independent(torch.distributions.Normal(mean, torch.ones_like(mean)), 1)
    torch.testing.assert_close(standard_normal_log_density(log_variance), standard.log_prob(log_variance))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_flow_has_an_exact_inverse_and_the_determinant_of_its_jacobian(seed, num_layers):
    torch.manual_seed(seed)
    flow = PointVAE(num_layers=num_layers, hidden_dim=16).flow.double().requires_grad_(False)
    latent = torch.randn(3, 256, dtype=torch.float64)
    noise, log_determinant = flow(latent)
    torch.testing.assert_close(flow.inverse(noise), latent)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z[None])[0][0], latent[1])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_determinant[1])


def test_encoder_does_not_look_at_the_order_or_number_of_points():
    encoder, points = PointVAE().encoder.eval(), torch.randn(3, 11, 3)
    for twice, once in zip(encoder(points[:, torch.randperm(11)].repeat(1, 2, 1)), encoder(points), strict=True):
        torch.testing.assert_close(twice, once)


def test_denoiser_moves_every_point_by_itself():
    network, time, latent = PointVAE(), torch.tensor([0.1, 0.7]), torch.randn(2, 256)
    points = torch.randn(2, 5, 3)
    out = network(points, time, latent)
    torch.testing.assert_close(network(points[:, 2:3], time, latent), out[:, 2:3])
    torch.testing.assert_close(network(points[1:], time[1:], latent[1:]), out[1:])


def test_a_batch_of_one_cloud_trains():
    network = PointVAE()
    mean, log_variance = network.encode(torch.randn(1, 6, 3))
    assert bool(mean.isfinite().all())
    (mean.sum() + log_variance.sum()).backward()


def test_groups_start_alike_and_learn_priors_of_their_own():
    network, noise, group = PointVAE(num_groups=2), torch.randn(3, 256), torch.tensor([0, 1, -1])
    torch.testing.assert_close(network.draw_latent(noise, group), network.draw_latent(noise))
    torch.nn.init.normal_(network.prior_mean.weight)
    torch.nn.init.normal_(network.context_shift.weight)
    latent = network.draw_latent(noise, group)
    assert not torch.allclose(latent, network.draw_latent(noise, group.flip(0)), atol=0.1)
    means = network.prior_mean.weight[[0, 1, 2]]
    base = torch.distributions.Independent(torch.distributions.Normal(means, torch.ones_like(means)), 1)
    expected = base.log_prob(noise + means) + network.flow(latent)[1]
    torch.testing.assert_close(network.log_prior(latent, group), expected, rtol=1e-4, atol=1e-3)
    points, time = torch.randn(3, 4, 3), torch.full((3,), 0.5)
    shifted = network(points, time, latent + network.context_shift.weight[[0, 1, 2]])
    torch.testing.assert_close(network(points, time, latent, group), shifted)


@pytest.mark.parametrize("group", [2, -2, 7])
def test_groups_beyond_the_last_are_refused(group):
    with pytest.raises(ValueError, match=r"group must be -1 \(unknown\) or 0 to 1, but is"):
        PointVAE(num_groups=2).draw_latent(torch.randn(1, 256), torch.tensor([group]))


def published(network, steps=100):
    """A checkpoint as the authors' trainer saves it: arguments, tensors with the schedule's, optimizer state."""
    schedule = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, steps)])
    names = ("betas", "alphas", "alpha_bars", "sigmas_flex", "sigmas_inflex")
    state = {f"diffusion.var_sched.{name}": schedule for name in names}
    state |= {name: tensor.clone() for name, tensor in network.reference_tensors().items()}
    return {"args": argparse.Namespace(latent_dim=256), "state_dict": state, "others": {"optimizer": {"state": {}}}}


def test_the_authors_checkpoint_loads_though_it_pickles_its_arguments(tmp_path):
    trained, network = PointVAE(), PointVAE(num_groups=3)
    trained.encoder.norms[1].running_mean.fill_(0.25)
    torch.save(published(trained), tmp_path / "ckpt.pt")
    report = network.load_reference_weights(tmp_path / "ckpt.pt", torch.linspace(1e-4, 0.02, 100))
    loaded = network.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.state_dict().items())
    assert len(report.loaded) == len(trained.state_dict())
    assert "diffusion.var_sched.betas" in report.ignored
    assert {"encoder.conv1.weight", "encoder.fc_bn2_v.running_var", "flow.chain.13.net_s_t.4.bias"} <= {*report.loaded}
    assert {"diffusion.net.layers.5._hyper_bias.weight", "encoder.bn4.num_batches_tracked"} <= {*report.loaded}


def test_another_schedule_and_wrong_tensors_are_named(tmp_path):
    network = PointVAE()
    with pytest.raises(ValueError, match=r"200 steps of beta 0.0001 to 0.02; here .* 100 steps"):
        network.load_reference_weights(published(network, 200), torch.linspace(1e-4, 0.02, 100))
    content = published(network)
    content["state_dict"]["encoder.conv9.bias"] = content["state_dict"].pop("encoder.conv1.bias")
    content["state_dict"]["flow.chain.3.net_s_t.0.weight"] = torch.zeros(2, 2)
    before = network.denoiser.layers[0].linear.weight.clone()
    with pytest.raises(CheckpointMismatchError, match=r"conv1\.bias(.|\n)*conv9\.bias(.|\n)*chain\.3"):
        network.load_reference_weights(content)
    assert torch.equal(before, network.denoiser.layers[0].linear.weight)


class Foreign:
    """What is not allowed to be unpickled."""


def test_other_pickled_objects_are_refused(tmp_path):
    torch.save({"args": Foreign(), "state_dict": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="pickled objects"):
        PointVAE().load_reference_weights(tmp_path / "ckpt.pt")
