"""The settings of `recipes.diffusion`; those of the optimizer are `OptimizerArguments`."""

import math
import re
from dataclasses import dataclass, field

from recipes.common.errors import UserError
from recipes.common.run_folder import HELP as RESUME_HELP
from recipes.common.run_folder import OVERWRITE_HELP

_CHOICES = {"on_bad_image": ("skip", "stop"), "mixed_precision": ("no", "fp16", "bf16", None)}
_AT_LEAST_ONE = (
    *("lora_r", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "logging_steps"),
    *("max_image_pixels", "validation_images", "inference_steps", "save_total_limit", "prior_images"),
)
_NOT_NEGATIVE = ("snr_gamma", "noise_offset", "max_grad_norm", "save_steps", "validation_steps", "prior_weight")


@dataclass
class DiffusionArguments:
    """Model, data, concept, LoRA, training and validation."""

    data: str = field(metadata={"help": "Folder of images with captions, or a data set on the hub."})
    model: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Stable Diffusion 1.x, 2.x or XL in diffusers layout: hub name or folder."},
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the hub's model."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the hub's weight files, such as fp16."})
    output_dir: str = field(default="outputs/diffusion_lora", metadata={"help": "Where everything is written."})
    record: str | None = field(default=None, metadata={"help": "Where the record goes besides output_dir/record.json."})

    caption: str | None = field(default=None, metadata={"help": "One caption for all images, instead of files."})
    split: str = field(default="train", metadata={"help": "Split of a data set on the hub."})
    image_column: str = "image"
    caption_column: str = "text"
    on_bad_image: str = field(default="skip", metadata={"help": "skip an unreadable or huge image (named), or stop."})
    max_image_pixels: int = field(default=50_000_000, metadata={"help": "Width times height beyond which it is huge."})
    resolution: int | None = field(default=None, metadata={"help": "In pixels; by default the model's own."})
    random_crop: bool = field(default=False, metadata={"help": "Crop at random places instead of the centre."})
    flip: bool = field(default=False, metadata={"help": "Mirror half of the samples."})
    cache_latents: bool = field(default=False, metadata={"help": "Encode the images once. Not with random_crop."})
    cache_prompts: bool = field(default=False, metadata={"help": "Encode the captions once, if no text part trains."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read images, on each training process."}
    )

    concept_tokens: list[str] = field(
        default_factory=lambda: ["<V>"],
        metadata={"help": "New tokens, each with a trained embedding; `none` for a LoRA without new tokens."},
    )
    concept_init: list[str] | None = field(
        default=None,
        metadata={"help": "For each token the words its vectors start from: dog, or random+dog for two vectors."},
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA on the UNet's attention layers."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Output scaled by alpha / r; by default alpha = r."}
    )
    lora_dropout: float = 0.0
    text_lora: bool = field(default=False, metadata={"help": "A LoRA on the text encoders too."})

    prior_prompt: str | None = field(
        default=None, metadata={"help": "Prior preservation: caption of class images, such as `a photo of a dog`."}
    )
    prior_data: str | None = field(default=None, metadata={"help": "Folder of class images; by default they are made."})
    prior_images: int = field(default=100, metadata={"help": "How many class images are made."})
    prior_weight: float = field(default=1.0, metadata={"help": "Of the class images' loss."})

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Per process, not counting class images."})
    gradient_accumulation_steps: int = 1
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradients are clipped to this norm; 0 for never."})
    snr_gamma: float = field(default=5.0, metadata={"help": "min-SNR weighting of the loss; 0 for plain weights."})
    noise_offset: float = field(default=0.0, metadata={"help": "Strength of noise that is constant over an image."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Of the UNet: less memory, slower."})
    mixed_precision: str | None = field(default=None, metadata={"help": "no, fp16 or bf16; by default accelerate's."})
    seed: int = 0

    save_steps: int = field(default=0, metadata={"help": "Save the whole state every N steps; 0 for never."})
    save_total_limit: int = field(default=2, metadata={"help": "Older ones are deleted."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": RESUME_HELP})
    overwrite_output_dir: bool = field(default=False, metadata={"help": OVERWRITE_HELP})

    validation_prompts: list[str] | None = field(default=None, metadata={"help": "Prompts to draw samples for."})
    validation_steps: int = field(default=0, metadata={"help": "Draw them every N steps; 0 for the end only."})
    validation_images: int = field(default=1, metadata={"help": "Samples of each prompt."})
    inference_steps: int = 30
    guidance_scale: float = 7.5
    clip_model: str | None = field(default=None, metadata={"help": "Score the last samples by this CLIP model."})

    logging_steps: int = 10
    report_to: str | None = field(default=None, metadata={"help": "An accelerate tracker: tensorboard, wandb, ..."})

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                words = ", ".join(filter(None, choices))
                raise UserError(f"{name} must be one of {words}, got {getattr(self, name)!r}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"lora_alpha must be finite and above 0, or left out for lora_r, got {self.lora_alpha}")
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale must be finite, got {self.guidance_scale}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.cache_latents and self.random_crop:
            raise UserError("cache_latents needs the same crop every time; leave out random_crop")
        if self.report_to == "none":  # as in the other recipes
            self.report_to = None
        if self.concept_tokens == ["none"]:
            self.concept_tokens = []
        elif self.concept_init is None:
            raise UserError("concept_init is needed: a word for each of concept_tokens, such as the class (dog)")
        for token in self.concept_tokens:
            if not token or re.search(r"[\s`|\"'\\]", token):
                raise UserError(f"concept_tokens must be words without quotes, backquotes, | and \\, got {token!r}")
        if len(set(self.concept_tokens)) < len(self.concept_tokens):
            raise UserError(f"concept_tokens must differ from one another, got {' '.join(self.concept_tokens)}")
        if self.cache_prompts and (self.concept_tokens or self.text_lora):
            raise UserError("cache_prompts needs text encoders that do not train: --concept_tokens none, no text_lora")
        if self.prior_data and not self.prior_prompt:
            raise UserError("prior_data needs prior_prompt, the caption of its images")
        if self.clip_model and not self.validation_prompts:
            raise UserError("clip_model scores samples; set validation_prompts too")
