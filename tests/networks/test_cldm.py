import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint
from tiny_stable_diffusion import SD15_UNET, UNET

from fairdiff_lightning.networks import CheckpointMismatchError
from fairdiff_lightning.networks.cldm import load_cldm, original_names, to_cldm

SIZES = {"small": UNET, "one block": {**UNET, "layers_per_block": 1}, "sd15": SD15_UNET}
HINT = {"small": (4, 6), "one block": (4,), "sd15": (16, 32, 96, 256)}


def networks(size):
    """A UNet and its control branch; the full size without memory for its weights."""
    with torch.device("meta" if size == "sd15" else "cpu"):
        unet = UNet2DConditionModel(**SIZES[size])
        return unet, ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=HINT[size], load_weights_from_unet=False
        )


def numbered(network):
    """Every tensor replaced by one that tells its name."""
    return {name: torch.full((1,), float(i)) for i, name in enumerate(network.state_dict())}


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_has_a_name_of_its_own(size):
    for network in networks(size):
        names = original_names(network)
        assert names.keys() == network.state_dict().keys()
        assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("size", ["small", "sd15"])
def test_names_agree_with_the_converter_of_diffusers(size):
    unet, controlnet = networks(size)
    for network, prefix, convert in (
        (unet, "model.diffusion_model.", convert_ldm_unet_checkpoint),
        (controlnet, "control_model.", convert_controlnet_checkpoint),
    ):
        names, tensors = original_names(network), numbered(network)
        original = {prefix + names[name]: tensor for name, tensor in tensors.items()}
        converted = convert(original, network.config)
        kept = {
            name for name in tensors if not _is_last_hint(name, network)
        }  # it knows the last hint layer as .14 only
        assert {name: float(converted[name]) for name in kept} == {name: float(tensors[name]) for name in kept}


def _is_last_hint(name, network):
    return "controlnet_cond_embedding" in name and len(network.config.conditioning_embedding_out_channels) != 4


def test_the_full_size_has_the_original_code_s_names(reference):
    """Names from the ControlNet 1.0 and Stable Diffusion 1.5 checkpoints (card 3.1, 3.4)."""
    unet, controlnet = networks("sd15")
    expected = reference("fairdiff")["cn03_params"]["expected"]
    for network, count in ((unet, expected["unet"]), (controlnet, expected["controlnet"])):
        assert sum(p.numel() for p in network.parameters()) == count
    names = original_names(unet)
    blocks = [n for n, original in names.items() if original.startswith("output_blocks.")]
    head = [n for n, original in names.items() if original.startswith("out.")]
    assert sum(unet.state_dict()[n].numel() for n in blocks) == expected["unet_output_blocks"]
    assert sum(unet.state_dict()[n].numel() for n in head) == expected["unet_out"]
    names = original_names(controlnet)
    hint = [n for n, original in names.items() if original.startswith("input_hint_block.")]
    assert sum(controlnet.state_dict()[n].numel() for n in hint) == expected["hint_block"]
    assert "input_hint_block.14.weight" in names.values()
    zero = {
        original.rsplit(".", 1)[0]
        for original in names.values()
        if original.startswith(("zero_convs", "middle_block_out"))
    }
    assert len(zero) == expected["zero_convs"]


@pytest.mark.parametrize("size", ["small", "one block"])
def test_weights_survive_the_way_to_the_original_layout_and_back(size):
    unet, controlnet = networks(size)
    state = {**to_cldm(controlnet, unet), "betas": torch.zeros(3)}
    assert all(name.startswith(("control_model.", "model.diffusion_model.", "betas")) for name in state)
    other_unet, other_controlnet = networks(size)
    for network, other in ((unet, other_unet), (controlnet, other_controlnet)):
        report = load_cldm([other], state, "a test")
        assert len(report.loaded) == len(network.state_dict())
        assert "betas" in report.ignored
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_a_controlnet_may_come_without_its_prefix():
    controlnet, other = networks("small")[1], networks("small")[1]
    bare = {name.removeprefix("control_model."): tensor for name, tensor in to_cldm(controlnet).items()}
    load_cldm([other], bare, "a test")
    assert torch.equal(controlnet.conv_in.weight, other.conv_in.weight)


def test_a_checkpoint_without_a_controlnet_says_what_it_has():
    unet, controlnet = networks("small")
    with pytest.raises(ValueError, match=r"'sd.ckpt' holds no 'control_model\.\*'.*tensors begin with model"):
        load_cldm([controlnet], to_cldm(unet), "'sd.ckpt'")


def test_a_torn_checkpoint_names_what_is_missing_in_the_original_names():
    controlnet = networks("small")[1]
    state = to_cldm(controlnet)
    del state["control_model.zero_convs.2.0.bias"]
    state["control_model.middle_block.1.norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointMismatchError) as error:
        load_cldm([controlnet], state, "a test")
    assert error.value.missing == ["zero_convs.2.0.bias"]
    assert error.value.misshapen == {"middle_block.1.norm.weight": ((3,), (16,))}


def test_one_part_that_does_not_fit_leaves_all_as_they_are():
    unet, controlnet = networks("small")
    other_unet, other_controlnet = networks("small")
    state = to_cldm(controlnet, unet)
    state["model.diffusion_model.out.2.bias"] = torch.zeros(9)
    before = other_controlnet.conv_in.weight.clone()
    with pytest.raises(CheckpointMismatchError, match=r"shape of out\.2\.bias"):
        load_cldm([other_controlnet, other_unet], state, "a test")
    assert torch.equal(other_controlnet.conv_in.weight, before)


def test_a_part_that_the_original_code_lacks_is_named():
    unet = UNet2DConditionModel(**UNET, addition_embed_type="text", addition_embed_type_num_heads=2)
    with pytest.raises(ValueError, match=r"add_embedding.*no place in the cldm layout"):
        original_names(unet)


def test_the_autoencoder_of_an_original_checkpoint_loads():
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae, other = AutoencoderKL(**shape), AutoencoderKL(**shape)
    state = {f"first_stage_model.{_ldm_vae_name(n)}": t for n, t in vae.state_dict().items()}
    attention = "first_stage_model.encoder.mid.attn_1.q.weight"
    state[attention] = state[attention][:, :, None, None]  # a 1 x 1 convolution in the original
    report = load_cldm([], {**state, "betas": torch.zeros(1)}, "a test", other)
    assert report.ignored == ("betas",)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in vae.state_dict().items())
    assert load_cldm([], {"betas": torch.zeros(1)}, "a test", other).loaded == ()


def _ldm_vae_name(name):
    """Names of the original autoencoder with two levels, from its published checkpoints."""
    for new, old in (
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("encoder.down_blocks", "encoder.down"),
        ("decoder.up_blocks.0", "decoder.up.1"),
        ("decoder.up_blocks.1", "decoder.up.0"),
        ("resnets", "block"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        name = name.replace(new, old)
    return name
