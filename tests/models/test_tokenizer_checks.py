"""A tokenizer that does not belong to the model is refused; its hash is recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_cl.config.errors import UserError
from qwen_cl.data.examples import load_data_tokenizer
from qwen_cl.models.base_record import BaseMismatchError, record_base, recorded_base, require_same_base
from qwen_cl.models.tokenizer_checks import check_tokenizer, tokenizer_hash
from qwen_cl.planning.plan import make_plan
from tests.conftest import Launched
from tests.support.composed_configs import compose_run
from tests.support.models import DEMO_MODEL

CONFIG: dict[str, Any] = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def check(directory: Path, **config: Any) -> None:
    check_tokenizer(load_data_tokenizer(str(directory)), {**CONFIG, **config}, directory)


def ids(directory: Path) -> int:
    return max(load_data_tokenizer(str(directory)).get_vocab().values()) + 1


def test_the_demo_models_tokenizer_is_its_own(model: Path) -> None:
    check(model)


def test_rows_that_pad_a_vocabulary_are_allowed_and_many_more_are_not(model: Path) -> None:
    count = ids(model)
    most = count + max(1024, int(0.1 * count))
    check(model, vocab_size=count)
    check(model, vocab_size=most)
    for rows, message in (
        (count - 1, f"{model}: its tokenizer has id {count - 1}, past the model's vocab_size ({count - 1}); "),
        (most + 1, f"{model}: the model's vocab_size ({most + 1}) has {most + 1 - count} rows more than its tokenizer"),
    ):
        with pytest.raises(UserError) as refused:
            check(model, vocab_size=rows)
        assert str(refused.value).startswith(message)


@pytest.mark.parametrize("name", ["eos", "bos", "pad"])
def test_special_tokens_must_be_the_models(name: str, model: Path) -> None:
    field = f"{name}_token_id"
    edit_json(model / "tokenizer_config.json", bos_token="<|im_start|>", pad_token="<|im_end|>")
    found = int(getattr(load_data_tokenizer(str(model)), field))
    unset = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": -1}
    edit_json(model / "generation_config.json", **unset)
    for value in (None, -1, found, [7, found]):
        check(model, **{**unset, field: value})
    edit_json(model / "generation_config.json", **{field: [8, found]})
    check(model, **{**unset, field: 7})  # one of the two names it
    edit_json(model / "generation_config.json", **{field: [9, 8]})
    with pytest.raises(UserError) as refused:
        check(model, **{**unset, field: 7})
    token = load_data_tokenizer(str(model)).convert_ids_to_tokens(found)
    assert str(refused.value) == (
        f"{model}: its tokenizer's {name}_token is {token!r} (id {found}), and config.json and generation_config.json "
        f"have {field} 7, 8, 9; copy the tokenizer of the model that the weights are from, or set {field} in "
        "generation_config.json to what it was trained with"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json cannot be read as JSON: "),
        ("[]", "generation_config.json must hold a JSON object"),
        ('{"eos_token_id": "x"}', "model: eos_token_id (x) must be an id or a list of ids"),
        ('{"eos_token_id": [1, true]}', "model: eos_token_id ([1, True]) must be an id or a list of ids"),
    ],
)
def test_a_generation_config_that_is_none_is_refused(content: str, message: str, model: Path) -> None:
    (model / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        check(model)
    assert message in str(refused.value)


def test_a_plan_refuses_a_foreign_tokenizer(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.raises(UserError, match=r"its tokenizer's eos_token is '<\|im_end\|>' \(id \d+\), and config\.json"):
        make_plan(compose_run("cluster.accelerator=cpu", "model=local", f"model.source='{model}'"))


def test_the_hash_is_of_vocabulary_merges_and_added_tokens_alone(model: Path) -> None:
    path = model / "tokenizer.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in plain["model"]["merges"]]
    added = sorted((token["id"], token["content"]) for token in plain["added_tokens"])
    content = json.dumps([plain["model"]["vocab"], merges, added], sort_keys=True)
    expected = hashlib.sha256(content.encode()).hexdigest()
    assert tokenizer_hash(model) == expected

    written_otherwise = {**plain["model"], "merges": [" ".join(merge) for merge in merges]}
    edit_json(path, model=written_otherwise, normalizer=None)
    edit_json(model / "tokenizer_config.json", model_max_length=7)
    assert tokenizer_hash(model) == expected

    first, second, *others = merges
    vocab = dict(plain["model"]["vocab"])
    one, two = list(vocab)[:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    for changes in (
        {"model": {**plain["model"], "merges": [second, first, *others]}},
        {"model": {**plain["model"], "vocab": vocab}},
        {"added_tokens": plain["added_tokens"][:-1]},
    ):
        path.write_text(json.dumps({**plain, **changes}), encoding="utf-8")
        assert tokenizer_hash(model) != expected


def test_the_hash_of_other_files_and_of_none(tmp_path: Path) -> None:
    assert tokenizer_hash(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    before = tokenizer_hash(tmp_path)
    (tmp_path / "merges.txt").write_text("a b")
    assert None is not before != tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer: TypeError\(.*; copy it again$"):
        tokenizer_hash(tmp_path)


def test_a_checkpoint_is_not_resumed_with_another_tokenizer(model: Path, tmp_path: Path) -> None:
    weights = tmp_path / "step=1/weights"
    weights.mkdir(parents=True)
    assert recorded_base(tmp_path / "step=1") is None
    require_same_base(tmp_path / "step=1", str(model))
    record_base(weights, str(model))
    assert recorded_base(tmp_path / "step=1") == {"source": str(model), "tokenizer_hash": tokenizer_hash(model)}
    require_same_base(tmp_path / "step=1", str(model))
    plain = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    edit_json(model / "tokenizer.json", added_tokens=plain["added_tokens"][:-1])
    with pytest.raises(BaseMismatchError, match=r"step=1 was trained with another tokenizer than .*model has now: "):
        require_same_base(tmp_path / "step=1", str(model))
    (weights / "base_model.json").write_text(json.dumps({"source": str(model)}))  # written before hashes were
    require_same_base(tmp_path / "step=1", str(model))


def test_a_run_and_its_checkpoints_record_the_tokenizer(trained: Launched) -> None:
    expected = tokenizer_hash(DEMO_MODEL)
    assert trained.folder.status().tokenizer_hash == expected
    (checkpoint,) = trained.folder.checkpoints.iterdir()
    record = json.loads((checkpoint / "weights/base_model.json").read_text())
    assert record == {"source": str(DEMO_MODEL), "tokenizer_hash": expected}
