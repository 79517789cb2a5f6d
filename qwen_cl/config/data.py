"""Where a run's rows and texts come from."""

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
"""What ``data.fields`` may give another name: the fields that rows are read by."""


class DocumentSeparator(str, Enum):
    """What ends a document in a text file."""

    blank_line = "blank_line"
    line = "line"
    file = "file"


class NearDuplicates(str, Enum):
    """What becomes of texts that are measured and nearly, but not wholly, repeat what is trained on."""

    move = "move"
    report = "report"
    refuse = "refuse"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    pass


@dataclass(kw_only=True, slots=True)
class ChatDataConfig(DataConfig):
    """How conversations are rendered: what is trained on, replayed, measured and asked."""

    system_prompt: str | None = field(metadata=setting(scope=Scope.rendering))
    """Of conversations without a system message; None for none."""
    chat_template: str | None = field(metadata=setting(scope=Scope.rendering))
    """A file, or the name of a built-in template; None for the tokenizer's own."""
    template_date: str | None = field(metadata=setting(scope=Scope.rendering))
    """ISO date that the template is told is today's; None for the day the run is made."""
    special_tokens_in_content: bool = field(metadata=setting(scope=Scope.rendering))
    """A special token's name in a message is that token, as in the template; else it is text."""

    def __post_init__(self) -> None:
        for name in ("system_prompt", "chat_template"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"data.{name} is empty; write null to leave it open")
        if self.template_date is not None and not _is_date(self.template_date):
            raise UserError(f"data.template_date ({self.template_date}) must be a date like 2024-07-26")


@dataclass(kw_only=True, slots=True)
class DemoDataConfig(ChatDataConfig):
    instructions: str
    """Path of the pairs, less ``.train.jsonl`` and ``.validation.jsonl``."""
    text: str
    """Path of the documents, likewise."""


@dataclass(kw_only=True, slots=True)
class FileDataConfig(ChatDataConfig):
    path: str
    """Training rows: a file, a glob or a directory."""
    validation_path: str | None
    """Validation rows; without it every ``validation_every``-th row of ``path`` is held out."""
    validation_every: int
    subset: str | None
    """Of a dataset on the Hub, where it has several."""
    fields: dict[str, str]
    """The names that the rows' fields have, by the name they are read by."""
    prompt_field: str
    """Older name of ``fields.prompt``, as are the next two of theirs."""
    completion_field: str
    text_field: str
    near_duplicates: NearDuplicates
    """Of those held out of ``path`` to validate on: they train instead, with ``move``."""
    allow_overlap: bool
    """Train although validation rows, or rows of a retention set, are trained on too."""

    def __post_init__(self) -> None:
        ChatDataConfig.__post_init__(self)
        require("data.validation_every", self.validation_every, at_least=2)
        if self.subset is not None and not self.subset.strip():
            raise UserError("data.subset is empty; write null to leave it open")
        check_fields("data.fields", self.columns)

    @property
    def columns(self) -> dict[str, str]:
        """``fields``, with what the older keys say."""
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
    """Raw text, tokenized once into Megatron's indexed format."""

    path: str
    """A file, a glob, a directory, ``hf://datasets/ORG/NAME[@REVISION]``, or the prefix of an indexed dataset."""
    document_separator: DocumentSeparator
    """Of text files (.txt); other files have their own."""
    text_field: str
    """Older name of ``fields.text``."""
    fields: dict[str, str]
    """{text: the name that the field with the text has}."""
    split: str
    """Of a dataset on the Hub."""
    subset: str | None
    """Of a dataset on the Hub, where it has several."""
    validation_path: str | None
    """Validation text, of the same kinds; without it ``validation_fraction`` of the documents of ``path``
    are held out."""
    validation_split: str
    """``split`` of ``validation_path``."""
    validation_fraction: float
    workers: int | None
    """Processes that tokenize; None for one a core."""
    near_duplicates: NearDuplicates
    """Of those held out of ``path`` to validate on: they train instead, with ``move``."""
    allow_overlap: bool
    """Train although documents that validate, or rows of a retention set, are trained on too."""
    cache: str | None
    """Directory of what was tokenized; None for $QWEN_CL_CACHE/corpora, and without that ~/.cache/qwen_cl/corpora."""

    def __post_init__(self) -> None:
        ChatDataConfig.__post_init__(self)
        for name in ("path", "text_field", "split", "validation_split"):
            if not getattr(self, name).strip():
                raise UserError(f"data.{name} is empty; conf/data/text.yaml says what it takes")
        for name in ("subset", "validation_path", "cache"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"data.{name} is empty; write null to leave it open")
        if others := [name for name in self.fields if name != TEXT]:
            raise UserError(
                f"data.fields.{others[0]} would change nothing: data=text reads the field text alone; remove it"
            )
        check_fields("data.fields", {TEXT: self.text_column})
        require("data.validation_fraction", self.validation_fraction, above=0, below=1)
        if self.workers is not None:
            require("data.workers", self.workers, at_least=1)

    @property
    def text_column(self) -> str:
        older = {} if self.text_field == TEXT else {TEXT: self.text_field}
        return _joined(self.fields, older).get(TEXT, TEXT)


def check_fields(key: str, columns: dict[str, str]) -> None:
    """Raises UserError where a name is none that rows are read by, or two mean one field."""
    for name, column in columns.items():
        if name not in FIELDS:
            raise UserError(unknown_key(f"{key}.{name}", list(FIELDS)))
        if not column.strip():
            raise UserError(f"{key}.{name} is empty; write the name that the field has in the rows")
    columns = {name: column for name, column in columns.items() if name != TEXT}  # of another task than the others
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
                f"data.fields.{name} ({fields[name]}) and data.{name}_field ({column}), its older name, disagree; "
                "remove one"
            )
    return {**fields, **older}


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
