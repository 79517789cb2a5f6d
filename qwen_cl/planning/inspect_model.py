"""``task=inspect``: facts of a model, and its memory use on this machine. Fetches no weights, writes nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from qwen_cl.config.cluster import ClusterConfig
from qwen_cl.config.invocation import Invocation
from qwen_cl.config.model import ModelConfig
from qwen_cl.config.peft import PeftConfig
from qwen_cl.config.run import RunConfig
from qwen_cl.config.task.inspect import InspectConfig
from qwen_cl.data.examples import load_data_tokenizer
from qwen_cl.models.adapter_methods import adapter_of
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.export.model_card import base_license
from qwen_cl.models.formats.nemo_layout import WEIGHTS, is_nemo_checkpoint, tokenizer_directory
from qwen_cl.models.formats.safetensors import Checkpoint
from qwen_cl.models.formats.tensor_files import DTYPES, SHARD, SINGLE, weight_files
from qwen_cl.models.formats.torch_dist_metadata import DistributedMetadata
from qwen_cl.models.hub.settings import HubSettings
from qwen_cl.models.loading.base_adapter import find_adapter
from qwen_cl.models.reference import ModelFiles, resolve
from qwen_cl.models.weight_mapping import count_parameters, expected_shapes
from qwen_cl.planning.devices import Device, pick_device, single_process
from qwen_cl.planning.memory import BatchShape, estimate_memory
from qwen_cl.planning.parallelism import pipeline_parallel_sizes, tensor_parallel_sizes
from qwen_cl.planning.plan import check_weights
from qwen_cl.reporting.console import adapter_facts, print_facts

GIB = 2**30
SIZES = (1, 2, 4, 8)
"""Parallel sizes shown: common GPU counts of a host."""


def inspect(config: RunConfig, task: InspectConfig, invocation: Invocation) -> None:
    """Print the facts of a model and its memory use here.

    Raises:
        UserError: the model cannot be found, read or trained.
    """
    device = pick_device(config.cluster)
    model = resolve(config.model.source, HubSettings.of(config.model), weights=False)
    architecture = read_architecture(model.config, model.directory)
    if model.commit is None:
        check_weights(model, architecture)
    adapter = find_adapter(config.model.adapter, model.directory, architecture)
    facts = [
        *_model_facts(model, architecture),
        *adapter_facts(adapter),
        *_file_facts(model, config.model),
        *_device_facts(device, architecture),
    ]
    console = Console()
    print_facts(facts, console)
    batch = BatchShape(task.sequence_length, task.micro_batch_size, task.micro_batches)
    console.print(_layout_table(config, batch, device, architecture))


def _model_facts(model: ModelFiles, architecture: Architecture) -> list[tuple[str, str]]:
    shapes = expected_shapes(architecture)
    embedding = architecture.vocab_size * architecture.hidden_size
    return [
        ("model", model.source),
        ("commit", model.commit or "none: a local directory"),
        ("architecture", f"{architecture.model_type} ({architecture.family.title})"),
        ("parameters", f"{count_parameters(shapes):,}, of them {embedding:,} in the embedding{_tied(architecture)}"),
        ("layers", f"{architecture.num_layers} of {architecture.hidden_size}, MLP of {architecture.ffn_hidden_size}"),
        (
            "attention",
            f"{architecture.num_attention_heads} heads of {architecture.kv_channels}, "
            f"{architecture.num_query_groups} KV groups",
        ),
        ("vocabulary", f"{architecture.vocab_size:,}"),
        ("context", f"{architecture.longest_sequence:,} tokens"),
    ]


def _file_facts(model: ModelFiles, settings: ModelConfig) -> list[tuple[str, str]]:
    size, dtypes = _weights(model)
    tokenizer = load_data_tokenizer(str(tokenizer_directory(model.directory)))
    license = model.manifest.license if model.manifest else base_license(settings).get("license")
    return [
        ("weights", f"{decimal(size, precision=2)}, {dtypes}" if size else dtypes),
        ("tokenizer", f"{len(tokenizer):,} tokens, {'with' if tokenizer.chat_template else 'without'} a chat template"),
        ("license", license or "not stated; see the model's page or its provider"),
    ]


def _weights(model: ModelFiles) -> tuple[int, str]:
    """Return the bytes of the weights (0 if unknown) and their dtypes."""
    if model.commit is not None:
        files = model.manifest.files if model.manifest else {}
        names = [SINGLE] if SINGLE in files else [name for name in files if SHARD.fullmatch(name)]
        size = sum(files[name].size or 0 for name in names)
        return size, f"{model.config.get('dtype') or model.config.get('torch_dtype') or 'dtype not in config.json'}"
    if is_nemo_checkpoint(model.directory):
        metadata = DistributedMetadata(model.directory / WEIGHTS)
        types = Counter(metadata.tensor(key).dtype for key in metadata.keys)
        return sum(path.stat().st_size for path in (model.directory / WEIGHTS).glob("*.distcp")), _most(types)
    checkpoint = Checkpoint(model.directory)
    types = Counter(DTYPES.get(name, name) for name in (checkpoint.location(each).dtype for each in checkpoint.names))
    return sum(path.stat().st_size for path in weight_files(model.directory)), _most(types)


def _most(types: Counter[str]) -> str:
    return ", ".join(f"{dtype} ({count} tensors)" for dtype, count in types.most_common())


def _tied(architecture: Architecture) -> str:
    return ", which is also the output layer" if architecture.tied_embeddings else " and as many in the output layer"


def _device_facts(device: Device, architecture: Architecture) -> list[tuple[str, str]]:
    memory = "" if device.memory_bytes is None else f" with {device.memory_bytes / GIB:.0f} GiB"
    return [
        ("tensor_parallel", ", ".join(map(str, tensor_parallel_sizes(architecture)))),
        ("pipeline_parallel", ", ".join(map(str, pipeline_parallel_sizes(architecture)))),
        ("this machine", f"{device.name}{memory}, {device.precision.value}"),
    ]


def _layout_table(config: RunConfig, batch: BatchShape, device: Device, architecture: Architecture) -> Table:
    """Return the table of GiB per device for each layout, adapter and full; it marks what does not fit."""
    table = Table(
        title=f"GiB per device, {batch.micro_batch_size} x {batch.sequence_length} tokens per micro batch",
        title_justify="left",
    )
    for column in ("tensor_parallel", "pipeline_parallel", "devices", _name(config.peft), "full fine-tuning"):
        table.add_column(column, justify="right")
    for tensor_parallel in (size for size in SIZES if size in tensor_parallel_sizes(architecture)):
        for pipeline_parallel in (size for size in SIZES if size in pipeline_parallel_sizes(architecture)):
            devices = tensor_parallel * pipeline_parallel
            cluster = dataclasses.replace(
                single_process(config.cluster),
                devices=devices,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
            )
            row = [tensor_parallel, pipeline_parallel, devices]
            cells = [
                _memory(architecture, batch, peft, cluster, device)
                for peft in (config.peft, PeftConfig(default_lr=config.peft.default_lr))
            ]
            table.add_row(*map(str, row), *cells)
    return table


def _name(peft: PeftConfig) -> str:
    adapter = adapter_of(peft)
    return "no adapter" if adapter is None else f"{adapter.entry.title} r{adapter.rank}"


def _memory(
    architecture: Architecture, batch: BatchShape, peft: PeftConfig, cluster: ClusterConfig, device: Device
) -> str:
    total = estimate_memory(architecture, batch, peft, cluster, device.precision).total
    fits = device.memory_bytes is None or total <= device.memory_bytes
    return f"{total / GIB:.2f}" + ("" if fits else " (too much)")
