"""Tiny pipelines of nine families: diffusers' own classes, random weights, no files, no network."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import string
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

TEXT = 24  # tokens of every prompt, padded
PROMPT = "a red cat"

_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
_VOCABULARY = {piece: i for i, piece in enumerate([*_SPECIAL, *string.printable])}
PAD, BOS, EOS, _ = range(4)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character."""
    tokenizer = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=TEXT, padding_side="right",
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
    )


def _clip(width: int = 32, projection: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=len(_VOCABULARY), hidden_size=width, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=width, hidden_act="gelu",
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(config)


def _t5(cls: type = transformers.T5EncoderModel) -> nn.Module:
    small = {"vocab_size": len(_VOCABULARY), "d_model": 32, "d_kv": 8, "d_ff": 37,
             "num_layers": 1, "num_heads": 4, "pad_token_id": PAD, "eos_token_id": EOS}
    wide = cls is transformers.UMT5EncoderModel
    return cls((transformers.UMT5Config if wide else transformers.T5Config)(**small))


def _llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=len(_VOCABULARY), hidden_size=16, intermediate_size=37, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS,
    ))


def _vae(channels: int = 4, halvings: int = 1, **options: Any) -> nn.Module:
    levels = halvings + 1
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, layers_per_block=1,
        block_out_channels=(8,) * levels, norm_num_groups=2, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, **options,
    )


def _sd15() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=8,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )
    return diffusers.StableDiffusionPipeline(
        vae=_vae(halvings=3), text_encoder=_clip(), tokenizer=_tokenizer(), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80, cross_attention_dim=64, norm_num_groups=8,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing="leading", steps_offset=1,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(halvings=3), text_encoder=_clip(), text_encoder_2=_clip(projection=True),
        tokenizer=_tokenizer(), tokenizer_2=_tokenizer(), unet=unet, scheduler=scheduler,
        add_watermarker=False,
    )


def _sd3(**changes: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=24,
        **changes,
    )
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(shift_factor=0.06),
        text_encoder=_clip(projection=True), tokenizer=_tokenizer(),
        text_encoder_2=_clip(projection=True), tokenizer_2=_tokenizer(),
        text_encoder_3=None, tokenizer_3=None, transformer=transformer,
    )


def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(), tokenizer=_tokenizer(), text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(), transformer=transformer,
    )


def _pixart_sigma() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2,
        caption_channels=32, in_channels=4, cross_attention_dim=32, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=_tokenizer(), text_encoder=_t5(), vae=_vae(halvings=3), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def wan_transformer(**changes: Any) -> Any:
    return diffusers.WanTransformer3DModel(**{
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24,
        "in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32,
        "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32, **changes,
    })


def _wan(second: bool = False) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    more = {"transformer_2": wan_transformer(), "boundary_ratio": 0.875} if second else {}
    return diffusers.WanPipeline(
        tokenizer=_tokenizer(), text_encoder=_t5(transformers.UMT5EncoderModel), vae=vae,
        scheduler=scheduler, transformer=wan_transformer(), **more,
    )


def _cogvideox() -> Any:
    blocks = ("CogVideoXDownBlock3D",) * 4, ("CogVideoXUpBlock3D",) * 4
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=blocks[0], up_block_types=blocks[1],
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=32, num_layers=2, sample_width=10, sample_height=10,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=_tokenizer(), text_encoder=_t5(), vae=vae, transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def _ltx() -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, num_layers=2, caption_channels=32,
    )
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        text_encoder=_t5(), tokenizer=_tokenizer(), transformer=transformer,
    )


def _hunyuan_video() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        layers_per_block=1, act_fn="silu", norm_num_groups=4, scaling_factor=0.476986,
        spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True,
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=32, rope_axes_dim=(4, 6, 6),
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=_llama(), tokenizer=_tokenizer(), transformer=transformer, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_clip(), tokenizer_2=_tokenizer(),
    )


_BUILD: dict[str, Callable[[], Any]] = {
    "sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "pixart_sigma": _pixart_sigma,
    "wan": _wan, "cogvideox": _cogvideox, "ltx": _ltx, "hunyuan_video": _hunyuan_video,
}
NAMES = tuple(_BUILD)
_VARIANTS: dict[str, Callable[[], Any]] = {
    # two experts
    "wan22": lambda: _wan(second=True),
    # a second attention, over the grid alone, in the first block
    "sd35": lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
}
_FAMILY = {"wan22": "wan", "sd35": "sd3"}
VIDEO = ("wan", "cogvideox", "ltx", "hunyuan_video")
# text and latent tokens share one attention
JOINT = ("sd3", "flux", "cogvideox", "hunyuan_video")
# one forward a step holds both guidance branches
BATCHED_CFG = ("sd15", "sdxl", "sd3", "pixart_sigma", "cogvideox", "ltx")

# token grids (frames, height, width): odd ones on purpose
GRIDS = {
    "sd15": (1, 12, 9), "sdxl": (1, 10, 14), "sd3": (1, 10, 9), "flux": (1, 9, 11),
    "pixart_sigma": (1, 9, 10), "wan": (3, 5, 7), "cogvideox": (5, 5, 3), "ltx": (3, 8, 8),
    "hunyuan_video": (3, 5, 7),
}
_SIZE_OF_TOKEN = {
    "sd15": 8, "sdxl": 16, "sd3": 4, "flux": 4, "pixart_sigma": 16, "wan": 16, "cogvideox": 16,
    "ltx": 4, "hunyuan_video": 16,
}
_CALL: dict[str, dict[str, Any]] = {
    "sd15": {"guidance_scale": 4.0},
    "sdxl": {"guidance_scale": 4.0},
    "sd3": {"guidance_scale": 4.0, "max_sequence_length": TEXT},
    "flux": {"guidance_scale": 3.5, "max_sequence_length": TEXT},
    "pixart_sigma": {"guidance_scale": 4.0, "max_sequence_length": TEXT, "clean_caption": False,
                     "use_resolution_binning": False},
    "wan": {"guidance_scale": 4.0, "max_sequence_length": TEXT},
    "cogvideox": {"guidance_scale": 4.0, "max_sequence_length": TEXT},
    "ltx": {"guidance_scale": 3.0, "max_sequence_length": TEXT},
    "hunyuan_video": {"max_sequence_length": TEXT,
                      "prompt_template": {"template": "{}", "crop_start": 0}},
}


def build(name: str, seed: int = 0) -> Any:
    """A pipeline of this family or variant. Same seed, same weights."""
    torch.manual_seed(seed)
    pipe = {**_BUILD, **_VARIANTS}[name]()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> Any:
    return pipe.components.get("unet") or pipe.components["transformer"]


def size(name: str, grid: tuple[int, int, int] | None = None) -> dict[str, int]:
    """Arguments that give this token grid."""
    name = _FAMILY.get(name, name)
    frames, height, width = grid or GRIDS[name]
    scale = _SIZE_OF_TOKEN[name]
    found = {"height": height * scale, "width": width * scale}
    return {**found, "num_frames": 4 * frames - 3} if name in VIDEO else found


def call(name: str, pipe: Any, seed: int = 0, grid: tuple[int, int, int] | None = None,
         **changes: Any) -> Tensor:
    """Latents of a run of two steps. A list of prompts gets one seed each, from `seed` on."""
    prompt = changes.get("prompt", PROMPT)
    seeds = range(seed, seed + (len(prompt) if isinstance(prompt, list) else 1))
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    arguments = {
        "prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", "return_dict": False,
        "generator": generators if isinstance(prompt, list) else generators[0],
        **size(name, grid), **_CALL[_FAMILY.get(name, name)], **changes,
    }
    return pipe(**arguments)[0]


def small_options(name: str, **changes: Any) -> dict[str, Any]:
    """Options of enable with which sparse really runs on these small grids."""
    tile = (1, 2, 4) if _FAMILY.get(name, name) in VIDEO else (1, 4, 4)
    return {"density": 0.4, "dense_steps": 0, "min_tokens": 1, "max_density": 1.0, "tile": tile,
            "sink": 0, "strict": True, **changes}


def fingerprint(pipe: Any) -> dict[str, Any]:
    """All that FastDiff could leave behind: classes, attribute names, hooks, by place."""
    found: dict[str, Any] = {"pipe": (type(pipe), frozenset(vars(pipe)))}
    for part, component in pipe.components.items():
        if not isinstance(component, nn.Module):
            found[part] = (type(component), frozenset(getattr(component, "__dict__", {})))
            continue
        for name, module in component.named_modules():
            processor = getattr(module, "processor", None)
            found[f"{part}.{name}"] = (
                type(module), frozenset(vars(module)), len(module._forward_pre_hooks),
                len(module._forward_pre_hooks_with_kwargs), len(module._forward_hooks),
                type(processor), frozenset(getattr(processor, "__dict__", {})),
            )
    return found


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the rounding of float32 over a few layers and steps."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * float(wanted.abs().max()))
