"""Token ids against transformers and diffusers; typed control tokens stay text."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2TokenizerFast

from cosmos3_fast.testing.tokenizer import (
    CONTROL_TOKENS,
    PLAIN_CONTROL_TOKENS,
    VOCAB_SIZE,
    make_tokenizer,
)
from cosmos3_fast.tokenizer import VISION_START, PromptTokenizer

ORDINARY = {
    "empty": "",
    "sentence": "Pick up the cup.",
    "spaces": "  leading, trailing  \n\n",
    "digits": "1234567890 3.14",
    "german": "Größe: fünf Äpfel",
    "combining": "Cafe\u0301 au lait",
    "chinese": "把红色积木放进碗里。",
    "emoji": "🤖👍🏽 it's done",
    "role": "assistant\nuser\n",
    "json": json.dumps({"fps": 24.0, "actions": [{"time": "0:00-0:01"}]}),
    "angle": "< | im_start | > <b>not a token</b>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text_tokenizer")
    assert make_tokenizer(path) == VOCAB_SIZE
    return path


@pytest.fixture(scope="module")
def oracle(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PromptTokenizer(folder)


def template_ids(oracle, text):
    turn = [{"role": "user", "content": text}]
    ids = oracle.apply_chat_template(turn, add_generation_prompt=True, return_dict=True).input_ids
    return [*ids, oracle.eos_token_id, oracle.convert_tokens_to_ids(VISION_START)]


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_text_gives_the_chat_templates_ids(tokenizer, oracle, text):
    assert tokenizer.encode(text) == template_ids(oracle, text)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), max_size=40))
def test_any_text_without_brackets_gives_the_chat_templates_ids(tokenizer, oracle, text):
    assert tokenizer.encode(text) == template_ids(oracle, text)


@pytest.mark.parametrize("text", ["Pick up the cup.", "", "把红色积木放进碗里。"])
def test_ids_equal_diffusers_tokenize_prompt(tokenizer, oracle, text):
    from diffusers import Cosmos3OmniPipeline

    pipeline = SimpleNamespace(
        text_tokenizer=oracle,
        llm_special_tokens={
            "eos_token_id": oracle.eos_token_id,
            "start_of_generation": oracle.convert_tokens_to_ids(VISION_START),
        },
        image_resolution_template="",
        inverse_image_resolution_template="",
        video_resolution_template="",
        inverse_video_resolution_template="",
        _build_action_json_prompt=lambda prompt, **kwargs: prompt,
    )
    ids, negative = Cosmos3OmniPipeline.tokenize_prompt(
        pipeline, text, use_system_prompt=False, action_mode="policy"
    )
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode("") == negative


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *PLAIN_CONTROL_TOKENS])
def test_a_typed_control_token_stays_text(tokenizer, oracle, token):
    text = f"stop{token} and {token}system\n"
    ids, frame = tokenizer.encode(text), tokenizer.encode("")
    control = set(oracle.get_added_vocab().values())
    assert sum(i in control for i in ids) == sum(i in control for i in frame) == 5
    assert template_ids(oracle, text) != ids
    assert oracle.decode(ids) == oracle.decode(frame).replace("user\n", "user\n" + text)


def test_the_frame_is_one_user_turn_and_two_closing_tokens(tokenizer, oracle):
    assert oracle.decode(tokenizer.encode("Go.")) == (
        "<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n<|im_end|><|vision_start|>"
    )


def test_the_test_tokenizer_is_the_same_on_every_call(folder, tmp_path):
    make_tokenizer(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    digests = [
        [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names]
        for root in (folder, tmp_path)
    ]
    assert digests[0] == digests[1]


def test_diffusers_tokenizer_class_loads_the_same_vocabulary(folder, oracle):
    other = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
    assert len(other) == len(oracle) == VOCAB_SIZE
    assert other.get_vocab() == oracle.get_vocab()
    assert sorted(oracle.get_vocab().values()) == list(range(VOCAB_SIZE))
    assert (other.eos_token, other.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_template_with_a_system_prompt_keeps_it(folder, tmp_path):
    make_tokenizer(tmp_path)
    template = "<|im_start|>system\nBe kind.<|im_end|>\n" + (
        tmp_path / "chat_template.jinja"
    ).read_text(encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    oracle = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ids = PromptTokenizer(tmp_path).encode("Go.")
    assert ids == template_ids(oracle, "Go.")
    assert oracle.decode(ids).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")


def _edit(folder, **changes):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    path.write_text(json.dumps(config), encoding="utf-8")


def _template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def _no_template(folder):
    (folder / "chat_template.jinja").unlink()
    _edit(folder, chat_template=None)


def _rename_vision_start(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|vision_start|>", "<|view|>"), encoding="utf-8")


def _python_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    config = json.dumps({"tokenizer_class": "ByT5Tokenizer"})
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


def _no_files(folder):
    for path in folder.iterdir():
        path.unlink()


def _other_files(folder):
    """What transformers answers in five lines."""
    _no_files(folder)
    (folder / "vocab.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


BAD = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "no tokenizer folder"),
    "empty folder": (_no_files, r"load a tokenizer .*: it holds neither tokenizer\.json nor vocab"),
    "no settings": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        r"cannot load a tokenizer from .*: it holds no tokenizer_config\.json",
    ),
    "folder of another kind": (_other_files, "cannot load a tokenizer"),
    "model missing": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "cannot load a tokenizer from .*Model missing",
    ),
    "broken template": (_template("{{ oops"), "cannot run the chat template in .*TemplateSyntax"),
    "template that refuses": (
        _template("{{ raise_exception('no user') }}"),
        "cannot run the chat template in .*no user",
    ),
    "broken json": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{"),
        "cannot load a tokenizer",
    ),
    "broken added tokens": (
        lambda folder: _edit(folder, added_tokens_decoder={"1": 3}),
        "cannot load a tokenizer",
    ),
    "python tokenizer": (_python_tokenizer, "no tokenizer.json that `tokenizers` can run"),
    "no template": (_no_template, "no chat template"),
    "template without text": (_template("<|im_start|>user\n"), "does not give the text once"),
    "template says it twice": (
        _template("{{ messages[0]['content'] * 2 }}"),
        "does not give the text once",
    ),
    "no vision token": (_rename_vision_start, r"no control token '<\|vision_start\|>'"),
    "text cut": (
        _template("<|im_start|>user\n{{ messages[0]['content'][:9] }}<|im_end|>\n"),
        "other token ids",
    ),
}


@pytest.mark.parametrize(("breakage", "message"), BAD.values(), ids=BAD)
def test_bad_tokenizer_folders_are_refused(tmp_path, breakage, message):
    folder = tmp_path / "text_tokenizer"
    make_tokenizer(folder)
    breakage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        PromptTokenizer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_ids_outside_the_models_vocabulary_are_refused(folder):
    with pytest.raises(ValueError, match="outside the vocabulary of 590"):
        PromptTokenizer(folder, vocab_size=590).encode("Go.")
    largest = max(PromptTokenizer(folder).encode("Go."))
    assert max(PromptTokenizer(folder, vocab_size=largest + 1).encode("Go.")) == largest
    with pytest.raises(ValueError, match=f"token id {largest} is outside"):
        PromptTokenizer(folder, vocab_size=largest)


@pytest.mark.parametrize("text", ["\ud83d", "Go. \udcff"])
def test_text_that_is_no_unicode_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match=rf"must be Unicode .* at character {len(text) - 1}"):
        tokenizer.encode(text)


def test_the_longest_control_token_wins(tmp_path, folder):
    longer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    longer.add_tokens(["<|im_start|>user"], special_tokens=True)  # begins with another one
    longer.save_pretrained(tmp_path)
    assert PromptTokenizer(tmp_path).encode("Go.") == template_ids(longer, "Go.")


def test_a_stored_truncation_or_padding_does_not_matter(tmp_path, folder, tokenizer):
    copy = shutil.copytree(folder, tmp_path / "text_tokenizer")
    document = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    side = {"direction": "Right", "strategy": "LongestFirst"}
    pad = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    document["truncation"] = side | {"max_length": 5, "stride": 0}
    document["padding"] = side | pad | {"strategy": {"Fixed": 400}}
    (copy / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert PromptTokenizer(copy).encode("Go. " * 99) == tokenizer.encode("Go. " * 99)


def test_code_of_a_checkpoint_is_never_run(tmp_path, folder):
    copy, mark = shutil.copytree(folder, tmp_path / "text_tokenizer"), tmp_path / "mark"
    (copy / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    _edit(copy, auto_map={"AutoTokenizer": [None, "theirs.Tokenizer"]})
    with suppress(ValueError):
        PromptTokenizer(copy)
    assert not mark.exists()
