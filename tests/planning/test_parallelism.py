"""Layouts that cannot work are refused with those that can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.planning.parallelism import check_layout
from qwen_cl.planning.plan import make_plan
from tests.support.exporting import composed

EIGHT = ("cluster.accelerator=cpu", "cluster.devices=8", "task.global_batch_size=16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster.tensor_parallel=4"],
            "cluster.tensor_parallel (4) must divide the model's attention heads (6); this model allows 1, 2. With 8 "
            "processes, tensor_parallel x pipeline_parallel may be 1 x 1, 1 x 2, 1 x 4, 2 x 1, 2 x 2, 2 x 4",
        ),
        (
            ["cluster.pipeline_parallel=8"],
            "cluster.pipeline_parallel (8) must divide the model's layers (4); this model allows 1, 2, 4. With 8 "
            "processes, tensor_parallel x pipeline_parallel may be 1 x 1, 1 x 2, 1 x 4, 2 x 1, 2 x 2, 2 x 4",
        ),
        (
            ["cluster.tensor_parallel=4", "cluster.context_parallel=2"],
            "cluster.tensor_parallel (4) must divide the model's attention heads (6); this model allows 1, 2. With 8 "
            "processes and context_parallel 2, tensor_parallel x pipeline_parallel may be 1 x 1, 1 x 2, 1 x 4, 2 x 1, "
            "2 x 2",
        ),
        (
            ["cluster.tensor_parallel=2", "peft.rank=7"],
            "peft.rank (7) must be a multiple of cluster.tensor_parallel (2), over which the adapter is split too; "
            "change either",
        ),
        (
            ["cluster.devices=3", "cluster.context_parallel=3", "task.global_batch_size=2"],
            "cluster.context_parallel (3) must divide half of 16, the multiple that every row is padded to; it may "
            "be 1, 2, 4, 8",
        ),
        (
            ["cluster.devices=3", "cluster.tensor_parallel=3"],
            "cluster.tensor_parallel (3) must divide the model's KV groups (2); this model allows 1, 2. With 3 "
            "processes, tensor_parallel x pipeline_parallel may be 1 x 1",
        ),
        (
            ["cluster.devices=32", "cluster.tensor_parallel=2", "cluster.context_parallel=16"],
            "cluster.context_parallel (16) must divide half of 16, the multiple that every row is padded to; it may "
            "be 1, 2, 4, 8",
        ),
    ],
)
def test_a_model_that_cannot_be_split_so(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make_plan(composed(*EIGHT, *overrides))
    assert str(refused.value) == message


def test_rows_that_cannot_be_dealt_out_so() -> None:
    sixteen = ("cluster.devices=16", "cluster.context_parallel=8", "cluster.sequence_parallel=true")
    plan = make_plan(composed(*EIGHT, *sixteen, "cluster.tensor_parallel=2"))
    assert plan.config.cluster.data_parallel == 1
    wider = replace(plan.architecture, num_attention_heads=12, num_query_groups=4)
    cluster = replace(plan.config.cluster, devices=32, tensor_parallel=4)
    with pytest.raises(UserError) as refused:
        check_layout(cluster, plan.config.peft, wider)
    assert str(refused.value) == (
        "cluster.sequence_parallel splits a row over cluster.tensor_parallel (4) x cluster.context_parallel (8) = 32 "
        "ranks, which must divide 16, the multiple that every row is padded to; write "
        "cluster.sequence_parallel=false, or change the sizes"
    )
    check_layout(replace(cluster, sequence_parallel=False), plan.config.peft, wider)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster.devices=4", "cluster.context_parallel=3"],
            "cluster.tensor_parallel (1) x cluster.pipeline_parallel (1) x cluster.context_parallel (3) must divide "
            "the number of processes (4); set cluster.devices to a multiple of 3",
        ),
        (
            ["cluster.sequence_parallel=true"],
            "cluster.sequence_parallel (true) splits sequences over the tensor parallel ranks, and "
            "cluster.tensor_parallel is 1; raise it, or write cluster.sequence_parallel=false",
        ),
        (
            ["cluster.devices=8", "cluster.context_parallel=2", "task.global_batch_size=4"],
            "task.global_batch_size (4) must be a multiple of task.micro_batch_size (2) x data_parallel (4) = 8",
        ),
        (["cluster.context_parallel=0"], "cluster.context_parallel (0) must be at least 1"),
        (["cluster.timeout_minutes=0"], "cluster.timeout_minutes (0.0) must be above 0"),
    ],
)
def test_processes_that_cannot_be_dealt_out_so(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        composed("cluster.accelerator=cpu", *overrides)
    assert str(refused.value) == message
