"""Stable Diffusion (1.x, 2.x, XL) with a LoRA and new tokens: loading, training forward pass, saving for diffusers."""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.common.errors import UserError

logger = logging.getLogger(__name__)
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
EMBEDDINGS = "learned_embeds"  # the name that load_textual_inversion looks for
_SD_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_XL_PARTS = (*_SD_PARTS, "text_encoder_2", "tokenizer_2")


def load_pipeline(name: str, revision: str | None = None, variant: str | None = None) -> Any:
    """A Stable Diffusion pipeline in diffusers layout, by hub name or folder, in float32, its parts checked.

    Raises:
        UserError: a part is missing, of another size than its neighbours, or this is another kind of pipeline.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
    try:
        pipe = DiffusionPipeline.from_pretrained(name, revision=revision, variant=variant, safety_checker=None)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model: could not load {name!r} as a diffusers pipeline: {error}") from error
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UserError(f"model: {name!r} is a {type(pipe).__name__}, not Stable Diffusion 1.x, 2.x or XL")
    _check_sizes(pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, *text_parts(pipe)[1]):
        for p in part.parameters():
            p.data = p.data.float()  # the files can be in half precision
    return pipe


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"model: {folder} has no model_index.json, so it is not a pipeline in diffusers layout")
    try:
        named = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model: {index} must be JSON: {error}") from error
    if not isinstance(named, dict):
        raise UserError(f"model: {index} must name the parts of a pipeline, got a {type(named).__name__}")
    wanted = _XL_PARTS if "text_encoder_2" in named else _SD_PARTS
    if missing := [part for part in wanted if named.get(part) in (None, [None, None]) or not (folder / part).is_dir()]:
        raise UserError(f"model: {folder} lacks {', '.join(missing)}; a pipeline needs {', '.join(wanted)}")


def _check_sizes(pipe: Any) -> None:
    unet, vae = pipe.unet.config, pipe.vae.config
    if unet.in_channels != vae.latent_channels:
        raise UserError(
            f"model: the UNet takes {unet.in_channels} channels, the VAE's latents have {vae.latent_channels}; "
            "take the VAE that belongs to this UNet (inpainting models are not supported)"
        )
    width = sum(encoder.config.hidden_size for encoder in text_parts(pipe)[1])
    if unet.cross_attention_dim not in (width, (width,) * len(unet.block_out_channels)):
        raise UserError(
            f"model: the UNet attends to text of width {unet.cross_attention_dim}, the text encoder's is {width}; "
            "take the text encoder that belongs to this UNet"
        )


def text_parts(pipe: Any) -> tuple[list[Any], list[Any]]:
    """Tokenizers and text encoders: one of each, two in SDXL."""
    if isinstance(pipe, StableDiffusionXLPipeline):
        return [pipe.tokenizer, pipe.tokenizer_2], [pipe.text_encoder, pipe.text_encoder_2]
    return [pipe.tokenizer], [pipe.text_encoder]


def training_schedule(pipe: Any) -> DDPMScheduler:
    """The noise schedule the model was trained with, whatever its sampler."""
    return DDPMScheduler.from_config(pipe.scheduler.config)


# ---------------------------------------------------------------- new tokens


class ConceptEmbedding(nn.Module):
    """A frozen embedding table with new rows behind it, one parameter for each concept token.

    The new rows are no part of the table, because an optimizer treats a parameter as one block: SGD-SaI measures the
    g-SNR over all of it, and 49,408 rows whose gradient is zero would swamp the one that trains; weight decay and
    momentum would move rows that must stay. So the table needs no mask and stays bitwise what it was.
    """

    def __init__(self, table: nn.Embedding, rows: list[Tensor]) -> None:
        super().__init__()
        self.table = table
        self.rows = nn.ParameterList(nn.Parameter(row) for row in rows)  # each (vectors, width), float32

    @property
    def weight(self) -> Tensor:
        """The frozen table, for code that asks an embedding for its dtype or width."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        known = self.table.num_embeddings
        new = ids >= known
        rows = torch.cat(list(self.rows))
        found = self.table(ids.clamp(max=known - 1))
        return torch.where(new[..., None], rows[(ids - known).clamp(min=0)].to(found.dtype), found)


def add_concepts(pipe: Any, tokens: list[str], initial: list[str], seed: int) -> None:
    """Give the pipeline's tokenizers and text encoders new tokens.

    Args:
        pipe: changed in place.
        tokens: such as `<V>`.
        initial: for each token the words that its vectors start from, joined by `+`: `dog` for one vector,
            `random+dog` for two, of which the first is random with the table's mean and spread.
        seed: of the random vectors.

    Raises:
        UserError: a token that exists, a word that is not one token, lists of different lengths.
    """
    if len(tokens) != len(initial):
        raise UserError(
            f"concept_init must have one entry for each of {len(tokens)} concept tokens, got {len(initial)}"
        )
    for tokenizer, encoder in zip(*text_parts(pipe), strict=True):
        parent, table = _embedding_table(encoder)
        if table.num_embeddings != len(tokenizer):
            raise UserError(
                f"model: the tokenizer has {len(tokenizer)} tokens, the text encoder {table.num_embeddings} embeddings"
            )
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for token, words in zip(tokens, initial, strict=True):
            rows.append(torch.stack([_start(word, token, tokenizer, table, generator) for word in words.split("+")]))
            for name in (token, *(f"{token}_{i}" for i in range(1, len(rows[-1])))):  # diffusers' names for the vectors
                ids = tokenizer.encode(name, add_special_tokens=False)
                if (len(ids) == 1 and ids[0] != tokenizer.unk_token_id) or tokenizer.add_tokens(name) != 1:
                    raise UserError(f"concept_tokens: {name!r} is already a token of this model; choose another name")
        parent.token_embedding = ConceptEmbedding(table, rows)


def _embedding_table(encoder: Any) -> tuple[Any, nn.Embedding]:
    parent = next(
        module for module in encoder.modules() if isinstance(getattr(module, "token_embedding", None), nn.Module)
    )
    return parent, parent.token_embedding


def _start(word: str, token: str, tokenizer: Any, table: nn.Embedding, generator: torch.Generator) -> Tensor:
    weight = table.weight.detach().float()
    if word == "random":
        noise = torch.randn(weight.shape[1], generator=generator).to(weight.device)
        return weight.mean(dim=0) + weight.std(dim=0) * noise
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"concept_init: {word!r} for {token} must be one token of the model, it is {len(ids)}")
    return weight[ids[0]].clone()


# ---------------------------------------------------------------- the training forward pass


def token_ids(pipe: Any, prompts: list[str]) -> list[Tensor]:
    """Each tokenizer's ids of the prompts, (n, tokens), as the pipeline itself makes them."""
    found = []
    for tokenizer in text_parts(pipe)[0]:
        texts = pipe.maybe_convert_prompt(prompts, tokenizer)  # a token of several vectors becomes as many tokens
        length = tokenizer.model_max_length
        for text in texts:
            if (used := len(tokenizer(text).input_ids)) > length:
                logger.warning("caption of %d tokens cut to %d: %r", used, length, text)
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        found.append(batch.input_ids)
    return found


def encode(text_encoders: Any, ids: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Prompt embeddings (n, tokens, width) as the pipeline makes them, and SDXL's pooled ones."""
    if len(text_encoders) == 1:
        return text_encoders[0](ids[0])[0], None
    outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(text_encoders, ids, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1][0]


class ConceptModel(nn.Module):
    """UNet and text encoders as one module, so that one wrapper (DistributedDataParallel, FSDP) holds all that trains.

    Text encoders are left out (an empty list) when nothing of them trains and the prompts are encoded before training.
    """

    def __init__(self, unet: nn.Module, text_encoders: list[nn.Module]) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoders = nn.ModuleList(text_encoders)
        # FSDP shards these one by one.
        layers = {type(module).__name__ for module in self.modules()} & {"BasicTransformerBlock", "CLIPEncoderLayer"}
        self._no_split_modules = sorted(layers)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: list[Tensor], pooled: Tensor | None, sizes: Tensor
    ) -> Tensor:
        """The UNet's prediction.

        Args:
            noisy: latents (n, channels, height, width).
            timesteps: (n,).
            text: token ids, one tensor a text encoder; without text encoders their embeddings (n, tokens, width) alone.
            pooled: SDXL's pooled embedding, if the embeddings are given.
            sizes: (n, 6), which SDXL is conditioned on.
        """
        if self.text_encoders:
            embeddings, pooled = encode(self.text_encoders, text)
        else:
            embeddings = text[0]
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(noisy, timesteps, embeddings, added_cond_kwargs=added).sample


def add_lora(part: Any, rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
    """A LoRA on the linear layers of `part` whose names end in one of `targets`; its weights are float32."""
    try:
        part.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                lora_dropout=dropout,
                target_modules=targets,
            )
        )
    except ValueError as error:
        raise UserError(f"lora targets {', '.join(targets)}: {error}") from error
    for p in part.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """All that trains, by name, on the CPU; sharded parameters are put together (on every process)."""
    return {name: _whole(p) for name, p in model.named_parameters() if p.requires_grad}


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


# ---------------------------------------------------------------- diffusers' formats


def trained_parts(pipe: Any, tokens: list[str]) -> dict[str, dict[str, Any]]:
    """The arguments of `save_lora_weights` (key `lora`) and each token's rows (key `rows`), whole, on the CPU."""
    lora: dict[str, Any] = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        part: Any = getattr(pipe, name, None)
        if getattr(part, "peft_config", None):
            state = {key: _whole(value) for key, value in get_peft_model_state_dict(part).items()}
            lora[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
            # Without it diffusers takes alpha to be the rank.
            about = part.peft_config["default"].to_dict()
            about["target_modules"] = sorted(about["target_modules"])  # of a set: the same file in every process
            lora[f"{name}_lora_adapter_metadata"] = about
    encoders = text_parts(pipe)[1]
    rows: dict[str, Any] = {
        token: [_whole(cast(Any, _embedding_table(encoder)[1]).rows[i]) for encoder in encoders]
        for i, token in enumerate(tokens)
    }
    return {"lora": lora, "rows": rows}


def save_concept(folder: Path, pipe: Any, trained: dict[str, dict[str, Any]]) -> None:
    """`pytorch_lora_weights.safetensors` for `load_lora_weights`, and a file for `load_textual_inversion` per token.

    Args:
        folder: must exist.
        pipe: says which kind of pipeline this is.
        trained: from `trained_parts`.
    """
    pipe.save_lora_weights(folder, **trained["lora"])
    for i, (token, rows) in enumerate(trained["rows"].items()):
        # One encoder: diffusers' own format. SDXL: the keys that diffusers' documentation loads one by one.
        keys = [token] if len(rows) == 1 else ["clip_l", "clip_g"]
        path = folder / (f"{EMBEDDINGS}.safetensors" if i == 0 else f"{EMBEDDINGS}_{i}.safetensors")
        save_file(dict(zip(keys, rows, strict=True)), path, metadata={"token": token})


def load_concept(pipe: Any, folder: str | Path) -> None:
    """Load what `save_concept` wrote into a fresh pipeline, by diffusers' own loaders."""
    folder = Path(folder)
    pipe.load_lora_weights(folder)
    for path in sorted(folder.glob(f"{EMBEDDINGS}*.safetensors")):
        with safe_open(path, framework="pt") as file:
            token = file.metadata()["token"]
            rows = [file.get_tensor(key) for key in (("clip_l", "clip_g") if "clip_l" in file.keys() else (token,))]  # noqa: SIM118
        for row, tokenizer, encoder in zip(rows, *text_parts(pipe), strict=True):
            pipe.load_textual_inversion({token: row}, tokenizer=tokenizer, text_encoder=encoder)
