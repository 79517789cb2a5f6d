"""The loading of Hugging Face models in a stock NeMo 2.0 recipe, without the rest of this framework.

    from nemo.collections import llm
    from qwen_cl import from_hugging_face

    recipe = llm.qwen25_500m.finetune_recipe(num_nodes=1, num_gpus_per_node=1, peft_scheme="lora")
    recipe = from_hugging_face(recipe, "hf://Qwen/Qwen2.5-0.5B")

Importing this module also makes ``nl.RestoreConfig(path="hf://…")`` work wherever a recipe has it.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
from nemo import lightning as nl

from qwen_cl.config.errors import UserError
from qwen_cl.models.architecture import Architecture, read_architecture
from qwen_cl.models.loading import nemo_hooks
from qwen_cl.models.loading.compatibility import check_model_config
from qwen_cl.models.loading.tokenizer import load_tokenizer
from qwen_cl.models.reference import local_directory, read_model_config, resolve
from qwen_cl.training.callbacks.vocabulary import MaskPaddedVocabulary

nemo_hooks.install()


def from_hugging_face(recipe: run.Partial, source: str) -> run.Partial:
    """Return a copy of the recipe that starts from the weights of ``source``: ``hf://ORG/NAME[@REVISION]``, or a
    directory in Hugging Face layout.

    The source is pinned to its commit immediately, and only its small files are fetched; the training process fetches
    the weights. A resumable recipe stays resumable, and refuses a checkpoint of another base. If unset, these are set
    from the source: the tokenizer of model and data, and ``share_embeddings_and_output_weights``, which NeMo's Qwen2.5
    configs of 0.5B and 1.5B leave at False though the checkpoints are tied. No value that is set is changed.

    Raises:
        UserError: The source does not exist, its architecture is not supported, or the recipe is for another model.
    """
    recipe = copy.deepcopy(recipe)
    model_config = getattr(getattr(recipe, "model", None), "config", None)
    if not isinstance(model_config, run.Config):
        raise UserError("recipe.model has no config; give a recipe of llm.pretrain or llm.finetune with a GPT model")
    files = resolve(source, weights=False)
    architecture = read_architecture(files.config, files.directory)
    if "share_embeddings_and_output_weights" not in model_config.__arguments__:
        model_config.share_embeddings_and_output_weights = architecture.tied_embeddings
    check_model_config(model_config, architecture, files.source, prefix="recipe.model.config")
    _check_length(recipe.data, architecture, files.source)
    tokenizer = run.Config(load_tokenizer, source=files.source)
    for owner in (recipe.model, recipe.data):
        if _takes_tokenizer(owner) and owner.tokenizer is None:
            owner.tokenizer = tokenizer
    recipe.resume = _resume(recipe, files.source)
    return recipe


class HuggingFaceResume(nl.AutoResume):
    """NeMo's AutoResume, defined here so that importing it installs the hooks for ``hf://``.

    NeMo-Run builds a recipe in a new process, which imports only what the recipe names.
    """

    def setup(self, trainer: pl.Trainer, model: Any = None) -> None:
        super().setup(trainer, model)
        directory = local_directory(self.restore_config.path)
        architecture = read_architecture(read_model_config(directory), directory)
        trainer.callbacks.append(MaskPaddedVocabulary(architecture.vocab_size))


def _check_length(data: Any, architecture: Architecture, source: str) -> None:
    length = getattr(data, "seq_length", None)
    if length is not None and length > architecture.longest_sequence:
        raise UserError(
            f"recipe.data.seq_length ({length}) must be at most the longest sequence of {source} "
            f"({architecture.longest_sequence})"
        )


def _takes_tokenizer(owner: Any) -> bool:
    return isinstance(owner, run.Config) and "tokenizer" in inspect.signature(owner.__fn_or_cls__).parameters


def _resume(recipe: run.Partial, source: str) -> run.Config:
    stock = recipe.resume
    if stock is not None and stock.__fn_or_cls__ not in (nl.AutoResume, HuggingFaceResume):
        raise UserError(f"recipe.resume ({stock.__fn_or_cls__.__name__}) must be nl.AutoResume, or unset")
    arguments = {} if stock is None else dict(stock.__arguments__)
    arguments["restore_config"] = run.Config(nl.RestoreConfig, path=source, load_artifacts=False)
    return run.Config(HuggingFaceResume, **arguments)
