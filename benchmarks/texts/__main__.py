"""English and Japanese prose from Debian's documentation: ``python -m benchmarks.texts DIRECTORY [--packages CACHE]``.

Fetches the packages of packages.tsv from deb.debian.org (about 600 MB, each by its pinned sha256) into CACHE and
writes {english,japanese}.{train,validation}.jsonl, one document with its package per line, and SOURCES.md to DIRECTORY.
The same packages give the same bytes. ``grep '"package": "debian-reference-ja"'`` selects one of them. Requires
``pip install -c constraints.txt -e '.[texts]'`` and mandoc; takes a few minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TextIO

from benchmarks.texts.formats import pages
from benchmarks.texts.packages import Source, fetch, members, sources
from benchmarks.texts.prose import Documents, is_held_out
from qwen_cl.config.errors import UserError

LANGUAGES = ("english", "japanese")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.texts", description=__doc__)
    parser.add_argument("directory", type=Path, help="output directory")
    parser.add_argument("--packages", type=Path, help="package cache; default DIRECTORY/packages")
    arguments = parser.parse_args()
    try:
        write(arguments.directory, arguments.packages or arguments.directory / "packages", sources())
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def write(directory: Path, packages: Path, chosen: list[Source]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    characters: dict[Source, int] = {}
    for language in LANGUAGES:
        documents = Documents(language)
        train, validation = (_create(directory / f"{language}.{part}.jsonl") for part in ("train", "validation"))
        with train, validation:
            for source in [source for source in chosen if source.language == language]:
                characters[source] = 0
                files = members(fetch(source, packages), source.files)
                for page in pages(source.format, files, language):
                    for text in documents.of(page):
                        line = json.dumps({"text": text, "package": source.package}, ensure_ascii=False)
                        (validation if is_held_out(text) else train).write(line + "\n")
                        characters[source] += len(text)
                print(f"{language}: {source.package} {characters[source]:,} characters", flush=True)
    (directory / "SOURCES.md").write_text(_table(characters), encoding="utf-8")


def _create(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _table(characters: dict[Source, int]) -> str:
    lines = ["| language | package | version | license | characters |", "|---|---|---|---|---:|"]
    lines += [
        f"| {source.language} | {source.package} | {source.version} | {source.license} | {count:,} |"
        for source, count in characters.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
