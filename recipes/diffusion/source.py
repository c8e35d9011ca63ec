"""A set of training samples as the UNet takes them: latents and text of a batch."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.data import CachedLatents, ConceptImages, Example, SampleNumbers
from recipes.diffusion.model import encode, text_parts, token_ids


class Source:
    """Samples of one set of examples; class images are a second set beside the concept's.

    Args:
        examples: images with captions.
        pipe: with the new tokens, on the device.
        config: of the run.
        size: of the images, in pixels.
    """

    def __init__(self, examples: list[Example], pipe: Any, config: DiffusionArguments, size: int) -> None:
        self.vae = pipe.vae
        self.config = config
        images = ConceptImages(examples, size, config.seed, config.random_crop, config.flip)
        self.dataset = CachedLatents(images, self._encode) if config.cache_latents else images
        # Of all captions: ids, a tensor for each text encoder; or the embeddings alone, where they are cached.
        self.text = token_ids(pipe, [example.caption for example in examples])
        self.pooled: Tensor | None = None
        if config.cache_prompts:
            with torch.no_grad():
                embeddings, pooled = encode(text_parts(pipe)[1], [ids.to(self.vae.device) for ids in self.text])
            self.text, self.pooled = [embeddings.cpu()], None if pooled is None else pooled.cpu()

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior; always in float32, in which SDXL's does not overflow."""
        with torch.autocast(self.vae.device.type, enabled=False):
            found = self.vae.encode(pixels.to(self.vae.device, torch.float32)).latent_dist
        return found.mean, found.std

    def posterior(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, channels, height, width) of a batch's latents, scaled for the UNet."""
        mean, std = (batch["mean"], batch["std"]) if "mean" in batch else self._encode(batch["pixels"])
        scale = self.vae.config.scaling_factor
        return mean.to(self.vae.device) * scale, std.to(self.vae.device) * scale

    def batches(self, first: int, last: int, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
        """This process's batches from number `first` to `last`."""
        numbers = SampleNumbers(
            first, last, self.config.per_device_train_batch_size, accelerator.process_index, accelerator.num_processes
        )
        # A separate generator: the loader would draw from the global one, whose state a checkpoint restores.
        generator = torch.Generator().manual_seed(self.config.seed)
        workers = self.config.dataloader_num_workers
        yield from DataLoader(self.dataset, batch_sampler=numbers, num_workers=workers, generator=generator)
