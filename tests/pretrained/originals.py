"""Small published networks with random weights, and their published configs."""

import diffusers
import torch
import transformers

from tests.reference import randomise

IMAGE_TOKEN = 290


def qwen_vl(tied: bool = False) -> torch.nn.Module:
    """Qwen2.5-VL with odd widths and grouped heads."""
    return randomise(
        transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(
                text_config=dict(
                    hidden_size=48,
                    num_hidden_layers=3,
                    num_attention_heads=6,
                    num_key_value_heads=2,
                    intermediate_size=72,
                    vocab_size=300,
                    rms_norm_eps=1e-6,
                    rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=1e6),
                    bos_token_id=0,
                    eos_token_id=1,
                    tie_word_embeddings=tied,
                ),
                vision_config=dict(
                    depth=3,
                    hidden_size=32,
                    num_heads=2,
                    intermediate_size=48,
                    patch_size=4,
                    window_size=16,
                    fullatt_block_indexes=[1],
                    out_hidden_size=48,
                    tokens_per_second=2,
                ),
                tie_word_embeddings=tied,
                image_token_id=IMAGE_TOKEN,
                vision_start_token_id=291,
                vision_end_token_id=292,
                video_token_id=293,
            )
        )
    )


def siglip() -> torch.nn.Module:
    """SigLIP whose images its patches do not divide, as in so400m/14-384."""
    tower = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    return randomise(
        transformers.SiglipModel(
            transformers.SiglipConfig(
                text_config=text | dict(vocab_size=100, max_position_embeddings=17, bos_token_id=0, eos_token_id=1),
                vision_config=tower | dict(image_size=26, patch_size=4),
            )
        )
    )


def siglip_vision() -> torch.nn.Module:
    """A vision tower alone."""
    tower = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    return randomise(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**tower, image_size=24, patch_size=4))
    )


def siglip2() -> torch.nn.Module:
    """SigLIP2 NaFlex, whose texts are projected to another width."""
    tower = dict(num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    text = tower | dict(hidden_size=24, vocab_size=100, max_position_embeddings=17, projection_size=32)
    return randomise(
        transformers.Siglip2Model(
            transformers.Siglip2Config(
                text_config=text | dict(bos_token_id=0, eos_token_id=1),
                vision_config=tower | dict(hidden_size=32, num_patches=25, patch_size=4),
            )
        )
    )


def autoencoder_kl(quant_convs: bool = False) -> torch.nn.Module:
    """An autoencoder whose widths grow and stay."""
    return randomise(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=quant_convs,
            use_post_quant_conv=quant_convs,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    )


def sd3(dual: int = 0, qk_norm: str | None = None) -> torch.nn.Module:
    """A member of the SD3 family."""
    return randomise(
        diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=24,
            num_attention_heads=3,
            joint_attention_dim=20,
            caption_projection_dim=72,
            pooled_projection_dim=28,
            pos_embed_max_size=24,
            dual_attention_layers=tuple(range(dual)),
            qk_norm=qk_norm,
        )
    )


def centred(model: torch.nn.Module) -> torch.nn.Module:
    """Numbers the positions as published files do: 0 to 16 over the middle 8 of 24 patches."""
    axis = (torch.arange(24, dtype=torch.float64) - 8) * 2
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))
    table = diffusers.models.embeddings.get_2d_sincos_pos_embed_from_grid(72, grid, output_type="pt")
    model.pos_embed.pos_embed.copy_(table[None])
    return model


ORIGINALS = {
    "qwen_vl": qwen_vl,
    "qwen_vl tied": lambda: qwen_vl(tied=True),
    "siglip": siglip,
    "siglip vision": siglip_vision,
    "siglip2": siglip2,
    "sd3": sd3,
    "sd3.5 dual": lambda: centred(sd3(dual=2, qk_norm="rms_norm")),
    "autoencoder": autoencoder_kl,
    "autoencoder quant": lambda: autoencoder_kl(quant_convs=True),
}
