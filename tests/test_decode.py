"""Cached decoding: the tokens of transformers, the logits of the whole sequence, and one program a bucket."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmcore_jax import config, decode, sharding
from mmcore_jax.config import UserError
from mmcore_jax.data import example, image, text
from mmcore_jax.data.layout import ChatFormat
from mmcore_jax.decode import TextSampling
from mmcore_jax.models import qwen_vl
from mmcore_jax.nn.masks import PAD
from tests import rows as rows_lib
from tests import tiny
from tests.models import test_parity_qwen_vl as parity
from tests.models.test_parity_qwen_vl import FIRST, IMAGE_ID, SHORT, TIED

PROMPTS = [SHORT, FIRST, [parity.text(6, 20)]]
NEVER = (-1,)
GREEDY = TextSampling(max_new_tokens=12)


def prompts_of(rows, side="right"):
    return parity.prepare(TIED, parity.arrays(TIED, rows, side))


def keys_of(seed, count):
    return decode.row_keys(jax.random.key(seed), 0, count)


def load(**changes):
    model = parity.make_model(TIED, **changes)
    return model, jax.device_get(parity.load(model, parity.make_reference(TIED)[1]))  # to go to any mesh


def greedy(prompts, ends=NEVER, settings=GREEDY, **changes):
    return decode.generate(*load(**changes), prompts, keys_of(0, len(prompts.tokens)), settings, ends)


def test_greedy_tokens_are_those_of_the_published_code():
    """A ragged batch with images, padded on the left for them; then each token that ends an answer cuts it short."""
    theirs, _ = parity.make_reference(TIED)
    given = parity.tensors(parity.arrays(TIED, PROMPTS, "left"))
    theirs.generation_config.eos_token_id = None
    out = theirs.generate(**given, max_new_tokens=GREEDY.max_new_tokens, do_sample=False, pad_token_id=0)
    expected = out[:, given["input_ids"].shape[1] :].tolist()
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert min(len(set(row)) for row in expected) > 2
    for side in ("right", "left"):
        assert greedy(prompts_of(PROMPTS, side)) == expected
    end = expected[0][4]
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert len(cut[0]) < len(expected[0])
    assert greedy(prompts_of(PROMPTS), ends=(end, 299)) == [row[: row.index(299)] if 299 in row else row for row in cut]


@pytest.mark.parametrize(("scan", "side"), [(True, "right"), (False, "left")])
def test_cached_logits_are_those_of_the_whole_sequence(scan, side, record_property):
    model, params = load(scan_layers=scan)
    steps = 4
    more = np.array([parity.text(20 + number, steps) for number in range(len(PROMPTS))])
    whole = parity.arrays(TIED, [[*row, new.tolist()] for row, new in zip(PROMPTS, more)])
    expected = np.asarray(qwen_vl.forward(model, params, **whole, image_token=IMAGE_ID))
    lengths = whole["attention_mask"].sum(axis=1)

    prompts = prompts_of(PROMPTS, side)
    behind = prompts.positions.max(axis=(1, 2)) + 1
    cache = qwen_vl.empty_cache(TIED, model.execution, prompts.meta, steps)
    first, advance = (
        jax.jit(lambda params, *x, method=method: model.apply({"params": params}, *x, method=method))
        for method in (decode.first_logits, decode.next_logits)
    )
    logits, cache = first(params, prompts, cache)
    found = []
    for step in range(steps + 1):
        at = expected[np.arange(len(lengths)), lengths - steps - 1 + step]
        found.append(float(np.abs(np.asarray(logits) - at).max()))
        if step < steps:
            logits, cache = advance(params, more[:, step], behind + step, cache)
    record_property("max_difference", max(found))
    assert int(cache.filled) == cache.keys.shape[2]
    assert max(found) < 1e-5


def test_one_program_for_a_bucket():
    def grow(row, length):
        return [*row, parity.text(30, length)]

    model, params = load()
    settings = dataclasses.replace(GREEDY, max_new_tokens=3)
    before = decode._generate._cache_size()
    counts = []
    for length in (1, 7, 11, 60, 70):  # prompts of 54 to 64, then of 113 and 123 tokens
        prompts = prompts_of([grow(SHORT, length)])
        decode.generate(model, params, prompts, keys_of(0, 1), settings, NEVER)
        counts.append(decode._generate._cache_size() - before)
    assert counts == [1, 1, 1, 2, 2]


def test_buckets_hide_nothing():
    prompts = prompts_of(PROMPTS)
    padded = decode.pad_to_bucket(prompts, TIED.vision.merge_size)
    assert padded.tokens.shape[1] == padded.meta.kind.shape[1] == padded.positions.shape[1] == 64
    assert padded.patches.shape[1] == padded.patch_meta.row.shape[1] == 256
    assert (padded.meta.kind != PAD).sum() == (prompts.meta.kind != PAD).sum()
    assert decode.pad_to_bucket(prompts_of([[parity.text(1, 65)]]), 2).tokens.shape[1] == 128


# --- Sampling ---------------------------------------------------------------------------------------------------------

LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.3, 0.15]))


def frequencies(**settings):
    count = 4000
    drawn = decode.sample(jnp.tile(LOGITS, (count, 1)), keys_of(0, count), TextSampling(1, **settings))
    return np.bincount(drawn, minlength=5) / count


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(temperature=0.0), [0, 1, 0, 0, 0]),
        (dict(temperature=1.0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (dict(temperature=0.5), np.array([0.05, 0.4, 0.1, 0.3, 0.15]) ** 2 / 0.285),
        (dict(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (dict(temperature=1.0, top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (dict(temperature=1.0, top_k=3, top_p=0.8), [0, 4 / 7, 0, 3 / 7, 0]),
        (dict(temperature=1.0, top_p=0.01), [0, 1, 0, 0, 0]),
    ],
)
def test_frequencies(settings, expected):
    found = frequencies(**settings)
    np.testing.assert_allclose(found, expected, atol=0.03)
    np.testing.assert_array_equal(found > 0, np.array(expected) > 0)


def test_the_key_decides():
    model, params = load()
    settings = TextSampling(max_new_tokens=8, temperature=1.0, top_k=50)

    def run(rows, keys):
        return decode.generate(model, params, prompts_of(rows), keys, settings, NEVER)

    first = run(PROMPTS, keys_of(0, 3))
    assert run(PROMPTS, keys_of(0, 3)) == first
    assert all(a != b for a, b in zip(run(PROMPTS, keys_of(1, 3)), first))
    assert run(PROMPTS[2:], keys_of(0, 3)[2:]) == first[2:]


@pytest.mark.parametrize("wrong", [dict(max_new_tokens=0), dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0)])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match="cannot be sampled with"):
        TextSampling(**{"max_new_tokens": 1} | wrong)


# --- Text in, text out ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    text.train_tokenizer(["what is this? a red apple"], 300, directory)
    return text.load_tokenizer(directory)


def request(*segments):
    return {"id": "request", "task": "answer", "segments": list(segments)}


def alone(model, params, tokenizer, processor, one):
    """The answer to one request, step by step."""
    chat = ChatFormat(tokenizer)
    pictures = [image.open_rgb(part["image"]) for part in one["segments"] if part["type"] == "image"]
    values, grids = zip(*(image.pixel_values(picture, processor) for picture in pictures), strict=True)
    ids = np.array([chat.question(one["segments"], [rows * cols // 4 for _, rows, cols in grids])])
    given = (ids, np.ones_like(ids), np.concatenate(values), np.array(grids))
    prompts = qwen_vl.prepare(TIED, *given, chat.image_pad)
    (tokens,) = decode.generate(model, params, prompts, keys_of(0, 1), GREEDY, chat.ends)
    return tokenizer.decode(tokens)


def test_answers(tokenizer):
    """Pictures of any size, an earlier turn, and a batch that does not divide the requests."""
    model, params = load()
    processor = image.Processor(4, 2, 64, 1024, (0.5,) * 3, (0.5,) * 3)
    pictures = [example.image(rows_lib.png(seed, size)) for seed, size in ((1, 30), (2, 9))]
    ask = [
        request(pictures[0], example.text("what is this?")),
        request(example.text("a"), example.text("red", "assistant"), *pictures, example.text("and these?")),
        request(pictures[1], example.text("a")),
    ]
    answers = decode.TextGenerator(model, tokenizer, processor)(params, ask, GREEDY, batch_size=2)
    assert answers == [alone(model, params, tokenizer, processor, one) for one in ask]
    with pytest.raises(UserError, match="an image of 'request' cannot be used"):
        decode.TextGenerator(model, tokenizer, processor)(params, [request(example.image(b"none"))], GREEDY)


def test_meshes_give_the_same_tokens():
    """Four emulated devices, in a process of their own; the cache lies over rows and key heads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_decode"],
        cwd=tiny.REPOSITORY,
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == greedy(prompts_of([SHORT, FIRST]))


def _print_tokens_of_a_mesh():
    mesh = sharding.make_mesh(config.Mesh(2, 1, 1, 2))
    with jax.set_mesh(mesh):
        model, _ = load()
        prompts = prompts_of([SHORT, FIRST])
        cache = jax.jit(qwen_vl.empty_cache, static_argnums=(0, 1, 3))(TIED, model.execution, prompts.meta, 12)
        assert cache.keys.sharding.spec == jax.sharding.PartitionSpec(None, "data", None, "tensor")
        print(json.dumps(greedy(prompts)))


if __name__ == "__main__":
    _print_tokens_of_a_mesh()
