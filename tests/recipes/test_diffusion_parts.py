"""Parts of the diffusion recipe by themselves: data, loss, the toy world, CLIP scores, SDXL."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
from accelerate import Accelerator
from diffusers import DDPMScheduler

from recipes.common.errors import UserError
from recipes.diffusion.card import model_card
from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.data import ConceptImages, Example, SampleNumbers, load_examples, open_image, read_hub
from recipes.diffusion.demo import TOKEN, unseen, write_concept
from recipes.diffusion.loss import LossByTimestep, draw_noise, min_snr_weights, target_of
from recipes.diffusion.pretrain import new_pipeline, obeyed, pretrain
from recipes.diffusion.samples import grid, sample, save_picture
from recipes.diffusion.scores import ClipScorer
from recipes.diffusion.tiny import identity_vae, word_tokenizer
from recipes.diffusion.toy import BACKGROUND, CONCEPT, SIZE, combinations, detect, draw

pytestmark = pytest.mark.xdist_group("diffusion")


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", **how: Any) -> Path:
    """A picture of noise."""
    bands = len(mode)
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path, **how)
    return path


# ---------------------------------------------------------------- images and captions


def test_captions_from_jsonl_csv_and_text_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("one <V>\n")
    (tmp_path / "b.txt").write_text("two <V>\n")
    assert [(e.name, e.caption) for e in load_examples(str(tmp_path))] == [("a.jpg", "one <V>"), ("b.png", "two <V>")]
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,2\na.jpg,1\n")
    assert [e.caption for e in load_examples(str(tmp_path))] == ["1", "2"]
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "B"}\n\n{"file_name": "a.jpg", "text": "A"}'
    )
    assert [e.caption for e in load_examples(str(tmp_path))] == ["A", "B"]
    assert [e.caption for e in load_examples(str(tmp_path), caption="all")] == ["all", "all"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "has no captions"),
        ('{"file_name": "c.png", "text": "x"}', r"lists c.png, not in .*did you mean '[ab].png'"),
        ('{"file_name": "a.png", "text": "x"}', "has no caption for b.png"),
        ('{"file_name": "a.png", "caption": "x"}', "expected file_name and text, got the keys file_name, caption"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "a.png is listed twice"),
        ('{"file_name": ', "line 1: not JSON"),
        ("[1]", "line 1: expected an object"),
    ],
)
def test_captions_that_do_not_match(tmp_path: Path, metadata: str | None, message: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    if metadata is not None:
        (tmp_path / "metadata.jsonl").write_text(metadata)
    with pytest.raises(UserError, match=message):
        load_examples(str(tmp_path))


def test_bad_images_are_named_and_skipped_unless_told_to_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "good.png")
    picture(tmp_path / "huge.png", (40, 40))
    whole = picture(tmp_path / "cut.jpg", (64, 64)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    found = load_examples(str(tmp_path), caption="x", max_image_pixels=100 * 41)
    assert [e.name for e in found] == ["good.png", "huge.png"]
    assert "cut.jpg" in caplog.text
    assert "text.png" in caplog.text
    assert [e.name for e in load_examples(str(tmp_path), caption="x", max_image_pixels=1599)] == ["good.png"]
    assert "huge.png: 40x40 has more than max_image_pixels (1599)" in caplog.text
    with pytest.raises(UserError, match=r"bad image cut.jpg.*--on_bad_image skip"):
        load_examples(str(tmp_path), caption="x", on_bad_image="stop")
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="none of 3 images is usable"):
        load_examples(str(tmp_path), caption="x", max_image_pixels=100)


def test_empty_or_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in"):
        load_examples(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot read the folder .*No such file"):
        load_examples(str(tmp_path / "none"))


def test_rgb_whatever_the_file_holds(tmp_path: Path) -> None:
    """Transparent becomes white, and a photograph is turned as the camera was held."""
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_image(tmp_path / "clear.png")).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", (4, 8)).save(tmp_path / "turned.jpg", exif=exif)
    turned = open_image(tmp_path / "turned.jpg")
    assert (turned.mode, turned.size) == ("RGB", (8, 4))


def test_hub_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = [str(picture(tmp_path / f"{i}.png")) for i in range(2)]
    rows = datasets.Dataset.from_dict({"image": names, "text": ["a", "b"]}).cast_column("image", datasets.Image())
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set/train.parquet")
    found = read_hub(str(tmp_path / "set"), "train", "image", "text", None)
    assert [e.caption for e in found] == ["a", "b"]
    assert open_image(found[0].source).size == (8, 8)
    with pytest.raises(UserError, match="no column 'caption'; its columns: image, text"):
        read_hub(str(tmp_path / "set"), "train", "image", "caption", None)
    with pytest.raises(UserError, match=r"'text' of .* does not hold images"):
        read_hub(str(tmp_path / "set"), "train", "text", "text", None)


def test_samples_depend_on_seed_and_number_only(tmp_path: Path) -> None:
    """Each epoch has every image once; crops lie inside; flips mirror; two processes together have one's samples."""
    examples = [Example(f"{i}", picture(tmp_path / f"{i}.png", (12, 20)), "") for i in range(3)]
    images = ConceptImages(examples, 8, seed=1, random_crop=True, flip=True)
    for epoch in range(3):
        assert sorted(images[n]["index"] for n in range(3 * epoch, 3 * epoch + 3)) == [0, 1, 2]
    again = ConceptImages(examples, 8, seed=1, random_crop=True, flip=True)
    assert all(torch.equal(images[n]["pixels"], again[n]["pixels"]) for n in (5, 1))
    sizes = torch.stack([images[n]["sizes"] for n in range(40)])
    assert sizes[:, :2].unique(dim=0).tolist() == [[20, 12]]
    assert sizes[:, 2].min() >= 0
    assert sizes[:, 2].max() <= round(20 * 8 / 12) - 8
    straight, mirrored = (images.item(0, flipped, None)["pixels"] for flipped in (False, True))
    assert torch.equal(straight.flip(-1), mirrored)
    single = [n for batch in SampleNumbers(1, 3, 4, 0, 1) for n in batch]
    double = [list(SampleNumbers(1, 3, 2, process, 2)) for process in (0, 1)]
    assert single == list(range(4, 12))
    assert [sorted(a + b) for a, b in zip(*double, strict=True)] == [single[:4], single[4:]]


# ---------------------------------------------------------------- loss


def test_noise_is_that_of_the_sample() -> None:
    noise, timesteps, spread = draw_noise([7, 3], (4, 2, 2), 1000, seed=5)
    alone = draw_noise([3], (4, 2, 2), 1000, seed=5)
    assert torch.equal(noise[1:], alone[0])
    assert torch.equal(timesteps[1:], alone[1])
    assert not torch.equal(noise, spread)
    assert not torch.equal(draw_noise([3], (4, 2, 2), 1000, seed=6)[0], alone[0])
    shifted = draw_noise([3], (4, 2, 2), 1000, seed=5, offset=0.5)[0] - alone[0]
    assert shifted.flatten(2).std(dim=2).max() < 1e-6  # constant over the picture
    assert shifted.abs().max() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_x0(kind: str) -> None:
    """Whatever the UNet predicts, weight x error is min(SNR, 5) x the error of x0 that it stands for."""
    schedule = DDPMScheduler(prediction_type=kind)
    t = torch.tensor([1, 200, 500, 990])
    x0, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    noisy = schedule.add_noise(x0, noise, t)
    signal = schedule.alphas_cumprod[t].double()
    a, s = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    predicted = target_of(schedule, x0, noise, t) + 0.1 * torch.randn_like(x0)
    of_x0 = {"epsilon": (noisy - s * predicted) / a, "v_prediction": a * noisy - s * predicted, "sample": predicted}[
        kind
    ]
    snr = signal / (1 - signal)
    expected = snr.clamp(max=5) * ((of_x0 - x0) ** 2).mean(dim=(1, 2, 3))
    found = min_snr_weights(schedule, t, 5.0) * ((predicted - target_of(schedule, x0, noise, t)) ** 2).mean(
        dim=(1, 2, 3)
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)  # alphas_cumprod is float32


def test_loss_by_timestep() -> None:
    counted = LossByTimestep(1000, torch.device("cpu"))
    counted.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 99, 999]))
    counted.add(torch.tensor([7.0]), torch.tensor([900]))
    assert counted.take(Accelerator(cpu=True)) == {"loss": 4.0, "loss/t0000-0099": 2.0, "loss/t0900-0999": 6.0}
    counted.add(torch.tensor([1.0]), torch.tensor([500]))
    assert counted.take(Accelerator(cpu=True)) == {"loss": 1.0, "loss/t0500-0599": 1.0}


# ---------------------------------------------------------------- the toy world


@pytest.mark.parametrize("size", [8, SIZE, 64])
def test_detector_reads_every_drawing_also_noisy(size: int) -> None:
    drawings = combinations(concept=True) + combinations(concept=False)
    rng = np.random.default_rng(0)
    pictures = np.stack([draw(drawing, size) for drawing in drawings])
    assert pictures.shape[1:] == (size, size, 3)
    assert len(drawings) == len(set(drawings)) == 3 * 3 * 4 * 4
    assert detect(pictures) == drawings
    noisy = np.clip(pictures + rng.normal(0, 15, pictures.shape), 0, 255).astype(np.uint8)
    assert detect(noisy) == drawings


def test_detector_sees_nothing_in_what_is_no_drawing() -> None:
    rng = np.random.default_rng(0)
    empty = np.full((1, SIZE, SIZE, 3), BACKGROUND, dtype=np.uint8)
    noise = rng.integers(256, size=(4, SIZE, SIZE, 3), dtype=np.uint8)
    assert detect(np.concatenate([empty, noise])) == [None] * 5
    scores = obeyed(list(noise), combinations(concept=True)[:4])
    assert scores == {"all": 0.0, "object": 0.0, "colour": 0.0, "place": 0.0, "nothing": 1.0}


def test_concept_set_is_five_and_the_prompts_are_others(tmp_path: Path) -> None:
    write_concept(tmp_path, SIZE)
    examples = load_examples(str(tmp_path))
    assert len(examples) == 5
    assert all(TOKEN in e.caption for e in examples)
    shown = {e.caption for e in examples}
    asked = {drawing.caption(TOKEN) for drawing in unseen()}
    assert len(asked) == 16 - 5
    assert not shown & asked
    assert all((d.shape, d.pattern) == CONCEPT for d in unseen())


def test_identity_vae_and_tokenizer() -> None:
    """Latents are the pixels to well within a grey level of 2 / 255; each word is one token, others are letters."""
    vae = identity_vae(16)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert (vae.encode(pixels).latent_dist.sample() - pixels).abs().max() < 1e-3
        assert (vae.decode(pixels).sample - pixels).abs().max() < 1e-3
    tokenizer = word_tokenizer(["red", "green", "greenish"], 8)
    ids = tokenizer("Red greenish green").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == ["red</w>", "greenish</w>", "green</w>"]
    assert len(tokenizer.encode("zebra", add_special_tokens=False)) == 5
    # The same numbers every time: each trainer has a hash table in an order of its own.
    tables = [word_tokenizer(["a", "photo", "of", "dog", "toy"], 8).get_vocab() for _ in range(8)]
    assert all(table == tables[0] for table in tables)


def test_pretraining_learns_and_the_pipeline_loads(tmp_path: Path) -> None:
    """A few steps lower the loss, of which an untrained model has 1 or more."""
    torch.manual_seed(0)
    pipe = new_pipeline(SIZE, (8, 16))
    assert pretrain(pipe, steps=12, batch_size=8, lr=3e-3, seed=0)["loss"] < 0.9
    pipe.save_pretrained(tmp_path)
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    settings = {"steps": 2, "guidance": 2.0, "batch_size": 2, "size": SIZE}
    drawn = [sample(p, ["a red cross", "a blue square"], [0, 1], **settings) for p in (pipe, loaded)]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*drawn, strict=True))
    alone = sample(pipe, ["a blue square"], [1], **settings)[0]  # batches do not matter: at most rounding
    assert abs(np.asarray(alone).astype(int) - np.asarray(drawn[0][1]).astype(int)).max() <= 1


# ---------------------------------------------------------------- pictures and scores


def test_grid_and_atomic_png(tmp_path: Path) -> None:
    colours = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    sheet = grid([("one", colours), ("two", colours[::-1])], ["a red thing and more words", "b"], cell=40)
    pixels = {sheet.getpixel((sheet.width - 4 - 40 * i - 20 - 4 * i, sheet.height - 20)) for i in (0, 1)}
    assert pixels == {(255, 0, 0), (0, 0, 255)}
    path = save_picture(sheet, tmp_path / "new/grid.png")
    assert open_image(path).size == sheet.size
    with pytest.raises(AttributeError):
        save_picture(None, path)  # type: ignore[arg-type]
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    assert open_image(path).size == sheet.size


def test_clip_scores(tmp_path: Path) -> None:
    """A tiny random CLIP: a picture is like itself, and the scores are the cosines of CLIP's own vectors."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = word_tokenizer(["a", "red", "dog"], 8)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "max_position_embeddings": 8, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    half = [0.5, 0.5, 0.5]
    how = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "image_mean": half}
    how |= {"crop_size": {"height": 8, "width": 8}, "image_std": half}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(how))
    scorer = ClipScorer(str(tmp_path))
    one, two = (open_image(picture(tmp_path / f"{i}.png", (8 + i, 8))) for i in (0, 4))
    assert scorer.score([one], ["a red dog"], [one])["clip_image"] == pytest.approx(1.0, abs=1e-5)
    found = scorer.score([one, two], ["a red dog", "a dog"], [one, two])
    pixels = torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    ids = tokenizer(["a red dog"], return_tensors="pt")
    expected = model(pixel_values=pixels.float(), **ids).logits_per_image.item() / model.logit_scale.exp().item()
    assert scorer.score([one], ["a red dog"], [two])["clip_text"] == pytest.approx(expected, abs=1e-4)
    assert -1 <= found["clip_image"] <= 1
    assert not math.isnan(found["clip_text"])
    with pytest.raises(UserError, match="clip_model: could not load"):
        ClipScorer(str(tmp_path / "none"))


def test_a_card_on_a_local_base_names_no_model_of_the_hub(tmp_path: Path) -> None:
    record = {"config": {"model": "base", "optim": "sgd_sai", "learning_rate": 0.1, "weight_decay": 0.0}, "scores": {}}
    record |= {"captions": ["<V>"], "images": 1, "steps": 1, "samples_per_step": 1, "text_encoders": 1, "versions": {}}
    cards = [
        model_card(record, DiffusionArguments(data="x", concept_init=["dog"], model=name), None)
        for name in (str(tmp_path), "owner/base")
    ]
    assert [card.data.base_model for card in cards] == [None, "base"]
    assert "| base model | base (a local folder) |" in cards[0].text
    assert 'from_pretrained("FOLDER OF THE BASE")' in cards[0].text
    assert 'from_pretrained("base")' in cards[1].text
