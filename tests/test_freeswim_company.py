"""FreeSwim beside what else a user switches on, in other Wan pipelines, and on the command line."""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import imageio.v3 as iio
import pytest
import torch
import zoo
from PIL import Image
from test_compat import lora
from typer.testing import CliRunner

import fastdiff
from fastdiff.cli import app

ROOT = Path(__file__).resolve().parents[1]
SIZE = {"height": 32, "width": 48, "num_frames": 5}
CALL = {"prompt": zoo.PROMPT, "num_inference_steps": 4, "output_type": "latent",
        "return_dict": False, **SIZE}


def seeded(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def wan_i2v(**changes):
    """Wan image-to-video; with pictures in the text attention unless `changes` say otherwise."""
    parts = zoo.build("wan")
    torch.manual_seed(0)
    transformer = zoo.wan_transformer(**{"in_channels": 36, **changes}).eval()
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, vae=parts.vae,
        scheduler=parts.scheduler, transformer=transformer.requires_grad_(False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("pictures", [True, False])
def test_image_to_video(pictures):
    changes = {"image_dim": 40, "added_kv_proj_dim": 48} if pictures else {}
    pipe = wan_i2v(**changes)
    call = {**CALL, "image": Image.new("RGB", (48, 32), "red"), "guidance_scale": 3.0,
            "max_sequence_length": 512}
    # in place of a picture encoder
    seen = torch.randn(1, 7, 40, generator=seeded(1))
    pipe.__dict__["encode_image"] = lambda image, device: seen
    before = zoo.fingerprint(pipe)
    found = {}
    for mode in ("cache", "window"):
        pipe.enable_fastdiff("freeswim", target=(64, 96), mode=mode, strict=True)
        found[mode] = pipe(**call, generator=seeded())[0]
    assert tuple(found["cache"].shape) == (1, 16, 2, 8, 12)
    assert found["cache"].isfinite().all() and not torch.equal(found["cache"], found["window"])
    pipe.enable_fastdiff("freeswim", target=(32, 48), mode="dense", strict=True)
    wanted = pipe(**call, generator=seeded())[0]
    pipe.enable_fastdiff("freeswim", target=(32, 48), mode="nocache", scale_mult=1.0, strict=True)
    zoo.assert_near(pipe(**call, generator=seeded())[0], wanted)
    pipe.disable_fastdiff()
    assert zoo.fingerprint(pipe).keys() == before.keys()


def test_wan_22_with_a_timestep_for_every_token():
    parts = zoo.build("wan")
    pipe = diffusers.WanPipeline(
        tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, vae=parts.vae,
        scheduler=parts.scheduler, transformer=parts.transformer, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "max_sequence_length": zoo.TEXT}
    pipe.enable_fastdiff("freeswim", target=(64, 96), strict=True)
    assert pipe(**call, generator=seeded())[0].shape[-2:] == (8, 12)
    pipe.enable_fastdiff("freeswim", target=(32, 48), mode="dense", strict=True)
    wanted = pipe(**call, generator=seeded())[0]
    pipe.enable_fastdiff("freeswim", target=(32, 48), mode="nocache", scale_mult=1.0, strict=True)
    zoo.assert_near(pipe(**call, generator=seeded())[0], wanted)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_lora(name):
    pipe = zoo.build(name)
    size = zoo.size(name)
    fastdiff.enable(pipe, "freeswim", target=(2 * size["height"], 2 * size["width"]), strict=True)
    plain = zoo.call(name, pipe, num_inference_steps=3)
    pipe.load_lora_weights(lora(name, pipe), adapter_name="one")
    assert not torch.equal(zoo.call(name, pipe, num_inference_steps=3), plain)
    pipe.unload_lora_weights()
    assert torch.equal(zoo.call(name, pipe, num_inference_steps=3), plain)


@pytest.mark.parametrize("how", ["model", "every module", "groups"])
def test_offload_hooks(how):
    accelerate = pytest.importorskip("accelerate")
    pipe = zoo.build("wan")
    fastdiff.enable(pipe, "freeswim", target=(160, 224), strict=True)
    plain = zoo.call("wan", pipe, num_inference_steps=3)
    if how == "model":
        accelerate.cpu_offload_with_hook(pipe.transformer, "cpu")
    elif how == "every module":
        accelerate.cpu_offload(pipe.transformer, "cpu")
    else:
        try:
            pipe.transformer.enable_group_offload(
                onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
                offload_type="leaf_level")
        except (ValueError, RuntimeError):
            pytest.skip("this diffusers offloads groups to an accelerator only")
    for _ in range(2):
        assert torch.equal(zoo.call("wan", pipe, num_inference_steps=3), plain)


def test_a_cache_of_another_kind_is_refused():
    pipe = zoo.build("wan")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    fastdiff.enable(pipe, "freeswim", target=(160, 224))
    with pytest.raises(ValueError, match="disable_cache"):
        zoo.call("wan", pipe)


def test_fused_projections():
    pipe = zoo.build("wan")
    fastdiff.enable(pipe, "freeswim", target=(160, 224), strict=True)
    plain = zoo.call("wan", pipe)
    pipe.transformer.fuse_qkv_projections()
    zoo.assert_near(zoo.call("wan", pipe), plain)


def test_four_times_the_side_of_a_picture():
    pipe = zoo.build("flux")
    fastdiff.enable(pipe, "freeswim", target=(96, 128), strict=True)
    out = zoo.call("flux", pipe, grid=(1, 6, 8), num_inference_steps=4, output_type="pt")
    assert tuple(out.shape) == (1, 3, 96, 128) and out.isfinite().all()


def test_an_error_in_a_call_leaves_nothing_behind():
    pipe = zoo.build("wan")
    zoo.call("wan", pipe)
    fastdiff.enable(pipe, "freeswim", target=(160, 224), strict=True)
    between = zoo.fingerprint(pipe)

    def fail(pipe, step, timestep, tensors):
        if tensors["latents"].shape[-1] == 28:
            raise KeyError("stop")
        return tensors

    with pytest.raises(KeyError):
        zoo.call("wan", pipe, callback_on_step_end=fail)
    found = zoo.fingerprint(pipe)
    assert {k: v for k, v in found.items() if not k.startswith("vae")} == {
        k: v for k, v in between.items() if not k.startswith("vae")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "wan"
    zoo.build("wan").save_pretrained(folder)
    (folder / "fastdiff.json").write_text(json.dumps({
        "kind": ["video", "image"], "height": 32, "width": 48, "frames": 5, "fps": 8, "steps": 4,
        "guidance": 4.0, "max_sequence_length": zoo.TEXT, "multiple": 16, "frames_rule": "4n+1"}))
    return str(folder)


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def test_generate_upscaled(model, tmp_path):
    out = tmp_path / "x.mp4"
    said = run("generate", "a red cat", "-m", model, "-o", out, "--upscale-to", "64x96",
               "--option", "interval=5")
    assert "5 frames of 64x96" in said.stderr + said.stdout
    assert iio.imread(out).shape == (5, 64, 96, 3)
    record = json.loads((tmp_path / "x.mp4.json").read_text())
    (plan,) = record["plan"]["methods"]
    assert plan["method"] == "freeswim" and plan["target"] == [64, 96] and plan["interval"] == 5
    assert (record["height"], record["width"]) == (32, 48)
    again = tmp_path / "again.mp4"
    run("generate", "--from", tmp_path / "x.mp4.json", "-o", again)
    assert (iio.imread(again) == iio.imread(out)).all()


def test_generate_upscaled_beside_another_method(model, tmp_path):
    run("generate", "a red cat", "-m", model, "-o", tmp_path / "x.png", "--upscale-to", "64",
        "--size", "32", "--method", "tile-sparse", "--option", "tile-sparse.min_tokens=1")
    assert iio.imread(tmp_path / "x.png").shape == (64, 64, 3)
    record = json.loads((tmp_path / "x.png.json").read_text())
    assert [m["method"] for m in record["plan"]["methods"]] == ["tile-sparse", "freeswim"]


@pytest.mark.parametrize(("words", "said"), [
    (["--upscale-to", "60x96"], "multiples of 16; the nearest is 64x96"),
    (["--upscale-to", "big"], "--upscale-to 'big' is not a size"),
    (["--upscale-to", "64x96", "--compare"], "leave --compare out"),
    (["--upscale-to", "64x96", "--plan", "x.json"], "do not go together"),
    (["--upscale-to", "64x96", "--method", "bottleneck"], "one sampling method"),
])
def test_generate_says_what_cannot_be(model, tmp_path, words, said):
    result = run("generate", "x", "-m", model, "-o", tmp_path / "x.mp4", *words, code=2)
    assert said in result.stderr and "Traceback" not in result.stderr


KILL = """
import sys, torch, zoo, fastdiff
pipe = zoo.build("wan")
fastdiff.enable(pipe, "freeswim", target=(160, 224), folder=sys.argv[1])
def told(pipe, step, timestep, tensors):
    print(tensors["latents"].shape[-1], step, flush=True)
    return tensors
out = zoo.call("wan", pipe, num_inference_steps=12, callback_on_step_end=told)
torch.save(out, sys.argv[2])
"""


def test_a_process_that_is_killed_goes_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = [sys.executable, "-c", KILL]
    whole = subprocess.run([*words, tmp_path / "one", tmp_path / "whole.pt"], env=environment,
                           check=True, capture_output=True, text=True)
    assert whole.stdout.splitlines().count("28 0") == 1
    first = subprocess.Popen([*words, tmp_path / "two", tmp_path / "cut.pt"], env=environment,
                             stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line == "28 4\n":
            first.send_signal(signal.SIGKILL)
            break
    first.wait(timeout=30)
    time.sleep(0.1)
    assert not (tmp_path / "cut.pt").exists()
    second = subprocess.run([*words, tmp_path / "two", tmp_path / "cut.pt"], env=environment,
                            check=True, capture_output=True, text=True)
    # stage one is not made again, and of stage two what follows the last guide step
    assert "14 0" not in second.stdout
    assert len(second.stdout.splitlines()) <= 4
    assert torch.equal(torch.load(tmp_path / "cut.pt"), torch.load(tmp_path / "whole.pt"))
