"""The diffusion LoRA recipe on a tiny random SDXL: two text encoders, pooled embedding, sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from recipes.common.optimizers import OptimizerArguments
from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.data import open_image
from recipes.diffusion.model import load_concept
from recipes.diffusion.tiny import word_tokenizer
from recipes.diffusion.train import fine_tune

pytestmark = pytest.mark.xdist_group("diffusion")


def tiny_xl() -> StableDiffusionXLPipeline:
    """Random weights; text encoders of width 32 and 16, the second with a projection to 16; pictures of 16 pixels."""
    tokenizers = [word_tokenizer(["a", "photo", "of", "dog"], 8) for _ in range(2)]
    encoders = []
    for kind, width, tokenizer in zip((CLIPTextModel, CLIPTextModelWithProjection), (32, 16), tokenizers, strict=True):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoders.append(kind(config))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionXLPipeline(
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


@pytest.mark.parametrize("text_trains", [True, False])
def test_sdxl_trains_and_loads_back(tmp_path: Path, text_trains: bool) -> None:
    """The same pixels from a fresh pipeline, with a token in both text encoders, or with captions encoded once."""
    torch.manual_seed(0)
    tiny_xl().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 16, 3), dtype=np.uint8)).save(
        tmp_path / "data/0.png"
    )
    (tmp_path / "data/metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a photo of <V>"}))
    prompt = "a photo of <V>" if text_trains else "a photo of dog"
    concept = {"concept_init": ["dog"], "text_lora": True} if text_trains else {"concept_tokens": ["none"]}
    config = DiffusionArguments(
        data=str(tmp_path / "data"),
        model=str(tmp_path / "model"),
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        inference_steps=2,
        validation_prompts=[prompt],
        cache_prompts=not text_trains,
        **concept,
    )
    record = fine_tune(config, OptimizerArguments(learning_rate=0.1, lr_scheduler_type="constant"))
    assert record["text_encoders"] == 2
    drawn = np.asarray(open_image(tmp_path / "out/samples/step-000003/00.png")).astype(int)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    load_concept(pipe, tmp_path / "out/lora")
    picture = pipe(
        prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=2, guidance_scale=7.5
    ).images[0]
    assert abs(np.asarray(picture).astype(int) - drawn).max() <= 1
    names = load_file(tmp_path / "out/lora/pytorch_lora_weights.safetensors").keys()
    kinds = {name.split(".")[0] for name in names}
    assert kinds == ({"unet", "text_encoder", "text_encoder_2"} if text_trains else {"unet"})
    if text_trains:
        rows = load_file(tmp_path / "out/lora/learned_embeds.safetensors")
        assert {name: tuple(row.shape) for name, row in rows.items()} == {"clip_l": (1, 32), "clip_g": (1, 16)}
        assert "clip_g" in (tmp_path / "out/lora/README.md").read_text()
