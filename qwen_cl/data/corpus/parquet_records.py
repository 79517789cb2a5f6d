"""Rows of Parquet files. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen_cl.config.errors import UserError
from qwen_cl.data.corpus.files import InputFile
from qwen_cl.data.corpus.record import Record

BATCH_ROWS = 1024


def read_parquet(file: InputFile, text_field: str | None) -> Iterator[Record]:
    """Yield the rows of a file, with the column ``text_field`` only if it exists; else with all columns."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(str(file.path)) as parquet:
            names = parquet.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{file.path} has two columns {twice!r}; every column needs a name of its own")
            columns = [text_field] if text_field and text_field in names else None
            total, number = parquet.metadata.num_rows, 0
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    found = {name: without_nulls(value) for name, value in row.items()}
                    yield Record(found, f"{file.path}: row {number}", file.size * number // total)
    except (ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())  # Arrow's message has several lines
        raise UserError(f"{file.path} cannot be read: {reason}") from error


def without_nulls(value: Any) -> Any:
    """Remove null fields, which Arrow adds to give all objects of a list the same fields."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
