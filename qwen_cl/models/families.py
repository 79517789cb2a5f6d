"""The model families, one entry each; a family with the same tensors needs nothing else. No torch, no NeMo.

Tensors with other names or shapes also need rules in weight_mapping.py (see docs/extending.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
"""The layer kinds that ``layer_types`` of a config.json may name."""
DEFAULT_TOKENIZER = "LlamaTokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """The rule by which transformers chooses the layers with sliding window attention."""

    default: int = 4096
    """Tokens of the window if config.json has no ``sliding_window``."""
    opt_in: bool = False
    """True if the window is used only with ``use_sliding_window``."""
    by_layer: bool = False
    """True if ``layer_types`` names the layers with a window; without that list all have one."""
    first_layer: int | None = None
    """The first layer with a window if ``layer_types`` and ``max_window_layers`` are absent; None if the family has no
    ``max_window_layers``."""

    def width(self, config: Mapping[str, Any]) -> int | None:
        """Return the window in tokens if some layer has one, else None."""
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
    """The properties of a model_type beyond the config fields that all decoders share."""

    model_type: str
    title: str
    """The published models, for messages."""
    transformers: str
    """The prefix of its class names in transformers."""
    nemo_model: str
    """The model class in ``nemo.collections.llm``."""
    nemo_config: str
    """Its config class there; every size in it is overridden."""
    nemo_checkpoints: str | None = None
    """Pattern of the config classes below ``nemo.collections.llm.gpt.model`` whose checkpoints are read as this family;
    None if NeMo has none."""
    nemo_window: bool = False
    """True if NeMo's config has the window (``window_size``)."""
    tokenizer: str = DEFAULT_TOKENIZER
    """The transformers class for tokenizer files that name no class (tokenization_auto.py)."""
    tokenizer_always: bool = False
    """True if transformers 5 ignores the class in the files (``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS``)."""
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Width of an attention head if config.json has none; None for hidden_size / num_attention_heads."""
    sliding_window: SlidingWindow | None = None
    key_value_heads_required: bool = True
    """True if the default of num_key_value_heads in transformers differs from num_attention_heads."""
    rope_types: tuple[str, ...] = ("default",)
    unsupported_flags: tuple[str, ...] = ()
    """Fields of config.json that must be false, because the layers they add are not supported."""

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
