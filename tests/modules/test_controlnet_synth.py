import copy
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_stable_diffusion import SD15_NOISE, SD15_UNET, write_stable_diffusion
from torch.utils.data import DataLoader

from fairdiff_lightning import DMoESegmenter, Segmenter
from fairdiff_lightning.callbacks import TrainableEMA
from fairdiff_lightning.data import GenerationPlan, Record, collate
from fairdiff_lightning.data.provenance import TRAINING_CASES, read_training_cases
from fairdiff_lightning.data.requests import RequestBatches, make_requests
from fairdiff_lightning.metrics.functional import dice_score
from fairdiff_lightning.modules import ControlNetSynth
from fairdiff_lightning.modules.adherence import MaskJudge
from fairdiff_lightning.networks import CheckpointMismatchError
from fairdiff_lightning.networks.prompt_mixture import PHRASES

PLAIN = {"num_classes": 3, "in_channels": 1, "image_size": (24, 16), "num_steps": 2, "num_groups": {"race": 3}}
SMALL = {"block_out_channels": (8, 16), "attention_head_dim": 2, "norm_num_groups": 4}
TINY = {**PLAIN, "base": "tiny", "base_args": SMALL, "trained": "all", "prompt": "{group}", "guidance_scale": 2.0}
NAMES = ["asian", "black", "white"]


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    return str(write_stable_diffusion(tmp_path_factory.mktemp("base")))


def tiny(**arguments):
    torch.manual_seed(1)
    return ControlNetSynth(**(TINY | arguments))


def latent(sd, **arguments):
    torch.manual_seed(1)
    module = ControlNetSynth(**({"base": sd, **PLAIN, "prompt": "fundus of {group}", "group_names": NAMES} | arguments))
    for block in (*module.controlnet.controlnet_down_blocks, module.controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)  # so that the condition has an effect before any training
    torch.nn.init.normal_(module.controlnet.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return module


def batch(count=3, size=(24, 16), **extra):
    samples = [
        {
            "image": torch.rand(1, *size, generator=torch.Generator().manual_seed(i)),
            "mask": torch.randint(3, (1, *size), generator=torch.Generator().manual_seed(i)),
            "attributes": {"race": torch.tensor(i % 4 - 1)},
            "id": f"s{i}",
            "seed": torch.tensor(1000 + i),
        }
        for i in range(count)
    ]
    return collate(samples) | extra


def requests(count, slices=1):
    """A batch of requests as a plan makes them, so many for each slice."""
    records = [Record(f"slice{i}", {}, {"race": 1}, f"slice{i}") for i in range(slices)]
    plan = GenerationPlan(per_source=count, masks="train")
    asked = make_requests(plan, {1: NAMES[1]}, {}, records, "race")

    def read(request):
        edge = torch.rand(1, 24, 16, generator=torch.Generator().manual_seed(int(request.condition.id[5:])))
        return {"edge": edge, "mask": (edge > 0.5).long()}

    return RequestBatches(asked, len(asked), ["race"], read)[0]


class Contract(LightningDataModule):
    def __init__(self, count=4, **facts):
        super().__init__()
        made = batch(count)
        self.samples = [{k: _row(v, i) for k, v in made.items() if k != "seed"} for i in range(count)]
        for name, value in facts.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=2, collate_fn=collate)

    val_dataloader = train_dataloader


def _row(value, i):
    return {k: v[i] for k, v in value.items()} if isinstance(value, dict) else value[i]


def trainer(folder, **arguments):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"enable_checkpointing": False, "max_epochs": 1} | arguments),
    )


def modules(sd):
    return {"tiny": tiny(), "latent": latent(sd)}


# parameters and what is trained


def write_configurations(folder):
    """Stable Diffusion 1.5 without its weights."""
    from diffusers import AutoencoderKL, PNDMScheduler

    with torch.device("meta"):
        UNet2DConditionModel(**SD15_UNET).save_config(folder / "unet")
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels).save_config(folder / "vae")
    PNDMScheduler(**SD15_NOISE).save_config(folder / "scheduler")


@pytest.mark.parametrize("trained", ["controlnet", "controlnet+decoder"])
def test_full_size_parameters_are_counted_as_in_the_reference(tmp_path, reference, trained):
    """cn03, on the meta device."""
    write_configurations(tmp_path)
    expected = reference("fairdiff")["cn03_params"]["expected"]
    with torch.device("meta"):
        module = ControlNetSynth(base=str(tmp_path), pretrained=False, trained=trained, condition="colours")
    assert sum(p.numel() for p in module.controlnet.parameters()) == expected["controlnet"] == 361_279_120
    assert sum(p.numel() for p in module.unet.parameters()) == expected["unet"] == 859_520_964
    assert sum(p.numel() for p in module.vae.parameters()) == 83_653_863
    learned = sum(p.numel() for p in module.parameters() if p.requires_grad) - module.prompts.learned.numel()
    wanted = {"controlnet": expected["controlnet"], "controlnet+decoder": expected["trainable_sd_unlocked"]}
    assert learned == wanted[trained]
    down, middle = module.controlnet(
        *(torch.empty(shape, device="meta") for shape in ((1, 4, 64, 64), (1,), (1, 77, 768), (1, 3, 512, 512))),
        return_dict=False,
    )
    assert [list(r.shape[1:]) for r in (*down, middle)] == expected["residual_shapes_for_64x64"]


@pytest.mark.parametrize("trained", ["controlnet", "controlnet+decoder", "all"])
def test_only_what_is_trained_moves_is_optimised_and_is_saved(sd, tmp_path, trained):
    module = latent(sd, trained=trained, num_validation_samples=1)
    before = copy.deepcopy(module.state_dict())
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, Contract())
    after = module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    prefixes = {"controlnet": ("controlnet.",), "all": ("controlnet.", "unet.")}
    decoder = ("controlnet.", "unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.")
    expected = {name for name in before if name.startswith(prefixes.get(trained, decoder))}
    assert moved <= expected
    assert len(moved) > 0.9 * len(expected)
    optimised = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for name, p in module.named_parameters() if name in expected}
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == expected


def test_a_checkpoint_without_the_frozen_part_gives_the_same_images_again(sd, tmp_path):
    data = Contract(attribute_groups={"race": NAMES}, num_groups={"race": 3})
    module = latent(sd, trained="controlnet+decoder", group_names=None, num_validation_samples=0)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = ControlNetSynth.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(module.eval().generate(batch())["image"], again.eval().generate(batch())["image"])
    resumed = latent(sd, trained="controlnet+decoder", num_validation_samples=0)
    trainer(tmp_path, max_epochs=2, max_steps=2).fit(resumed, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.trainer.global_step == 2


def test_resuming_without_the_average_warns(tmp_path):
    run = trainer(tmp_path, max_steps=1, callbacks=[TrainableEMA()])
    run.fit(tiny(num_validation_samples=0), Contract())
    run.save_checkpoint(tmp_path / "averaged.ckpt")
    with pytest.warns(UserWarning, match="trained with TrainableEMA"):
        trainer(tmp_path, max_steps=2).fit(
            tiny(num_validation_samples=0), Contract(), ckpt_path=tmp_path / "averaged.ckpt", weights_only=True
        )


def test_a_checkpoint_of_another_trained_part_is_refused_by_name(sd, tmp_path):
    module = latent(sd, num_validation_samples=0)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, Contract())
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointMismatchError, match=r"missing: unet\.conv_out\.weight"):
        ControlNetSynth.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, trained="controlnet+decoder")


def test_frozen_modules_stay_in_evaluation(sd):
    module = latent(sd, trained="controlnet+decoder").train()
    assert module.controlnet.training
    assert module.unet.up_blocks.training
    assert not any(m.training for part in (module.vae, module.unet.down_blocks) for m in part.modules())
    assert tiny().train().unet.training


@pytest.mark.parametrize("kind", ["tiny", "latent"])
def test_every_trained_parameter_gets_a_gradient(sd, kind):
    module = modules(sd)[kind].train()
    module.losses(batch())["loss"].backward()
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name, p in module.named_parameters() if not p.requires_grad and p.grad is not None]


def test_gradient_checkpointing_changes_no_gradient(sd):
    def gradient(**arguments):
        module = latent(sd, text_dropout=0.0, trained="controlnet+decoder", **arguments).train()
        module.losses(batch())["loss"].backward()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(gradient_checkpointing=True), gradient())


# the loss


@pytest.mark.parametrize("kind", ["tiny", "latent"])
def test_the_loss_depends_on_the_seed_alone(sd, kind):
    module = modules(sd)[kind].eval()
    whole = module.losses(batch())["loss"]
    torch.rand(5)
    assert torch.equal(module.losses(batch())["loss"], whole)
    rows = [{k: _rows(v, i) for k, v in batch().items()} for i in range(3)]
    torch.testing.assert_close(torch.stack([module.losses(row)["loss"] for row in rows]).mean(), whole)


def test_seeds_in_a_training_batch_do_not_freeze_its_noise():
    module = tiny(text_dropout=0.0, guidance_scale=1.0).train()
    with torch.no_grad():
        losses = {float(module.losses(batch())["loss"]) for _ in range(3)}
    assert len(losses) == 3


@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_the_loss_is_the_same_along_every_scheduler(scheduler):
    expected = tiny().eval().losses(batch())["loss"]
    torch.testing.assert_close(tiny(scheduler=scheduler).eval().losses(batch())["loss"], expected)


def _rows(value, i):
    return {k: v[i : i + 1] for k, v in value.items()} if isinstance(value, dict) else value[i : i + 1]


def test_min_snr_weighs_each_sample_by_its_step(sd):
    from fairdiff_lightning.diffusion import generators, timesteps

    plain, weighted = latent(sd).eval(), latent(sd, min_snr_gamma=5.0).eval()
    one = batch(1)
    draws = generators(one["seed"])
    plain.encode(one["image"], draws)
    torch.randn(1, 4, 12, 8, generator=draws[0])
    step = timesteps(one["image"], 1000, draws)
    snr = plain.noise.alphas_cumprod[step] / (1 - plain.noise.alphas_cumprod[step])
    expected = plain.losses(one)["loss"] * (snr.clamp(max=5) / snr)
    torch.testing.assert_close(weighted.losses(one)["loss"], expected.squeeze().float())


def test_text_dropout_replaces_prompts_by_the_empty_one(sd):
    module = latent(sd, text_dropout=0.25)
    prompts = module._prompts_of(batch()).expand(-1, -1, -1).repeat(400, 1, 1)
    dropped = (module.prompts.drop(prompts, module.text_dropout) == module.prompts.empty(module.device)).flatten(1)
    dropped = dropped.all(1)
    assert 0.2 < dropped.float().mean() < 0.3
    assert latent(sd, reference_behaviour=True).text_dropout == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_trains_and_samples(sd, tmp_path, precision):
    module = latent(sd, num_validation_samples=1)
    run = trainer(tmp_path, max_steps=2, precision=precision)
    run.fit(module, Contract())
    assert bool(torch.isfinite(run.callback_metrics["train/loss"]))
    assert run.predict(module, DataLoader([batch(2)], batch_size=None))[0]["image"].dtype == torch.float32


# samples


@pytest.mark.parametrize("kind", ["tiny", "latent"])
@pytest.mark.parametrize("sampler", ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_same_request_gives_the_same_sample_in_any_batch(sd, kind, sampler):
    module = (tiny if kind == "tiny" else lambda **a: latent(sd, **a))(sampler=sampler).eval()
    together = module.generate(batch(8))["image"]
    alone = [module.generate({k: _rows(v, i) for k, v in batch(8).items()})["image"] for i in range(8)]
    assert (together - torch.cat(alone)).abs().max() <= 1 / 255
    assert together.min() >= 0
    assert together.max() <= 1
    assert not torch.allclose(together[0], together[1], atol=0.05)


@pytest.mark.parametrize("kind", ["tiny", "latent"])
def test_samples_depend_on_seed_mask_and_group(sd, kind):
    module = modules(sd)[kind].eval()
    one = batch(1)
    image = module.generate(one)["image"]
    for other in (
        {"seed": torch.tensor([7])},
        {"mask": 2 - one["mask"]},
        {"attributes": {"race": torch.tensor([2])}},
    ):
        assert not torch.equal(module.generate(one | other)["image"], image), other.keys()


def test_half_precision_weights_leave_the_samplers_state_in_float32(sd, monkeypatch):
    module, states = latent(sd).eval().bfloat16(), []
    make = module.make_sampler

    def watched():
        sampler = make()
        step = sampler.step
        sampler.step = lambda predicted, t, state, **more: (
            states.append(state.dtype) or step(predicted, t, state, **more)
        )
        return sampler

    monkeypatch.setattr(module, "make_sampler", watched)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does
    try:
        module.generate(batch(2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert states == [torch.float32] * 2


def test_guidance_in_one_pass_equals_two(sd):
    module = latent(sd, guidance_scale=3.0, negative_prompt="blurry").eval()
    calls = []
    module.unet.register_forward_hook(lambda m, arguments, output: calls.append(len(arguments[0])))
    guided = module.generate(batch(2))["image"]
    assert calls == [4, 4], "two steps, both branches in one batch"

    sampler, made = module.make_sampler(), batch(2)
    from fairdiff_lightning.diffusion import gaussian, generators

    sampler.set_timesteps(2)
    latents = gaussian(torch.empty(2, 4, 12, 8), generators(made["seed"])) * sampler.init_noise_sigma
    positive, condition = module._prompts_of(made), module.condition(made)
    with torch.no_grad():
        for step in sampler.timesteps:
            with_prompt = module(latents, step, positive, condition)
            without = module(latents, step, module.prompts.negative(module.device).expand_as(positive), condition)
            latents = sampler.step(without + 3 * (with_prompt - without), step, latents).prev_sample
    torch.testing.assert_close(module.decode(latents), guided, atol=1e-4, rtol=0)


def test_grey_images_pass_a_base_of_three_channels(sd, reference):
    assert reference("diffboost")["gray_decoder"]["equals_unweighted_mean_of_conv_out"]
    module = latent(sd)
    seen = []
    module.vae.encoder.register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0]))
    image = torch.rand(2, 1, 24, 16)
    latents = module.encode(image)
    assert torch.equal(seen[0], (image * 2 - 1).expand(-1, 3, -1, -1))
    decoded = module.vae.decode(latents / module.vae.config.scaling_factor).sample
    expected = (decoded.mean(1, keepdim=True) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(module.decode(latents), expected)


def test_pixels_come_back_as_they_went():
    module, image = tiny(), torch.rand(3, 1, 24, 16)
    torch.testing.assert_close(module.decode(module.encode(image)), image)


def test_a_mask_of_another_resolution_is_resized(sd):
    module = tiny().eval()
    coarse = torch.randint(3, (3, 1, 12, 8))
    fine = torch.nn.functional.interpolate(coarse.float(), scale_factor=2).long()
    made = module.generate(batch(mask=coarse))
    assert torch.equal(made["mask"], fine)
    assert torch.equal(made["image"], module.generate(batch(mask=fine))["image"])


def test_samplers_follow_the_noise_of_training(sd):
    module = latent(sd, scheduler_args={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    sampler = module.make_sampler()
    assert sampler.config.prediction_type == module.noise.config.prediction_type == "v_prediction"
    assert float(module.noise.alphas_cumprod[-1]) == float(sampler.alphas_cumprod[-1]) == 0
    assert (sampler.config.steps_offset, sampler.config.set_alpha_to_one, sampler.config.clip_sample) == (
        1,
        False,
        False,
    )


# conditions and prompts


@pytest.mark.parametrize(("condition", "channels"), [("one_hot", 3), ("colours", 3), ("edge", 3)])
def test_every_condition_trains_and_samples(condition, channels):
    module = tiny(condition=condition)
    made = batch(edge=torch.rand(3, 1, 24, 16))
    if condition == "edge":
        del made["mask"]
    assert module.condition(made).shape == (3, channels, 24, 16)
    module.losses(made)["loss"].backward()
    assert module.eval().generate(made)["image"].shape == (3, 1, 24, 16)


def test_one_hot_takes_any_number_of_classes():
    module = tiny(num_classes=5)
    assert module.controlnet.config.conditioning_channels == 5
    module.losses(batch(mask=torch.full((3, 1, 24, 16), 4)))["loss"].backward()


def test_prompts_are_encoded_once(sd):
    module = latent(sd)
    encoder, seen = module.prompts.encoder.encoder, []
    encoder.register_forward_hook(lambda m, arguments, output: seen.append(len(arguments[0])))
    with torch.inference_mode():
        module.generate(batch())
    module.train().losses(batch())["loss"].backward()
    assert sum(seen) == 5, "three groups, unknown and empty"
    prompts = module._prompts_of(batch())
    assert not torch.equal(prompts[0], prompts[1])
    tokens = module.prompts.encoder.tokenizer(
        "fundus of unknown", padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    expected = encoder(tokens.input_ids).last_hidden_state[0]
    torch.testing.assert_close(prompts[0], expected)
    assert not any(
        "text" in name or "encoder.encoder" in name for name, _ in module.named_parameters() if "vae" not in name
    )


def test_prompts_come_from_the_batch_when_asked_to(sd):
    module = latent(sd, prompt=None)
    made = batch(2, prompt=["left eye", "right eye"])
    prompts = module._prompts_of(made)
    assert not torch.equal(prompts[0], prompts[1])
    assert torch.equal(prompts, module._prompts_of(made | {"prompt": ["left eye", "right eye"]}))
    with pytest.raises(ValueError, match=r"prompt=None needs 'prompt'"):
        module.generate(batch(2))


def test_the_reference_appends_its_quality_words_to_the_positive_prompt(sd):
    module = latent(sd, prompt="fundus", reference_behaviour=True)
    plain = module._prompts_of(batch(1))
    assert torch.equal(plain, module.prompts.encode(["fundus"], module.device))
    sampling = module._prompts_of(batch(1), torch.tensor([0]))
    assert torch.equal(sampling, module.prompts.encode(["fundus, low quality, blurry"], module.device))


def test_a_samples_own_prompt_wins_where_a_text_encoder_reads_it(sd):
    module = latent(sd)
    texts = ["left eye", "right eye", "eye"]
    own = module._prompts_of(batch(prompt=texts))
    assert torch.equal(own, module.prompts.encode(texts, module.device))
    assert not torch.equal(own, module._prompts_of(batch()))


def test_a_samples_own_prompt_that_no_text_encoder_reads_is_told_of_once():
    module, texts = tiny().eval(), ["left eye", "right eye", "eye"]
    told = r"'s0' and others brings prompts such as 'left eye', but the base has no text encoder.*prompt='\{group\}'"
    with pytest.warns(UserWarning, match=told):
        made = module.generate(batch(prompt=texts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(made["image"], module.generate(batch(prompt=texts))["image"])
        assert torch.equal(made["image"], module.generate(batch())["image"])
        tiny(prompt="Fundus").losses(batch(prompt=["Fundus"] * 3))  # what the module has learned
    with pytest.warns(UserWarning, match="such as 'eye'.*prompt='Fundus'"):
        tiny(prompt="Fundus").losses(batch(prompt=["Fundus", "eye", "eye"]))


def test_without_a_text_encoder_each_prompt_of_the_data_is_learned(tmp_path):
    texts = ["left eye", "right eye"]
    data = with_texts(texts, texts)
    module = tiny(prompt=None, num_groups=None)
    run = trainer(tmp_path, max_epochs=2, callbacks=[TrainableEMA()], enable_checkpointing=True)
    run.fit(module, data)
    assert module.hparams["learned_prompts"] == texts
    path = run.checkpoint_callback.best_model_path
    again = ControlNetSynth.load_from_checkpoint(path, weights_only=True).eval()
    asked = batch(prompt=["left eye", "right eye", "left eye"])
    made = again.generate(asked)["image"]
    assert not torch.equal(made[1], again.generate(asked | {"prompt": ["left eye"] * 3})["image"][1])
    with pytest.raises(ValueError, match=r"prompt 'eye', which has no embedding.*\['left eye', 'right eye'\]"):
        again.generate(asked | {"prompt": ["left eye", "eye", "eye"]})
    resumed = tiny(prompt=None, num_groups=None)
    trainer(tmp_path, max_epochs=3, callbacks=[TrainableEMA()]).fit(resumed, data, ckpt_path=path, weights_only=True)
    assert resumed.prompts.learned.shape == (3, 4, 64)
    again.save_pretrained(tmp_path / "pipeline")
    parts = {"base": str(tmp_path / "pipeline"), "controlnet": str(tmp_path / "pipeline" / "controlnet")}
    settings = {**PLAIN, **parts, "prompt": None, "num_groups": None, "guidance_scale": 2.0}
    saved = ControlNetSynth(**settings).eval()
    assert torch.equal(saved.generate(asked)["image"], made)
    more = ControlNetSynth(**settings, learned_prompts=[*texts, "eye"])
    assert torch.equal(more.prompts.encode(texts, more.device), saved.prompts.encode(texts, more.device))


def with_texts(texts, told):
    """A data module whose samples have these texts in turn, and which tells of others."""
    data = Contract(prompts=told)
    for place, sample in enumerate(data.samples):
        sample["prompt"] = texts[place % len(texts)]
    return data


def saved_prompts(folder, data):
    """The checkpoint after an epoch."""
    run = trainer(folder, enable_checkpointing=True)
    run.fit(tiny(prompt=None, num_groups=None), data)
    return run.checkpoint_callback.best_model_path


def test_prompts_keep_their_embeddings_in_a_run_that_resumes_with_another_order(tmp_path):
    texts = ["left", "right"]
    first = saved_prompts(tmp_path / "first", with_texts(texts, texts))
    module, data = tiny(prompt=None, num_groups=None), with_texts(texts, texts[::-1])
    run = trainer(tmp_path / "second", enable_checkpointing=True, max_epochs=2)
    run.fit(module, data, ckpt_path=first, weights_only=True)
    again = ControlNetSynth.load_from_checkpoint(run.checkpoint_callback.best_model_path, weights_only=True)
    before = ControlNetSynth.load_from_checkpoint(first, weights_only=True)
    assert again.prompts.learned_texts == texts
    torch.testing.assert_close(again.prompts.learned, before.prompts.learned, atol=0.1, rtol=0)
    assert (before.prompts.learned[0] - before.prompts.learned[1]).abs().max() > 1, "each went on from its own"


def test_a_run_does_not_resume_with_prompts_that_it_did_not_begin_with(tmp_path):
    texts = ["left", "right"]
    first = saved_prompts(tmp_path / "first", with_texts(texts, texts))
    more = with_texts(["left", "eye"], [*texts, "eye"])
    with pytest.raises(
        ValueError, match=r"would learn the prompts \['eye'\] beside .*Start a new run from the weights"
    ):
        trainer(tmp_path / "second").fit(tiny(prompt=None, num_groups=None), more, ckpt_path=first, weights_only=True)
    again = ControlNetSynth.load_from_checkpoint(first, weights_only=True)
    before = again.prompts.encode(texts, again.device).detach().clone()
    trainer(tmp_path / "third").fit(again, more)
    assert again.prompts.learned_texts == [*texts, "eye"]
    torch.testing.assert_close(again.prompts.encode(texts, again.device), before, atol=0.1, rtol=0)


def test_lightnings_averaging_is_refused_where_it_would_lack_the_prompts(tmp_path):
    texts, ema = ["left", "right"], EMAWeightAveraging()
    with pytest.raises(ValueError, match=r"average with TrainableEMA, or give learned_prompts=\['left', 'right'\]"):
        trainer(tmp_path, callbacks=[ema]).fit(tiny(prompt=None, num_groups=None), with_texts(texts, texts))
    module = tiny(prompt=None, num_groups=None, learned_prompts=texts)
    trainer(tmp_path, callbacks=[EMAWeightAveraging()]).fit(module, with_texts(texts, texts))
    assert module.prompts.trained.tolist() == [True, True, True]


def test_a_checkpoint_tells_what_any_device_trained():
    """Each device marks its own samples; DDP is told not to spread the first one's marks."""
    module = tiny(prompt=None, num_groups=None, learned_prompts=["left", "right"])
    assert module._ddp_params_and_buffers_to_ignore == [name for name, _ in module.named_buffers() if "trained" in name]
    module.prompts.mark_trained(module.prompts.rows(["left"]), dropout=0.1)
    other = torch.tensor([False, True, True])
    strategy = SimpleNamespace(reduce=lambda marks, reduce_op: marks + other.float())
    module._trainer = SimpleNamespace(strategy=strategy)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"]["prompts.trained"].tolist() == [True, True, True]
    assert module.prompts.trained.tolist() == [True, False, True]


def test_guidance_leads_away_from_no_empty_prompt_that_a_saved_pipeline_never_trained(tmp_path):
    data = with_texts(["left"], ["left"])
    module = tiny(prompt=None, num_groups=None, text_dropout=0.0, guidance_scale=1.0)
    trainer(tmp_path).fit(module, data)
    module.save_pretrained(tmp_path / "pipeline")
    parts = {"base": str(tmp_path / "pipeline"), "controlnet": str(tmp_path / "pipeline" / "controlnet")}
    settings = {**PLAIN, **parts, "prompt": None, "num_groups": None}
    ControlNetSynth(**settings, guidance_scale=1.0).generate(batch(prompt=["left"] * 3))
    with pytest.raises(ValueError, match="nothing was learned for the empty prompt"):
        ControlNetSynth(**settings, guidance_scale=2.0).generate(batch(prompt=["left"] * 3))


def test_prompts_that_no_sample_had_are_not_sampled_with(tmp_path):
    path = saved_prompts(tmp_path, with_texts(["left", "right"], ["left", "right", "eye"]))
    module = ControlNetSynth.load_from_checkpoint(path, weights_only=True).eval()
    module.generate(batch(prompt=["left", "right", "left"]))
    with pytest.raises(ValueError, match="nothing was learned for the prompt 'eye'"):
        module.generate(batch(prompt=["left", "eye", "left"]))
    module.save_pretrained(tmp_path / "pipeline")
    parts = {"base": str(tmp_path / "pipeline"), "controlnet": str(tmp_path / "pipeline" / "controlnet")}
    again = ControlNetSynth(**{**PLAIN, **parts, "prompt": None, "num_groups": None, "guidance_scale": 2.0}).eval()
    with pytest.raises(ValueError, match="nothing was learned for the prompt 'eye'"):
        again.generate(batch(prompt=["left", "eye", "left"]))


def test_prompts_that_nobody_told_of_are_refused_without_a_text_encoder(tmp_path):
    module = tiny(prompt=None, num_groups=None)
    with pytest.raises(ValueError, match=r"prompt 'left eye', which has no embedding.*knows \[\]"):
        module.losses(batch(prompt=["left eye"] * 3))
    with pytest.raises(ValueError, match="prompt=None needs 'prompt'"):
        module.losses(batch())


@pytest.mark.parametrize("prompt", [["left eye"], "eye"])
def test_another_number_of_prompts_than_samples_is_refused(sd, prompt):
    with pytest.raises(ValueError, match=r"'prompt' of 's0' and others is .*; expected is a text for each sample"):
        latent(sd).generate(batch(prompt=prompt))


@pytest.mark.parametrize("own", [False, True])
def test_a_mixture_is_for_samples_and_not_for_training(sd, own):
    plain, mixed = latent(sd), latent(sd, prompt_mixture={"{prompt}": 0.25, "grey": 0.5})
    made = batch(prompt=["left", "right", "left"]) if own else batch()
    assert torch.equal(mixed._prompts_of(made), plain._prompts_of(made))
    expected = 0.25 * plain._prompts_of(made) + 0.5 * plain.prompts.encode(["grey"], plain.device)
    torch.testing.assert_close(mixed._prompts_of(made, torch.zeros(3, dtype=torch.int64)), expected)
    assert not torch.equal(mixed.eval().generate(made)["image"], plain.eval().generate(made)["image"])


def test_a_mixture_of_fifty_samples_encodes_each_text_once(sd):
    module = latent(sd, prompt="mri", negative_prompt="low", condition="edge", prompt_mixture="diffboost", num_steps=1)
    seen = []
    module.prompts.encoder.encoder.register_forward_hook(lambda m, given, output: seen.append(len(given[0])))
    made = requests(50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that this tokenizer of letters finds long
        first = module._prompts_of(made, made["round"])
        module.prompts.negative(module.device)
        assert torch.equal(module._prompts_of(made, made["round"]), first)
    assert sum(seen) == 53, "the prompt, fifty phrases, the constant text and the negative prompt"
    assert len({tuple(row.flatten().tolist()) for row in first}) > 40, "phrases beginning alike are cut to one"


def test_noises_are_shared_only_when_asked_for():
    made = requests(5)
    own = tiny().eval().generate(made)["image"]
    shared = tiny(shared_noises=3).eval().generate(made)["image"]
    torch.testing.assert_close(shared[:2], shared[3:])
    alike = [(i, j) for i in range(5) for j in range(i) if torch.allclose(own[i], own[j], atol=1e-3)]
    assert alike == []
    assert not any(torch.allclose(shared[i], shared[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))
    alone = tiny(shared_noises=3).eval().generate({k: _rows(v, 0) for k, v in made.items()})["image"]
    torch.testing.assert_close(shared[0], alone[0])


def test_the_fifty_samples_of_each_slice_have_each_noise_and_phrase_of_the_reference_once(sd):
    module = latent(sd, condition="edge", prompt="mri", reference_behaviour=True)
    made, seen = requests(50, slices=2), {}
    module.sample = lambda condition, prompts, seeds: seen.update(seeds=seeds) or torch.zeros(len(seeds), 1, 24, 16)
    texts = module.prompts.mixture.texts
    module.prompts.mixture.texts = lambda template, prompts, rounds: seen.setdefault(
        template, texts(template, prompts, rounds)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that this tokenizer of letters finds long
        module.generate(made)
    for name in ("slice0", "slice1"):
        rows = [i for i, condition in enumerate(made["condition"]) if condition == name]
        assert [int(seen["seeds"][i]) for i in rows] == list(range(50))
        assert [seen["{phrase}"][i] for i in rows] == list(PHRASES)


@pytest.mark.parametrize("arguments", [{"shared_noises": 50}, {"prompt_mixture": {"{phrase}": 1.0}}])
def test_requests_that_do_not_tell_their_round_are_refused_where_it_counts(sd, arguments):
    made = requests(2)
    del made["round"]
    with pytest.raises(ValueError, match=r"'synthetic_black_00000' .* 'round' \(B,\) is needed"):
        latent(sd, **arguments).generate(made)
    latent(sd, prompt_mixture="fairdiff", num_steps=1).eval().generate(made)


def test_the_reference_for_edges_is_diffboosts(sd):
    module = latent(sd, condition="edge", prompt="mri", reference_behaviour=True)
    assert (module.text_dropout, module.shared_noises) == (0, 50)
    assert list(module.prompts.mixture.weights.values()) == [0.045, 0.005, 0.95]
    assert latent(sd, reference_behaviour=True).shared_noises is None
    chosen = latent(sd, reference_behaviour=True, prompt_mixture={"{prompt}": 1.0})
    assert list(chosen.prompts.mixture.weights) == ["{prompt}"]


@pytest.mark.parametrize("sampler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"])
def test_few_step_solvers_sample_under_edges(sampler):
    module = tiny(condition="edge", sampler=sampler, num_steps=4).eval()
    calls = []
    module.unet.register_forward_hook(lambda m, given, output: calls.append(len(given[0])))
    image = module.generate(batch(edge=torch.rand(3, 1, 24, 16)))["image"]
    assert calls == [6] * 4, "both branches of guidance in one pass"
    assert bool(torch.isfinite(image).all())
    other = module.generate(batch(edge=torch.rand(3, 1, 24, 16)))["image"]
    assert not torch.equal(image, other)


def test_unknown_groups_have_a_learned_prompt_of_their_own():
    module = tiny()
    prompts = module._prompts_of(batch(4))  # groups -1, 0, 1, 2
    assert torch.equal(prompts, module.prompts.learned[[3, 0, 1, 2]])
    assert torch.equal(module.prompts.empty(module.device)[0], module.prompts.learned[4])


# adherence


def test_adherence_is_the_dice_of_a_segmenter_that_stays_outside(tmp_path):
    torch.manual_seed(2)
    segmenter = Segmenter(network="unet", num_classes=3, in_channels=1, image_size=32, num_groups={"race": 3})
    run = trainer(tmp_path)
    run.strategy.connect(segmenter)
    run.save_checkpoint(tmp_path / "segmenter.ckpt")
    module = tiny(adherence=str(tmp_path / "segmenter.ckpt"), num_validation_samples=3)
    names = set(module.state_dict())
    run = trainer(tmp_path, limit_val_batches=2)
    run.validate(module, Contract(), verbose=False)
    assert set(module.state_dict()) == names
    assert {name for name in run.callback_metrics if "adherence" in name} == {
        "val/adherence",
        "val/adherence/class_1",
        "val/adherence/class_2",
    }
    made = module.eval().generate(batch(3)) | {"attributes": batch(3)["attributes"]}
    resized = torch.nn.functional.interpolate(made["image"], (32, 32), mode="bilinear", antialias=True)
    logits = torch.nn.functional.interpolate(segmenter.eval()(resized), (24, 16), mode="bilinear")
    expected = dice_score(logits.argmax(1, keepdim=True), made["mask"], 3)
    torch.testing.assert_close(module._judge(made), expected)


def judge(folder, segmenter=None, **arguments):
    """A judge whose segmenter was not trained."""
    torch.manual_seed(2)
    facts = {"num_classes": 3, "in_channels": 1, "image_size": 32}
    run = trainer(folder)
    run.strategy.connect(segmenter or Segmenter(network="unet", **facts | arguments))
    run.save_checkpoint(folder / "judge.ckpt")
    return MaskJudge(str(folder / "judge.ckpt"), 3, 1)


def test_adherence_averages_over_samples_and_leaves_out_absent_classes(tmp_path, monkeypatch):
    """Against a mean by hand; a batch without a class, and batches of unequal size."""
    one = judge(tmp_path)
    monkeypatch.setattr(one, "_find", lambda sample: sample["found"])
    rim, both = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 2, 2])
    first = {"mask": rim.view(1, 1, 2, 2), "found": torch.tensor([0, 0, 1, 1]).view(1, 1, 2, 2)}  # Dice 0.8, none
    second = {"mask": both.expand(2, -1).view(2, 1, 2, 2), "found": both.expand(2, -1).reshape(2, 1, 2, 2).clone()}
    second["found"][1] = 0  # Dice 1, 1 and 0, 0
    for made in (first, second):
        one.update({**made, "image": torch.zeros(len(made["mask"]), 1, 2, 2), "attributes": {}})
    values = {name: float(value) for name, value in one.compute().items()}
    expected = {"adherence": (0.8 + 1 + 0) / 3, "adherence/class_1": (0.8 + 1 + 0) / 3, "adherence/class_2": 0.5}
    assert values == pytest.approx(expected, abs=1e-6)
    one.update({**first, "image": torch.zeros(1, 1, 2, 2), "attributes": {}})
    values = one.compute()
    assert float(values["adherence"]) == pytest.approx(0.8)
    assert bool(values["adherence/class_2"].isnan()), "this class is nowhere"


def test_a_judge_may_know_an_attribute_that_the_samples_lack_unless_it_routes_by_it(tmp_path):
    sample = {"image": torch.rand(2, 1, 32, 32), "mask": torch.zeros(2, 1, 32, 32, dtype=torch.int64)}
    sample["attributes"] = {"race": torch.tensor([0, 1])}
    for inference in ("whole", "sliding"):
        plain = judge(tmp_path, num_groups={"sex": 2}, inference=inference, roi_size=32)
        assert plain(sample).shape == (2, 2)
    facts = {"network": "tiny", "num_classes": 3, "in_channels": 1, "image_size": 32, "num_groups": {"sex": 2}}
    routed = judge(tmp_path, DMoESegmenter(**facts))
    with pytest.raises(ValueError, match=r"routes by the groups of 'sex', but the samples carry \['race'\]"):
        routed(sample)
    shared = judge(tmp_path, DMoESegmenter(**facts, routing="shared"))
    assert shared(sample).shape == (2, 2)


def test_a_judge_without_a_mask_to_compare_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"compares masks, but the samples have \['attributes', 'image'\]"):
        judge(tmp_path)({"image": torch.rand(1, 1, 32, 32), "attributes": {}})


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"inference": "sliding", "image_size": None, "roi_size": 32}, [64, 96]),
        ({"inference": "sliding", "image_size": 48, "roi_size": 32}, [48, 48]),
        ({"inference": "whole", "image_size": None, "roi_size": 32}, [32, 32]),
    ],
)
def test_images_are_judged_at_the_size_that_the_segmenter_was_trained_on(tmp_path, monkeypatch, arguments, seen):
    one, sizes = judge(tmp_path, **arguments), []
    infer = one.segmenter.infer
    monkeypatch.setattr(
        one.segmenter, "infer", lambda made, stage: sizes.append([*made["image"].shape[2:]]) or infer(made, stage)
    )
    one({"image": torch.rand(1, 1, 64, 96), "mask": torch.zeros(1, 1, 64, 96, dtype=torch.int64), "attributes": {}})
    assert sizes == [seen]


def test_adherence_tells_the_best_checkpoint_when_it_is_measured():
    assert (tiny().monitor, tiny().monitor_mode) == ("val/loss", "min")
    judged = tiny(adherence="segmenter.ckpt")
    assert (judged.monitor, judged.monitor_mode) == ("val/adherence", "max")
    assert tiny(adherence="segmenter.ckpt", num_validation_samples=0).monitor == "val/loss"


def test_a_segmenter_of_other_classes_cannot_judge(tmp_path):
    judge_of_two = Segmenter(network="unet", num_classes=2, in_channels=1, image_size=32)
    with pytest.raises(ValueError, match="its num_classes is 2, the generator's is 3"):
        judge(tmp_path, judge_of_two)


def test_a_judge_is_loaded_where_something_is_judged_only(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of a segmenter at 'nowhere\.ckpt'"):
        trainer(tmp_path).validate(tiny(adherence="nowhere.ckpt"), Contract())
    made = trainer(tmp_path).predict(tiny(adherence="nowhere.ckpt"), DataLoader([batch(1)], batch_size=None))
    assert made[0]["image"].shape == (1, 1, 24, 16)


# diffusers and cldm


@pytest.mark.parametrize("kind", ["tiny", "latent"])
def test_the_saved_pipeline_draws_what_the_module_draws(sd, tmp_path, kind):
    module = modules(sd)[kind].eval()
    module.save_pretrained(tmp_path / "pipeline")
    absent = {"text_encoder": None, "tokenizer": None} if kind == "tiny" else {}
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None, **absent)
    assert isinstance(pipeline.controlnet, ControlNetModel)
    pipeline.set_progress_bar_config(disable=True)
    made = batch(2)
    prompts = module._prompts_of(made)
    texts = {
        "prompt_embeds": prompts,
        "negative_prompt_embeds": module.prompts.negative(module.device).expand_as(prompts),
    }
    if kind == "latent":
        texts = {"prompt": ["fundus of unknown", "fundus of asian"]}

    def draw(output_type):
        return pipeline(
            image=module.condition(made),
            num_inference_steps=2,
            guidance_scale=module.hparams["guidance_scale"],
            generator=[torch.Generator().manual_seed(int(seed)) for seed in made["seed"]],
            output_type=output_type,
            **{name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in texts.items()},
        ).images

    latents, pictures = draw("latent"), draw("np")
    torch.testing.assert_close(module.decode(latents), module.generate(made)["image"], atol=2e-3, rtol=0)
    assert pictures.shape == (2, 24, 16, pipeline.vae.config.in_channels)
    assert np.isfinite(pictures).all()
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(pictures, expected, atol=1e-5)
    if kind == "tiny":
        from safetensors.torch import load_file

        assert torch.equal(load_file(tmp_path / "pipeline" / "prompts.safetensors")["prompts"], module.prompts.learned)


@pytest.mark.parametrize("kind", ["tiny", "latent"])
def test_training_goes_on_from_a_saved_pipeline(sd, tmp_path, kind):
    module = modules(sd)[kind]
    module.save_pretrained(tmp_path)
    arguments = {**PLAIN, "base": str(tmp_path), "controlnet": str(tmp_path / "controlnet"), "prompt": "{group}"}
    again = ControlNetSynth(**arguments, group_names=NAMES)
    for part in ("unet", "controlnet", "vae"):
        ours, its = getattr(module, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(ours[name], its[name]) for name in ours)
    if kind == "tiny":
        assert torch.equal(again.prompts.learned, module.prompts.learned)
        with pytest.raises(ValueError, match=r"shape \(5, 4, 64\), but this module learns \(4, 4, 64\)"):
            ControlNetSynth(**arguments | {"num_groups": {"race": 2}})
        ControlNetSynth(**arguments, reference_behaviour=True)  # its empty prompt has been trained
    again.losses(batch())["loss"].backward()


class Known(Contract):
    """Data that tell which cases are trained on."""

    def state_dict(self):
        return {"training_cases": ["a\t1", "b\t2"]}

    def load_state_dict(self, state_dict):
        pass


def test_what_was_trained_on_stays_with_the_weights(sd, tmp_path):
    module = latent(sd, num_validation_samples=0)
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, Known())
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again = ControlNetSynth.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again.save_pretrained(tmp_path / "saved")
    branch = str(tmp_path / "saved" / "controlnet")
    arguments = {**PLAIN, "prompt": "{group}", "group_names": NAMES}
    whole = ControlNetSynth(**arguments, base=str(tmp_path / "saved"))
    part = ControlNetSynth(**arguments, base=sd, controlnet=branch)
    ours = ControlNetSynth(**arguments, base=sd, controlnet=str(tmp_path / "last.ckpt"))
    for found in (module, again, whole, part, ours):
        assert found.training_cases == {"a\t1", "b\t2"}
    assert ControlNetSynth(**arguments, base=sd).training_cases == frozenset()
    old = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del old["training_cases"]
    torch.save(old, tmp_path / "old.ckpt")
    assert not ControlNetSynth.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True).training_cases


def test_validation_samples_are_the_first_of_their_conditions(tmp_path):
    module, seen = tiny(shared_noises=2), []
    sample = module.sample
    module.sample = lambda condition, prompts, seeds: seen.append(seeds) or sample(condition, prompts, seeds)
    trainer(tmp_path, max_steps=1).validate(module, Contract(), verbose=False)
    assert torch.cat(seen).tolist() == [0] * 4


def test_further_training_adds_to_what_was_trained_on(sd, tmp_path):
    before = latent(sd)
    before.training_cases = frozenset(["c\t3"])
    before.save_pretrained(tmp_path)
    module = latent(str(tmp_path), num_validation_samples=0)
    trainer(tmp_path, max_steps=1).fit(module, Known())
    module.save_pretrained(tmp_path / "next")
    assert read_training_cases(tmp_path / "next") == {"a\t1", "b\t2", "c\t3"}
    assert (tmp_path / "next" / "controlnet" / TRAINING_CASES).is_file()


def test_original_checkpoints_load_and_are_written(sd, tmp_path):
    module = latent(sd)
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in module.prompts.encoder.encoder.state_dict().items()
    }
    text["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)
    torch.save({**module.reference_weights(), **text, "betas": torch.zeros(4)}, tmp_path / "original.ckpt")
    other = latent(sd)
    torch.nn.init.zeros_(other.controlnet.conv_in.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the frozen weights are the base's own
        report = other.load_reference_weights(tmp_path / "original.ckpt")
    assert set(report.ignored) == {"betas", "cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert torch.equal(module.eval().generate(batch())["image"], other.eval().generate(batch())["image"])

    branch = ControlNetSynth(**PLAIN, base=sd, condition="colours", controlnet=str(tmp_path / "original.ckpt"))
    assert torch.equal(branch.controlnet.conv_in.weight, module.controlnet.conv_in.weight)

    torch.nn.init.normal_(other.unet.conv_in.weight)
    with pytest.warns(UserWarning, match="changed weights that are frozen here"):
        other.load_reference_weights(tmp_path / "original.ckpt")


def test_an_original_checkpoint_that_lacks_a_part_loads_nothing(sd):
    module, other = latent(sd), latent(sd)
    torch.nn.init.zeros_(other.controlnet.conv_in.weight)
    state = module.reference_weights()
    del state["model.diffusion_model.out.2.bias"]
    with pytest.raises(CheckpointMismatchError, match=r"missing: out\.2\.bias"):
        other.load_reference_weights(state)
    assert not other.controlnet.conv_in.weight.any()


def test_a_new_branch_leaves_a_trained_unet_alone(sd):
    module = ControlNetSynth(base=sd, **PLAIN)
    made = batch()
    noisy, steps, prompts = torch.randn(3, 4, 12, 8), torch.tensor([3, 500, 999]), module._prompts_of(made)
    with torch.no_grad():
        steered = module(noisy, steps, prompts, module.condition(made))
        torch.testing.assert_close(steered, module.unet(noisy, steps, prompts).sample)


# bad input


def test_a_wrong_base_says_what_is_missing(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=r"unet/config\.json, vae/config\.json.* missing; it holds notes\.txt"):
        ControlNetSynth(base=str(tmp_path))


def test_a_base_without_its_weights_is_refused(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "bare")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base='.*bare' cannot be loaded: .*diffusion_pytorch_model"):
        ControlNetSynth(**PLAIN, base=str(folder))
    ControlNetSynth(**PLAIN, base=str(folder), pretrained=False)  # which needs its configurations alone


def changed(base, folder, part, **config):
    """The configurations of a base, one of them changed."""
    shutil.copytree(base, folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(folder)


@pytest.mark.parametrize(
    ("part", "config", "message"),
    [
        ("unet", {"in_channels": 9}, r"its UNet takes 9 channels and its autoencoder makes 4 \(inpainting\?\)"),
        ("unet", {"cross_attention_dim": 20}, "its text encoder makes 12 channels and its UNet expects 20"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "its vae is of class AutoencoderTiny; .* is AutoencoderKL"),
        (
            "unet",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 56,
            },
            "has addition_embed_type 'text_time', as Stable Diffusion XL has",
        ),
    ],
)
def test_a_stable_diffusion_of_another_kind_is_refused(sd, tmp_path, part, config, message):
    with pytest.raises(ValueError, match=message):
        ControlNetSynth(base=changed(sd, tmp_path / "sd", part, **config), pretrained=False, **PLAIN)


def test_arguments_of_the_tiny_base_are_refused_elsewhere(sd):
    with pytest.raises(ValueError, match=r"base_args \['layers_per_block'\] are for base='tiny'"):
        ControlNetSynth(base=sd, base_args={"layers_per_block": 1})
    with pytest.raises(ValueError, match=r"base_args: .*'layers'"):
        tiny(base_args={**SMALL, "layers": 1})
    with pytest.raises(ValueError, match="patch_size 3; expected is a power of two"):
        tiny(base_args={"patch_size": 3})


def test_a_source_without_a_controlnet_is_refused(sd, tmp_path):
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel; expected is a ControlNetModel"):
        ControlNetSynth(base=sd, **PLAIN, controlnet=f"{sd}/unet")
    with pytest.raises(ValueError, match=r"no folder with a ControlNet's config\.json"):
        ControlNetSynth(base=sd, **PLAIN, controlnet=sd)
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "sd.ckpt")
    with pytest.raises(ValueError, match=r"holds no 'control_model\.\*'"):
        ControlNetSynth(base=sd, **PLAIN, controlnet=str(tmp_path / "sd.ckpt"))


def test_a_controlnet_of_another_unet_or_condition_is_refused(sd, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    ControlNetModel.from_unet(unet, conditioning_channels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"conditioning_channels 2, the condition has 3.*8 times as wide"):
        ControlNetSynth(base=sd, **PLAIN, controlnet=str(tmp_path))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mask": torch.zeros(3, 1, 16, 24, dtype=torch.int64)}, "'mask' of 's0' is 16 x 24.*another aspect ratio"),
        ({"mask": torch.full((3, 1, 24, 16), 3)}, r"classes \[3\]; expected are 0 to 2"),
        ({"mask": torch.full((3, 1, 24, 16), -1)}, r"classes \[-1\]; expected are 0 to 2"),
    ],
)
def test_requests_that_do_not_fit_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(batch(**extra))


def test_requests_without_a_condition_are_refused():
    made = batch()
    del made["mask"]
    for answer in (tiny().generate, tiny().losses):
        with pytest.raises(ValueError, match="condition='one_hot' needs 'mask'"):
            answer(made)
    with pytest.raises(ValueError, match=r"'edge' of 's0' has shape \(3, 1, 8, 8\)"):
        tiny(condition="edge").generate(batch(edge=torch.zeros(3, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"condition='edge' needs 'edge'\. Give the data module its option `edges`"):
        tiny(condition="edge").generate(batch())
    for value in (255.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"'edge' of 's0' has values in .*; edges are in \[0, 1\]"):
            tiny(condition="edge").losses(batch(edge=torch.full((3, 1, 24, 16), value)))


def test_training_samples_of_another_size_or_class_are_refused():
    with pytest.raises(ValueError, match=r"'mask' of sample 's0' has size \(12, 8\)"):
        tiny().losses(batch(mask=torch.zeros(3, 1, 12, 8, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"'image' of sample 's0' has size \(12, 8\)"):
        tiny().losses(batch(image=torch.zeros(3, 1, 12, 8)))
    with pytest.raises(ValueError, match=r"classes \[7\]"):
        tiny().losses(batch(mask=torch.full((3, 1, 24, 16), 7)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": None}, "attribute=None: num_groups names none"),
        ({"attribute": "gender"}, r"attribute='gender': num_groups names race \(3 groups\)"),
        ({"negative_prompt": "blurry"}, "no text encoder"),
        ({"image_size": 30}, "multiples of 4"),
        ({"attribute": "gender", "prompt": ""}, r"attribute='gender': num_groups names race"),
        (
            {"text_dropout": 0.0},
            r"guidance_scale 2\.0 leads away from .* Set guidance_scale=1, or text_dropout above 0",
        ),
        ({"reference_behaviour": True}, r"guidance_scale 2\.0 leads away from the empty prompt"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "cannot be trained with"),
        ({"trained": "controlnet"}, "base='tiny' has no trained weights to keep; train 'all' of it"),
        ({"sampler": "NoScheduler"}, "scheduler 'NoScheduler' is not known"),
        ({"prompt_mixture": "diffboost"}, r"prompt_mixture=\{.*'gray, sketch': 0\.95\}: the base has no text encoder"),
        ({"prompt_mixture": "emit"}, "prompt_mixture='emit': expected is one of fairdiff, diffboost"),
        ({"shared_noises": 0}, "shared_noises=0: give 1 or more"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_channels_that_the_base_cannot_make_are_refused(sd):
    with pytest.raises(ValueError, match="in_channels 2: the base makes images of 3 channels, which serve 1 or 3"):
        ControlNetSynth(base=sd, **PLAIN | {"in_channels": 2})


def test_group_names_are_asked_for_when_nobody_gives_them(sd):
    with pytest.raises(ValueError, match="names one of 3 groups, whose names are None: give group_names"):
        latent(sd, group_names=None).generate(batch())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_classes": 4}, "num_classes: Contract has 4"),
        ({"image_size": (24, 24)}, "image_size: Contract has"),
        ({"num_groups": {"race": 2}}, "attribute 'race': Contract has 2 groups"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_training(tmp_path, facts, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(tiny(), Contract(**facts))


def test_requests_must_tell_the_group_that_the_prompt_names(tmp_path):
    groups = {"sex": ["female", "male"], "race": NAMES}
    data = Contract(attribute_groups=groups, num_groups={"sex": 2, "race": 3}, generate=object())
    data.predict_dataloader = lambda: DataLoader([batch(1)], batch_size=None)
    module = tiny(num_groups={"sex": 2, "race": 3}, attribute="race")
    with pytest.raises(ValueError, match=r"asks for groups of 'sex', the first of .*Name 'race' first"):
        trainer(tmp_path).predict(module, data)
    data.generate = None
    assert trainer(tmp_path).predict(module, data)


def test_a_batch_without_the_groups_that_the_prompt_names_is_refused():
    with pytest.raises(ValueError, match=r"carries the attributes \['sex'\], but the model is conditional on 'race'"):
        tiny().generate(batch(attributes={"sex": torch.tensor([0, 1, 0])}))


def test_the_papers_configuration_generates_with_a_stable_diffusion(sd, tmp_path, monkeypatch):
    from fairdiff_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD15", sd)
    monkeypatch.delenv("CONTROLNET", raising=False)
    monkeypatch.delenv("FAIRSEG_ROOT", raising=False)
    config = str(Path(__file__).parents[2] / "configs" / "fairseg" / "controlnet.yaml")
    given = ["--config", config, "--data.image_size=32", "--data.batch_size=2", "--data.num_workers=0"]
    given += ["--trainer.accelerator=cpu", "--trainer.default_root_dir=run", "--model.num_steps=2"]
    main(["predict", *given, "--data.generate.per_group=1", "--data.generate.masks=train"])
    made = sorted((tmp_path / "run" / "synthetic").glob("*.npz"))
    assert [file.stem for file in made] == [f"synthetic_{group}_00000" for group in ("Asian", "Black", "White")]
    for file in made:
        with np.load(file) as archive:
            assert archive["slo_fundus"].shape == (32, 32)
            assert archive["slo_fundus"].std() > 0
