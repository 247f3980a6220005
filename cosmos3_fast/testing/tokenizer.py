"""A small tokenizer of the right kind: byte-level BPE, Qwen control tokens, chat template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VOCAB_SIZE = 600
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen's added tokens that are not "special": a tokenizer with special tokens disabled still
# matches these in a text.
PLAIN_CONTROL_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = """user
assistant
system
You are a helpful assistant who will generate videos from a given prompt.
This video is captured from a first-person perspective looking at the scene.
This video is captured from a third-person perspective looking towards the agent from the front.
This video is captured from a wrist-mounted camera.
This video contains concatenated views from multiple camera perspectives.
The top row is from the wrist-mounted camera. The bottom row contains two horizontally concatenated
third-person perspective views of the scene from opposite sides, with the robot visible.
The video is 1.0 seconds long and is of 24 FPS. This video is of 480x832 resolution.
{"cinematography": {"framing": "", "actions": [{"time": "0:00-0:01", "description": "pick up"}],
"duration": "0s", "fps": 24.0, "resolution": {"H": 544, "W": 736}, "aspect_ratio": "4,3"}
The robot picks up the cup, opens the drawer, puts the red block into the left bowl, pushes the
object forward, closes its gripper and moves the arm to the right. The car turns left and stops.
Stack the blue plate on the green towel, wipe the table with a sponge, and fold the cloth twice.
Reach for the handle, pull the door open slowly, then place the bottle between the two boxes.
"""


def _bpe() -> tuple[dict[str, int], list[list[str]]]:
    """(vocabulary, merges) trained on the corpus above: 256 bytes and as many merges as fit."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(PLAIN_CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


def _added_tokens(first: int) -> list[dict[str, Any]]:
    names = (*CONTROL_TOKENS, *PLAIN_CONTROL_TOKENS)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": first + i, "content": name, **flags, "special": name in CONTROL_TOKENS}
        for i, name in enumerate(names)
    ]


def _byte_level(**options: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, **options}


def _document(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """tokenizer.json: Qwen2's normaliser, pre-tokeniser and decoder around the trained BPE."""
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(len(vocab)),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, _byte_level(use_regex=False)],
        },
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def make_tokenizer(folder: str | os.PathLike[str]) -> int:
    """Write a tokenizer folder that AutoTokenizer and diffusers' pipelines load; return its size.

    Byte-level BPE of VOCAB_SIZE (600) ids, the last 18 of them control tokens; the same bytes on
    every call. Class Qwen2Tokenizer, eos `<|im_end|>`, no system prompt.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    vocab, merges = _bpe()
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 262144,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in _added_tokens(len(vocab))
        },
        "chat_template": _TEMPLATE,
    }
    texts = {
        "tokenizer.json": json.dumps(_document(vocab, merges), ensure_ascii=False, indent=1),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(" ".join(merge) for merge in merges) + "\n",
        "chat_template.jinja": _TEMPLATE,
    }
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")
    return len(vocab) + len(CONTROL_TOKENS) + len(PLAIN_CONTROL_TOKENS)
