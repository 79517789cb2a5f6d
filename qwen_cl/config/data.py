"""Where a run's rows and texts come from."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_cl.config.errors import UserError
from qwen_cl.config.rules import require


@dataclass(kw_only=True, slots=True)
class DataConfig:
    pass


@dataclass(kw_only=True, slots=True)
class DemoDataConfig(DataConfig):
    instructions: str
    """Path of the pairs, less ``.train.jsonl`` and ``.validation.jsonl``."""
    text: str
    """Path of the documents, likewise."""


@dataclass(kw_only=True, slots=True)
class FileDataConfig(DataConfig):
    path: str
    """Training rows: a file, a glob or a directory."""
    validation_path: str | None
    """Validation rows; without it every ``validation_every``-th row of ``path`` is held out."""
    validation_every: int
    prompt_field: str
    completion_field: str
    text_field: str
    allow_overlap: bool
    """Train although validation rows, or rows of a retention set, are trained on too."""

    def __post_init__(self) -> None:
        require("data.validation_every", self.validation_every, at_least=2)


@dataclass(kw_only=True, slots=True)
class MockDataConfig(DataConfig):
    rows: int
    """Training sequences of random tokens; an eighth as many (at least one) validate."""

    def __post_init__(self) -> None:
        require("data.rows", self.rows, at_least=1)


@dataclass(kw_only=True, slots=True)
class TextDataConfig(DataConfig):
    """Raw text, tokenised once into Megatron's indexed format."""

    path: str
    """A file, a glob, a directory, ``hf://datasets/ORG/NAME[@REVISION]``, or the prefix of an indexed dataset."""
    text_field: str
    split: str
    """Of a dataset on the Hub."""
    subset: str | None
    """Of a dataset on the Hub, where it has several."""
    validation_path: str | None
    """Validation text, of the same kinds; without it ``validation_share`` of the documents of ``path`` is held out."""
    validation_split: str
    """``split`` of ``validation_path``."""
    validation_share: float
    workers: int | None
    """Processes that tokenise; None for one a core."""
    allow_overlap: bool
    """Train although documents that validate, or rows of a retention set, are trained on too."""
    cache: str | None
    """Directory of what was tokenised; None for $QWEN_CL_CACHE/corpora, and without that ~/.cache/qwen_cl/corpora."""

    def __post_init__(self) -> None:
        for name in ("path", "text_field", "split", "validation_split"):
            if not getattr(self, name).strip():
                raise UserError(f"data.{name} is empty; conf/data/text.yaml says what it takes")
        for name in ("subset", "validation_path", "cache"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"data.{name} is empty; write null to leave it open")
        require("data.validation_share", self.validation_share, above=0, below=1)
        if self.workers is not None:
            require("data.workers", self.workers, at_least=1)
