"""Pretraining of the toy world's text-conditioned diffusion model, from nothing, in minutes on a CPU."""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from recipes.diffusion.loss import sample_losses, target_of
from recipes.diffusion.model import encode, token_ids, training_schedule
from recipes.diffusion.samples import sample
from recipes.diffusion.tiny import tiny_pipeline
from recipes.diffusion.toy import Drawing, combinations, detect, draw

_UNPROMPTED = 0.1  # of the captions are left out, for classifier-free guidance
# A part of the timesteps is drawn from where the text alone says which colour and place: an object, many pixels of
# one colour, shows through weaker noise. Where that begins goes with the number of pixels: here for 8 a side.
_NOISY_SHARE, _NOISY_SNR, _NOISY_SIDE = 0.5, 0.26, 8


def new_pipeline(size: int, channels: Sequence[int]) -> StableDiffusionPipeline:
    """The untrained model, whose tokenizer knows the words of all captions.

    Args:
        size: of the pictures, in pixels.
        channels: of the UNet's levels, each of half the size of the one before; the last one attends to the text.
    """
    drawings = combinations(concept=True) + combinations(concept=False)
    words = {word for drawing in drawings for word in drawing.caption().split()}
    attention = (*(False for _ in channels[1:]), True)
    return tiny_pipeline(words, size, channels=tuple(channels), attention=attention)


def as_pixels(pictures: list[np.ndarray]) -> Tensor:
    """(n, 3, size, size) in [-1, 1] of n uint8 pictures (size, size, 3)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def pretrain(pipe: StableDiffusionPipeline, steps: int, batch_size: int, lr: float, seed: int) -> dict[str, Any]:
    """Train UNet and text encoder on drawings of everything but the concept.

    Args:
        pipe: changed in place, on its device; its VAE must be the identity.
        steps: of AdamW with a one-cycle schedule.
        batch_size: drawings a step.
        lr: the schedule's peak.
        seed: of drawings, noise and timesteps.

    Returns:
        The loss over the last tenth of the steps, and the seconds it took, of the clock and of the processor.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    drawings = combinations(concept=False)
    pictures = as_pixels([draw(drawing, pipe.unet.config.sample_size) for drawing in drawings]).to(pipe.device)
    ids = token_ids(pipe, [drawing.caption() for drawing in drawings] + [""])[0].to(pipe.device)  # last: no prompt
    schedule = training_schedule(pipe)
    signal = schedule.alphas_cumprod
    noisy_from = int((signal > (1 - signal) * _NOISY_SNR * (_NOISY_SIDE / pipe.unet.config.sample_size) ** 2).sum())
    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    pipe.unet.train()
    pipe.text_encoder.train()
    recent: deque[tuple[float, float]] = deque(maxlen=max(1, steps // 10))  # loss: all, and where the noise is strong
    bar = tqdm(range(steps), desc="pretrain")
    for step in bar:
        chosen = rng.integers(len(drawings), size=batch_size)
        pixels = pictures[chosen]
        captions = torch.from_numpy(np.where(rng.random(batch_size) < _UNPROMPTED, len(drawings), chosen))
        low = torch.where(torch.rand(batch_size) < _NOISY_SHARE, noisy_from, 0)
        timesteps = (low + torch.rand(batch_size) * (len(signal) - low)).long().to(pipe.device)
        noise = torch.randn_like(pixels)
        embeddings, _ = encode([pipe.text_encoder], [ids[captions]])
        predicted = pipe.unet(schedule.add_noise(pixels, noise, timesteps), timesteps, embeddings).sample
        losses = sample_losses(predicted, target_of(schedule, pixels, noise, timesteps))
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        noisy = losses.detach()[timesteps >= noisy_from]
        recent.append((loss.item(), noisy.mean().item() if len(noisy) else math.nan))
        if step % 50 == 49:
            everywhere, strong = np.nanmean(list(recent)[-50:], axis=0)
            bar.set_postfix(loss=f"{everywhere:.3f}", noisy=f"{strong:.3f}")
    pipe.unet.eval()
    pipe.text_encoder.eval()
    return {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": lr,
        "seed": seed,
        "loss": float(np.mean([all_steps for all_steps, _ in recent])),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - start_cpu, 1),
    }


def draw_samples(
    pipe: Any, wanted: list[Drawing], noun: str | None, steps: int, guidance: float, seed: int
) -> list[np.ndarray]:
    """What the pipeline draws for the captions of `wanted`, with `noun` in the place of pattern and shape."""
    prompts = [drawing.caption(noun) for drawing in wanted]
    pictures = sample(
        pipe, prompts, [seed + i for i in range(len(wanted))], steps, guidance, 32, pipe.unet.config.sample_size
    )
    return [np.asarray(picture) for picture in pictures]


def obeyed(pictures: list[np.ndarray], wanted: list[Drawing]) -> dict[str, float]:
    """Shares of pictures in which the detector finds what was asked for.

    `object`: its shape and pattern; `colour`; `place`; `all` of these; `nothing`: no drawing of this world is near.
    """
    found = detect(np.stack(pictures))
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]

    def share(parts: tuple[str, ...]) -> float:
        return sum(all(getattr(a, part) == getattr(b, part) for part in parts) for a, b in pairs) / len(wanted)

    return {
        "all": share(("shape", "pattern", "colour", "place")),
        "object": share(("shape", "pattern")),
        "colour": share(("colour",)),
        "place": share(("place",)),
        "nothing": found.count(None) / len(found),
    }
