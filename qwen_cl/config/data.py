"""The data group: sources of rows and texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from enum import Enum

from qwen_cl.config.errors import UserError
from qwen_cl.config.fields import Scope, setting
from qwen_cl.config.hydra_errors import unknown_key
from qwen_cl.config.validation import require

TEXT = "text"
PAIR = ("prompt", "completion")
ALPACA = ("instruction", "output", "input")
TURNS = ("messages", "conversations")
FIELDS = (
    *(TEXT, *PAIR, *TURNS, *ALPACA, "system", "history", "tools", "reasoning_content", "documents"),
    *("chat_template_kwargs", "enable_thinking"),
)
"""Standard field names, which ``data.fields`` may map to other names."""


class DocumentSeparator(str, Enum):
    """The separator of documents in a text file."""

    blank_line = "blank_line"
    line = "line"
    file = "file"


class NearDuplicates(str, Enum):
    """The handling of evaluated texts that are near duplicates of training texts."""

    move = "move"
    report = "report"
    refuse = "refuse"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The base of the data groups."""


@dataclass(kw_only=True, slots=True)
class ChatDataConfig(DataConfig):
    """The settings for rendering conversations, in training, replay, evaluation and generation."""

    system_prompt: str | None = field(metadata=setting(scope=Scope.rendering))
    """System message of conversations without one; None for none."""
    chat_template: str | None = field(metadata=setting(scope=Scope.rendering))
    """Template file, or name of a built-in template; None for the tokenizer's own."""
    template_date: str | None = field(metadata=setting(scope=Scope.rendering))
    """ISO date that the template renders as today; None for the date of the run."""
    special_tokens_in_content: bool = field(metadata=setting(scope=Scope.rendering))
    """Encode the name of a special token in a message as that token, not as text."""

    def __post_init__(self) -> None:
        for name in ("system_prompt", "chat_template"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"data.{name} is empty; write null to leave it open")
        if self.template_date is not None and not _is_date(self.template_date):
            raise UserError(f"data.template_date ({self.template_date}) must be a date like 2024-07-26")


@dataclass(kw_only=True, slots=True)
class DemoDataConfig(ChatDataConfig):
    instructions: str
    """Path of the instruction data, without ``.train.jsonl`` and ``.validation.jsonl``."""
    text: str
    """Path of the documents, without ``.train.jsonl`` and ``.validation.jsonl``."""


@dataclass(kw_only=True, slots=True)
class FileDataConfig(ChatDataConfig):
    path: str
    """Training rows: a file, a glob or a directory."""
    validation_path: str | None
    """Validation rows; without it every ``validation_every``-th row of ``path`` is held out."""
    validation_every: int
    subset: str | None
    """Subset of a Hub dataset, if it has several."""
    fields: dict[str, str]
    """Field names in the rows, by standard name."""
    prompt_field: str
    """Old name of ``fields.prompt``; the next two are old names of the others."""
    completion_field: str
    text_field: str
    near_duplicates: NearDuplicates
    """Handling of held-out near duplicates; ``move`` trains on them instead."""
    allow_overlap: bool
    """Allow validation or retention rows in the training data."""

    def __post_init__(self) -> None:
        ChatDataConfig.__post_init__(self)
        require("data.validation_every", self.validation_every, at_least=2)
        if self.subset is not None and not self.subset.strip():
            raise UserError("data.subset is empty; write null to leave it open")
        check_fields("data.fields", self.columns)

    @property
    def columns(self) -> dict[str, str]:
        """The field names of ``fields`` and of the old keys."""
        older = {name: getattr(self, f"{name}_field") for name in (*PAIR, TEXT)}
        return _joined(self.fields, {name: value for name, value in older.items() if value != name})


@dataclass(kw_only=True, slots=True)
class MockDataConfig(DataConfig):
    rows: int
    """Training sequences of random tokens; an eighth as many (at least one) validate."""

    def __post_init__(self) -> None:
        require("data.rows", self.rows, at_least=1)


@dataclass(kw_only=True, slots=True)
class TextDataConfig(ChatDataConfig):
    """The source of raw text, tokenized once into Megatron's indexed format."""

    path: str
    """File, glob, directory, ``hf://datasets/ORG/NAME[@REVISION]``, or the prefix of an indexed dataset."""
    document_separator: DocumentSeparator
    """Separator of documents in text files (.txt); other formats have their own."""
    text_field: str
    """Old name of ``fields.text``."""
    fields: dict[str, str]
    """Name of the text field, as {text: NAME}."""
    split: str
    """Split of a Hub dataset."""
    subset: str | None
    """Subset of a Hub dataset, if it has several."""
    validation_path: str | None
    """Validation text, of the same kinds; without it ``validation_fraction`` of the documents of ``path``
    are held out."""
    validation_split: str
    """Split of ``validation_path``."""
    validation_fraction: float
    workers: int | None
    """Number of tokenizing processes; None for one per core."""
    near_duplicates: NearDuplicates
    """Handling of held-out near duplicates; ``move`` trains on them instead."""
    allow_overlap: bool
    """Allow validation documents or retention rows in the training data."""
    cache: str | None
    """Cache of tokenized text; None for $QWEN_CL_CACHE/corpora, and without that ~/.cache/qwen_cl/corpora."""

    def __post_init__(self) -> None:
        ChatDataConfig.__post_init__(self)
        for name in ("path", "text_field", "split", "validation_split"):
            if not getattr(self, name).strip():
                raise UserError(f"data.{name} is empty; conf/data/text.yaml says what it takes")
        for name in ("subset", "validation_path", "cache"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"data.{name} is empty; write null to leave it open")
        if others := [name for name in self.fields if name != TEXT]:
            raise UserError(f"data.fields.{others[0]} has no effect: data=text only reads the field text; remove it")
        check_fields("data.fields", {TEXT: self.text_column})
        require("data.validation_fraction", self.validation_fraction, above=0, below=1)
        if self.workers is not None:
            require("data.workers", self.workers, at_least=1)

    @property
    def text_column(self) -> str:
        older = {} if self.text_field == TEXT else {TEXT: self.text_field}
        return _joined(self.fields, older).get(TEXT, TEXT)


def check_fields(key: str, columns: dict[str, str]) -> None:
    """Refuse field names that are not standard names, or that name one field twice. Raises UserError."""
    for name, column in columns.items():
        if name not in FIELDS:
            raise UserError(unknown_key(f"{key}.{name}", list(FIELDS)))
        if not column.strip():
            raise UserError(f"{key}.{name} is empty; write the name that the field has in the rows")
    columns = {name: column for name, column in columns.items() if name != TEXT}  # read by another task
    forms = [form for form in (PAIR, *((name,) for name in TURNS), ALPACA) if set(form) & columns.keys()]
    if len(forms) > 1:
        first, second = (next(name for name in form if name in columns) for form in forms[:2])
        raise UserError(f"{key} names {first} and {second}, which are two forms of a row; name the fields of one")
    twice = next((column for column in columns.values() if list(columns.values()).count(column) > 1), None)
    if twice is not None:
        names = " and ".join(name for name, column in columns.items() if column == twice)
        raise UserError(f"{key} names the field {twice!r} for {names}; a field can be one of them")


def _joined(fields: dict[str, str], older: dict[str, str]) -> dict[str, str]:
    for name, column in older.items():
        if fields.get(name, column) != column:
            raise UserError(
                f"data.fields.{name} ({fields[name]}) and data.{name}_field ({column}), its old name, disagree; "
                "remove one"
            )
    return {**fields, **older}


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
