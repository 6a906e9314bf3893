"""With a tokenizer of Qwen2.5-VL the chat format gives the ids that the published chat template gives."""

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mmcore_jax.config import UserError
from mmcore_jax.data import example, layout, text
from tests import rows

FIRST_SPECIAL = 151643
NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
SPECIAL = [f"<|{name}|>" for name in f"{NAMES} vision_start vision_end vision_pad image_pad video_pad".split()]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The published template for text and images.
TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def save_tokenizer(directory, template, special=SPECIAL):
    """A byte-level BPE as Qwen's, few merges, with the special tokens at their published ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("u", "s"), ("us", "er"), ("e", "r"), ("Ġ", "t"), ("Ġt", "he")]
    words = [*alphabet, *(a + b for a, b in merges)]
    words += [f"unused {number}" for number in range(FIRST_SPECIAL - len(words))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    made.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("qwen"), TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return text.load_tokenizer(directory)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return layout.ChatFormat(tokenizer)


def published(tokenizer, chat, messages, image_tokens, **options):
    """Ids of the rendered template, each image mark repeated as often as its image has merged patches."""
    counts = iter(image_tokens)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return [token for one in ids for token in ([one] * next(counts) if one == chat.image_pad else [one])]


def image_part():
    return {"type": "image"}


def text_part(content):
    return {"type": "text", "text": content}


def test_special_ids(chat):
    assert (chat.vision_start, chat.vision_end, chat.image_pad) == (151652, 151653, 151655)
    assert chat.ends == (151645, 151643)


def test_question_is_the_published_template(tokenizer, chat):
    picture = example.image(rows.png(1))
    segments = [picture, example.text("what is the\nuser doing?"), example.text("A hat.", "assistant")]
    segments += [example.text("and here?"), picture, picture]
    messages = [
        {"role": "user", "content": [image_part(), text_part("what is the\nuser doing?")]},
        {"role": "assistant", "content": "A hat."},
        {"role": "user", "content": [text_part("and here?"), image_part(), image_part()]},
    ]
    counts = [6, 4, 1]
    expected = published(tokenizer, chat, messages, counts, add_generation_prompt=True)
    assert chat.question(segments, counts) == expected
    shown = tokenizer.decode(expected)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert shown.startswith(f"{system}<|im_start|>user\n<|vision_start|><|image_pad|>")
    assert shown.endswith("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")


def test_training_rows_are_the_published_template(tokenizer, chat):
    """A captioning example, up to the end of the answer; positions count the system prompt."""
    one = rows.document("caption", 1, "what is the user?", ("assistant", "a hat"))
    item = layout.make_item(one, chat, rows.SIZES)
    messages = [
        {"role": "user", "content": [image_part(), text_part("what is the user?")]},
        {"role": "assistant", "content": "a hat"},
    ]
    expected = published(tokenizer, chat, messages, [4])
    assert item.ids.tolist() == expected[:-1]  # the template adds a line break behind the last turn
    assert tokenizer.decode(item.ids[item.learned].tolist()) == "a hat<|im_end|>"
    np.testing.assert_array_equal(item.positions[: len(chat.preamble), 0], np.arange(len(chat.preamble)))


def test_another_template_is_refused(tmp_path):
    save_tokenizer(tmp_path, "{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="not Qwen's turns"):
        layout.ChatFormat(text.load_tokenizer(tmp_path))


def test_a_missing_special_token_is_named(tmp_path):
    save_tokenizer(tmp_path, TEMPLATE, special=SPECIAL[:-2])
    with pytest.raises(UserError, match=r"no special token <.image_pad.>"):
        layout.ChatFormat(text.load_tokenizer(tmp_path))


def test_only_the_tokenizer_of_a_published_model_is_kept(directory, tmp_path):
    weights = directory / "model.safetensors"
    weights.write_bytes(b"large")
    text.keep_tokenizer(directory, tmp_path / "kept")
    assert not (tmp_path / "kept" / weights.name).exists()
    kept, ours = text.load_tokenizer(tmp_path / "kept"), text.load_tokenizer(directory)
    assert kept.encode("the user<|im_end|>") == ours.encode("the user<|im_end|>")
    assert kept.chat_template == ours.chat_template == TEMPLATE
