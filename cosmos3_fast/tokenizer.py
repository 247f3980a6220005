"""Prompt text to token ids: chat template, one user turn, then eos and `<|vision_start|>`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

VISION_START = "<|vision_start|>"
_MARK = "\ue000"  # stands for the user's text while the chat template is taken apart
_FILES = ("tokenizer.json", "vocab.json")  # either is enough for transformers
_CONFIG = "tokenizer_config.json"  # names the class and the closing token
_PROBE = "Pick up the cup, then 1 + 1 = 2."


def check_unicode(text: str, name: str) -> None:
    """ValueError for a text that UTF-8 cannot hold: bytes of another encoding on a command line
    become lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode text (UTF-8 on a command line), got "
            f"{text[error.start]!r} at character {error.start}"
        ) from error


class PromptTokenizer:
    """Tokenizer of a checkpoint (its `text_tokenizer` folder) for prompts.

    The chat template is rendered once around a mark. Its control tokens become ids; the text
    between two of them, the user's included, is encoded as one piece by a tokenizer that knows no
    added token, so a control token typed by a user stays plain text. For ordinary text the ids
    are those of `apply_chat_template(add_generation_prompt=True)` and the two closing tokens,
    which is checked once here. Folders only; no code of a checkpoint is ever run.

    `vocab_size` (default: the tokenizer's own) bounds the ids. ValueError for a folder without a
    usable tokenizer, a template without the user's text, and ids that are not below `vocab_size`.
    """

    def __init__(self, path: str | os.PathLike[str], *, vocab_size: int | None = None) -> None:
        self.path = os.fspath(path)
        tokenizer = self._load()
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self._text = _without_added_tokens(tokenizer)
        self._added: dict[str, int] = tokenizer.get_added_vocab()
        self._closing = [self._control(tokenizer.eos_token), self._control(VISION_START)]
        self._head, self._tail = self._split_template(self._render(tokenizer, _MARK))
        expected = tokenizer(self._render(tokenizer, _PROBE), add_special_tokens=False).input_ids
        if self.encode(_PROBE) != [*expected, *self._closing]:
            raise ValueError(
                f"{self.path}: taking its chat template apart gives other token ids than the "
                "template itself"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of one user turn, its generation prompt, eos and `<|vision_start|>`; ValueError for
        what is no Unicode text.
        """
        check_unicode(text, "a prompt")
        head, before = self._head
        after, tail = self._tail
        ids = [*head, *self._plain(before + text + after), *tail, *self._closing]
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"{self.path}: token id {max(ids)} is outside the vocabulary of {self.vocab_size}"
            )
        return ids

    def _load(self) -> Any:
        from transformers import AutoTokenizer  # 2 s of imports that only this needs

        if not Path(self.path).is_dir():
            raise ValueError(f"no tokenizer folder at {self.path!r}")
        try:
            if not any(Path(self.path, name).is_file() for name in _FILES):
                raise ValueError(f"it holds neither {' nor '.join(_FILES)}")
            if not Path(self.path, _CONFIG).is_file():
                raise ValueError(f"it holds no {_CONFIG}")
            tokenizer = AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # `tokenizers` raises nothing narrower for a file it cannot use
            said = _first_line(error)
            raise ValueError(f"cannot load a tokenizer from {self.path!r}: {said}") from error
        if not tokenizer.is_fast:
            raise ValueError(f"{self.path!r} holds no tokenizer.json that `tokenizers` can run")
        return tokenizer

    def _render(self, tokenizer: Any, text: str) -> str:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {self.path!r} has no chat template")
        turn = [{"role": "user", "content": text}]
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        try:
            return str(tokenizer.apply_chat_template(turn, **settings))
        except Exception as error:  # a template is a program: it may raise anything
            said = _first_line(error)
            raise ValueError(f"cannot run the chat template in {self.path!r}: {said}") from error

    def _control(self, token: str | None) -> int:
        if token not in self._added:
            raise ValueError(f"the tokenizer in {self.path!r} has no control token {token!r}")
        return self._added[token]

    def _plain(self, text: str) -> list[int]:
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def _split_template(self, rendered: str) -> tuple[tuple[list[int], str], tuple[str, list[int]]]:
        """(ids, plain text) before the mark and (plain text, ids) after it."""
        if rendered.count(_MARK) != 1:
            raise ValueError(f"the chat template in {self.path!r} does not give the text once")
        before, after = rendered.split(_MARK)
        first, last = self._pieces(before), self._pieces(after)
        return (self._ids(first[:-1]), first[-1]), (last[0], self._ids(last[1:]))

    def _pieces(self, text: str) -> list[str]:
        """Plain text and control tokens in turn, beginning and ending with plain text."""
        names = sorted(self._added, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, names))})", text)

    def _ids(self, pieces: list[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += [self._added[piece]] if piece in self._added else self._plain(piece)
        return ids


def _first_line(error: Exception) -> str:
    """An error's first line, behind its kind unless that is ValueError; transformers' have many."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line if type(error) is ValueError else f"{type(error).__name__}: {line}"


def _without_added_tokens(tokenizer: Any) -> Any:
    """The tokenizer's normaliser, pre-tokeniser and model alone, as a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(document))
