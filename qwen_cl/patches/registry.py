"""Replace upstream names, and only while upstream's code is the code that the replacement was written for.

Upstream's code is read from its files without importing it, so the launcher can check it before a run starts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

VERSIONS = {
    "torch": ("torch", ">=2.11,<2.15"),
    "megatron": ("megatron-core", "==0.15.3"),
    "nemo": ("nemo_toolkit", "==2.7.3"),
    "lightning": ("lightning", "==2.4.0"),
}
"""The package of each top-level module, and its supported versions."""


class UpstreamChanged(Exception):
    """The installed upstream code is not the code that a replacement was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A replaced name, MODULE:NAME."""

    name: str
    by: str
    """The file of qwen_cl that replaces it."""
    why: str
    code: str
    """MODULE:NAME, or MODULE, of the upstream code that the replacement was written for."""
    fingerprint: str
    cpu: bool = False
    """Replaced only on a CPU."""


def replace(owner: Any, name: str, new: Any) -> None:
    """Set an attribute of an upstream module, class or object to ours. Repeating a call has no effect.

    Raises:
        UpstreamChanged: upstream's code is not the code that the replacement was written for.
        LookupError: the table does not list the name.
    """
    require_known_code(_listed(owner, name))
    if isinstance(inspect.getattr_static(type(owner), name, None), property):  # cannot be set on one object
        owner.__class__ = type(type(owner).__name__, (type(owner),), {name: new})
    else:
        setattr(owner, name, new)


def replace_everywhere(owner: ModuleType, name: str, new: Any) -> None:
    """Replace a function also in the modules of its package that have imported it by its name."""
    stock, package = getattr(owner, name), owner.__name__.partition(".")[0]
    replace(owner, name, new)
    for key, module in list(sys.modules.items()):  # by key: modules of compiled packages may lack __name__
        if key.partition(".")[0] == package and vars(module).get(name) is stock:
            setattr(module, name, new)


def check_installed(*, cpu: bool) -> None:
    """Check all names that a run may replace, in the installed packages. Imports none of them.

    Raises:
        UpstreamChanged: some upstream code is not the code that a replacement was written for.
    """
    for patch in patches().values():
        if cpu or not patch.cpu:
            require_known_code(patch)


@cache
def patches() -> dict[str, Patch]:
    """Return all replacements by name (qwen_cl/patches/table.yaml)."""
    files = yaml.safe_load(resources.files("qwen_cl.patches").joinpath("table.yaml").read_text(encoding="utf-8"))
    return {
        name: Patch(**{"name": name, "by": by, "code": name, **entry})
        for by, entries in files.items()
        for name, entry in entries.items()
    }


@cache
def require_known_code(patch: Patch) -> None:
    """Check the code of one replacement, if the package is installed.

    Raises:
        UpstreamChanged: it has other code.
    """
    if _folders(patch.code) and fingerprint(patch.code) != patch.fingerprint:
        package, versions = package_of(patch)
        installed = next((each.version for each in metadata.distributions(name=package)), "(unknown version)")
        name, code = patch.name.replace(":", "."), patch.code.replace(":", ".")
        raise UpstreamChanged(
            f"{package} {installed} is not supported: its {code} differs from that of {package}{versions}, "
            f"for which qwen_cl replaces {name}; run pip install --force-reinstall --no-deps '{package}{versions}'"
        )


def package_of(patch: Patch) -> tuple[str, str]:
    """Return the package that the replacement was written for, and its versions."""
    return VERSIONS[patch.code.partition(".")[0]]


def fingerprint(code: str) -> str | None:
    """Return 12 digits of the sha256 of the source of MODULE:NAME, or of a whole MODULE; None if it does not exist."""
    module, _, path = code.partition(":")
    source = _source(module)
    lines = [] if source is None else source.splitlines(keepends=True)
    *classes, name = path.split(".")
    for each in classes:
        lines = lines[_start(lines, each) :]
    if name:
        lines = _block(lines, name)
    return hashlib.sha256("".join(lines).strip().encode()).hexdigest()[:12] if lines else None


def _listed(owner: Any, name: str) -> Patch:
    """Return the patch of a name, which the table lists under the class that defines it."""
    if isinstance(owner, ModuleType):
        names = [f"{owner.__name__}:{name}"]
    else:
        kind = owner if isinstance(owner, type) else type(owner)
        names = [f"{each.__module__}:{each.__qualname__}.{name}" for each in kind.__mro__]
    found = next((patches()[each] for each in names if each in patches()), None)
    if found is None:
        raise LookupError(f"qwen_cl/patches/table.yaml does not list {names[0]}")
    return found


def _folders(code: str) -> list[str]:
    """Return the folders of the installed package; empty if it is not installed."""
    spec = importlib.util.find_spec(code.partition(":")[0].partition(".")[0])
    return list(spec.submodule_search_locations or []) if spec else []


@cache
def _source(module: str) -> str | None:
    parts = module.split(".")[1:]
    for folder in _folders(module):
        for file in (Path(folder, *parts).with_suffix(".py"), Path(folder, *parts, "__init__.py")):
            if file.is_file():
                return file.read_text(encoding="utf-8")
    return None


def _block(lines: list[str], name: str) -> list[str]:
    """Return the lines of the first function or class of that name, with its decorators."""
    first = _start(lines, name)
    if first == len(lines):
        return []
    block = inspect.getblock(lines[first:])
    while not block[-1].strip() or block[-1].lstrip().startswith("#"):  # Python versions differ in trailing lines
        block.pop()
    while first and lines[first - 1].lstrip().startswith("@"):
        first -= 1
        block.insert(0, lines[first])
    return block


def _start(lines: list[str], name: str) -> int:
    """Return the line number of the definition, or the number of lines if there is none."""
    start = re.compile(rf"\s*(async def|def|class) {name}\b")
    return next((number for number, line in enumerate(lines) if start.match(line)), len(lines))
