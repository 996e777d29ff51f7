"""Turn texts into token ids with a model's tokenizer, and list the ids that synthetic prompts may hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from transformers import AutoTokenizer

from pytest_llem.engines.library_errors import library_errors_as_preflight, one_line
from pytest_llem.engines.models import ModelSource
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.study.config import ExperimentConfig


class PromptTokenizer:
    """The tokenizer of an experiment's model, if it has one.

    Args:
        source: Where the model was found.
        config: The experiment.
        arguments: Further arguments of ``from_pretrained``, such as the revision.

    Attributes:
        tokenizer: The model's tokenizer; None if it has none and the prompts are token ids anyway.

    Raises:
        PreflightError: The prompts are texts, and the model has no tokenizer, or its chat template does not work.
    """

    def __init__(self, source: ModelSource, config: ExperimentConfig, arguments: dict[str, Any]) -> None:
        self._model, self._is_chat = config.model_name, config.prompt_format == "chat"
        self.tokenizer = _load(source, config, arguments)
        if self._is_chat:
            self._try_template()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt with special tokens, and with the chat template if it is in use."""
        assert self.tokenizer is not None, "the prompts are token ids"
        if self._is_chat:
            messages = [{"role": "user", "content": text}]
            chat = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return list(chat["input_ids"])
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids* without special tokens."""
        assert self.tokenizer is not None, "the model has no tokenizer"
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def vocabulary(self, config: Any) -> list[int]:
        """Return the token ids that a synthetic prompt may hold, without special tokens.

        Args:
            config: The model's configuration, of transformers.
        """
        return vocabulary(config, self.tokenizer)

    def _try_template(self) -> None:
        """Check that the chat template works.

        Raises:
            PreflightError: The model has no chat template, or it fails.
        """
        assert self.tokenizer is not None, "prompts are texts if they have a template"
        if not self.tokenizer.chat_template:
            message = f"model {self._model!r} has no chat template: set prompt_format: raw, or name another model"
            raise PreflightError(message)
        try:
            self.encode("Hello")
        except Exception as error:  # a template is a program of the model's author
            message = f"the chat template of model {self._model!r} does not take a prompt: {one_line(error)}"
            raise PreflightError(message) from error


def text_config(config: Any) -> Any:
    """Return the decoder's part of a model's configuration.

    It is *config* itself, unless the model has other parts, such as an image encoder.
    """
    return config.get_text_config(decoder=True)


def vocabulary(config: Any, tokenizer: Any) -> list[int]:
    """Return the token ids that a synthetic prompt may hold, without special tokens.

    Args:
        config: The model's configuration, of transformers.
        tokenizer: The model's tokenizer; None if it has none.
    """
    text = text_config(config)
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    if tokenizer is None or text is not config:  # a tokenizer may not mark image placeholders as special
        named = {**config.to_dict(), **text.to_dict()}
        given = (named[name] for name in named if name.endswith(("_token_id", "_token_index")))
        special.update(chain.from_iterable(one if isinstance(one, list) else [one] for one in given))
    size = text.vocab_size if tokenizer is None else min(len(tokenizer), text.vocab_size)
    return [token for token in range(size) if token not in special]


def _load(source: ModelSource, config: ExperimentConfig, arguments: dict[str, Any]) -> Any:
    what = f"the tokenizer of model {config.model_name!r} cannot be loaded"
    try:
        with library_errors_as_preflight(what):
            found = AutoTokenizer.from_pretrained(source.location, **arguments)
        if len(found) > len(found.all_special_ids):
            found.model_max_length = sys.maxsize  # it would warn of long texts, which are truncated later
            return found
        # If the files are missing, transformers makes some tokenizers without a vocabulary.
        missing = PreflightError(f"{what}: it has no vocabulary; are its files (tokenizer.json, …) missing?")
    except PreflightError as error:
        missing = error
    if config.has_texts:
        raise missing
    return None
