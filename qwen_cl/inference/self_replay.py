"""Text that the base model itself writes, to be replayed: sampled once, and kept by what it was sampled from.

Self-generated replay stands in for the data a model was trained on where nobody has it (arXiv 2403.01244).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qwen_cl.config.errors import UserError
from qwen_cl.config.replay import FileReplayConfig, GeneratedReplayConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.data.examples import load_data_tokenizer
from qwen_cl.data.raw_text import document_delimiters
from qwen_cl.files.atomic import write_text
from qwen_cl.files.cache import cache_home
from qwen_cl.inference.child_process import run_child
from qwen_cl.inference.target_model import find_model
from qwen_cl.models.fingerprint import fingerprint
from qwen_cl.models.formats.nemo_layout import tokenizer_directory
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.loading.base_adapter import adapter_directory, read_adapter
from qwen_cl.models.reference import local_directory, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SET = "generated"
LEAST_CHARACTERS = 20
"""Of a sampled text; some begin with an end-of-text, and are none."""


def with_sampled_text(config: RunConfig, replay: GeneratedReplayConfig) -> RunConfig:
    """The config with a file of sampled text for its replay; samples it where it is not there yet. ``config`` is
    settled, and its model's weights are present.

    Raises:
        UserError: the cache cannot be written to.
        RunFailed: the process that samples died.
    """
    path = sampled_file(config, replay, _bos_id(config))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be made: {error.strerror}; set QWEN_CL_CACHE to another place"
        ) from error
    with FileLock(f"{path}.lock"):  # another run may be sampling the same
        if not path.exists():
            run_child(config, "the sampling of text to replay")
    return replace(config, replay=FileReplayConfig(ratio=replay.ratio, datasets={SET: str(path)}, weights={}))


def sampled_file(config: RunConfig, replay: GeneratedReplayConfig, bos_id: int | None = None) -> Path:
    """Named by the model's commit (or its files' fingerprint), the adapter merged into it, the seed, how it is sampled,
    and the BOS it is sampled from, if the model's tokenizer begins texts with one."""
    source = config.model.source
    model = source if source.startswith("hf://") else fingerprint(local_directory(source))
    if (adapter := config.model.adapter) is not None:
        model += f" {read_adapter(adapter_directory(adapter)).sha256}"
    how = {name: value for name, value in asdict(replay).items() if name not in ("share", "batch_size")}
    if bos_id is not None:
        how["bos_id"] = bos_id
    key = hashlib.sha256(json.dumps([model, config.seed, how], sort_keys=True).encode()).hexdigest()
    return cache_home() / "replay" / f"{key}.jsonl"


def sample_text(config: RunConfig, replay: GeneratedReplayConfig) -> None:
    """In the child, which has torch: writes the file whole or not at all."""
    from qwen_cl.inference.model import load_model

    subject = find_model(config.model, config.data)
    model = load_model(subject, config.cluster)
    tokenizer = subject.tokenizer()
    texts, tokens = [], 0
    for text, count in _samples(model, tokenizer, replay, config.seed):
        tokens += count
        if len(text.strip()) >= LEAST_CHARACTERS:
            texts.append(text)
        print(f"\rsampling text to replay: {min(tokens, replay.tokens):,} of {replay.tokens:,} tokens", end="")
    print(flush=True)
    if not texts:
        raise UserError(
            f"{subject.label} writes nothing by itself (replay.temperature {replay.temperature:g}, replay.max_length "
            f"{replay.max_length}); replay text of your own with replay=files"
        )
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    write_text(sampled_file(config, replay, document_delimiters(tokenizer).bos_id), "".join(lines))


def _bos_id(config: RunConfig) -> int | None:
    model = resolve(config.model.source, HubSettings.of(config.model), weights=False)
    return document_delimiters(load_data_tokenizer(str(tokenizer_directory(model.directory)))).bos_id


def _samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, replay: GeneratedReplayConfig, seed: int
) -> Any:
    """Texts with their numbers of tokens, until there are enough; each from the start of a document."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    delimiters = document_delimiters(tokenizer)
    eos = delimiters.eos_id
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=replay.temperature,
        top_p=replay.top_p,
        top_k=0,
        max_new_tokens=replay.max_length,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    start = torch.full((replay.batch_size, 1), delimiters.first_id, device=model.device)
    tokens = 0
    while tokens < replay.tokens:
        with torch.no_grad():
            produced = model.generate(input_ids=start, attention_mask=torch.ones_like(start))
        for row in produced[:, 1:].tolist():
            kept = row[: row.index(eos)] if eos in row else row
            tokens += len(kept) + 1
            yield tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False), len(kept) + 1
