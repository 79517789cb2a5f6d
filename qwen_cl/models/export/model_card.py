"""The model card of an export. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_cl.config.model import ModelConfig
from qwen_cl.models.hub.http_errors import request_errors
from qwen_cl.models.reference import HUB_REFERENCE

LICENSE_FIELDS = ("license", "license_name", "license_link")
HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """The facts in a model card."""

    source: str
    """The base as in the run's config: pinned, or a directory."""
    fingerprint: str | None
    """The fingerprint of a local base (see fingerprint.py), or None."""
    method: str
    """LoRA, DoRA or full fine-tuning, with its settings."""
    data: str
    data_hash: str | None
    learning_rate: float
    steps: int
    code: str | None
    """Commit of this repository, or None."""
    is_adapter: bool
    base_adapter: str | None = None
    """Directory of the adapter that was merged into the base, or None."""
    base_adapter_sha256: str | None = None


def model_card(facts: CardFacts, license: dict[str, str]) -> str:
    """Return the card in Markdown, with front matter for the Hub; ``license`` is the result of :func:`base_license`."""
    from huggingface_hub import ModelCardData

    match = HUB_REFERENCE.fullmatch(facts.source)
    # A local path is private, so only its last part is published.
    base = match["repo"] if match else Path(facts.source).name
    front_matter = ModelCardData(
        base_model=match["repo"] if match else None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["qwen_cl", facts.method.split(",")[0].lower().replace(" ", "-")],
        **license,
    )
    where = {"commit of the base": match["revision"]} if match else {"base's fingerprint": facts.fingerprint}
    rows = {
        "base model": base if match else f"{base}, a local directory",
        **where,
        **_merged_rows(facts),
        "license": _license_cell(license),
        "method": facts.method,
        "learning rate": f"{facts.learning_rate:g}",
        "optimizer steps": str(facts.steps),
        "data": facts.data,
        "data, sha256": facts.data_hash,
        "code": f"qwen_cl {facts.code}" if facts.code else "qwen_cl",
    }
    table = "\n".join(f"| {name} | {_cell(value or 'not recorded')} |" for name, value in rows.items())
    return f"---\n{front_matter.to_yaml()}\n---\n# {_cell(base)}, adapted\n\n| | |\n|---|---|\n{table}\n"


def _merged_rows(facts: CardFacts) -> dict[str, str | None]:
    if facts.base_adapter is None:
        return {}
    name = "/".join(Path(facts.base_adapter).parts[-2:])
    what = "of the base with it merged in; both are in this adapter" if facts.is_adapter else "merged into the base"
    return {"earlier adapter": f"{name}, {what}", "earlier adapter, sha256": facts.base_adapter_sha256}


def base_license(model: ModelConfig) -> dict[str, str]:
    """Return the license fields of the base's card; empty if it has no card, or the Hub cannot be asked for it."""
    import yaml
    from huggingface_hub import hf_hub_download, metadata_load

    match = HUB_REFERENCE.fullmatch(model.source)
    try:
        card = Path(model.source) / "README.md"
        if match:
            card = Path(
                hf_hub_download(
                    match["repo"],
                    "README.md",
                    revision=match["revision"],
                    endpoint=model.endpoint,
                    cache_dir=model.cache,
                    local_files_only=model.offline,
                )
            )
        fields: Any = metadata_load(card)
    # These include huggingface_hub's errors: absent, gated, offline, not in the cache.
    except request_errors(OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(fields, dict):
        return {}
    found = {name: fields[name] for name in LICENSE_FIELDS if isinstance(fields.get(name), str)}
    if "://" not in found.get("license_link", "://"):  # relative to the base's card
        link = found.pop("license_link")
        if match:
            found["license_link"] = f"{HUB}/{match['repo']}/blob/{match['revision']}/{link}"
    return found if "license" in found else {}


def _license_cell(license: dict[str, str]) -> str:
    if not license:
        return "see the base model's card"
    name = license["license"] if license["license"] != "other" else license.get("license_name", "other")
    link = license.get("license_link")
    return f"{name}, as the base model's" + (f" ({link})" if link else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
