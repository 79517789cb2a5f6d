"""The adapter methods that the config group ``peft`` selects, one entry each. No torch, no NeMo.

All code that depends on the method reads its entry here; a method that needs code in Megatron names its class there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_cl.config.peft import DoraConfig, LoraConfig, PeftConfig
from qwen_cl.models.architecture import Architecture
from qwen_cl.models.weight_mapping import LAYER_PREFIX, count_parameters, fused_shape, layer_rules

if TYPE_CHECKING:
    import torch

ADAPTER = ".adapter."
"""The part of a NeMo tensor name between the layer and the adapter's tensor."""


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """A tensor of each adapted layer; ``shape`` names its dimensions: rank, and the layer's rows and columns."""

    nemo: str
    peft: str
    shape: tuple[str, ...]
    by_rank: bool = False
    """True if its rows are stored per tensor parallel rank: that rank's gate rows, then its up rows."""


DOWN = AdapterTensor("linear_in.weight", "lora_A.weight", ("rank", "columns"))
UP = AdapterTensor("linear_out.weight", "lora_B.weight", ("rows", "rank"))
MAGNITUDE = AdapterTensor("weight_magnitude", "lora_magnitude_vector", ("rows",), by_rank=True)


def lora_update(up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    """Return LoRA's update of a weight (arXiv 2106.09685) in fp32; where it is zero, adding it changes no bit."""
    update = up.float() @ down.float() * scale
    return update.masked_fill_(update == 0, -0.0)  # added to -0.0, 0.0 would flip its sign


def _merge_lora(weight: torch.Tensor, adapter: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
    return weight + lora_update(adapter[UP.peft], adapter[DOWN.peft], scale)


def _merge_dora(weight: torch.Tensor, adapter: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
    """Merge the LoRA update, then rescale each row to its magnitude (arXiv 2402.09353)."""
    merged = _merge_lora(weight, adapter, scale)
    return merged * (adapter[MAGNITUDE.peft].float() / merged.norm(dim=1)).unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMethod:
    """The entry of a method that trains an adapter beside frozen weights."""

    title: str
    config: type[LoraConfig]
    transform: str
    """The NeMo class that adds the adapters, as MODULE:NAME."""
    tensors: tuple[AdapterTensor, ...]
    merge: Callable[[torch.Tensor, Mapping[str, torch.Tensor], float], torch.Tensor]
    """The function from a weight in fp32, the adapter's tensors by PEFT name and the scale to the merged weight."""
    peft_fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of PEFT's LoraConfig other than rank, alpha and dropout."""
    fused: bool = False
    """speed.fused_lora computes it."""
    not_on_adapter: str | None = None
    """The reason why its result cannot be combined with ``model.adapter`` into one adapter; None where it can."""


ADAPTER_METHODS = {
    "lora": AdapterMethod(
        title="LoRA",
        config=LoraConfig,
        transform="nemo.collections.llm.peft:LoRA",
        tensors=(DOWN, UP),
        merge=_merge_lora,
        fused=True,
    ),
    "dora": AdapterMethod(
        title="DoRA",
        config=DoraConfig,
        transform="nemo.collections.llm.peft:DoRA",
        tensors=(DOWN, UP, MAGNITUDE),
        merge=_merge_dora,
        peft_fields={"use_dora": True},
        not_on_adapter="its magnitudes are those of the merged weights, which an adapter of the base cannot represent",
    ),
}
"""The adapter methods by value of ``peft``; full fine-tuning has no adapter, and so no entry."""
FULL_FINE_TUNING = "full fine-tuning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapter that a run trains."""

    method: str
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    """Megatron's names of the adapted layers."""

    @property
    def entry(self) -> AdapterMethod:
        return ADAPTER_METHODS[self.method]

    @property
    def scale(self) -> float:
        """Return the factor of the update B A."""
        return self.alpha / self.rank

    def describe(self) -> str:
        modules = ", ".join(self.target_modules)
        return f"{self.entry.title}, rank {self.rank}, alpha {self.alpha:g}, on {modules}"

    def transform_arguments(self) -> dict[str, Any]:
        """Return the arguments of the NeMo class."""
        return {
            "target_modules": list(self.target_modules),
            "dim": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "dropout_position": "pre",  # as in PEFT
        }

    def peft_arguments(self) -> dict[str, Any]:
        """Return the arguments of PEFT's LoraConfig, without the target modules."""
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **self.entry.peft_fields}

    def modules(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the rows and columns of each adapted layer of a transformer block, by sharded key."""
        shapes = {}
        for key, rule in layer_rules(architecture).items():
            module, _, part = key.rpartition(".")
            if part == "weight" and module.rpartition(".")[2] in self.target_modules:
                shapes[LAYER_PREFIX + module] = fused_shape(rule, 0, architecture)
        return shapes

    def tensor_shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one transformer block's adapter tensors, by sharded key."""
        shapes = {}
        for module, (rows, columns) in self.modules(architecture).items():
            sizes = {"rank": self.rank, "rows": rows, "columns": columns}
            for tensor in self.entry.tensors:
                shapes[f"{module}{ADAPTER}{tensor.nemo}"] = tuple(sizes[name] for name in tensor.shape)
        return shapes

    def parameters(self, architecture: Architecture) -> int:
        return architecture.num_layers * count_parameters(self.tensor_shapes(architecture))


def adapter_parameters(peft: PeftConfig, architecture: Architecture) -> int | None:
    """Return the number of trainable parameters of the adapters; None for full fine-tuning."""
    adapter = adapter_of(peft)
    return None if adapter is None else adapter.parameters(architecture)


def describe_method(peft: PeftConfig) -> str:
    adapter = adapter_of(peft)
    return FULL_FINE_TUNING if adapter is None else adapter.describe()


def adapter_of(peft: PeftConfig) -> Adapter | None:
    """Return the adapter that the config group ``peft`` describes; None for full fine-tuning."""
    if not isinstance(peft, LoraConfig):
        return None
    return Adapter(
        method=next(name for name, entry in ADAPTER_METHODS.items() if entry.config is type(peft)),
        rank=peft.rank,
        alpha=peft.alpha,
        dropout=peft.dropout,
        target_modules=list(peft.target_modules),
    )
