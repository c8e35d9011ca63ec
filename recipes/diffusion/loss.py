"""The diffusion training loss: noise and timesteps of each sample, min-SNR weights, loss by timestep bucket."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.common.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BUCKETS = 10


def draw_noise(
    numbers: list[int], shape: tuple[int, ...], timesteps: int, seed: int, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What is random in the loss of each sample, from a separate generator.

    Args:
        numbers: of the samples, n of them.
        shape: of one latent (channels, height, width).
        timesteps: how many the training schedule has.
        seed: of the run.
        offset: strength of the noise that is constant over an image (offset noise).

    Returns:
        Noise (n, *shape); timesteps (n,); and noise (n, *shape) for the draw of the latents from the VAE's posterior.
    """
    noises, times, posteriors = [], [], []
    for number in numbers:
        # Spread over 64 bits: neighbouring seeds of two runs must not share their samples.
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) % 2**63)
        times.append(torch.randint(timesteps, (1,), generator=generator))
        noise = torch.randn(shape, generator=generator)
        posteriors.append(torch.randn(shape, generator=generator))
        noises.append(noise + offset * torch.randn(shape[0], 1, 1, generator=generator) if offset else noise)
    return torch.stack(noises), torch.cat(times), torch.stack(posteriors)


def target_of(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet should predict, by the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise UserError(f"model: unknown prediction type {kind!r}; known: {', '.join(PREDICTION_TYPES)}")


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights of min-SNR-gamma for the scheduler's prediction type, (n,) float32 (arXiv 2303.09556, section 3.4).

    With x0 as the target the weight is min(SNR, gamma); the other targets divide it by what turns their error into
    that of x0: SNR for epsilon, SNR + 1 for v.
    """
    signal = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = signal / (1 - signal)
    clipped = snr.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return torch.where(snr > 0, clipped / snr, torch.ones_like(snr))  # at zero SNR the limit, 1
    return clipped / (snr + 1) if kind == "v_prediction" else clipped


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (n,) float32."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


class LossByTimestep:
    """The unweighted loss in ten equal ranges of timesteps: the mean over all hardly moves while a LoRA learns."""

    def __init__(self, timesteps: int, device: torch.device) -> None:
        self.timesteps = timesteps
        self._sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=device)  # of the losses, of the counts

    @torch.no_grad()
    def add(self, losses: Tensor, timesteps: Tensor) -> None:
        """Count the losses (n,) of samples at `timesteps` (n,)."""
        bucket = timesteps * BUCKETS // self.timesteps
        self._sums[0].index_add_(0, bucket, losses.detach().double())
        self._sums[1].index_add_(0, bucket, torch.ones_like(losses, dtype=torch.float64))

    def take(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes by bucket (`loss/t0000-0099`, ...) and over all (`loss`); starts again at zero."""
        sums, counts = accelerator.reduce(self._sums, reduction="sum").cpu()
        self._sums.zero_()
        width = self.timesteps // BUCKETS
        found = {"loss": float(sums.sum() / counts.sum())}
        for i in range(BUCKETS):
            if counts[i]:
                found[f"loss/t{i * width:04d}-{(i + 1) * width - 1:04d}"] = float(sums[i] / counts[i])
        return found
