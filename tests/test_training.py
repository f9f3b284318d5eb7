"""The training code: sign of motion, captions, tokenizer, and equality with the stock modules."""

# diffusers annotates what its models return as a union
# pyright: basic, reportAttributeAccessIssue=false

import random
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from fastdiff import models  # noqa: E402
from training import (  # noqa: E402
    captions,
    data,
    denoiser,
    image_models,
    joint,
    lean_codec,
    text,
    unet_models,
)
from training.autoencoder import FullSequence, build_autoencoder  # noqa: E402

AE = {"encoder_dim": 8, "decoder_dim": 8, "dim_mult": [1, 2, 3]}


@pytest.fixture(scope="module")
def sprites():
    return data.load_sprites("cpu")


@pytest.mark.parametrize(
    ("motion", "dx", "dy"),
    [
        ("moving left", -1, 0),
        ("moving right", 1, 0),
        ("moving up", 0, -1),
        ("moving down", 0, 1),
        ("not moving", 0, 0),
    ],
)
def test_motion_goes_the_way_its_caption_says(sprites, motion, dx, dy):
    scene = captions.Scene(0, 0, 0, captions.MOTIONS.index(motion))
    assert motion in captions.plain_caption(scene)
    batch = data.make_batch([scene] * 4, random.Random(0), frames=9, duration=9)
    alpha = data.render(batch, sprites, 64, alpha_only=True)[:, :, 0]
    axis = (torch.arange(64) + 0.5) / 64
    mass = alpha.sum((2, 3))
    x = (alpha.sum(2) * axis).sum(-1) / mass
    y = (alpha.sum(3) * axis).sum(-1) / mass
    moved = torch.stack([x[:, -1] - x[:, 0], y[:, -1] - y[:, 0]], 1)
    expected = torch.tensor([dx, dy])
    assert ((moved * expected) >= 0.25 * expected.abs()).all()
    assert (moved.abs() * (1 - expected.abs()) < 0.02).all()
    assert (x - batch.x).abs().max() < 0.08


def test_training_never_draws_a_held_out_pair():
    rng = random.Random(1)
    for clip in (False, True):
        seen = [data.random_scene(rng, clip) for _ in range(500)]
        assert not any(captions.held_out(s.obj, s.colour) for s in seen)
    share = len(captions.held_out_pairs()) / (len(captions.NAMES) * len(captions.COLOURS))
    assert 0.10 < share < 0.15


def test_captions_name_object_colour_and_pattern():
    rng = random.Random(2)
    for _ in range(300):
        scene = data.random_scene(rng, rng.random() < 0.5)
        text = captions.caption(scene, rng)
        row = captions.OBJECTS[scene.obj]
        assert any(noun in text for noun in (row["name"], *row["synonyms"]))
        assert f"{captions.COLOUR_NAMES[scene.colour]} background" in text
        assert scene.pattern == 0 or captions.PATTERNS[scene.pattern] in text


@pytest.mark.parametrize("frames", [1, 5, 9, 33])
def test_full_sequence_equals_stock_autoencoder(frames):
    torch.manual_seed(0)
    vae = build_autoencoder(AE).eval()
    video = torch.rand(2, frames, 3, 32, 32) * 2 - 1
    model = FullSequence(vae)
    with torch.no_grad():
        moments = model.encode(video)
        stock = vae.encode(video.transpose(1, 2), return_dict=False)[0].parameters
        torch.testing.assert_close(moments.transpose(1, 2), stock, rtol=1e-4, atol=1e-4)
        latents = torch.randn(2, (frames + 3) // 4, 16, 4, 4)
        decoded = model.decode(latents).clamp(-1, 1)
        stock = vae.decode(latents.transpose(1, 2), return_dict=False)[0]
        torch.testing.assert_close(decoded.transpose(1, 2), stock, rtol=1e-4, atol=1e-4)


def test_tokenizer_covers_captions_in_few_tokens_and_any_text():
    tokenizer = text.build_tokenizer()
    rng = random.Random(3)
    for i in range(200):
        caption = captions.caption(data.random_scene(rng, i % 2 == 0), rng)
        ids = tokenizer(caption)["input_ids"]
        assert len(ids) <= len(caption.replace(",", " ,").split()) + 1 < text.TOKENS
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == caption
    odd = "A snowman by the sea, 漢字 and émoji 🙂!"
    back = str(tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True))
    assert back.strip() == odd.lower()
    assert tokenizer("")["input_ids"] == [text.EOS]


def test_an_exported_run_is_a_pipeline_of_its_average_weights(tmp_path):
    config = tomllib.loads((Path(unet_models.__file__).parent / "tiny_unet_test.toml").read_text())
    run = unet_models.UNetState(config, torch.device("cpu"))
    for value in run.average.values:
        value.add_(0.125)
    sizes = unet_models.export_unet(run, tmp_path)
    assert sizes["total"] == pytest.approx(sum(sizes.values()) - sizes["total"], abs=0.01)
    pipe = models.load(tmp_path, dtype=torch.float32)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.tokenizer.model_max_length == text.TOKENS
    kept = dict(pipe.unet.named_parameters())
    for name, value in run.average.state_dict().items():
        assert torch.equal(kept[name], value.bfloat16().float()), name
    assert models.defaults(tmp_path).call == {"guidance_rescale": 0.7}


@pytest.mark.parametrize("padded", [32, 226])
def test_lean_denoiser_equals_stock_on_zero_padded_prompts(padded):
    torch.manual_seed(0)
    model = denoiser.build_denoiser({"heads": 2, "layers": 2, "ffn_dim": 128}, text_dim=16).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.08)
    latents = torch.randn(2, 16, 3, 8, 8)
    lengths = torch.tensor([5, 11])
    prompt = torch.randn(2, padded, 16)
    prompt[0, 5:], prompt[1, 11:] = 0, 0
    sigma = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        stock = model(latents, sigma * 1000, prompt, return_dict=False)[0]
        bias = denoiser.pad_bias(lengths, torch.tensor([padded, padded]))
        lean = denoiser.LeanDenoiser(model)
        out = lean(latents, sigma, prompt[:, : text.TOKENS], bias, torch.float32)
    torch.testing.assert_close(out, denoiser.patches(stock, "output"), rtol=1e-4, atol=1e-4)


def test_lean_codec_equals_stock_autoencoder():
    torch.manual_seed(0)
    vae = image_models.build_codec({"widths": [8, 16, 24, 24]}).eval()
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.2)
    codec = lean_codec.LeanCodec(vae)
    with torch.no_grad():
        frames = torch.rand(2, 3, 40, 56) * 2 - 1
        stock = vae.encode(frames).latent_dist.parameters
        torch.testing.assert_close(codec.encode(frames), stock, rtol=1e-4, atol=1e-5)
        latents = torch.randn(2, 16, 5, 7)
        torch.testing.assert_close(
            codec.decode(latents), vae.decode(latents).sample, rtol=1e-4, atol=1e-5
        )


def test_folded_statistics_leave_pictures_alone_and_make_latents_standard():
    torch.manual_seed(1)
    vae = image_models.build_codec({"widths": [8, 8, 16, 16]}).eval()
    frames = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(frames).latent_dist.mean
        before = vae.decode(latents).sample
        rows = latents.transpose(0, 1).flatten(1)
        image_models.fold_statistics(vae, rows.mean(1), rows.std(1))
        folded = vae.encode(frames).latent_dist.mean
        torch.testing.assert_close(vae.decode(folded).sample, before, rtol=1e-3, atol=1e-4)
    rows = folded.transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(rows.std(1), torch.ones(16), rtol=1e-3, atol=0)


def test_lean_flux_equals_stock_denoiser():
    torch.manual_seed(2)
    text = {"dim": 24, "pooled_dim": 16}
    model = image_models.build_joint({"heads": 1, "double_layers": 1, "single_layers": 1}, text)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    tokens, hidden, pooled = torch.randn(2, 9, 64), torch.randn(2, 5, 24), torch.randn(2, 16)
    sigma = torch.tensor([0.25, 0.75])
    with torch.no_grad():
        lean = joint.LeanJoint(model)(tokens, sigma, hidden, pooled, edge=6)
        stock = model(
            hidden_states=tokens,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_models.image_ids(6, torch.device("cpu")),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    torch.testing.assert_close(lean, stock, rtol=1e-4, atol=1e-5)
    assert image_models.unpack(image_models.pack(torch.ones(1, 16, 6, 6)), 6).shape == (1, 16, 6, 6)
