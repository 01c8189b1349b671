"""DeepFloyd-shaped networks with random weights, in files that diffusers wrote."""

import pytest

# Flags as the published networks have them. They differ from diffusers' defaults, and from each other.
COMMON = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim_type": "text_proj",
    "out_channels": 6,
}
DOWN, DOWN_TEXT = "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"
UP, UP_TEXT = "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"


def levels(count, attending):
    """Block types of which the last `attending` attend to the text."""
    return {
        "down_block_types": [DOWN] * (count - attending) + [DOWN_TEXT] * attending,
        "up_block_types": [UP_TEXT] * attending + [UP] * (count - attending),
    }


SUPER = {
    "in_channels": 6,
    "class_embed_type": "timestep",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142271248762552,
    "mid_block_scale_factor": 1.4142271248762552,
    "time_embedding_act_fn": "gelu",
}
DUMMY = {
    "sample_size": 32,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "attention_head_dim": 2,
    "encoder_hid_dim": 32,
    "cross_attention_dim": 32,
    "addition_embed_type_num_heads": 2,
    **levels(2, 1),
}
# As I-XL and II-L, of less width.
STAGE1 = {
    "sample_size": 16,
    "in_channels": 3,
    "layers_per_block": 3,
    "block_out_channels": [32, 64, 96, 128],
    "attention_head_dim": 32,
    "encoder_hid_dim": 64,
    "cross_attention_dim": 128,
    "addition_embed_type_num_heads": 64,
    "only_cross_attention": False,
    **levels(4, 3),
}
STAGE2 = {
    **SUPER,
    "sample_size": 64,
    "layers_per_block": [2, 2, 3, 5, 5],
    "block_out_channels": [32, 64, 64, 96, 128],
    "attention_head_dim": 32,
    "encoder_hid_dim": 64,
    "cross_attention_dim": 64,
    "addition_embed_type_num_heads": 64,
    "only_cross_attention": True,
    "mid_block_only_cross_attention": False,
    **levels(5, 2),
}
NETWORKS = {
    "dummy-1": {**COMMON, **DUMMY, "in_channels": 3},
    "dummy-2": {**COMMON, **DUMMY, **SUPER, "sample_size": 64},
    "stage-1": {**COMMON, **STAGE1},
    "stage-2": {**COMMON, **STAGE2},
    # Only cross-attention in the middle too, a width of the embedding of its own, another activation.
    "odd": {
        **COMMON,
        **DUMMY,
        **SUPER,
        "only_cross_attention": True,
        "time_embedding_dim": 80,
        "act_fn": "silu",
    },
}


def make_unet(config, seed=0):
    """A diffusers network whose norms are not the identity."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return unet


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory):
    """unet_folder(name) → the diffusers network of that name and its folder."""
    made = {}

    def make(name):
        if name not in made:
            unet = make_unet(NETWORKS[name])
            folder = tmp_path_factory.mktemp(name)
            unet.save_pretrained(folder, max_shard_size="3MB" if name == "stage-1" else "10GB")
            made[name] = unet, folder
        return made[name]

    return make
