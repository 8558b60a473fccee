"""Models of transformers made tiny: the default configuration of each, shrunk by the names of its attributes.

Run as a program, what came of a share, as JSON.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_parameter_registration_hook

from zoo.sweep import NotBuilt, tell, through_the_store

MOST_PARAMETERS = 5_000_000
LAYERS, HEADS, TOKENS, POSITIONS, IMAGE, PATCHES = 2, 4, 128, 128, 64, 4
FIRST_SPECIAL_TOKEN = 64

# How large a number of that name may be: as it is, or as a part of a layer's width. The first pattern that fits counts.
WHOLE, HALF, QUARTER = 1, 2, 4
SIZES: list[tuple[str, int, int | None]] = [
    ("num_channels|^channels$|kernel|drop|stride|bias|types?$|std|^is_|^use_", 0, None),
    ("qk_head_dim", 0, HALF),
    ("head_dim|d_head|d_kv|head_size|lora_rank|rotary_dim|key_dim|value_dim", 0, QUARTER),
    ("kv_head|key_value_heads|num_key_heads|per_tok|topk$|top_?k_experts|num_selected_experts|moe_k$|period$", 2, None),
    ("shared_experts|n_group$|topk_group|first_k_dense|offset$", 1, None),
    ("(mamba|ssm|linear).*heads$", 2 * HEADS, None),
    ("experts$|expert_num|heads?$|heads_per_stage|^window_size$|num_groups", HEADS, None),
    ("image_size|img_size|input_size|resolution", IMAGE, None),
    ("vocab", TOKENS, None),
    ("codebook_size|num_embeddings", 32, None),
    ("max_position|n_positions|max_seq|n_ctx|max_length|context_length|position_embeddings", POSITIONS, None),
    ("(source|target)_positions", 32, None),
    ("(^|_)layers?$|^num_.*(blocks|stacks)|depths?$|num_blocks|repeats|blocks_per_stage|of_layers", LAYERS, None),
    ("quer(y|ies)|latents|num_denoising", 8, None),
    ("d_ssm", 128, None),
    ("hidden|intermediate|ffn|mlp_dim|d_ff|inner|feedforward|d_model|embd|embed|width|dims?($|_)", 0, WHOLE),
    ("channel|filters|projection_size|output_size|^in_|^out_|upsample_groups", 0, WHOLE),
]
PATTERNS = [(re.compile(pattern), size, part) for pattern, size, part in SIZES]
# Classes that have no default for these cannot do without.
WANTED = {"vocab_size": TOKENS, "prediction_length": 8, "num_experts_per_tok": 2, "head_dim": POSITIONS}
# Widths to try, with weights tied where a model can, and with what a configuration has worked out made small as well.
ATTEMPTS = [(64, True, True), (64, True, False), (64, False, True), (32, True, True), (8, True, True)]
KINDS = ("", "_FOR_CAUSAL_LM", "_FOR_SEQ_TO_SEQ_CAUSAL_LM", "_FOR_MASKED_LM", "_FOR_IMAGE_TEXT_TO_TEXT")


def classes() -> list[str]:
    """Names of the classes of models, base models first."""
    from transformers.models.auto import modeling_auto as auto

    tables = [getattr(auto, f"MODEL{kind}_MAPPING_NAMES") for kind in KINDS]
    names = [[names] if isinstance(names, str) else names for table in tables for names in table.values()]
    return list(dict.fromkeys(name for some in names for name in some))


def build(name: str) -> Any:
    """A tiny model of a class in eval mode; each of its weights, also biases and norms, has values of its own."""
    import transformers

    errors = []
    for attempt in ATTEMPTS:
        limit = register_module_parameter_registration_hook(_Limit())
        try:
            torch.manual_seed(0)
            kind = getattr(transformers, name)
            model = kind(_Shrinking(*attempt).config(kind.config_class())).eval()
            break
        except (ImportError, NameError) as error:
            raise NotBuilt(" ".join(str(error).split())) from error
        except Exception as error:  # whatever the code of hundreds of models raises
            errors.append(" ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            limit.remove()
    else:
        raise NotBuilt("; ".join(dict.fromkeys(errors)))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.is_contiguous():
                tensor.add_(torch.rand_like(tensor), alpha=0.01)
    return model


class _Limit:
    """Stops the making of a model that grows too large; it is called before a weight gets values."""

    def __init__(self) -> None:
        self._left = MOST_PARAMETERS

    def __call__(self, module: Module, name: str, parameter: torch.Tensor | None) -> None:
        self._left -= parameter.numel() if parameter is not None else 0
        if self._left < 0:
            raise NotBuilt(f"more than {MOST_PARAMETERS:,} parameters")


class _Shrinking:
    """One attempt at a configuration and those within it."""

    def __init__(self, width: int, tied: bool, derived: bool):
        self._width, self._tied, self._derived = width, tied, derived
        self._tokens: dict[int, int] = {}

    def config(self, old: Any) -> Any:
        from transformers import ResNetConfig

        if old.model_type == "timm_backbone":  # a package of its own
            old = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
        values, usual, given = vars(old), vars(type(old)()), {}
        layers: Any = getattr(old, "num_hidden_layers", None)
        heads: Any = getattr(old, "num_attention_heads", None)
        by_layer = [value for value in values.values() if isinstance(value, list) and len(value) == layers]
        # The first layer, and the last of those that are most unlike it
        other = max(range(layers if by_layer else 0), key=lambda i: (sum(v[i] != v[0] for v in by_layer), i), default=0)
        for field in fields(old):
            name, value = field.name, values.get(field.name)
            if not field.init or name not in values:
                continue
            if hasattr(value, "to_dict"):
                given[name] = self.config(value)
                continue
            small = self._small(name, WANTED.get(name) if value is None else value)
            if name == "num_key_value_heads" and value == heads:
                small = min(value, HEADS)
            if isinstance(value, list) and len(value) == layers > LAYERS:
                small = [small[0], small[other]]
            worked_out = field.default is None and value is not None and value == usual.get(name)
            if not worked_out or (self._derived and small != value):
                given[name] = small
        patch = values.get("patch_size")
        if isinstance(patch, int) and isinstance(given.get("image_size"), int):
            given["image_size"] = patch * max(given["image_size"] // patch, 2)
        if "tie_word_embeddings" in values:
            given["tie_word_embeddings"] = self._tied
        config = type(old)(**given)
        rotary = vars(config).get("rope_parameters")
        if isinstance(rotary, dict) and "rope_theta" in rotary and isinstance(heads, int):
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            half = int(head * rotary.get("partial_rotary_factor", 1)) // 2
            rotary["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]  # time, height, width
        return config

    def _small(self, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._small(name, part) for part in value)
        if type(value) is not int:
            return value
        if re.search("token(_id|_index|_ids)$|_id$", name):
            special = value >= FIRST_SPECIAL_TOKEN
            return self._tokens.setdefault(value, FIRST_SPECIAL_TOKEN + len(self._tokens)) if special else value
        size, part = next((rule[1:] for rule in PATTERNS if rule[0].search(name)), (0, None))
        most = self._width // part if part else size or value
        return 2 if value == 3 and most == HEADS else min(value, most)  # three heads would not divide a width


def guesses(model: Any) -> Iterator[dict[str, Any]]:
    """What the model might be called with, the fullest first."""
    config, random = model.config, torch.Generator().manual_seed(1)
    parts = [vars(config), *(vars(value) for value in vars(config).values() if hasattr(value, "to_dict"))]

    def number(default: int, *names: str) -> int:
        found = [part[name] for name in names for part in parts if isinstance(part.get(name), int)]
        return found[0] if found else default

    image, channels = number(IMAGE, "image_size", "img_size"), number(3, "num_channels", "in_channels", "in_chans")
    mel, frames = number(80, "num_mel_bins", "feature_size", "input_dim"), number(8, "num_frames", "frames_per_clip")
    length, hidden = 2 * number(16, "max_source_positions"), number(64, "hidden_size", "d_model")
    patch = channels * number(1, "temporal_patch_size") * number(16, "patch_size") ** 2
    shapes: dict[str, list[tuple[int, ...]]] = {
        "pixel_values": [(2, channels, image, image), (2, frames, channels, image, image), (PATCHES**2, patch)],
        "input_features": [(2, mel, length), (2, length, mel)],
        "input_values": [(2, 4000), (1, 1, 4000), (2, length, mel), (2, mel, length)],
        "hidden_states": [(PATCHES**2, patch)],
    }
    tokens = torch.randint(3, 60, (2, 8), generator=random)
    words = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens}
    words |= {"bbox": torch.zeros(2, 8, 4, dtype=torch.int64), "grid_thw": torch.tensor([[1, PATCHES, PATCHES]])}
    names = inspect.signature(model.forward).parameters
    words = {name: value for name, value in words.items() if name in names}
    for choice in range(4):
        chosen = {name: some[choice] for name, some in shapes.items() if name in names and choice < len(some)}
        if chosen:
            signals = {name: torch.randn(shape, generator=random) for name, shape in chosen.items()}
            main = {name: signal for name, signal in signals.items() if name == model.main_input_name}
            yield words | signals
            if main.keys() != signals.keys():
                yield words | main
            if words and main:
                yield main
    if words:
        yield words
    if "inputs_embeds" in names:
        yield {"inputs_embeds": torch.randn(2, 8, hidden, generator=random)}
    yield dict(model.dummy_inputs)


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    tell(sorted(classes()), lambda name: through_the_store(partial(build, name), guesses))
