import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from fairdiff_lightning.data import collate
from fairdiff_lightning.diffusion.control_sphere import control_sphere, draw_spheres
from fairdiff_lightning.diffusion.lesion_channels import class_masks
from fairdiff_lightning.diffusion.lesion_cleanup import clean_lesions
from fairdiff_lightning.modules.lesion_mask_diffusion import LesionMaskDiffusion
from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError

SIZE = (12, 8, 5)
TINY = {"image_size": SIZE, "width": 8, "multipliers": (1, 2), "num_steps": 3}
HEART = {"num_classes": 5, "boundary_classes": (2,), "lesion_classes": (3, 4)}
SPHERES = torch.tensor([[6.0, 4, 2, 3], [4.0, 3, 2, 2], [7.5, 4.5, 2.5, 2.2]])


def module(**arguments):
    torch.manual_seed(0)
    return LesionMaskDiffusion(**{**TINY, **arguments}).eval()


def sample(k, num_classes=2):
    mask = torch.zeros(1, *SIZE, dtype=torch.int64)
    if num_classes == 5:
        mask[:, 2:10, 1:7, 1:4] = 2
        mask[:, 5:8, 3:5, 2:4] = 1
        mask[:, 3:5, 2 : 4 + k % 2, 1:4] = 3
        mask[:, 4, 2, 2] = 4
    else:
        mask[:, 4 : 6 + k % 4, 2:5, 1:4] = 1
    return {"id": f"s{k}", "image": torch.rand(1, *SIZE), "mask": mask, "attributes": {}}


def requests(size=3, num_classes=2, **more):
    return {**collate([sample(k, num_classes) for k in range(size)]), "seed": torch.arange(size) + 5, **more}


def knows(made, wanted):
    """Let a module's network know the lesion (B, K, H, W, D) bool that every mask shows."""

    def perfect(noisy, steps):
        kept = made.noise.alphas_cumprod[steps].float().view(-1, 1, 1, 1, 1)
        return (noisy[:, : len(made.classes)] - kept.sqrt() * (wanted.float() * 2 - 1)) / (1 - kept).sqrt()

    made.network.forward = perfect
    return made


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dataloader|The '.*_dataloader'|.*came out without a lesion")
        yield


@pytest.mark.parametrize("arguments", [{}, {"sampler": "DPMSolverMultistepScheduler", "eta": 0.0}])
def test_what_the_network_knows_comes_out(arguments):
    wanted = draw_spheres(SPHERES, SIZE)
    made = knows(module(cleanup=False, **arguments), wanted)
    assert torch.equal(made.sample(SPHERES, seeds=torch.arange(3)), wanted.long())


@pytest.mark.parametrize("cleanup", [True, False])
def test_no_voxel_leaves_the_boundary(cleanup):
    boundary = torch.zeros(3, 1, *SIZE, dtype=torch.uint8)
    boundary[..., 3:9, 2:6, 1:4] = 1
    everything = torch.ones(3, 1, *SIZE, dtype=torch.bool)
    for made in (module(cleanup=cleanup), knows(module(cleanup=cleanup), everything)):
        found = made.generate(requests(sphere=SPHERES, boundary=boundary))["mask"]
        assert not found[boundary == 0].any()
    assert found.flatten(1).any(1).all()
    assert cleanup or torch.equal(found, boundary.long())


def test_the_network_sees_nothing_outside_of_the_boundary(monkeypatch):
    made, seen = module(), []
    boundary = torch.zeros(3, 1, *SIZE, dtype=torch.bool)
    boundary[..., 3:9, :, :] = True

    def watch(noisy, steps, forward=made.network.forward):
        seen.append((noisy[:, :1][~boundary], steps))
        return forward(noisy, steps)

    monkeypatch.setattr(made.network, "forward", watch)
    made.sample(SPHERES, boundary, torch.arange(3))
    for outside, step in seen[1:]:
        kept = made.noise.alphas_cumprod[step]
        noise = (outside + kept.sqrt()) / (1 - kept).sqrt()
        assert abs(noise.mean()) < 0.15
        assert 0.9 < noise.std() < 1.1
    assert len(seen) == 3


@pytest.mark.parametrize(("encoding", "values"), [("signed", [-1, 1]), ("uint8_wrap", [1, 255])])
def test_the_sphere_is_a_channel_without_noise(monkeypatch, encoding, values):
    made, seen = module(sphere_encoding=encoding), []

    def watch(noisy, steps, forward=made.network.forward):
        seen.append(noisy[:, 1:])
        return forward(noisy, steps)

    monkeypatch.setattr(made.network, "forward", watch)
    made.losses(requests())
    made.generate(requests())
    expected = draw_spheres(control_sphere(requests()["mask"]), SIZE)
    for channel in seen:
        assert channel.unique().tolist() == values
        assert torch.equal(channel == 1, expected)
    assert len(seen) == 4


@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("l2", 2)])
def test_the_loss_is_over_the_whole_volume(monkeypatch, loss, power):
    made, asked = module(loss=loss, **HEART), requests(num_classes=5)
    target = class_masks(asked["mask"], (3, 4)).float() * 2 - 1
    noise = []

    def half(noisy, steps):
        kept = made.noise.alphas_cumprod[steps].float().view(-1, 1, 1, 1, 1)
        noise.append((noisy[:, :2] - kept.sqrt() * target) / (1 - kept).sqrt())
        return noise[0] / 2

    monkeypatch.setattr(made.network, "forward", half)
    found = made.losses(asked)["loss"]
    torch.testing.assert_close(found, (noise[0] / 2).abs().pow(power).mean(), rtol=1e-4, atol=0)
    assert 0.8 < noise[0].std() < 1.2


@pytest.mark.parametrize("arguments", [{}, HEART])
def test_a_mask_depends_on_its_own_seed(arguments):
    made, asked = module(cleanup=False, **arguments), requests(num_classes=arguments.get("num_classes", 2))
    whole = made.generate(asked)["mask"]
    for k in range(3):
        alone = made.generate({key: value[k : k + 1] for key, value in asked.items() if key != "attributes"})
        assert (alone["mask"][0] != whole[k]).sum() <= 1  # rounding differs with the batch's size
    assert not torch.equal(made.generate(asked | {"seed": torch.arange(3) + 50})["mask"], whole)
    assert torch.equal(made.generate(asked)["mask"], whole)


def test_hearts_keep_their_classes_around_the_new_lesion():
    asked = requests(num_classes=5)
    wanted = torch.zeros(3, 2, *SIZE, dtype=torch.bool)
    wanted[:, 0, 7:11, 3:7, 1:5] = True
    wanted[:, 1, 8, 5, 2:4] = True
    wanted[:, 0] &= ~wanted[:, 1]
    made = knows(module(cleanup=False, **HEART), wanted)
    found = made.generate(asked)["mask"]
    region = (asked["mask"] >= 2)[:, 0]
    for k, class_index in enumerate((3, 4)):
        assert torch.equal(found[:, 0] == class_index, wanted[:, k] & region)
    lesion = wanted.any(1) & region
    assert torch.equal(found[:, 0][~lesion & region].unique(), torch.tensor([2]))
    assert torch.equal(found[:, 0][~region], asked["mask"][:, 0][~region])
    assert set(found.unique().tolist()) == {0, 1, 2, 3, 4}
    cleaned = knows(module(**HEART), wanted).generate(asked)["mask"][:, 0]
    assert not (cleaned[~region] > 2).any()
    assert (cleaned == 4).any()


def test_a_boundary_narrows_that_of_the_mask():
    made = knows(module(cleanup=False, **HEART), torch.ones(3, 2, *SIZE, dtype=torch.bool))
    half = torch.zeros(3, 1, *SIZE, dtype=torch.bool)
    half[:, :, :6] = True
    asked = requests(num_classes=5, boundary=half)
    assert torch.equal(made.generate(asked)["mask"] > 2, half & (asked["mask"] >= 2))


def test_a_sphere_is_asked_for_in_a_mask_without_lesions():
    asked = requests(num_classes=5)
    asked["mask"][asked["mask"] > 2] = 2
    sphere = torch.tensor([[9.0, 3, 2, 2]] * 3)
    ball = draw_spheres(sphere, SIZE)
    made = knows(module(cleanup=False, **HEART), torch.cat([ball, torch.zeros_like(ball)], 1))
    found = made.generate({**asked, "sphere": sphere})["mask"]
    assert torch.equal(found == 3, ball & (asked["mask"] == 2))


def test_what_belongs_to_the_grid_is_handed_on():
    asked = requests(affine=torch.eye(4).expand(3, 4, 4) * 2)
    found = module().predict_step(asked)
    assert "image" not in found, "the old scan does not show the new lesion"
    assert torch.equal(found["affine"], asked["affine"])
    assert found["mask"].shape == asked["mask"].shape
    assert (found["mask"].dtype, found["synthetic"].all()) == (torch.int64, torch.tensor(True))


def test_larger_lesions_are_asked_for_by_scale():
    asked = requests()
    alone, larger = module(), module(radius_scale=1.5)
    spheres = alone.spheres(asked["mask"])
    drawn = []
    for made in (alone, larger):
        made._draw = lambda given, *rest: drawn.append(given) or torch.zeros(3, 1, *SIZE, dtype=torch.int64)
        with pytest.warns(UserWarning, match="without a lesion"):
            made.generate(asked)
    assert len(drawn) == 6, "what comes out empty is drawn twice more"
    torch.testing.assert_close(drawn[0], spheres)
    torch.testing.assert_close(drawn[3], spheres * torch.tensor([1, 1, 1, 1.5]))


def test_blocks_without_a_lesion_get_one_in_their_middle():
    made, asked = module(), requests()
    made.bank.measure(torch.tensor([[0, 0, 0, 2.0]]))
    asked["mask"][1] = 0
    drawn = []
    made._draw = lambda spheres, *rest: drawn.append(spheres) or torch.ones(3, 1, *SIZE, dtype=torch.int64)
    made.generate(asked)
    assert drawn[0][1].tolist() == [*(side // 2 for side in SIZE), 2.0]
    torch.testing.assert_close(drawn[0][[0, 2]], made.spheres(asked["mask"])[[0, 2]])


def test_anatomy_without_a_lesion_gets_a_place_and_the_size_of_a_training_lesion():
    made = module(num_classes=4, lesion_classes=(2, 3), boundary_classes=(1,))
    made.bank.measure(torch.tensor([[0, 0, 0, 1.5], [0, 0, 0, -1.0], [0, 0, 0, 2.5]]))
    assert made.bank.radii.tolist() == [1.5, 2.5]
    anatomy = torch.zeros(3, 1, *SIZE, dtype=torch.int64)
    anatomy[:, :, 2:7, 2:7, 2:5] = 1
    asked = {"seed": torch.arange(3), "id": ["a", "b", "c"], "mask": anatomy}
    drawn = []
    made._draw = lambda spheres, boundary, seeds: drawn.append(spheres) or boundary.long() * 2
    made.generate(asked)
    (spheres,) = drawn
    assert set(spheres[:, 3].tolist()) <= {1.5, 2.5}
    assert all(anatomy[0, 0][tuple(centre)] == 1 for centre in spheres[:, :3].long().tolist())
    made.generate({key: value[1:2] for key, value in asked.items()})
    torch.testing.assert_close(drawn[1], spheres[1:2])
    again = module(num_classes=4, lesion_classes=(2, 3), boundary_classes=(1,))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.bank.radii, made.bank.radii)
    with pytest.raises(ValueError, match="no training lesion was measured"):
        module(num_classes=4, lesion_classes=(2, 3), boundary_classes=(1,)).generate(asked)
    with pytest.raises(ValueError, match="without a voxel of the boundary classes"):
        made.generate({**asked, "mask": torch.zeros_like(anatomy)})


def test_samples_without_a_lesion_are_named(monkeypatch):
    monkeypatch.setattr("fairdiff_lightning.modules.lesion_mask_diffusion.ATTEMPTS", 1)
    nothing = torch.zeros(3, 1, *SIZE, dtype=torch.bool)
    nothing[1] = draw_spheres(SPHERES[1:2], SIZE)
    made = knows(module(), nothing)
    with pytest.warns(UserWarning, match="2 of 3 masks came out without a lesion: s0, s2. Ask for a larger radius"):
        found = made.generate(requests(sphere=SPHERES))["mask"]
    assert found.flatten(1).any(1).tolist() == [False, True, False]


def test_without_seeds_every_mask_is_new():
    made = module(cleanup=False)
    torch.manual_seed(3)
    first, second = made.sample(SPHERES), made.sample(SPHERES)
    assert not torch.equal(first, second)
    assert first.shape == (3, 1, *SIZE)


def test_reference_behaviour_is_the_authors():
    made = module(reference_behaviour=True)
    s = made.settings
    assert (s["num_steps"], s["eta"], s["sphere_encoding"], s["loss"]) == (300, 0.0, "uint8_wrap", "l1")
    assert type(made.make_sampler()).__name__ == "DDPMScheduler"
    assert float(made.noise.betas[-1]) == pytest.approx(0.9999)
    mask = requests()["mask"]
    assert torch.equal(made.spheres(mask), control_sphere(mask, truncate=True))
    made.settings["num_steps"] = 4
    knows(made, draw_spheres(SPHERES, SIZE))
    found = made.generate(requests())["mask"]
    assert found.shape == (3, 1, 18, 12, 8)
    assert found.flatten(1).any(1).all()
    with pytest.raises(ValueError, match="reference_behaviour=True has no boundary"):
        made.sample(SPHERES, torch.ones(3, 1, *SIZE))


def test_weights_of_the_authors_load_by_renaming():
    made, other = module(sphere_encoding="uint8_wrap"), module()
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.add_(0.1)
    named = {f"denoise_fn.module.{name}": tensor for name, tensor in other.network.reference_tensors().items()}
    made.load_reference_weights({"step": 80_000, "model": named, "ema": {}, "scaler": None})
    for loaded, wanted in zip(made.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(loaded, wanted)
    with pytest.warns(UserWarning, match="set sphere_encoding='uint8_wrap'"):
        module().load_reference_weights(named)
    del named["denoise_fn.module.init_conv.bias"]
    with pytest.raises(CheckpointMismatchError, match=r"init_conv\.bias"):
        made.load_reference_weights({"model": named})


def test_the_papers_network_has_its_parameters(reference):
    with torch.device("meta"):
        network = LesionMaskDiffusion(image_size=(64, 64, 32)).network
    expected = reference("lefusion")["param_counts"]["diffmask_lidc(dim64,ch2->1,no cond)"]
    assert sum(p.numel() for p in network.parameters()) == expected == 35_711_041


@pytest.mark.parametrize("reference_behaviour", [False, True])
def test_training_validates_and_reloads(tmp_path, reference_behaviour):
    made = module(reference_behaviour=reference_behaviour).train()
    made.settings["num_steps"] = 2
    samples = [sample(k) for k in range(4)]
    samples[3]["mask"].zero_()  # a lesion that the crop has cut off
    loader = DataLoader(samples, batch_size=2, collate_fn=collate)
    trainer = Trainer(
        max_epochs=1,
        num_sanity_val_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(made, loader, loader)
    logged = trainer.callback_metrics
    assert logged["train/loss"].isfinite() & logged["val/loss"].isfinite()
    assert logged["val/volume_ratio"] >= 0
    assert 0 <= logged["val/outside_sphere"] <= 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = LesionMaskDiffusion.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    again.settings["num_steps"] = 2
    assert torch.equal(again.generate(requests())["mask"], made.eval().generate(requests())["mask"])


@pytest.mark.parametrize("reference_behaviour", [False, True])
def test_perfect_masks_score_what_smoothing_makes_of_them(reference_behaviour):
    made, batch = module(reference_behaviour=reference_behaviour), requests(2)
    batch["mask"][:, :, 3:9, 2:7, 1:4] = 1
    made.settings["num_steps"] = 3
    made.log_dict = lambda *args, **kwargs: None
    asked = draw_spheres(made.spheres(batch["mask"]), SIZE)
    knows(made, asked)
    made._validation_budget = 5
    output = made.validation_step(batch, 0)
    ratio, outside = (made.metrics[name].compute() for name in ("volume_ratio", "outside_sphere"))
    smoothing = clean_lesions(asked).sum() / asked.sum()  # makes small lesions larger
    assert float(ratio) == pytest.approx(float(smoothing), rel=0.12 if reference_behaviour else 1e-6)
    assert float(outside) < (0.05 if reference_behaviour else 1e-6)
    assert output["generated"]["id"] == ["s0", "s1"]
    assert "image" not in output["generated"]
    assert made._validation_budget == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (15, 8, 6)}, r"give multiples of \(2, 2, 1\)"),
        ({"sampler": "Magic"}, "scheduler 'Magic' is not known"),
        ({"loss": "l3"}, "loss='l3'; expected is l1 or l2"),
        ({"sphere_encoding": "bytes"}, "sphere_encoding 'bytes'"),
        ({"lesion_classes": (2,)}, "different classes from 1 to 1"),
        ({"lesion_classes": ()}, "at least one lesion class"),
        ({**HEART, "lesion_classes": (2, 3)}, r"lesion_classes \(2, 3\) and boundary_classes \(2,\)"),
        ({**HEART, "reference_behaviour": True}, "the authors' code has one lesion class and no boundary"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_lesions_are_what_the_boundary_leaves():
    assert module(num_classes=5, boundary_classes=(1, 2)).classes == (3, 4)


NOWHERE = torch.zeros(3, 1, *SIZE)
CORNER = NOWHERE.clone()
CORNER[:, :, 0, 0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": None}, "neither 'sphere' .* nor 'mask'"),
        ({"mask": NOWHERE.long()}, r"no training lesion was measured, so that no size can be drawn"),
        ({"mask": torch.ones(3, 1, 8, 8, 6)}, r"mask has shape .* expected is \(3, 1, 12, 8, 5\)"),
        ({"mask": None, "sphere": SPHERES * torch.tensor([1, 1, 1, 0])}, "radius 0.0"),
        ({"mask": None, "sphere": SPHERES + torch.tensor([0, 0, 9, 0])}, "centre inside of the volume of 12 x 8 x 5"),
        ({"mask": None, "sphere": SPHERES[:, :3]}, r"expected is \(B, 4\)"),
        ({"boundary": CORNER}, "the sphere of sample 0 lies outside of the boundary entirely"),
        ({"boundary": NOWHERE}, "outside of the boundary entirely"),
        ({"boundary": torch.ones(3, *SIZE)}, r"boundary has shape \(3, 12, 8, 5\)"),
        ({"mask": None, "sphere": SPHERES[:2]}, "seeds is for 3 samples and background has 2"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(changes, message):
    asked = {key: value for key, value in {**requests(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        module().generate(asked)


def test_spheres_are_checked_outside_of_a_trainer_too():
    with pytest.raises(ValueError, match="radius above 0"):
        module().sample(torch.tensor([[4.0, 4, 3, -1]]))
