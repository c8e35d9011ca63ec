"""CLIP scores of samples: are they like the concept's pictures, and do they show what the prompt asks for."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.common.errors import UserError


class ClipScorer:
    """Cosine similarities in CLIP's space, as the DreamBooth paper's CLIP-I and CLIP-T.

    Args:
        name: a CLIP model with its tokenizer and image processor, by hub name or folder; on the CPU, in float32.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        # Without torchvision newer versions of transformers have the slow processor under another name.
        try:
            from transformers import CLIPImageProcessorPil as Processor
        except ImportError:
            from transformers import CLIPImageProcessor as Processor  # type: ignore[assignment]
        try:
            self.model = CLIPModel.from_pretrained(name).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self.processor = Processor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"clip_model: could not load {name!r} as a CLIP model: {error}") from error

    def to(self, device: torch.device | str) -> "ClipScorer":
        """Move the model."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, width) of pictures."""
        pixels = self.processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt").pixel_values
        return F.normalize(
            _vectors(self.model.get_image_features(pixel_values=pixels.to(self.model.device))), dim=-1
        ).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, width) of prompts."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        return F.normalize(_vectors(self.model.get_text_features(**tokens)), dim=-1).cpu()

    def score(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], references: Sequence[Image.Image]
    ) -> dict[str, float]:
        """`clip_image`: mean similarity of each picture with each reference; `clip_text`: with its own prompt.

        Args:
            pictures: the samples, n of them.
            prompts: n of them, with the concept token replaced by words that CLIP knows.
            references: pictures of the concept.
        """
        found = self.images(pictures)
        return {
            "clip_image": float((found @ self.images(references).T).mean()),
            "clip_text": float((found * self.texts(prompts)).sum(dim=-1).mean()),
        }


def _vectors(output: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the projected vectors."""
    return output if isinstance(output, Tensor) else output.pooler_output
