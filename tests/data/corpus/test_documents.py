"""Raw text in every form gives the same documents; what cannot be read is named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.documents import read_files
from qwen_cl.data.corpus.files import find_files
from tests.support.corpora import FORMS, TEXTS, json_lines, text_files, write_parquet, zstd
from tests.support.dataset_hub import DatasetHub
from tests.support.hub import client_environment

ROOT = Path(__file__).resolve().parents[3]


def read(path: Path | str, text_field: str = "text") -> list[str]:
    return [document.text for document in read_files(find_files(str(path), "data.path"), text_field)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(form: str, tmp_path: Path) -> None:
    path = FORMS[form](tmp_path, TEXTS)
    files = find_files(str(path), "data.path")
    documents = list(read_files(files, "text"))
    assert [document.text for document in documents] == TEXTS
    progress = [document.progress for document in documents]
    assert progress == sorted(progress)
    assert 0 < progress[0] <= progress[-1] <= sum(file.size for file in files)
    assert len({document.where for document in documents}) == len(documents)


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/b/c.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(json_lines([name]))
    ordered = ["a/b/c.jsonl", "a/z.jsonl", "b.jsonl", "c.jsonl"]
    assert read(tmp_path) == read(tmp_path / "**/*.jsonl") == ordered
    assert read(tmp_path / "*.jsonl") == ["b.jsonl", "c.jsonl"]
    # A name that reads like a glob is a name where there is such a file.
    (tmp_path / "[bc].jsonl").write_bytes(json_lines(["itself"]))
    assert read(tmp_path / "[bc].jsonl") == ["itself"]


def test_a_home_directory_and_a_relative_path_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read("~/a.txt") == read("a.txt") == ["here"]


def test_marks_blanks_and_newlines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  one\r\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b" \n")
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "c"}\n\n{"text": " "}\r\n{"text": "d", "other": 1}')
    assert read(tmp_path) == ["  one\r\ntwo\n", "", "c", "", "d"]


def test_another_field_is_read_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x"], "body"))
    assert read(tmp_path / "a.jsonl", "body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\ntwo é".encode("latin-1"), "{path}:2: byte 0xe9 at column 5 is not UTF-8; convert the file"),
        ("a.txt.gz", gzip.compress(b"\xff", mtime=0), "{path}:1: byte 0xff at column 1 is not UTF-8"),
        ("a.jsonl", json_lines(["x"]) + b'{"text": "\xe9"}\n', "{path}:2: byte 0xe9 at column 11 is not UTF-8"),
        ("a.jsonl", json_lines(["x"]) + b'\n{"text": \n', "{path}:3: not JSON (Expecting value at column 10)"),
        ("a.jsonl", b'["x"]\n', "{path}:1: a string, it must be an object with field 'text'"),
        ("a.jsonl", b'{"body": "x"}\n', "{path}:1: field 'text' is missing (found: 'body'); rename it, or set data.fi"),
        ("a.jsonl", b'{"text": 3}\n', "{path}:1: field 'text' is a number, it must be a string"),
        ("a.jsonl", b'{"text": null}\n', "{path}:1: field 'text' is null, it must be a string"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "{path}:1: field 'text' holds half of a surrogate pair"),
        ("a.jsonl.zst", zstd(json_lines(TEXTS))[:-9], "{path}: damaged zstd: Truncated compressed stream; fetch or"),
        (
            "a.jsonl.gz",
            gzip.compress(json_lines(TEXTS), mtime=0)[:-9],
            "{path}: damaged gzip: Truncated compressed stream",
        ),
        ("a.jsonl.gz", json_lines(TEXTS), "{path}: damaged gzip: zlib inflate failed: incorrect header check"),
        ("a.parquet", json_lines(TEXTS), "{path} cannot be read as Parquet: Parquet magic bytes not found"),
        (
            "a.xlsx",
            b"text\n",
            "data.path: {path} is of an unknown format; known are .txt, .jsonl, .ndjson, .json, .csv",
        ),
        ("a.parquet.gz", b"", "data.path: {path} is of an unknown format"),
        ("README", b"text\n", "data.path: {path} is of an unknown format"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read(path)
    assert str(refused.value).startswith(message.format(path=path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.jsonl", "does not exist; name a file, a glob, a directory, hf://datasets/ORG/NAME, or the prefix"),
        ("*.jsonl", "matches no file; ** stands for any number of directories"),
        ("empty", "is a directory without files; put .txt, .jsonl"),
    ],
)
def test_a_path_without_files_is_refused(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(UserError) as refused:
        read(tmp_path / path)
    assert str(refused.value).startswith(f"data.path ({tmp_path / path}) {message}")


def test_an_unknown_kind_among_others_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    text_files(tmp_path / "texts", TEXTS)
    (tmp_path / "texts" / "table.xlsx").touch()
    with pytest.raises(UserError, match=r"table\.xlsx is of an unknown format; .*; a glob such as .* others out$"):
        read(tmp_path / "texts")


def test_a_column_that_parquet_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.parquet", "body")
    message = f"{tmp_path}/a.parquet: row 1: field 'body' is missing (found: 'number', 'text');"
    assert str(refused.value).startswith(message)


def test_a_column_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    latin = pyarrow.array([b"fine", "é".encode("latin-1")]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.parquet")
    assert str(refused.value).startswith(f"{tmp_path}/a.parquet cannot be read as Parquet: 'utf-8' codec can't decode")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS), mtime=0))
    (tmp_path / "a.jsonl.gz").chmod(0)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read: Permission denied$"):
        read(tmp_path / "a.jsonl.gz")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ_HUB = """
import json, sys
from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.hub_dataset import pin, read_hub_dataset
answers = []
for path, split, subset, commit in json.loads(sys.argv[1]):
    source = TextSource(key="data.path", path=path, text_field="text", split=split, subset=subset)
    try:
        documents = list(read_hub_dataset(source, commit or pin(source)))
        answers.append([pin(source), [[document.where, document.progress, document.text] for document in documents]])
    except UserError as error:
        answers.append(str(error))
print(json.dumps([answers, "torch" in sys.modules]))
"""


IDENTIFY = """
import sys
from transformers import AutoTokenizer
from qwen_cl.data.corpus.documents import TextSource
from qwen_cl.data.corpus.prepare import make_build_request
source = TextSource(key="data.path", path=sys.argv[1], text_field="text", split="train", subset=None)
request = make_build_request(source, AutoTokenizer.from_pretrained("qwen_cl/demo/model"), workers=1, cache=None)
print(request.known.commit, request.entry)
"""


def run_python(script: str, argument: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, argument],
        cwd=ROOT,
        env={**environment, "USE_TORCH": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_pinned_and_streamed(tmp_path: Path) -> None:
    with DatasetHub(tmp_path / "hub") as hub:
        card = b"---\nlicense: mit\n---\n"
        files = {"train.jsonl": json_lines(TEXTS[:4]), "test.jsonl": json_lines(TEXTS[4:5]), "README.md": card}
        old = hub.publish("org/texts", files, "main", "v1")
        new = hub.publish("org/texts", {**files, "train.jsonl": json_lines(["new"])}, "main")
        environment = client_environment(hub.url, tmp_path / "home", QWEN_CL_CACHE=str(tmp_path / "cache"))
        references = ["hf://datasets/org/texts", "hf://datasets/org/texts@v1", f"hf://datasets/org/texts@{old}"]
        cases = [(reference, "train", None, None) for reference in [*references, "hf://datasets/org/absent"]]
        answers, _ = json.loads(run_python(READ_HUB, json.dumps(cases), environment))
        (newest, *older, absent), texts = answers, TEXTS[:4]
        assert newest == [new, [["hf://datasets/org/texts: row 1", 1, "new"]]]
        assert [(commit, [text for _, _, text in documents]) for commit, documents in older] == [(old, texts)] * 2
        assert absent.startswith("data.path (hf://datasets/org/absent) cannot be read: Dataset 'org/absent' doesn't")
        online = [run_python(IDENTIFY, reference, environment) for reference in references[:2]]
    # What a reference meant is remembered, so what was tokenized is found again without a network.
    environment["HF_HUB_OFFLINE"] = "1"
    assert [run_python(IDENTIFY, reference, environment) for reference in references[:2]] == online
    assert [line.split()[0] for line in online] == [new, old]
    assert len({line.split()[1] for line in online}) == 2


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as `datasets` keeps it once it was fetched: under its name, its subset and its commit."""
    directory = tmp_path_factory.mktemp("datasets")
    content = directory / "content"
    content.mkdir()
    write_parquet(content / "train.parquet", TEXTS[:4])
    write_parquet(content / "test.parquet", TEXTS[4:5])
    files = {split: str(content / f"{split}.parquet") for split in ("train", "test")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(directory / "made"))
    (info,) = (directory / "made").rglob("dataset_info.json")
    for repository, subsets in (("org___texts", ["default"]), ("org___two", ["ja", "en"])):
        for subset in subsets:
            place = directory / "cache" / repository / subset / "0.0.0" / COMMIT
            shutil.copytree(info.parent, place)
            for arrow in place.glob("parquet-*.arrow"):
                arrow.rename(arrow.with_name(arrow.name.replace("parquet-", f"{repository.split('___')[1]}-")))
            text = (place / "dataset_info.json").read_text(encoding="utf-8")
            text = text.replace('"config_name": "default"', f'"config_name": "{subset}"')
            (place / "dataset_info.json").write_text(text, encoding="utf-8")
    return directory / "cache"


def test_a_dataset_of_the_hub_is_read_from_the_cache_without_a_network(datasets_cache: Path) -> None:
    pinned, other, refused = f"hf://datasets/org/texts@{COMMIT}", "hf://datasets/org/two", "data.path (hf://{}) {}"
    cases = [
        (pinned, "train", None, None),
        (other, "test", "ja", None),
        ("hf://datasets/org", "train", None, None),
        ("hf://org/name", "train", None, None),
        ("hf://datasets/org/absent", "train", None, None),
        ("hf://datasets/org/texts", "dev", None, None),
        (other, "train", None, None),
        ("hf://datasets/org/texts@" + "f" * 40, "train", None, None),
        (pinned, "train", None, "f" * 40),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(datasets_cache)}
    (first, second, *refusals), torch_is_imported = json.loads(run_python(READ_HUB, json.dumps(cases), environment))
    assert not torch_is_imported
    assert first == [COMMIT, [[f"{pinned}: row {n}", n, text] for n, text in enumerate(TEXTS[:4], start=1)]]
    assert second == [COMMIT, [[f"{other}: row 1", 1, TEXTS[4]]]]
    expected = [
        refused.format("datasets/org", "must read hf://datasets/ORG/NAME, optionally with @REVISION and #SPLIT or"),
        refused.format("org/name", "must read hf://datasets/ORG/NAME, optionally with @REVISION and #SPLIT or"),
        refused.format("datasets/org/absent", "cannot be read: "),
        refused.format(
            "datasets/org/texts", "cannot be read: Bad split: dev. Available splits: ['train', 'test']; nam"
        ),
        refused.format("datasets/org/two", "cannot be read: There are multiple 'org/two' configurations in the cache"),
        f"data.path ({cases[7][0]}): the cache holds commit 0123456789ab of it; connect once to fetch the other",
        f"data.path ({pinned}): the cache holds commit 0123456789ab, not ffffffffffff; connect once to fetch it",
    ]
    assert [refusal[: len(start)] for refusal, start in zip(refusals, expected)] == expected
    assert len(refusals) == len(expected)
    assert refusals[3].endswith("; name one of them after a #, as in hf://datasets/org/texts#test")
    assert refusals[4].endswith("; set data.subset to one of them")
    assert not any("\n" in refusal for refusal in refusals)
