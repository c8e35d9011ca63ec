"""The parameter names and shapes of well-known models, as in transformers and timm. Nothing is downloaded."""

from collections.abc import Callable
from typing import NamedTuple

Shapes = list[tuple[str, tuple[int, ...]]]


class Model(NamedTuple):
    """A model as an optimizer sees it."""

    title: str
    shapes: Shapes
    dim: int  # the width of the residual stream, for optimizers that split attention by heads
    heads: int


def _gpt2(dim: int, layers: int, vocabulary: int = 50257, positions: int = 1024) -> Shapes:
    shapes: Shapes = [("transformer.wte.weight", (vocabulary, dim)), ("transformer.wpe.weight", (positions, dim))]
    for i in range(layers):
        at = f"transformer.h.{i}"
        for name, shape in (
            ("ln_1", (dim,)),
            ("attn.c_attn", (dim, 3 * dim)),
            ("attn.c_proj", (dim, dim)),
            ("ln_2", (dim,)),
            ("mlp.c_fc", (dim, 4 * dim)),
            ("mlp.c_proj", (4 * dim, dim)),
        ):
            shapes += [(f"{at}.{name}.weight", shape), (f"{at}.{name}.bias", shape[-1:])]
    return [*shapes, ("transformer.ln_f.weight", (dim,)), ("transformer.ln_f.bias", (dim,))]


def _vit(dim: int, layers: int, patch: int, classes: int = 1000, pixels: int = 224) -> Shapes:
    patches = (pixels // patch) ** 2
    shapes: Shapes = [
        ("cls_token", (1, 1, dim)),
        ("pos_embed", (1, patches + 1, dim)),
        ("patch_embed.proj.weight", (dim, 3, patch, patch)),
        ("patch_embed.proj.bias", (dim,)),
    ]
    for i in range(layers):
        for name, shape in (
            ("norm1", (dim,)),
            ("attn.qkv", (3 * dim, dim)),
            ("attn.proj", (dim, dim)),
            ("norm2", (dim,)),
            ("mlp.fc1", (4 * dim, dim)),
            ("mlp.fc2", (dim, 4 * dim)),
        ):
            shapes += [(f"blocks.{i}.{name}.weight", shape), (f"blocks.{i}.{name}.bias", shape[:1])]
    for name, shape in (("norm", (dim,)), ("head", (classes, dim))):
        shapes += [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]
    return shapes


def _llama(dim: int, layers: int, inner: int, vocabulary: int) -> Shapes:
    shapes: Shapes = [("model.embed_tokens.weight", (vocabulary, dim))]
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes += [(f"{at}.self_attn.{name}.weight", (dim, dim)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        shapes += [(f"{at}.mlp.{name}.weight", (inner, dim)) for name in ("gate_proj", "up_proj")]
        shapes += [
            (f"{at}.mlp.down_proj.weight", (dim, inner)),
            (f"{at}.input_layernorm.weight", (dim,)),
            (f"{at}.post_attention_layernorm.weight", (dim,)),
        ]
    return [*shapes, ("model.norm.weight", (dim,)), ("lm_head.weight", (vocabulary, dim))]


def _lora(dim: int, pairs: int, rank: int) -> Shapes:
    shapes: Shapes = []
    for i in range(pairs):
        at = f"model.layers.{i // 4}.self_attn.{('q_proj', 'k_proj', 'v_proj', 'o_proj')[i % 4]}"
        shapes += [(f"{at}.lora_A.default.weight", (rank, dim)), (f"{at}.lora_B.default.weight", (dim, rank))]
    return shapes


_MODELS: dict[str, Callable[[], Model]] = {
    "gpt2": lambda: Model("GPT-2 124M", _gpt2(768, 12), 768, 12),
    "gpt2-xl": lambda: Model("GPT-2 XL 1.5B", _gpt2(1600, 48), 1600, 25),
    "vit-s-16": lambda: Model("ViT-S/16", _vit(384, 12, 16), 384, 6),
    "vit-h-14": lambda: Model("ViT-H/14", _vit(1280, 32, 14), 1280, 16),
    "llama-2-7b": lambda: Model("Llama-2 7B", _llama(4096, 32, 11008, 32000), 4096, 32),
    "lora": lambda: Model("LoRA, 200 tensors", _lora(4096, 100, 8), 4096, 32),
}
MODELS = tuple(_MODELS)


def model(name: str) -> Model:
    """Return the model with this name. For an unknown name, raise a ValueError that lists the names."""
    if name not in _MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return _MODELS[name]()
