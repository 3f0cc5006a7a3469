"""Tiny models of the larger families: the real classes with a few thousand random parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny import build_tokenizer

WIDTH = 16
"""Width of every text encoder."""
TOKENS = 24


def build_t5_tokenizer() -> T5Tokenizer:
    """Build a T5 tokenizer whose vocabulary is the letters."""
    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=TOKENS)


def t5_encoder(width: int = 2 * WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=30, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def clip_config(vocabulary: int, width: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def autoencoder(channels: int, shift: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=0.5,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def build_sdxl(folder: Path, second: int = WIDTH) -> Path:
    """Write a Stable Diffusion XL pipeline whose second text encoder has some width; return its folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "vocabulary")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH + second,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + second,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(4, None),
        text_encoder=CLIPTextModel(clip_config(len(tokenizer))),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(len(tokenizer), second)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def build_sd3(folder: Path, second: int = WIDTH) -> Path:
    """Write a Stable Diffusion 3 pipeline whose second text encoder has some width; return its folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "vocabulary")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH + second,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH + second,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        vae=autoencoder(4, 0.1),
        text_encoder=CLIPTextModelWithProjection(clip_config(len(tokenizer))),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(len(tokenizer), second)),
        text_encoder_3=t5_encoder(WIDTH + second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=build_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def build_flux(folder: Path, *, guidance_input: bool = True) -> Path:
    """Write a Flux pipeline, guidance-distilled or not; return its folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "vocabulary")
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_input,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        vae=autoencoder(4, 0.1),
        text_encoder=CLIPTextModel(clip_config(len(tokenizer))),
        text_encoder_2=t5_encoder(),
        tokenizer=tokenizer,
        tokenizer_2=build_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_input),
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"
