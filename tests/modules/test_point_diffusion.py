import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.plugins import HalfPrecision
from torch import nn
from torch.utils.data import DataLoader

from fairdiff_lightning.data import collate
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.diffusion import gaussian, generators
from fairdiff_lightning.geometry import mask_to_points
from fairdiff_lightning.metrics.generation import generation_scores
from fairdiff_lightning.modules import PointDiffusion, cloud_sampling
from fairdiff_lightning.modules.cloud_sampling import UndecodableCloudError
from fairdiff_lightning.networks import CheckpointMismatchError

SIZE, POINTS = (40, 52), 24
SMALL = {"image_size": SIZE, "num_points": POINTS, "num_steps": 5, "num_validation_samples": 4}
RACES = {"num_groups": {"race": 3}}


def sample(i, groups=2, radius=None):
    random = torch.Generator().manual_seed(i)
    row, col = torch.arange(SIZE[0])[:, None], torch.arange(SIZE[1])
    centre = torch.tensor([19.0, 26.0]) + 4 * torch.rand(2, generator=random)
    distance = torch.hypot((row - centre[0]) * 1.2, col - centre[1])
    radius = radius or 10 + 4 * float(torch.rand(1, generator=random))
    mask = (distance < radius).long() + (distance < radius / 2).long()
    return {
        "image": torch.zeros(1, *SIZE),
        "mask": mask[None],
        "points": mask_to_points(mask, POINTS),
        "attributes": {"race": torch.tensor(-1 if i == 4 else i % groups)},
        "id": f"s{i}",
    }


class Outlines(LightningDataModule):
    def __init__(self, count=7, **facts):
        super().__init__()
        self.samples = [sample(i) for i in range(count)]
        for name, value in facts.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=3, collate_fn=collate)

    val_dataloader = train_dataloader


def decodable(**arguments):
    """A module that was not trained, but whose clouds scatter widely enough to outline something."""
    module = PointDiffusion(**SMALL, **RACES, **arguments).eval()
    with torch.no_grad():
        for parameter in module.network.denoiser.layers[-1].parameters():
            parameter.mul_(0.1)
        module.network.prior_mean.weight.normal_()
        module.statistics.scale.mul_(4)
    return module


def trainer(tmp_path, **arguments):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False, "max_epochs": 1} | arguments),
    )


def requests(count, groups=3, first=0):
    indices = range(first, first + count)
    return {
        "id": [f"r{i}" for i in indices],
        "seed": torch.tensor([derive_seed("request", i) for i in indices]),
        "attributes": {"race": torch.tensor([i % groups for i in indices])},
    }


def test_schedule_is_the_references(reference):
    """pd02, in its precision, which shows where alpha_bar is near 1; ours is float64."""
    scheduler = PointDiffusion(**SMALL, terminal_snr="reference").scheduler
    beta = scheduler.betas.float()
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    before = torch.cat([torch.ones(1), alpha_bar[:-1]])
    tables = {
        "beta": beta,
        "alpha_bar": alpha_bar,
        "sigma_flex0": ((1 - before) / (1 - alpha_bar) * beta).sqrt(),
        "sigma_flex1": beta.sqrt(),
        "c0": alpha.rsqrt(),
        "c1": (1 - alpha) / (1 - alpha_bar).sqrt(),
    }
    for number, expected in reference("fairdiff")["pd02_schedule"]["expected"].items():
        t = int(number) - 1
        assert {name: float(table[t]) for name, table in tables.items()} == pytest.approx(expected, rel=1e-5)
        assert float(scheduler.alphas_cumprod[t]) == pytest.approx(expected["alpha_bar"], rel=1e-5)
        sigma = float(scheduler._get_variance(t).sqrt()) if t else 0.0
        rounded = 6e-8 / (1 - expected["alpha_bar"])  # what float32 leaves open of 1 - alpha_bar
        assert sigma == pytest.approx(expected["sigma_flex0"], rel=1e-5 + rounded)


def test_reference_sampling_is_the_papers_recursion():
    module = PointDiffusion(**SMALL, reference_behaviour=True)
    seeds = torch.tensor([3, 5])
    network, draws = module.network.double(), generators(seeds)
    with torch.no_grad():
        latent = network.flow.inverse(gaussian(torch.empty(2, 256, dtype=torch.float64), draws))
        x = gaussian(torch.empty(2, POINTS, 3, dtype=torch.float64), draws)
        beta = torch.linspace(1e-4, 0.02, 100)
        alpha_bar = (1 - beta).cumprod(0)
        for t in reversed(range(100)):
            noise = gaussian(x, draws) if t else torch.zeros_like(x)
            sigma = ((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]).sqrt()
            predicted = network(x, beta[t].expand(2), latent)
            x = (x - beta[t] / (1 - alpha_bar[t]).sqrt() * predicted) / (1 - beta[t]).sqrt() + sigma * noise
    expected = x * module.statistics.scale + module.statistics.shift
    torch.testing.assert_close(module.draw(seeds).double(), expected, rtol=1e-4, atol=1e-3)


class Oracle(nn.Module):
    """What a perfectly trained network predicts where all clouds are the same one."""

    def __init__(self, module, cloud):
        super().__init__()
        self.cloud, self.levels, self.times = cloud.double(), module.scheduler.alphas_cumprod, module.times
        self.kind = module.scheduler.config.prediction_type

    def draw_latent(self, noise, group):
        return noise

    def forward(self, points, time, latent, group):
        level = self.levels[(self.times - time[0]).abs().argmin()].double()
        noise = (points - level.sqrt() * self.cloud) / (1 - level).sqrt()
        return noise if self.kind == "epsilon" else level.sqrt() * noise - (1 - level).sqrt() * self.cloud


@pytest.mark.parametrize("terminal_snr", ["zero", "reference"])
@pytest.mark.parametrize(
    ("sampler", "num_steps"),
    [("DDPMScheduler", 100), ("DDPMScheduler", 7), ("DDIMScheduler", 7), ("DPMSolverMultistepScheduler", 7)],
)
def test_every_sampler_finds_the_cloud_that_a_perfect_network_knows(terminal_snr, sampler, num_steps):
    module = PointDiffusion(**SMALL | {"num_steps": num_steps}, sampler=sampler, terminal_snr=terminal_snr)
    cloud = torch.randn(POINTS, 3)
    module.network = Oracle(module, cloud)
    found = module.statistics.normalize(module.sample(3))
    torch.testing.assert_close(found, cloud.expand(3, -1, -1), atol=2e-3, rtol=0)


def test_noising_ends_in_noise_alone_unless_as_in_the_reference():
    clean, noise, last = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.tensor([99, 99])
    torch.testing.assert_close(PointDiffusion(**SMALL).scheduler.add_noise(clean, noise, last), noise)
    noisy = PointDiffusion(**SMALL, terminal_snr="reference").scheduler.add_noise(clean, noise, last)
    torch.testing.assert_close(noisy, 0.36356321**0.5 * clean + (1 - 0.36356321) ** 0.5 * noise)


def test_the_step_is_told_by_an_angle_or_by_beta():
    module = PointDiffusion(**SMALL)
    levels = module.scheduler.alphas_cumprod
    torch.testing.assert_close((module.times / 2).cos().square(), levels.float(), atol=1e-6, rtol=0)
    assert float(module.times[-1]) == pytest.approx(math.pi)
    assert float(PointDiffusion(**SMALL, time="beta", terminal_snr="reference").times[-1]) == pytest.approx(0.02)


@pytest.mark.parametrize("sampler", ["DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_a_request_gets_the_same_mask_alone_and_in_any_batch(sampler):
    module = decodable(sampler=sampler)
    together = module.predict_step(requests(8))
    assert together["mask"].shape == (8, 1, *SIZE)
    assert together["mask"].dtype == torch.int64
    assert together["id"] == [f"r{i}" for i in range(8)]
    for i in range(8):
        alone = module.predict_step(requests(1, first=i))
        assert torch.equal(alone["mask"][0], together["mask"][i])
        torch.testing.assert_close(alone["points"][0], together["points"][i], rtol=1e-6, atol=1e-5)
    assert len({mask.numpy().tobytes() for mask in together["mask"]}) == 8


def test_samples_depend_on_the_seed_and_their_number_alone():
    module = PointDiffusion(**SMALL, **RACES)
    five = module.sample(5, group=[0, 1, 2, 0, -1], seed=4, batch_size=2)
    torch.manual_seed(99)
    assert five.shape == (5, POINTS, 3)
    torch.testing.assert_close(module.sample(3, group=torch.tensor([0, 1, 2]), seed=4), five[:3])
    assert not torch.allclose(module.sample(3, group=[0, 1, 2], seed=5), five[:3], atol=1)
    assert not torch.allclose(module.sample(3, group=[0, 1, 2], seed=4, num_steps=9), five[:3], atol=1e-3)


def test_losses_come_from_the_seed_and_no_sample_meets_another_in_evaluation():
    module = PointDiffusion(**SMALL, **RACES).eval()
    batch = collate([sample(i) for i in range(4)]) | {"seed": torch.tensor([1, 2, 3, 4])}
    losses = module.losses(batch)
    assert losses["loss"] == losses["noise"] + 1e-4 * (losses["entropy"] + losses["prior"])
    apart = [module.losses(collate([sample(i)]) | {"seed": torch.tensor([i + 1])})["loss"] for i in range(4)]
    torch.testing.assert_close(torch.stack(apart).mean(), losses["loss"], rtol=1e-4, atol=1e-4)


def test_seeds_in_a_training_batch_do_not_freeze_its_noise():
    module = PointDiffusion(**SMALL, **RACES, unknown_share=0.0).train()
    batch = collate([sample(i) for i in range(4)]) | {"seed": torch.tensor([1, 2, 3, 4])}
    assert len({float(module.losses(batch)["noise"]) for _ in range(3)}) == 3


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_the_loss_is_the_same_along_every_scheduler(scheduler):
    def loss(**arguments):
        torch.manual_seed(1)
        module = PointDiffusion(**SMALL, terminal_snr="reference", **arguments).eval()
        batch = collate([sample(i) for i in range(4)]) | {"seed": torch.tensor([1, 2, 3, 4])}
        return module.losses(batch)["loss"]

    torch.testing.assert_close(loss(scheduler=scheduler), loss())
    with pytest.raises(ValueError, match="cannot be trained with"):
        loss(scheduler="FlowMatchEulerDiscreteScheduler")


def test_bfloat16_changes_the_losses_by_its_rounding_only():
    module = PointDiffusion(**SMALL, **RACES).eval()
    batch = collate([sample(i) for i in range(4)]) | {"seed": torch.tensor([1, 2, 3, 4])}
    exact = module.losses(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, clouds = module.losses(batch), module.sample(2)
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        assert float(rounded[name]) == pytest.approx(float(value), rel=0.02)
    torch.testing.assert_close(clouds, module.sample(2))


def test_every_parameter_gets_a_gradient_and_no_step_waits_for_the_device(monkeypatch):
    module = PointDiffusion(**SMALL, **RACES)
    batch = collate([sample(i) for i in (0, 3, 4)])
    module.losses(batch)["loss"].backward()
    assert all(p.grad is not None for p in module.parameters())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    module.to("meta")  # where nothing has a value: what asks for one raises
    points, group = batch["points"].to("meta"), batch["attributes"]["race"].to("meta")
    module.losses({"id": batch["id"], "points": points, "attributes": {"race": group}})["loss"].backward()


def test_statistics_are_those_of_the_training_points():
    batches = [collate([sample(i) for i in part]) for part in ((0, 1, 2), (3, 4))]
    points = torch.cat([batch["points"] for batch in batches]).flatten(0, 1)
    module = PointDiffusion(**SMALL, **RACES)
    module.measure(batches)
    normal = module.statistics.normalize(points)
    torch.testing.assert_close(normal[:, :2].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal[:, :2].std(0), torch.ones(2))
    assert set(normal[:, 2].tolist()) == {-1, 1}
    torch.testing.assert_close(module.statistics.denormalize(normal), points)
    assert module.statistics.num_clouds.tolist() == [2, 2, 0, 1]
    module = PointDiffusion(**SMALL, normalization="reference")
    module.measure(batches)
    torch.testing.assert_close(module.statistics.normalize(points), (points - points.mean(0)) / points.std())


def test_training_validates_saves_its_statistics_and_resumes_with_them(tmp_path):
    module, data = PointDiffusion(**SMALL, **RACES), Outlines(num_points=POINTS, num_groups={"race": 3}, num_classes=3)
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(module, data)
    assert {
        "train/loss",
        "val/noise",
        "val/prior",
        "val/mmd",
        "val/coverage",
        "val/1nna",
    } <= run.callback_metrics.keys()
    path = run.checkpoint_callback.best_model_path
    again = PointDiffusion.load_from_checkpoint(path, weights_only=True)
    torch.testing.assert_close(again.statistics.shift, torch.cat([s["points"] for s in data.samples]).mean(0))
    torch.testing.assert_close(again.sample(2, group=1), module.sample(2, group=1))
    other = Outlines()
    other.samples = [sample(i, radius=15) for i in range(4)]
    resumed = PointDiffusion(**SMALL, **RACES)
    trainer(tmp_path, max_epochs=2).fit(resumed, other, ckpt_path=path, weights_only=True)
    assert torch.equal(resumed.statistics.scale, module.statistics.scale)
    assert torch.equal(resumed.statistics.num_clouds, module.statistics.num_clouds)


def test_validation_compares_the_generated_with_as_many_held_out_clouds(tmp_path):
    module, data = decodable(), Outlines()
    module.num_validation_samples = 5
    module.statistics.num_clouds.fill_(1)
    run = trainer(tmp_path)
    run.validate(module, data, verbose=False)
    five = collate(data.samples[:5])
    seeds = torch.tensor([derive_seed("validation", name) for name in five["id"]])
    generated = module.generate(five | {"seed": seeds})["points"]
    expected = generation_scores(
        module.statistics.normalize(generated), module.statistics.normalize(five["points"]), "chamfer"
    )
    for name, value in expected.items():
        assert float(run.callback_metrics[f"val/{name}"]) == pytest.approx(float(value), rel=1e-4)


def test_best_checkpoint_is_told_by_the_loss_when_nothing_is_generated(tmp_path):
    module = PointDiffusion(**SMALL | {"num_validation_samples": 0})
    assert (module.monitor, PointDiffusion(**SMALL).monitor) == ("val/loss", "val/mmd")
    run = trainer(tmp_path)
    run.fit(module, Outlines(3))
    assert "val/mmd" not in run.callback_metrics


def test_a_cloud_that_outlines_nothing_is_drawn_again_from_the_next_seed(monkeypatch):
    module, asked = decodable(), requests(3)
    first = module.generate(asked)
    decode, calls = module._decode, []

    def decode_but_the_second(points):
        calls.append(len(points))
        masks, errors = decode(points)
        return masks, errors | ({1: ValueError("no outline")} if len(calls) == 1 else {})

    monkeypatch.setattr(module, "_decode", decode_but_the_second)
    second = module.generate(asked)
    assert calls == [3, 1]
    assert torch.equal(second["mask"][[0, 2]], first["mask"][[0, 2]])
    again = module.draw(torch.tensor([derive_seed(int(asked["seed"][1]), 1)]), torch.tensor([1]))
    torch.testing.assert_close(second["points"][1], again[0])
    assert torch.equal(second["mask"][1], decode(again)[0][0])


def test_requests_that_get_no_mask_are_named_but_do_not_stop_a_validation(tmp_path):
    module = PointDiffusion(**SMALL)
    module.statistics.shift.add_(1e4)  # out of the frame
    module.statistics.measured.fill_(True)
    with pytest.raises(UndecodableCloudError, match=r"2 of 2 requests \('r0', 'r1'\): 8 clouds"):
        module.predict_step(requests(2))
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match="No picture of this validation"):
        run.validate(module, Outlines(3), verbose=False)
    assert "val/mmd" in run.callback_metrics


@pytest.mark.parametrize("arguments", [RACES, {**RACES, "conditional": False}, {}], ids=["groups", "one", "none"])
def test_groups_are_optional(arguments):
    module = PointDiffusion(**SMALL, **arguments)
    assert ("network.prior_mean.weight" in module.state_dict()) == (module.attribute == "race")
    assert module.sample(2).shape == (2, POINTS, 3)
    module.losses(collate([sample(0), sample(1)]))["loss"].backward()


def test_some_groups_are_hidden_while_training_only():
    module = PointDiffusion(**SMALL, **RACES, unknown_share=0.3)
    batch = {"attributes": {"race": torch.arange(3000) % 3}}
    assert float((module.group(batch) == -1).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(module.eval().group(batch), batch["attributes"]["race"])


def test_groups_that_cannot_be_generated_are_named():
    module = decodable()
    with pytest.raises(ValueError, match=r"group \[3\] was found, but 'race' has groups 0 to 2"):
        module.sample(2, group=[0, 3])
    with pytest.raises(ValueError, match=r"group \[0\] was found, but the model has no groups"):
        PointDiffusion(**SMALL).sample(1, group=0)
    module.measure([collate([sample(i) for i in range(4)])])
    with pytest.raises(ValueError, match=r"group \[2\] of 'race' .* no training cloud .*\[2, 2, 0\]"):
        module.generate(requests(3))
    assert module.sample(2, group=[0, 1]).isfinite().all()
    with pytest.raises(ValueError, match=r"group \[5\] was found"):
        module.measure([collate([sample(0) | {"attributes": {"race": torch.tensor(5)}}])])


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"set --data\.image_size"):
        PointDiffusion(image_size=None)
    with pytest.raises(ValueError, match=r"attribute='sex': num_groups names race \(3 groups\)"):
        PointDiffusion(**SMALL, **RACES, attribute="sex")
    module = PointDiffusion(**SMALL, **RACES)
    with pytest.raises(ValueError, match="num_steps must lie between 1 and 100, but is 101"):
        module.sample(1, num_steps=101)
    with pytest.raises(ValueError, match="num and batch_size must be at least 1"):
        module.sample(0)
    with pytest.raises(ValueError, match=r"no 'points': set --data\.num_points=24"):
        module.losses({"id": ["a"], "attributes": {}})
    with pytest.raises(ValueError, match=r"shape \(1, 7, 3\), but the module's are \(B, 24, 3\)"):
        module.losses({"id": ["a"], "points": torch.zeros(1, 7, 3), "attributes": {}})
    with pytest.raises(ValueError, match=r"carries the attributes \['sex'\], but the model is conditional on 'race'"):
        module.generate(requests(1) | {"attributes": {"sex": torch.tensor([0])}})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_points": None}, r"num_points is None, the module's is 24: set --data\.num_points=24"),
        ({"num_classes": 2}, "num_classes: Outlines has 2, the module was built for 3"),
        ({"image_size": (40, 40)}, r"image_size: Outlines has \(40, 40\), the module was built for \(40, 52\)"),
        ({"num_groups": {"race": 5}}, "attribute 'race': Outlines has 5 groups, the module was built for 3"),
    ],
)
def test_data_that_the_module_was_not_built_for_are_refused(tmp_path, facts, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(PointDiffusion(**SMALL, **RACES), Outlines(**facts))


def test_the_authors_weights_come_with_their_statistics_to_a_module_that_uses_them_alike(tmp_path):
    trained = PointDiffusion(**SMALL, reference_behaviour=True)
    torch.save({"mean": torch.tensor([[300.0, 400.0, -2.0]]), "std": torch.tensor([180.0])}, tmp_path / "stats_Male.pt")
    module = PointDiffusion(**SMALL, reference_behaviour=True)
    report = module.load_reference_weights(trained.network.reference_tensors(), tmp_path / "stats_Male.pt")
    assert len(report.loaded) == len(trained.network.state_dict())
    assert (module.statistics.shift.tolist(), module.statistics.scale.tolist()) == ([300, 400, -2], [180, 180, 180])
    assert bool(module.statistics.measured)
    with pytest.raises(ValueError, match="reference_behaviour=True"):
        PointDiffusion(**SMALL).load_reference_weights(trained.network.reference_tensors())


def test_clouds_are_counted_after_the_authors_weights_and_statistics_were_loaded(tmp_path):
    module = PointDiffusion(**SMALL, **RACES, reference_behaviour=True)
    statistics = {"mean": torch.tensor([[19.0, 26.0, 0.0]]), "std": torch.tensor([9.0])}
    module.load_reference_weights(module.network.reference_tensors(), statistics)
    trainer(tmp_path, limit_val_batches=0).fit(module, Outlines())
    assert module.statistics.num_clouds.tolist() == [3, 3, 0, 1]
    assert (module.statistics.shift.tolist(), module.statistics.scale.tolist()) == ([19, 26, 0], [9, 9, 9])


def test_the_authors_weights_load_all_or_nothing_and_on_any_device():
    module = PointDiffusion(**SMALL, reference_behaviour=True)
    before = module.network.flow.networks[0][0].weight.clone()
    ones = {name: torch.ones_like(tensor) for name, tensor in module.network.reference_tensors().items()}
    with pytest.raises(CheckpointMismatchError, match=r"missing: std"):
        module.load_reference_weights(ones, {"mean": torch.zeros(1, 3)})
    assert torch.equal(module.network.flow.networks[0][0].weight, before)
    assert not module.statistics.measured
    module.to("meta").load_reference_weights(ones)  # a device on which nothing compares with the CPU


def test_decoding_and_sampling_avoid_a_device_without_float64(monkeypatch):
    assert cloud_sampling.float64_device(torch.device("mps")) == torch.device("cpu")
    assert cloud_sampling.float64_device(torch.device("cuda:1")) == torch.device("cuda:1")
    monkeypatch.setattr(cloud_sampling, "float64_device", lambda device: torch.device("meta"))
    seen = []

    def decode(points):
        seen.append(points.device.type)
        return torch.ones(len(points), 1, *SIZE)

    masks, errors = cloud_sampling.decode_each(torch.zeros(2, POINTS, 3), decode, SIZE)
    assert (seen, masks.device.type, errors) == (["meta"], "cpu", {})


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_weights_are_refused(tmp_path, precision):
    run = trainer(tmp_path)
    run.strategy.precision_plugin = HalfPrecision(precision)
    with pytest.raises(ValueError, match=f"precision={precision}: .*Use bf16-mixed"):
        run.fit(PointDiffusion(**SMALL), Outlines(3))


def test_requests_must_tell_the_group_that_the_model_knows(tmp_path):
    data = Outlines(attribute_groups={"sex": ["f", "m"], "race": ["a", "b", "c"]}, generate=object())
    data.predict_dataloader = lambda: DataLoader([requests(1)], batch_size=None)
    module = PointDiffusion(**SMALL, num_groups={"sex": 2, "race": 3}, attribute="race")
    with pytest.raises(ValueError, match=r"asks for groups of 'sex', the first of .*Name 'race' first"):
        trainer(tmp_path).predict(module, data)


def test_a_checkpoint_of_other_groups_is_refused_by_name(tmp_path):
    run = trainer(tmp_path)
    module = PointDiffusion(**SMALL, **RACES)
    run.validate(module, Outlines(3), verbose=False)
    run.save_checkpoint(tmp_path / "three.ckpt")
    with pytest.raises(
        ValueError, match=r"shape of network\.prior_mean\.weight: found \(4, 256\), expected \(3, 256\)"
    ):
        trainer(tmp_path).validate(
            PointDiffusion(**SMALL, num_groups={"race": 2}), Outlines(3), tmp_path / "three.ckpt", weights_only=True
        )


def test_training_brings_the_clouds_near_the_real_ones_and_tells_the_groups_apart():
    samples = [sample(i, radius=15 if i % 2 else 8) for i in range(64) if i != 4]
    real = collate(samples)
    module = PointDiffusion(**SMALL | {"num_steps": 10}, num_groups={"race": 2})
    module.measure([real])

    def spread_and_distance():
        group = torch.arange(40) % 2
        clouds = module.statistics.normalize(module.draw(torch.arange(40), group))
        scores = generation_scores(clouds, module.statistics.normalize(real["points"]), "chamfer")
        return [clouds[group == g, :, :2].std(1).median() for g in (0, 1)], scores["mmd"]

    _, before = spread_and_distance()
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(160):
        optimizer.zero_grad()
        module.losses(collate([samples[i] for i in torch.randint(len(samples), (16,))]))["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10)
        optimizer.step()
    (small, large), after = spread_and_distance()
    assert after < before / 2
    assert large > 1.1 * small


@pytest.mark.parametrize("arguments", [{"decoder": "closing"}, {"reference_behaviour": True}])
def test_fairdiffs_own_decoder_is_refused_for_other_structures_than_a_disc_and_a_cup(arguments):
    with pytest.raises(ValueError, match=r"num_classes=4: decoder='closing'.* Set decoder='polygon'"):
        PointDiffusion(num_classes=4, image_size=64, **arguments)
