"""Separate networks, context, textures and guidance of LeFusion; that it trains and paints is tested beside."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from fairdiff_lightning.callbacks import GeneratedGrid, generated_grid
from fairdiff_lightning.data import collate
from fairdiff_lightning.data.seeding import derive_seed
from fairdiff_lightning.modules import LeFusionInpaint, LesionMaskDiffusion
from fairdiff_lightning.networks.checkpoint import CheckpointMismatchError

SIZE = (16, 8, 6)
TINY = {"width": 8, "multipliers": (1, 2), "network_args": {"heads": 2, "head_dim": 8}, "num_steps": 3}


def module(**arguments):
    torch.manual_seed(0)
    plain = {"image_size": SIZE, "num_classes": 3, "jump_length": 1, "jump_n_sample": 1, "textures": 2}
    return LeFusionInpaint(**{**TINY, **plain, **arguments}).eval()


def sample(k, synthetic=False):
    """Two classes that touch; the second class alone where k is 2."""
    draws = torch.Generator().manual_seed(k)
    mask = torch.zeros(1, *SIZE, dtype=torch.int64)
    mask[:, 4:9, 2:6, 1:5] = 2
    if k != 2:
        mask[:, 4:6, 2:6, 1:5] = 1
    image = torch.rand(1, *SIZE, generator=draws) * (0.9 if synthetic else 0.4) + 0.05
    return {"id": f"s{k}", "image": image, "mask": mask, "attributes": {}, "synthetic": torch.tensor(synthetic)}


def requests(size=3, bins=32):
    textures = torch.rand(size, bins // 16, 16, generator=torch.Generator().manual_seed(9))
    textures = (textures / textures.sum(-1, keepdim=True)).flatten(1)
    return {**collate([sample(k) for k in range(size)]), "seed": torch.arange(size) + 5, "texture": textures}


def measure_on(made, samples):
    """What a module measures before the first step."""
    loader = DataLoader(samples, batch_size=2, collate_fn=collate)
    made._trainer = SimpleNamespace(fit_loop=SimpleNamespace(setup_data=lambda: None), train_dataloader=loader)
    made.on_fit_start()
    return made.bank


@pytest.mark.parametrize("roi", ["volume", "lesion"])
def test_modules_of_one_class_paint_one_after_the_other(roi):
    asked, given = requests(), {"roi": roi, "context": 2, "guidance_scale": 1.5}
    first, second = (module(lesion_classes=(k,), **given) for k in (1, 2))
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.add_(0.02)
    dark, bright = asked["texture"].split(16, 1)
    with pytest.warns(UserWarning, match=r"the masks of s2 have no voxel of the lesion classes \(1,\)"):
        half = first.predict_step({**asked, "texture": dark})
    seeds = torch.tensor([derive_seed("network", 1, seed) for seed in asked["seed"].tolist()])
    whole = second.predict_step({**half, "texture": bright, "seed": seeds})["image"]
    mask, healthy = asked["mask"], asked["image"]
    assert torch.equal(whole[mask == 0], healthy[mask == 0])
    assert torch.equal(whole[mask == 1], half["image"][mask == 1]), "what is painted is not painted again"
    assert torch.equal(half["image"][mask == 2], healthy[mask == 2])
    for k in (1, 2):
        assert (whole[mask == k] != healthy[mask == k]).float().mean() > 0.99, "no voxel of a lesion is left out"
    alone = second.predict_step({**asked, "texture": bright, "seed": seeds})["image"]
    assert not torch.equal(alone[mask == 2], whole[mask == 2]), "the second class is painted around the first"

    together = module(decomposition="separate", **given)
    for network, made in zip(together.network.networks, (first, second), strict=True):
        network.load_state_dict(made.network.state_dict())
    torch.testing.assert_close(together.generate(asked)["image"], whole, rtol=0, atol=1e-5)


def test_separate_networks_learn_their_own_class_alone():
    made = module(decomposition="separate").train()
    batch = collate([sample(2), sample(2)])
    made.losses(batch)["loss"].backward()
    learnt = [sum(p.grad.abs().sum() for p in network.parameters()) for network in made.network.networks]
    assert learnt[0] == 0
    assert learnt[1] > 0
    assert [network.channels for network in made.network.networks] == [1, 1]
    assert [network.cond_dim for network in made.network.networks] == [16, 16]
    with pytest.raises(TypeError, match="use decomposition='joint'"):
        made.load_reference_weights({})
    again = module(decomposition="separate")
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.generate(requests())["image"], made.eval().generate(requests())["image"])


def test_networks_that_paint_are_those_that_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    for decomposition in ("joint", "separate"):
        made = module(decomposition=decomposition, compile=True)
        made._trainer = SimpleNamespace(datamodule=None, precision="32-true")
        made.setup("predict")
    assert [network.channels for network in compiled] == [2, 1, 1]


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_hearts_weights_of_the_authors_load_by_renaming(weights):
    hearts = {"num_classes": 5, "lesion_classes": (3, 4)}
    made, other = module(**hearts), module(**hearts)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.add_(0.1)
    named = {f"denoise_fn.module.{name}": tensor for name, tensor in other.network.reference_tensors().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    held = {"step": 50_000, "model": zeros, "ema": zeros} | {"model" if weights == "raw" else "ema": named}
    made.load_reference_weights(held, weights)
    for loaded, wanted in zip(made.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(loaded, wanted)
    with pytest.raises(CheckpointMismatchError, match=r"init_conv\.weight"):
        module(num_classes=2).load_reference_weights({"model": named})


@pytest.mark.parametrize("context", [0, 1, (3, 1, 0), 5])
def test_context_changes_what_the_network_sees_and_not_what_is_kept(context):
    asked, seen = requests(), []
    made = module(roi="lesion", context=context)
    made.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0].shape[2:]))
    found = made.generate(asked)["image"]
    lesion = asked["mask"] > 0
    assert found.shape == asked["image"].shape
    assert torch.equal(found[~lesion], asked["image"][~lesion])
    assert not torch.equal(found[lesion], asked["image"][lesion])
    height, width, depth = (context,) * 3 if isinstance(context, int) else context
    expected = [2 * -(-(9 + height) // 2) - max(4 - height, 0) // 2 * 2]
    expected += [min(6 + width + width % 2, 8) - max(2 - width, 0) // 2 * 2, min(5 + depth, 6) - max(1 - depth, 0)]
    assert set(seen) == {torch.Size(expected)}


def test_context_as_large_as_the_volume_is_the_volume():
    asked = requests()
    whole = module(roi="volume").generate(asked)["image"]
    assert torch.equal(module(roi="lesion", context=16).generate(asked)["image"], whole)
    assert not torch.equal(module(roi="lesion", context=0).generate(asked)["image"], whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": -1}, "context=-1; expected is one whole number of at least 0, or 3, one for each axis"),
        ({"context": (4, 4)}, r"context=\(4, 4\)"),
        ({"context": 2.5}, "context=2.5; expected is one whole number"),
        ({"decomposition": "both"}, "decomposition='both'; expected is joint or separate"),
        ({"textures": 0}, "textures 0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


@pytest.mark.parametrize("decomposition", ["joint", "separate"])
@pytest.mark.parametrize("roi", ["volume", "lesion"])
def test_textures_of_one_lesion_in_a_batch_are_what_each_is_alone(decomposition, roi):
    made, one = module(decomposition=decomposition, roi=roi, guidance_scale=2.0), requests(1)
    textures = torch.eye(16)[[1, 8, 14]].repeat(1, 2)
    block = {key: one[key].expand(3, *one[key].shape[1:]) for key in ("image", "mask")}
    several = {**block, "id": ["a", "b", "c"], "attributes": {}, "seed": one["seed"].expand(3), "texture": textures}
    found = made.predict_step(several)["image"]
    for k in range(3):
        alone = made.predict_step({**one, "texture": textures[k : k + 1]})["image"][0]
        torch.testing.assert_close(found[k], alone, rtol=0, atol=1e-5)
        painted = made.paint(one["image"], one["mask"], textures[k : k + 1], one["seed"])[0]
        assert torch.equal(painted, alone)
        assert torch.equal(found[k][one["mask"][0] == 0], one["image"][0][one["mask"][0] == 0])
    for k, other in ((0, 1), (1, 2), (0, 2)):
        assert (found[k] - found[other]).abs().max() > 1e-4, "the texture, not the seed alone, tells them apart"


def test_textures_are_those_of_real_lesions_alone():
    real, made = [sample(k) for k in range(3)], [sample(k, synthetic=True) for k in range(4)]
    bank = measure_on(module(), [made[0], real[0], made[1], made[2], real[1], made[3], real[2]])
    assert torch.equal(bank.histograms, measure_on(module(), real).histograms)
    assert len(bank.histograms) == len(bank.groups) == 3
    untold = [{key: value for key, value in one.items() if key != "synthetic"} for one in real]
    assert torch.equal(measure_on(module(), untold).histograms, bank.histograms)
    with pytest.raises(ValueError, match=r"0 real training lesions.*Train on more lesions that no generator made"):
        measure_on(module(), made)


def test_sizes_are_those_of_real_lesions_alone():
    made = sample(0, synthetic=True)
    made["mask"][:] = 1
    radii = measure_on(LesionMaskDiffusion(SIZE, num_classes=3, **TINY), [sample(0), made, sample(1)]).radii
    assert len(radii) == 2
    assert radii.max() < 5


@pytest.mark.parametrize("conditioning", ["film", "cross_attention"])
@pytest.mark.parametrize("decomposition", ["joint", "separate"])
def test_guidance_starts_from_what_is_predicted_without_a_texture(conditioning, decomposition):
    made, asked = module(conditioning=conditioning, decomposition=decomposition, guidance_scale=3.0), requests()
    noisy, step = torch.randn(3, 2, *SIZE, generator=torch.Generator().manual_seed(1)), torch.tensor(40)
    with torch.no_grad():
        found = made._predict(made.network, noisy, step, asked["texture"])
        given, null = made.network(noisy, step, asked["texture"]), made.network(noisy, step)
    torch.testing.assert_close(found, null + 3 * (given - null), rtol=1e-4, atol=1e-4)
    assert (found - given).abs().max() > 1e-3
    painted = made.generate(asked)["image"]
    made.settings["guidance_scale"] = 1.0
    assert not torch.equal(made.generate(asked)["image"], painted)


@pytest.mark.parametrize("conditioning", ["film", "cross_attention"])
def test_training_shows_the_network_textures_and_their_absence(conditioning):
    """Every other texture is dropped: both ways into the network learn, and the loss of the same noise falls."""
    made, batch = module(conditioning=conditioning, condition_dropout=0.5), collate([sample(k) for k in range(3)])
    optimizer, seen, seeded = torch.optim.Adam(made.parameters(), 1e-2), [], {**batch, "seed": torch.arange(3)}
    first, null = made.losses(seeded)["loss"].item(), made.network.null_condition.detach().clone()
    made.train().network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[3]))
    for _ in range(10):
        optimizer.zero_grad()
        made.losses(batch)["loss"].backward()
        optimizer.step()
    entry = made.network.tokens if conditioning == "cross_attention" else made.network.downs[0].block1.film
    assert all(p.grad.abs().sum() > 0 for p in entry.parameters())
    assert not torch.equal(made.network.null_condition, null)
    assert 0.2 < torch.cat(seen).float().mean() < 0.8
    assert made.eval().losses(seeded)["loss"] < 0.9 * first


def test_validation_shows_the_scan_the_mask_and_what_is_painted(monkeypatch):
    made, batch, drawn = module(), collate([sample(k) for k in range(3)]), []
    monkeypatch.setattr(generated_grid, "picture_grid", lambda rows, titles: drawn.append(rows))
    monkeypatch.setattr(generated_grid, "log_figure", lambda *arguments: None)
    monkeypatch.setattr(made, "log_dict", lambda *arguments, **options: None)
    made._validation_budget = 2
    trainer = SimpleNamespace(is_global_zero=True, sanity_checking=False, current_epoch=0, global_step=0)
    GeneratedGrid().on_validation_batch_end(trainer, made, made.validation_step(batch, 0), batch, 0)
    (rows,) = drawn
    assert list(rows) == ["real", "real mask", "generated"]
    for k, (before, after) in enumerate(zip(rows["real"], rows["generated"], strict=True)):
        depth = batch["mask"][k, 0].count_nonzero(dim=(0, 1)).argmax()
        lesion = batch["mask"][k, 0, ..., depth] > 0
        assert torch.equal(before, batch["image"][k, ..., depth])
        assert torch.equal(after[:, ~lesion], before[:, ~lesion])
        assert (after != before)[:, lesion].float().mean() > 0.9


def with_bank(made):
    histograms = torch.rand(9, 2, 16, generator=torch.Generator().manual_seed(1))
    histograms = (histograms / histograms.sum(-1, keepdim=True)).flatten(1)
    made.bank.measure(histograms, torch.arange(9) % 3)
    return made


def test_textures_are_asked_for_by_name_and_by_numbers_in_one_batch():
    made, asked = with_bank(module(texture="random")), requests(3)
    numbers = asked.pop("texture")
    mixed = {**asked, "texture": ["cluster:0", numbers[1], "exemplar:1"]}
    found = made.predict_step(mixed)["image"]
    for k, one in enumerate(mixed["texture"]):
        alone = {key: value[k : k + 1] for key, value in asked.items() if key != "attributes"} | {"attributes": {}}
        torch.testing.assert_close(
            made.predict_step({**alone, "texture": [one]})["image"][0], found[k], rtol=0, atol=1e-5
        )
    named = made.predict_step({**asked, "texture": ["random"] * 3})["image"]
    assert torch.equal(named, made.predict_step(asked)["image"]), "the module's own choice"
    with pytest.raises(ValueError, match="texture 'cluster:7': there are 2"):
        made.predict_step({**asked, "texture": ["cluster:7"] * 3})


@pytest.mark.parametrize(
    ("arguments", "textures", "message"),
    [
        ({"conditioning": None}, ["cluster:0"], r"textures=\['cluster:0'\] for a model with conditioning=None"),
        ({}, ["random", "cluster:2"], "texture 'cluster:2': there are 2"),
        ({}, ["dark.npy"], "texture_bins=8 for a model of bins=16"),
    ],
)
def test_textures_of_a_plan_are_those_that_the_model_knows(arguments, textures, message):
    plan = SimpleNamespace(textures=textures, texture_bins=8)
    data = SimpleNamespace(generate=plan, attribute_groups={}, dataset=SimpleNamespace(lesion_attributes=()))
    made = module(**arguments)
    made._trainer = SimpleNamespace(datamodule=data, precision="32-true")
    with pytest.raises(ValueError, match=message):
        made.setup("predict")
