"""Tokenizers: one trained here on the texts of a dataset, or any published one from a local directory.

The trained one is a byte-level BPE with Qwen's special tokens. Every text encodes, without an unknown token, and the
first word of a text is the same token as that word further on, because a space is put in front of the text.
"""

import os
import pathlib
import shutil
import types
import typing
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmcore_jax.config import UserError

if typing.TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
# What a directory may hold of a tokenizer; that of a published model also holds its weights.
# What is published beside the weights of a VLM, the settings of its image processor among it.
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_*")
_TOKENIZER_FILES += ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# By what config.json of a published model calls their ids.
_CONFIG_NAMES = {
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
}
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | pathlib.Path) -> None:
    """Trains a byte-level BPE on `texts` and saves it as a `transformers` tokenizer directory.

    Args:
      texts: the training corpus, consumed once.
      vocab_size: upper limit; it includes the 256 bytes and the special tokens.
      path: directory to write, created if needed.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=END_OF_TEXT,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (END_OF_TEXT, "<|im_end|>")],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(path)


def load_tokenizer(directory: str | pathlib.Path) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer saved in a local directory; no hub is asked.

    Raises:
      UserError: if the directory holds no tokenizer.
    """
    directory = pathlib.Path(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise UserError(
                f"no tokenizer in {directory}: {name} is missing, which `prepare` writes, or which you fetch with a "
                "published model and put there."
            )
    tokenizer = _transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.backend_tokenizer.no_truncation()  # what tokenizer.json has of these, transformers ignores, too
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class Encoder:
    """Texts to token ids, with nothing added: all that preparing data needs of a tokenizer.

    Any number of threads may call it. It goes to other processes, which then need `tokenizers` alone.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer.backend_tokenizer

    def __call__(self, content: str) -> list[int]:
        return self._tokenizer.encode(content, add_special_tokens=False).ids


def token_ids(directory: str | pathlib.Path) -> dict[str, int]:
    """Ids of the special tokens of a tokenizer, by their names in config.json of a published Qwen2.5-VL."""
    tokenizer = load_tokenizer(directory)
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in _CONFIG_NAMES.items()}


def copy_tokenizer(source: str | pathlib.Path, directory: pathlib.Path) -> None:
    """Copies the files of a tokenizer, and no weights that lie beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in _TOKENIZER_FILES:
        for file in pathlib.Path(source).glob(pattern):
            shutil.copy(file, directory)


def keep_tokenizer(source: str | pathlib.Path, directory: pathlib.Path) -> None:
    """Copies the tokenizer that a run uses into its workdir, so that both stay together.

    Raises:
      UserError: if another one is there already.
    """
    if not directory.exists():
        temporary = directory.with_name(f"{directory.name}.tmp")
        copy_tokenizer(source, temporary)
        temporary.replace(directory)
    check_same_tokenizer(source, directory)


def check_same_tokenizer(ours: str | pathlib.Path, theirs: pathlib.Path) -> None:
    """Raises `UserError` if two tokenizers differ: token ids of one mean nothing to a model trained with the other."""
    name = "tokenizer.json"
    if (pathlib.Path(ours) / name).read_bytes() != (theirs / name).read_bytes():
        raise UserError(
            f"the tokenizer in {ours} is not the one in {theirs}: the data was prepared again since. "
            "Train the earlier stage anew, or point config.data at the data that it was trained with."
        )


def _transformers() -> types.ModuleType:
    """Imports `transformers` late and quietly: it takes seconds, and warns wherever there is no torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
