"""The loaders that ``load.py`` compares: ``python -m benchmarks.loaders LOADER MODEL DEVICE``.

Each runs in a process of its own and prints one line of JSON: seconds by what they include, and the memory and I/O of
the process during that time.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]


def main(loader: str, model: Path, device: str) -> None:
    try:
        record = LOADERS[loader](model, device)
    except Exception as error:  # printed in the table
        record = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(record))


def ours(model: Path, device: str) -> dict[str, Any]:
    """Build and fill the model as a run does, at tensor and pipeline parallel 1."""
    import torch

    config = _run_config(model, device)
    plan = _plan(config)
    _one_rank()
    from qwen_cl.models.formats.safetensors import Checkpoint
    from qwen_cl.models.loading.buffers import BUFFERS, block_size
    from qwen_cl.models.loading.megatron_shards import fill
    from qwen_cl.models.loading.readers import default_readers

    _start(device)
    _build(replace(plan, architecture=replace(plan.architecture, num_layers=1, vocab_size=8)))  # warm up
    with measured() as record:
        started = time.perf_counter()
        module = _build(plan)
        _synchronize(device)
        built = time.perf_counter()
    building = record
    with measured() as record:
        began = time.perf_counter()
        checkpoint = Checkpoint(model)
        fill(module.sharded_state_dict(), module.named_parameters(), checkpoint, plan.architecture)
        _synchronize(device)
        filled = time.perf_counter()
    devices = {parameter.device.type for parameter in module.parameters()}
    dtypes = {parameter.dtype for parameter in module.parameters()}
    assert devices == {device} and dtypes == {_dtype(device)}, (devices, dtypes)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    record["seconds"] = {
        "filling the built model": filled - began,
        "building and filling the model": built - started + filled - began,
    }
    where, total = torch.device(device), record["read"]
    pinned = default_readers(where, total) * BUFFERS * block_size(where, total) / 1e6 if device == "cuda" else 0
    record["note"] = (
        f"ours: memory is measured while filling (building added {building['anonymous'] / 1e6:,.0f} MB anon"
    )
    record["note"] += f"), and {pinned:.0f} MB of pinned buffers, which RSS may not include." if pinned else ")."
    return record


def from_pretrained(model: Path, device: str) -> dict[str, Any]:
    return _transformers(
        model, device, "from_pretrained().cuda(), all" if device == "cuda" else "from_pretrained(), all"
    )


def device_map(model: Path, device: str) -> dict[str, Any]:
    return _transformers(model, device, f"from_pretrained(device_map={device}), all", device_map=device)


def read(model: Path, device: str) -> dict[str, Any]:
    """Read every byte into the same buffer, in one thread."""
    buffer = bytearray(16 * 2**20)
    paths = sorted(model.glob("*.safetensors"))
    with measured() as record:
        started = time.perf_counter()
        for path in paths:
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        record["seconds"] = {"readinto(), one thread": time.perf_counter() - started}
    return record


def import_ckpt(model: Path, device: str) -> dict[str, Any]:
    """Convert the model with NeMo's own ``llm.import_ckpt``."""
    from nemo.collections import llm

    shape = json.loads((model / "config.json").read_text())
    config = llm.Qwen2Config(
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_key_value_heads"],
        vocab_size=shape["vocab_size"],
        share_embeddings_and_output_weights=shape["tie_word_embeddings"],
    )
    with measured() as record:
        started = time.perf_counter()
        llm.import_ckpt(llm.Qwen2Model(config), f"hf://{model}", output_path=model.parent / "imported")
        record["seconds"] = {"import_ckpt": time.perf_counter() - started}
    return record


LOADERS = {"read": read, "from_pretrained": from_pretrained, "device_map": device_map, "ours": ours} | {
    "import_ckpt": import_ckpt
}


def _transformers(model: Path, device: str, timed: str, **options: Any) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import Qwen2ForCausalLM

    _start(device)
    Qwen2ForCausalLM(transformers.Qwen2Config(hidden_size=8, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=8, num_hidden_layers=1, vocab_size=8)).to(device)  # warm up  # fmt: skip
    with measured() as record:
        started = time.perf_counter()
        loaded = Qwen2ForCausalLM.from_pretrained(model, dtype=_dtype(device), **options)
        if device == "cuda":
            loaded = loaded.cuda()
        _synchronize(device)
        record["seconds"] = {timed: time.perf_counter() - started}
    assert {parameter.device.type for parameter in loaded.parameters()} == {device}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in loaded.parameters())
    return record


@contextlib.contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Fill the record at the end of the block: bytes of memory added, read, written, and allocated on the device."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    record: dict[str, Any] = {}
    before, traffic = _status(), _traffic()
    peak, done = [before["RssAnon"]], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak.append(max(peak.pop(), _status()["RssAnon"]))

    sampler = threading.Thread(target=sample)
    sampler.start()
    ended = traffic
    try:
        yield record
        ended = _traffic()
    finally:
        done.set()
        sampler.join()
    after = _status()
    record["rss"] = max(0, after["VmHWM"] - before["VmRSS"])
    record["anonymous"] = max(peak[0], after["RssAnon"]) - before["RssAnon"]
    record["read"], record["written"] = (ended[name] - traffic[name] for name in ("rchar", "write_bytes"))
    record["device_peak"] = _device_peak()


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


def _traffic() -> dict[str, int]:
    return {name: int(value) for name, value in (line.split(": ") for line in _lines("/proc/self/io"))}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _device_peak() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0


def _dtype(device: str) -> Any:
    """Return the dtype that ``cluster.precision=auto`` selects."""
    import torch

    return torch.bfloat16 if device == "cuda" else torch.float32


def _start(device: str) -> None:
    if device == "cuda":
        import torch

        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _run_config(model: Path, device: str) -> Any:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from qwen_cl.config.store import register_schemas

    register_schemas()
    accelerator = "gpu" if device == "cuda" else "cpu"
    overrides = ["model=local", f"model.source='{model}'", f"cluster.accelerator={accelerator}", "data=mock"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_object(compose("config", overrides))


def _plan(config: Any) -> Any:
    from qwen_cl.config.run import RunConfig
    from qwen_cl.planning.plan import make_plan
    from qwen_cl.training.worker import prepare

    plan = make_plan(cast(RunConfig, config))
    prepare(plan.config)
    return plan


def _one_rank() -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    distributed: Any = torch.distributed
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)


def _build(plan: Any) -> Any:
    import fiddle
    from megatron.core.transformer.module import Float16Module

    from qwen_cl.training.model.build import build_model

    megatron = fiddle.build(build_model(plan.config, plan.architecture, None).config)
    module = megatron.configure_model(None, True, True).cuda()
    return Float16Module(megatron, module) if megatron.bf16 else module  # as NeMo's precision plugin does


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
