"""Random adapters, saved by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def save_random_adapter(directory: Path, base: Path, *, rank: int = 4, alpha: float = 10, **fields: Any) -> Path:
    """Save an adapter with random factors, so that a missing or misplaced one changes the loss."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields}
    torch.manual_seed(rank)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **fields))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    return directory


def adapted_by_peft(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()
