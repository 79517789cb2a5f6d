"""The normalization of a tokenizer's files, as their author wrote them, to the one form that is read here. No torch.

transformers 5 writes files that 4.57 cannot read (``extra_special_tokens`` as a list, ``TokenizersBackend``), and both
change a tokenizer by its class on loading. Here tokenizer.json gets everything that affects the ids, and
tokenizer_config.json the class that both load without changes, ``PreTrainedTokenizerFast``.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_cl.config.errors import UserError
from qwen_cl.models.tokenizer.classes import PLAIN, class_defaults, class_name, is_by_transformers5
from qwen_cl.models.tokenizer.files import BACKEND, CONFIG, SPECIAL_MAP, chat_templates, read_object, write_object
from qwen_cl.models.tokenizer.special_tokens import SpecialTokens, content, read_special_tokens

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

BOS_BY_CLASS = {"LlamaTokenizer", "CodeLlamaTokenizer"}
"""The classes of transformers 4 that override in tokenizer.json whether texts begin with BOS."""
OTHER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""The files of a tokenizer without a tokenizer.json."""
PRESERVED = (
    "chat_control_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)
"""The fields of tokenizer_config.json that stay as the author wrote them."""
QWEN2 = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}
"""The pre-tokenization of transformers 5 for every ``model_type: qwen2``, which overrides tokenizer.json
(``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS``, Qwen2Tokenizer)."""


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory in Hugging Face layout from its normalized files.

    Raises:
        UserError: There is no tokenizer, or one that is not supported.
    """
    with tempfile.TemporaryDirectory(prefix="qwen_cl-") as parent:
        files = Path(parent) / "tokenizer"
        write_tokenizer(directory, files)
        try:
            tokenizer = load_as_written(str(files), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].replace(str(files), str(directory))
            raise UserError(
                f"{directory} has no tokenizer that loads ({reason}); "
                "copy tokenizer.json and tokenizer_config.json beside config.json"
            ) from error
    tokenizer.name_or_path = str(directory)
    return tokenizer


def load_as_written(directory: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer as AutoTokenizer does; for normalized files, without the overrides that transformers 5 has for
    some families (``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS``)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = Path(directory)
    is_plain = (files / BACKEND).is_file() and read_object(files / CONFIG).get("tokenizer_class") == PLAIN
    return (PreTrainedTokenizerFast if is_plain else AutoTokenizer).from_pretrained(directory, **options)


def write_tokenizer(source: Path, target: Path) -> None:
    """Write the normalized files of the tokenizer in ``source`` to the new folder ``target``; normalized files stay
    unchanged.

    Raises:
        UserError: The tokenizer needs code, its class is unknown, or a file cannot be read.
    """
    config, model = read_object(source / CONFIG), read_object(source / "config.json")
    target.mkdir(parents=True, exist_ok=True)
    for path in chat_templates(source):
        (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.relative_to(source))
    if not (source / BACKEND).is_file():
        _copy_other_kind(source, target, config)
        return
    by_transformers5 = is_by_transformers5(config)
    name = class_name(config, model, by_transformers5, source)
    special = read_special_tokens(
        config, read_object(source / SPECIAL_MAP), class_defaults(name), by_transformers5, source
    )
    tokenizer = _backend(source, config, name, special, by_transformers5)
    tokenizer.save(str(target / BACKEND))
    write_object(target / CONFIG, _normalized_config(config, special, tokenizer))


def _normalized_config(config: dict[str, Any], special: SpecialTokens, tokenizer: Tokenizer) -> dict[str, Any]:
    before = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    return {
        "model_input_names": ["input_ids", "attention_mask"],
        **{key: config[key] for key in PRESERVED if key in config},
        **({"add_prefix_space": before["add_prefix_space"]} if "add_prefix_space" in before else {}),
        **{key: content(value) for key, value in special.named.items()},
        "additional_special_tokens": [content(token) for token in special.extra],
        "extra_special_tokens": {key: content(value) for key, value in special.model_specific.items()},
        "tokenizer_class": PLAIN,
    }


def _backend(
    source: Path, config: dict[str, Any], name: str, special: SpecialTokens, by_transformers5: bool
) -> Tokenizer:
    """Return tokenizer.json with the additions of the class ``name`` and of tokenizer_config.json."""
    from tokenizers import Tokenizer

    plain = read_object(source / BACKEND)
    try:
        _set_splitting(plain, config, name, by_transformers5)
        tokenizer = Tokenizer.from_str(json.dumps(plain))
        tokenizer.add_tokens(list(_missing_tokens(tokenizer, config, special, name, by_transformers5)))
    except Exception as error:  # tokenizers raises no narrower class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} has no tokenizer that loads ({BACKEND}: {reason}); "
            f"copy {BACKEND} and {CONFIG} beside config.json"
        ) from error
    if not by_transformers5 and name in BOS_BY_CLASS:
        _set_bos(tokenizer, config, special)
    return tokenizer


def _set_splitting(plain: dict[str, Any], config: dict[str, Any], name: str, by_transformers5: bool) -> None:
    """Set the pre-tokenization where the class overrides it."""
    prefix = bool(config.get("add_prefix_space"))
    if by_transformers5 and name == "Qwen2Tokenizer":
        plain.update(copy.deepcopy(QWEN2))
        plain["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = prefix
        plain["model"] |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    elif (
        not by_transformers5
        and name not in BOS_BY_CLASS
        and (plain.get("pre_tokenizer") or {}).get("type") == "ByteLevel"
    ):
        plain["pre_tokenizer"]["add_prefix_space"] = prefix


def _missing_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], special: SpecialTokens, name: str, by_transformers5: bool
) -> Iterator[AddedToken]:
    """Yield the tokens that tokenizer.json lacks, or has with other flags."""
    from tokenizers import AddedToken

    added = tokenizer.get_added_tokens_decoder()
    written = {repr(token) for token in added.values()}
    contents = {token.content for token in added.values()}
    specials = [token for token in special.in_order(by_transformers5) if token is not None]
    texts = {content(token) for token in specials}
    listed = config.get("added_tokens_decoder") or {}
    for _, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        token = AddedToken(**fields)
        if repr(token) not in written:
            contents.add(token.content)
            yield AddedToken(**{**fields, "special": token.special or token.content in texts})
    for token in specials:
        flags = {key: value for key, value in token.items() if key != "__type"} if isinstance(token, dict) else {}
        if content(token) not in contents:
            contents.add(content(token))
            yield AddedToken(**{**flags, "content": content(token), "special": True})
    if by_transformers5 and name == "Qwen2Tokenizer":
        yield from (AddedToken(text, special=True) for text in texts)


def _set_bos(tokenizer: Tokenizer, config: dict[str, Any], special: SpecialTokens) -> None:
    from tokenizers.processors import TemplateProcessing

    bos, eos = (content(special.named[key]) for key in ("bos_token", "eos_token"))
    start = bos if config.get("add_bos_token", True) else None
    end = eos if config.get("add_eos_token", False) else None

    def around(text: str, number: int) -> str:
        parts = (start and f"{start}:{number}", f"{text}:{number}", end and f"{end}:{number}")
        return " ".join(part for part in parts if part)

    tokenizer.post_processor = TemplateProcessing(
        single=around("$A", 0),
        pair=f"{around('$A', 0)} {around('$B', 1)}",
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in dict.fromkeys((start, end)) if text],
    )


def _copy_other_kind(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Copy the files of a tokenizer without tokenizer.json, which transformers converts on loading."""
    for name in (*OTHER_FILES, SPECIAL_MAP, "config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if isinstance(config.get("extra_special_tokens"), list):
        config = {"additional_special_tokens": config["extra_special_tokens"], **config, "extra_special_tokens": {}}
    if config:
        write_object(target / CONFIG, config)
