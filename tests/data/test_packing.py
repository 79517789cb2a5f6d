"""Conversations that share a sequence: which do, and that none knows of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_cl.data.batching import padding_share
from qwen_cl.data.collate import StaticShape, collate
from qwen_cl.data.examples import Example
from qwen_cl.data.mixing import Mixture
from qwen_cl.data.packing import pack_examples, plan_packs
from tests.support import packing_probe
from tests.support.models import save_random_model
from tests.support.packing_probe import CAPACITY, packed_examples, probe_examples
from tests.support.ranks import run_ranks


def test_rows_are_kept_whole_and_in_order() -> None:
    random = np.random.default_rng(0)
    examples = [
        Example([row] * size, ((1, size),)) for row, size in enumerate(random.integers(2, 129, size=400).tolist())
    ]
    packs = pack_examples(examples, 128)
    assert max(pack.num_positions for pack in packs) <= 128
    found = {}
    for pack in packs:
        rows = [pack.ids[start] for start in pack.starts]
        assert rows == sorted(rows)
        for start, stop in pack.segments():
            found[pack.ids[start]] = pack.ids[start:stop]
            assert (start + 1, stop) in pack.loss_spans
    assert [found[row] for row in range(400)] == [example.ids for example in examples]
    assert [pack.ids[0] for pack in packs] == sorted(pack.ids[0] for pack in packs)
    assert sum(pack.num_labels for pack in packs) == sum(example.num_labels for example in examples)
    assert packs == pack_examples(examples, 128)


def test_packs_are_best_fit_decreasing() -> None:
    """Against the rule applied literally: the longest first, each into the fullest pack that has room."""
    random = np.random.default_rng(1)
    for capacity in (10, 64):
        sizes = random.integers(1, capacity + 1, size=200).tolist()
        packs: list[list[int]] = []
        for size in sorted(sizes, reverse=True):
            roomy = [pack for pack in packs if sum(pack) + size <= capacity]
            if roomy:
                max(roomy, key=sum).append(size)
            else:
                packs.append([size])
        found = plan_packs(sizes, capacity)
        assert sorted(itertools.chain(*found)) == list(range(200))
        # Which of equally full packs is taken is open; how full all end up is not.
        assert sorted(sum(sizes[index] for index in pack) for pack in found) == sorted(map(sum, packs))
    assert plan_packs([], 8) == []
    assert plan_packs([8, 8], 8) == [[0], [1]]


def test_collate_lays_segments_side_by_side() -> None:
    packed = Example([1, 2, 3, 11, 12, 21, 22, 23, 24], ((1, 3), (4, 5), (6, 7), (8, 9)), (0, 3, 5))
    alone = Example([31, 32], ((1, 2),))
    batch = collate([packed, alone])
    assert batch["tokens"][:, :7].tolist() == [[1, 2, 11, 21, 22, 23, 0], [31, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"][:, :7].tolist() == [[2, 3, 12, 22, 23, 24, 0], [32, 0, 0, 0, 0, 0, 0]]
    assert batch["loss_mask"][:, :7].tolist() == [[1, 1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert batch["loss_mask"].sum() == packed.num_labels + alone.num_labels
    assert batch["tokens"].shape == (2, 16)
    assert packed.num_positions == 6
    assert batch["segments"].tolist() == [0, 2, 3, 16, 32]
    assert batch["segments"].dtype == torch.int32
    assert "segments" not in collate([alone, alone])


def test_collate_fills_a_batch_up_to_the_shape_of_all() -> None:
    packed = Example([1, 2, 3, 11, 12, 21, 22, 23, 24], ((1, 3), (4, 5), (6, 7), (8, 9)), (0, 3, 5))
    alone = Example([31, 32], ((1, 2),))
    shape = StaticShape(width=32, segments=4)
    for examples, boundaries in (([packed, alone], [0, 2, 3, 32]), ([alone, alone], [0, 32])):
        batch = collate(examples, shape)
        assert batch["segments"].tolist() == boundaries + [64] * (9 - len(boundaries))
        plain = collate(examples)
        width = plain["tokens"].shape[1]
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert batch[name].shape == (2, 32)
            assert (batch[name][:, :width] == plain[name]).all()
            assert name == "position_ids" or not batch[name][:, width:].any()
    assert "segments" not in collate([alone, alone], replace(shape, segments=1))


def test_padding_share_is_that_of_the_batches_training_sees() -> None:
    random = np.random.default_rng(2)
    examples = [Example([0] * size, ((1, size),)) for size in random.integers(2, 80, size=48).tolist()]
    dataset = Mixture([examples], [1.0], num_samples=48, seed=3)
    computed = padding = 0
    for first in range(0, 48, 4):
        rows = [dataset[index] for index in range(first, first + 4)]
        positions = collate(rows)["tokens"].numel()
        computed += positions
        padding += positions - sum(len(row.ids) - 1 for row in rows)
    sizes = [example.num_positions for example in examples]
    assert padding_share(sizes, 4, 3) == pytest.approx(padding / computed, abs=1e-12)
    assert padding_share(sizes, 4, 3, 96) == pytest.approx(1 - sum(sizes) / (48 * 96), abs=1e-12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), heads=6, kv_groups=2, tied=True)


@pytest.fixture(scope="module")
def probed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("packing") / "probe.safetensors"
    done = run_ranks(packing_probe.main, out, model)
    assert done.returncode == 0, done.log[-3000:]
    return load_file(out)


def token_losses(losses: torch.Tensor, examples: list[Example]) -> list[list[float]]:
    """Return the losses of each segment."""
    found = []
    for row, example in enumerate(examples):
        position = 0
        for start, stop in example.segments():
            found.append(losses[row, position : position + stop - start - 1].tolist())
            position += stop - start - 1
    return found


def test_packed_losses_are_those_of_each_conversation_alone_in_transformers(
    probed: dict[str, torch.Tensor], model: Path
) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    by_ids = {}
    for example in probe_examples():
        ids = torch.tensor(example.ids)
        losses = torch.nn.functional.cross_entropy(reference(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        counts = [any(start <= index < stop for start, stop in example.loss_spans) for index in range(1, len(ids))]
        masked = losses * torch.tensor(counts)
        torch.autograd.backward(masked.sum())
        by_ids[tuple(example.ids)] = masked.tolist()
    packs = packed_examples()
    assert [len(pack.starts) for pack in packs] == [4, 2]
    assert all(pack.num_positions <= CAPACITY for pack in packs)
    expected = [by_ids[tuple(pack.ids[start:stop])] for pack in packs for start, stop in pack.segments()]
    for found, wanted in zip(token_losses(probed["packed.losses"], packs), expected):
        assert found == pytest.approx(wanted, abs=1e-4)
    gradient = probed["packed.gradient.embedding.word_embeddings.weight"]
    wanted_gradient = reference.get_input_embeddings().weight.grad
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < 1e-5


def test_packed_equals_unpacked(probed: dict[str, torch.Tensor]) -> None:
    total, alone = probed["packed.losses"].double().sum(), probed["alone.losses"].double().sum()
    labels = sum(example.num_labels for example in probe_examples())
    assert float(total / labels) == pytest.approx(float(alone / labels), abs=1e-5)
    names = [name for name in probed if name.startswith("alone.gradient.")]
    assert len(names) > 10
    for name in names:
        expected = probed[name]
        error = (probed[name.replace("alone", "packed")] - expected).norm() / expected.norm()
        assert float(error) < 1e-5, name


def test_a_batch_that_is_filled_up_is_the_same(probed: dict[str, torch.Tensor]) -> None:
    packs = packed_examples()
    before, after = (token_losses(probed[f"{case}.losses"], packs) for case in ("packed", "filled"))
    for one, other in zip(before, after):
        assert one == pytest.approx(other, abs=1e-5)
    assert not probed["filled.losses"][:, probed["packed.losses"].shape[1] :].any()
    for name in [name for name in probed if name.startswith("packed.gradient.")]:
        error = (probed[name.replace("packed", "filled")] - probed[name]).norm() / probed[name].norm()
        assert float(error) < 1e-5, name


def test_a_segments_text_changes_no_other_segment(probed: dict[str, torch.Tensor]) -> None:
    packs = packed_examples()
    before, after = (token_losses(probed[f"{case}.losses"], packs) for case in ("packed", "changed"))
    assert [one == other for one, other in zip(before, after)] == [True, False, True, True, True, True]


def test_without_segments_the_losses_would_differ(probed: dict[str, torch.Tensor]) -> None:
    """The tests above can fail."""
    packs = packed_examples()
    apart, leaking = (token_losses(probed[f"{case}.losses"], packs) for case in ("packed", "leaking"))
    differences = [max(abs(a - b) for a, b in zip(one, other)) for one, other in zip(apart, leaking)]
    first_of_row = [True, False, False, False, True, False]
    assert [difference < 1e-4 for difference in differences] == first_of_row
