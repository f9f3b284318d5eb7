"""The small UNet in SDXL form and the distillation of linear attention from it, at toy size."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fastdiff
from fastdiff.models import find
from fastdiff.tokens.at_edm import AtEdm
from fastdiff.tokens.linfusion_format import begin
from training.linfusion import student_of, watched
from training.unet_models import UNetState, build_noise, build_unet, export_unet, noised

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    config = tomllib.loads((TRAINING / "tiny_unet_test.toml").read_text())
    folder = tmp_path_factory.mktemp("toy") / "tiny-unet"
    export_unet(UNetState(config, torch.device("cpu")), folder)
    return folder


def test_the_settings_make_a_unet_in_sdxl_form():
    config = tomllib.loads((TRAINING / "tiny_unet.toml").read_text())
    with torch.device("meta"):
        unet = build_unet(config["denoiser"], config["text"]["dim"])
    blocks = {name: len(module.transformer_blocks) for name, module in unet.named_modules()
              if type(module).__name__ == "Transformer2DModel"}
    assert not any(name.startswith("down_blocks.0") for name in blocks)
    assert blocks["down_blocks.1.attentions.0"] == 2
    assert blocks["down_blocks.2.attentions.0"] == blocks["mid_block.attentions.0"] == 2
    assert sum(p.numel() for p in unet.parameters()) < 10e6


def test_the_exported_folder_is_a_pipeline_that_prunes(toy):
    assert find(toy).defaults.steps == 2
    pipe = StableDiffusionPipeline.from_pretrained(toy, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    fastdiff.enable(pipe, AtEdm(guard=False, early_steps=0), strict=True)
    picture = pipe("a frog on a red background", height=64, width=64, num_inference_steps=2,
                   output_type="pt").images
    assert picture.shape == (1, 3, 64, 64) and picture.isfinite().all()
    assert pipe.fastdiff.report.methods["at-edm"]["blocks pruned"] > 0
    pipe.disable_fastdiff()


def test_noise_and_velocity_agree_with_the_scheduler():
    scheduler = build_noise()
    latents, t = torch.randn(3, 16, 4, 4), torch.tensor([0, 500, 999])
    torch.manual_seed(1)
    here, velocity = noised(scheduler.alphas_cumprod, latents, t)
    torch.manual_seed(1)
    noise = torch.randn_like(latents)
    torch.testing.assert_close(here, scheduler.add_noise(latents, noise, t))
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, t))
    # the last level is noise alone
    torch.testing.assert_close(here[2], noise[2])


def test_distillation_reaches_every_weight_of_the_layers(toy):
    teacher = StableDiffusionPipeline.from_pretrained(toy, torch_dtype=torch.float32).unet
    teacher.requires_grad_(False)
    layers = begin(teacher, 8)
    for layer in layers.values():
        # the added projections begin at zero, where some gradients vanish
        for added in (layer.to_q_, layer.to_k_):
            torch.nn.init.normal_(added[-1].weight, std=0.1)
    student = student_of(teacher, layers)
    names = [place.module_name for place in layers]
    wanted, found = watched(teacher, names), watched(student, names)
    inputs = torch.randn(1, 16, 16, 16), torch.tensor([5]), torch.randn(1, 7, 32)
    teacher(*inputs)
    student(*inputs)
    loss = torch.stack([(found[n] - wanted[n]).square().mean() for n in names]).sum()
    assert not any(x.requires_grad for x in wanted.values())
    loss.backward()
    for place, layer in layers.items():
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), (place, name)
