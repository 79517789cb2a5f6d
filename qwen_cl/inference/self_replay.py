"""Self-generated replay: text sampled from the base model, cached by the model and the sampling settings.

It replaces the data that a model was trained on where that data is not available (arXiv 2403.01244).
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
from qwen_cl.inference.target_model import find_pretrained_model
from qwen_cl.models.fingerprint import fingerprint
from qwen_cl.models.formats.nemo_layout import tokenizer_directory
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.loading.base_adapter import adapter_directory, read_adapter
from qwen_cl.models.reference import local_directory, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SET = "generated"
MIN_CHARACTERS = 20
"""The shortest sampled text that is replayed; some samples begin with the end-of-text token and are empty."""


def with_sampled_text(config: RunConfig, replay: GeneratedReplayConfig) -> RunConfig:
    """Return the config with a file of sampled text for its replay, which is sampled first unless it is cached.

    ``config`` is resolved, and the weights of its model are present.

    Raises:
        UserError: the cache folder cannot be made.
        RunFailed: the child process that samples failed.
    """
    path = sampled_file(config, replay, _bos_id(config))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be created: {error.strerror}; set QWEN_CL_CACHE to another folder"
        ) from error
    with FileLock(f"{path}.lock"):  # another run may be sampling the same
        if not path.exists():
            run_child(config, "sampling text to replay")
    return replace(config, replay=FileReplayConfig(ratio=replay.ratio, datasets={SET: str(path)}, weights={}))


def sampled_file(config: RunConfig, replay: GeneratedReplayConfig, bos_id: int | None = None) -> Path:
    """Return the path of the cached text.

    It is named by the model's commit (or the fingerprint of its files), the adapter merged into it, the seed, the
    sampling settings, and the BOS token if the tokenizer begins documents with one.
    """
    source = config.model.source
    model = source if source.startswith("hf://") else fingerprint(local_directory(source))
    if (adapter := config.model.adapter) is not None:
        model += f" {read_adapter(adapter_directory(adapter)).sha256}"
    settings = {name: value for name, value in asdict(replay).items() if name not in ("ratio", "batch_size")}
    if bos_id is not None:
        settings["bos_id"] = bos_id
    key = hashlib.sha256(json.dumps([model, config.seed, settings], sort_keys=True).encode()).hexdigest()
    return cache_home() / "replay" / f"{key}.jsonl"


def sample_text(config: RunConfig, replay: GeneratedReplayConfig) -> None:
    """Sample the text in the child process, and write its file atomically."""
    from qwen_cl.inference.model import load_model

    target = find_pretrained_model(config.model, config.data)
    model = load_model(target, config.cluster)
    tokenizer = target.tokenizer()
    texts, tokens = [], 0
    for text, count in _samples(model, tokenizer, replay, config.seed):
        tokens += count
        if len(text.strip()) >= MIN_CHARACTERS:
            texts.append(text)
        print(f"\rsampling text to replay: {min(tokens, replay.tokens):,} of {replay.tokens:,} tokens", end="")
    print(flush=True)
    if not texts:
        raise UserError(
            f"{target.label} generates no text (replay.temperature {replay.temperature:g}, replay.max_length "
            f"{replay.max_length}); replay your own text with replay=files"
        )
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    write_text(sampled_file(config, replay, document_delimiters(tokenizer).bos_id), "".join(lines))


def _bos_id(config: RunConfig) -> int | None:
    model = resolve(config.model.source, HubSettings.of(config.model), weights=False)
    return document_delimiters(load_data_tokenizer(str(tokenizer_directory(model.directory)))).bos_id


def _samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, replay: GeneratedReplayConfig, seed: int
) -> Any:
    """Yield sampled documents with their numbers of tokens, until ``replay.tokens`` is reached."""
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
            document = row[: row.index(eos)] if eos in row else row
            count = len(document) + 1
            tokens += count
            yield tokenizer.decode(document, skip_special_tokens=True, clean_up_tokenization_spaces=False), count
