"""The trained tokenizer: lossless on any text, one token per special token, one per known word wherever it stands."""

import subprocess
import sys

import pytest

from mmcore_jax.config import UserError
from mmcore_jax.data import text

CORPUS = ["a red apple", "an emoji of a red apple", "draw a green apple", "apple on a white background"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    text.train_tokenizer(CORPUS, 512, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return text.load_tokenizer(directory)


@pytest.mark.parametrize(
    "content",
    ["a red apple", "x", " x", "two  spaces\n\ttab ", "日本語 🎉👩🏽‍🔬", "é\x00\x7f", "UPPER, (lower)!", "don't 've"],
)
def test_any_text_round_trips(tokenizer, content):
    ids = tokenizer(content)["input_ids"]
    assert tokenizer.decode(ids) == content
    assert max(ids) < len(tokenizer)


@pytest.mark.parametrize("token", text.SPECIAL_TOKENS)
def test_special_tokens_stay_single(tokenizer, token):
    ids = tokenizer(f"apple{token}apple")["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert len(ids) == 3
    assert token not in tokenizer.decode(ids, skip_special_tokens=True)


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == text.END_OF_TEXT


def test_a_word_is_one_token_wherever_it_stands(tokenizer):
    (apple,) = tokenizer("apple")["input_ids"]
    assert tokenizer("a red apple")["input_ids"][-1] == apple
    assert len(tokenizer("an emoji of a green apple")["input_ids"]) == 6


def test_vocabulary_is_limited(tmp_path):
    text.train_tokenizer(CORPUS, 280, tmp_path)
    assert len(text.load_tokenizer(tmp_path)) == 280


def test_a_missing_directory(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        text.load_tokenizer(tmp_path / "nowhere")


def test_nothing_is_printed(directory):
    load = f"from mmcore_jax.data import text; text.load_tokenizer({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ids_and_files_go_with_an_exported_model(directory, tokenizer, tmp_path):
    found = text.token_ids(directory)
    assert tokenizer.convert_ids_to_tokens(found["image_token_id"]) == "<|image_pad|>"
    assert found["eos_token_id"] == tokenizer.eos_token_id
    (directory / "model.safetensors").write_text("weights")
    text.copy_tokenizer(directory, tmp_path / "copy")
    assert text.token_ids(tmp_path / "copy") == found
    assert not (tmp_path / "copy/model.safetensors").exists()
