"""Debian packages as archives: downloaded by pinned sha256 and read in memory, without installing anything."""

from __future__ import annotations

import csv
import hashlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from debian.debfile import DebFile

from qwen_cl.config.errors import UserError

TABLE = Path(__file__).with_name("packages.tsv")
# A point release removes superseded versions from the first mirror; the second keeps all versions.
MIRRORS = [
    "http://deb.debian.org/debian",
    "https://snapshot.debian.org/archive/debian/20261101T000000Z",
]


@dataclass(frozen=True)
class Source:
    """The files of one package in one language. A package with two languages has two rows in packages.tsv."""

    language: str
    format: str
    path: str
    sha256: str
    license: str
    files: str  # comma-separated globs on the path within the package

    @property
    def package(self) -> str:
        return self.path.rpartition("/")[2].split("_")[0]

    @property
    def version(self) -> str:
        return self.path.rpartition("/")[2].split("_")[1]


def sources() -> list[Source]:
    with open(TABLE, encoding="utf-8", newline="") as file:
        return [Source(**row) for row in csv.DictReader(file, delimiter="\t")]


def fetch(source: Source, cache: Path) -> Path:
    """Return the package's file in ``cache``, downloading it if needed, after checking its sha256."""
    target = cache / source.path.rpartition("/")[2]
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        part.write_bytes(_download(source))
        part.replace(target)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != source.sha256:
        raise UserError(
            f"{target}: sha256 is {found}, packages.tsv says {source.sha256}; delete the file to fetch it again"
        )
    return target


def _download(source: Source) -> bytes:
    failures = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}/{source.path}", timeout=60) as response:
                return bytes(response.read())
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            failures.append(f"{mirror}: {error}")
    raise UserError(f"{source.path} could not be downloaded ({'; '.join(failures)}); put the file there manually")


def members(package: Path, globs: str) -> list[tuple[str, bytes]]:
    """Return path and content of the matching regular files of a package, ordered by path."""
    found = []
    with DebFile(str(package)).data.tgz() as archive:
        # Read in the archive's order: seeking back would decompress it from the start.
        for member in archive:
            if member.isfile() and any(fnmatch(member.name, glob) for glob in globs.split(",")):
                file = archive.extractfile(member)
                found.append((member.name, file.read()))
    return sorted(found)
