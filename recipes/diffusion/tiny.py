"""Small Stable Diffusion pipelines made on the spot, in diffusers layout: for the demo and the tests, no downloads."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz<>"


def word_tokenizer(words: Iterable[str], length: int) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each of `words` (lower case); other words fall into letters.

    Args:
        words: learned by byte-pair encoding until each is one token.
        length: prompts are padded and cut to this many tokens.
    """
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Special, so that they are numbered here: the trainer numbers a letter that ends a word when it first meets one, in
    # the order of a hash table, and joins pairs that are as frequent in the order of their numbers.
    endings = [f"{letter}</w>" for letter in _LETTERS]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=[*_LETTERS],
        special_tokens=[_START, _END, *endings],
        show_progress=False,
    )
    # Letters on their own, as the end of a word too: what is no known word must still be tokens.
    backend.train_from_iterator([*sorted(set(words)), *_LETTERS], trainer)
    learned = json.loads(backend.to_str())["model"]
    merges = [" ".join(pair) for pair in learned["merges"]]
    with tempfile.TemporaryDirectory() as folder:  # files are what every version of transformers reads
        (Path(folder) / "vocab.json").write_text(json.dumps(learned["vocab"]), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def identity_vae(size: int) -> AutoencoderKL:
    """A VAE whose latents are the pixels, to about 1e-3: the pipeline's layout for a model that works on pixels.

    Its group norms see +x, -x and two large constants: the mean is 0 and the variance nearly that of the constants, so
    that a norm is a known factor. A bias then carries the values to where SiLU is the identity.
    """
    vae = AutoencoderKL(
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    constant, shift = 100.0, 20.0
    for coder in (vae.encoder, vae.decoder):
        for name, module in coder.named_modules():
            if name.endswith("conv2"):  # the end of each residual branch
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        into, out, norm = coder.conv_in, coder.conv_out, coder.conv_norm_out
        for p in (into.weight, into.bias, out.weight, out.bias):
            nn.init.zeros_(p)
        for c in range(3):
            into.weight[c, c, 1, 1], into.weight[c + 3, c, 1, 1] = 1.0, -1.0
            out.weight[c, c, 1, 1] = 1.0
        into.bias[6], into.bias[7] = constant, -constant
        out.bias[:3] = -shift
        out.bias[3:] = -30.0  # the encoder's other half is the log variance: none
        nn.init.constant_(norm.weight, constant / 2)  # the standard deviation over the 8 channels
        nn.init.constant_(norm.bias, shift)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(conv.bias)
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
    return vae


def tiny_pipeline(
    words: Iterable[str],
    size: int = 16,
    channels: tuple[int, ...] = (16, 32, 64),
    attention: tuple[bool, ...] = (False, False, True),
    width: int = 64,
    length: int = 12,
    vae: AutoencoderKL | None = None,
    prediction_type: str = "v_prediction",
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights and an identity VAE, from torch's global generator.

    Args:
        words: the tokenizer's.
        size: of the UNet's input.
        channels: of the UNet's levels, multiples of 8.
        attention: at which levels the UNet attends to the text.
        width: of the text encoder, a multiple of 16.
        length: of prompts, in tokens.
        vae: by default the identity.
        prediction_type: what the UNet predicts.
    """
    tokenizer = word_tokenizer(words, length)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = vae or identity_vae(size)
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        up_block_types=["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        # The text also scales the channels of every block: colours are learned far sooner than by attention alone.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
        rescale_betas_zero_snr=prediction_type == "v_prediction",  # the first step of sampling is then pure noise
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
