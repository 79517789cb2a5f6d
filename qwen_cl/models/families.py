"""The model families: one entry each, which is all that a family with the same tensors needs. No torch, no NeMo.

Tensors of other names or shapes are the mapping's matter as well (see docs/extending.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers that ``layer_types`` of a config.json may name."""
DEFAULT_TOKENIZER = "LlamaTokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """The rule that transformers has for layers that look back on a limited number of tokens."""

    default: int = 4096
    """Tokens, where config.json has no ``sliding_window``."""
    opt_in: bool = False
    """There is none unless ``use_sliding_window`` is true."""
    by_layer: bool = False
    """``layer_types`` says which layers have it; without that list all do."""
    first_layer: int | None = None
    """The first layer that has it where ``layer_types`` and ``max_window_layers`` are absent; None where the family
    has no ``max_window_layers``."""

    def width(self, config: Mapping[str, Any]) -> int | None:
        """Return the tokens that some layer of the model looks back on, or None where each layer has all of them."""
        if self.opt_in and not config.get("use_sliding_window"):
            return None
        window: int | None = config.get("sliding_window", self.default)
        kinds = config.get("layer_types") if self.by_layer else None
        if kinds is not None:
            return window if SLIDING in kinds else None
        if self.first_layer is None:
            return window
        first: int = config.get("max_window_layers", self.first_layer) or 0
        return window if first < config["num_hidden_layers"] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a model_type means beyond the fields that all decoders share."""

    model_type: str
    title: str
    """The published models, for messages."""
    transformers: str
    """What the names of its classes in transformers begin with."""
    nemo_model: str
    """The class in ``nemo.collections.llm`` that is trained."""
    nemo_config: str
    """The class of its config there, every size of which is overridden."""
    nemo_checkpoints: str | None = None
    """Pattern of the config classes, below ``nemo.collections.llm.gpt.model``, whose checkpoints are read as this
    family; None where NeMo has none of it."""
    nemo_window: bool = False
    """NeMo's config has a window of its own (``window_size``)."""
    tokenizer: str = DEFAULT_TOKENIZER
    """transformers' class of tokenizer files that name none (its tokenization_auto.py)."""
    tokenizer_always: bool = False
    """transformers 5 takes that class whatever the files name (``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS``)."""
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Width of an attention head where config.json has none; None for hidden_size / num_attention_heads."""
    sliding_window: SlidingWindow | None = None
    key_value_heads_required: bool = True
    """transformers' own default of num_key_value_heads is another than num_attention_heads."""
    rope_types: tuple[str, ...] = ("default",)
    unsupported_flags: tuple[str, ...] = ()
    """Fields of config.json that must be false: the layers they add are not built."""

    def is_nemo_config(self, name: Any) -> bool:
        """Tell whether a NeMo checkpoint of that config class, by its full name, is read as this family."""
        pattern = rf"nemo\.collections\.llm\.gpt\.model\.{self.nemo_checkpoints}"
        return self.nemo_checkpoints is not None and isinstance(name, str) and re.fullmatch(pattern, name) is not None


QWEN_WINDOW = SlidingWindow(opt_in=True, by_layer=True, first_layer=28)

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="qwen2",
            title="Qwen2, Qwen2.5",
            transformers="Qwen2",
            nemo_model="Qwen2Model",
            nemo_config="Qwen2Config",
            nemo_checkpoints=r"qwen2\.Qwen25?Config\w*",
            tokenizer="Qwen2Tokenizer",
            tokenizer_always=True,
            qkv_bias=True,
            sliding_window=QWEN_WINDOW,
        ),
        Family(
            model_type="qwen3",
            title="Qwen3",
            transformers="Qwen3",
            nemo_model="Qwen3Model",
            nemo_config="Qwen3Config",
            nemo_checkpoints=r"qwen3\.Qwen3Config\w*",
            tokenizer="Qwen2Tokenizer",
            qk_norm=True,
            head_dim=128,
            sliding_window=QWEN_WINDOW,
            unsupported_flags=("attention_bias",),
        ),
        Family(
            model_type="llama",
            title="Llama 2 and 3, SmolLM2",
            transformers="Llama",
            nemo_model="LlamaModel",
            nemo_config="LlamaConfig",
            nemo_checkpoints=r"llama\.(Code)?Llama(2|3|31|32)?Config\w*",
            key_value_heads_required=False,
            rope_types=("default", "llama3"),
            unsupported_flags=("attention_bias", "mlp_bias"),
        ),
        Family(
            model_type="mistral",
            title="Mistral",
            transformers="Mistral",
            nemo_model="MistralModel",
            nemo_config="MistralConfig7B",
            nemo_checkpoints=r"mistral\.Mistral(NeMo|Small3)?Config\w*",
            nemo_window=True,
            sliding_window=SlidingWindow(),
        ),
    )
}
