"""The model card of a diffusion LoRA."""

import json
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from recipes.common.models import hub_name
from recipes.common.records import markdown_text
from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.model import EMBEDDINGS


def model_card(record: dict[str, Any], config: DiffusionArguments, grid: str | None) -> ModelCard:
    """The card in the hub's format: base model, concept, optimizer, learning rate, pictures, how to load.

    Args:
        record: of the run.
        config: its settings.
        grid: file name of a picture beside the card.
    """
    settings = record["config"]
    base = hub_name(config.model) and settings["model"]
    named = base or f"{settings['model']} (a local folder)"
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        tags=["lora", "text-to-image", "stable-diffusion", str(settings["optim"])],
        pipeline_tag="text-to-image",
        instance_prompt=record["captions"][0],
    )
    rows = [
        ("base model", markdown_text(named)),
        ("images", record["images"]),
        ("tokens", " ".join(f"`{token}`" for token in config.concept_tokens) or "none"),
        ("optimizer", markdown_text(f"{settings['optim']} {settings.get('optim_args') or ''}")),
        ("learning rate", f"{settings['learning_rate']:g}"),
        ("weight decay", f"{settings['weight_decay']:g}"),
        ("steps", f"{record['steps']}, {record['samples_per_step']} samples each"),
        ("LoRA", f"r {config.lora_r}, alpha {config.lora_alpha or config.lora_r:g}"),
        *((name, f"{value:.4f}") for name, value in record["scores"].items()),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    load = [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base or 'FOLDER OF THE BASE')})",
        'pipe.load_lora_weights("FOLDER")',
    ]
    names = [
        f"{EMBEDDINGS}.safetensors" if i == 0 else f"{EMBEDDINGS}_{i}.safetensors"
        for i in range(len(config.concept_tokens))
    ]
    if record["text_encoders"] == 1:
        load += [f'pipe.load_textual_inversion("FOLDER", weight_name="{name}")' for name in names]
    elif names:
        load[0] = "from diffusers import DiffusionPipeline\nfrom safetensors.torch import load_file"
        for token, name in zip(config.concept_tokens, names, strict=True):
            load.append(f'rows = load_file("FOLDER/{name}")')
            for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
                load.append(
                    f'pipe.load_textual_inversion(rows["{key}"], token={json.dumps(token)}, '
                    f"tokenizer=pipe.tokenizer{suffix}, text_encoder=pipe.text_encoder{suffix})"
                )
    code = "\n".join(load)
    about = (
        f"A LoRA for {markdown_text(named)}, trained by `recipes/diffusion/train.py` of hf_sai "
        f"{record['versions'].get('hf_sai', '')}.\n\n{table}\n\n```python\n{code}\n```\n"
    )
    if grid:
        about += f"\nSamples while training:\n\n![samples]({grid})\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Concept LoRA with {settings['optim']}\n\n{about}")
