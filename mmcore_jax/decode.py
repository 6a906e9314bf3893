"""Text and images in, text out: cached decoding with Qwen2.5-VL, for captions and visual question answering.

Prompts are padded to a bucket, so that one program serves many lengths. It fills the cache from the prompts, then takes
one token a step until every row has ended.

B rows, L prompt tokens, S vision patches, T new tokens, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.config import UserError
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.layout import ChatFormat
from mmcore_jax.models import qwen_vl
from mmcore_jax.models.qwen_vl import Cache, Prompts, QwenVLModel
from mmcore_jax.nn.masks import PAD

# The shortest buckets; longer ones double.
SHORTEST_PROMPT = 64
FEWEST_MERGED_PATCHES = 64


@dataclasses.dataclass(frozen=True)
class TextSampling:
    """How tokens are chosen: greedily at `temperature` 0; `top_k` 0 and `top_p` 1 keep the whole vocabulary.

    `top_p` keeps the likeliest tokens that together reach this probability, after `top_k`.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"{self} cannot be sampled with: it needs max_new_tokens >= 1, temperature >= 0, top_k >= 0 and "
                "0 < top_p <= 1."
            )


class TextGenerator:
    """Answers requests: examples of the user's text and images, and of earlier turns."""

    def __init__(self, model: QwenVLModel, tokenizer: Any, processor: image_lib.Processor) -> None:
        self._model, self._tokenizer, self._processor = model, tokenizer, processor
        self._format = ChatFormat(tokenizer)

    def __call__(
        self,
        params: Any,
        requests: Sequence[Example],
        settings: TextSampling,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[str]:
        """Returns the answers.

        Args:
          params: of the VLM.
          requests: in any order; the random numbers of each follow from `seed` and its position.
          settings: of the sampler.
          batch_size: how many are answered at once.

        Raises:
          UserError: if an image of a request cannot be used.
        """
        batch_size, answers = min(batch_size, len(requests)), []
        for first in range(0, len(requests), batch_size):
            chosen = [requests[min(first + offset, len(requests) - 1)] for offset in range(batch_size)]
            keys = row_keys(jax.random.key(seed), first, batch_size)
            answers += generate(self._model, params, self._prompts(chosen), keys, settings, self._format.ends)
        return [self._tokenizer.decode(answer) for answer in answers[: len(requests)]]

    def _prompts(self, requests: Sequence[Example]) -> Prompts:
        rows, pixels, grids = [], [], []
        for request in requests:
            images = [self._pixels(request, segment) for segment in request["segments"] if segment["type"] == "image"]
            merged = [len(values) // self._processor.merge_size**2 for values, _ in images]
            rows.append(self._format.question(request["segments"], merged))
            pixels += [values for values, _ in images]
            grids += [grid for _, grid in images]
        length = max(map(len, rows))
        ids = np.array([row + [0] * (length - len(row)) for row in rows])
        mask = np.arange(length) < np.array([len(row) for row in rows])[:, None]
        images = (np.concatenate(pixels), np.array(grids)) if pixels else (None, None)
        return qwen_vl.prepare(self._model.config, ids, mask, *images, self._format.image_pad)

    def _pixels(self, request: Example, segment: dict) -> tuple[np.ndarray, tuple[int, int, int]]:
        try:
            return image_lib.pixel_values(image_lib.open_rgb(segment["image"]), self._processor)
        except BadExample as bad:
            raise UserError(f"an image of {request['id']!r} cannot be used: {bad}.") from bad


def row_keys(key: jax.Array, first: int, count: int) -> jax.Array:
    """One key `[count]` for each row of a batch, from its position among all rows."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(count))


def generate(
    model: QwenVLModel, params: Any, prompts: Prompts, keys: jax.Array, settings: TextSampling, ends: tuple[int, ...]
) -> list[list[int]]:
    """Returns what follows each prompt, up to one of the tokens `ends`, which is left out.

    Args:
      params: of the VLM.
      prompts: from `qwen_vl.prepare`, of any lengths.
      keys: typed keys `[B]`, one a row.
      settings: of the sampler.
      ends: ids of the tokens that end an answer.
    """
    prompts = pad_to_bucket(prompts, model.config.vision.merge_size)
    tokens = np.asarray(_generate(model, params, prompts, keys, settings, ends)).tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in tokens]


def pad_to_bucket(prompts: Prompts, merge: int) -> Prompts:
    """Pads prompts to the next bucket of tokens and of patches, on the right."""
    length = _bucket(prompts.tokens.shape[1], SHORTEST_PROMPT)
    merged = prompts.patches.shape[1] // merge**2
    patches = _bucket(merged, FEWEST_MERGED_PATCHES) * merge**2 if merged else 0

    def pad(x: np.ndarray, size: int) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    sizes = Prompts(length, length, length, length, patches, patches)
    return Prompts(*(jax.tree.map(lambda x, size=size: pad(x, size), field) for field, size in zip(prompts, sizes)))


def _bucket(count: int, smallest: int) -> int:
    return max(smallest, 1 << (count - 1).bit_length())


class _Loop(NamedTuple):
    """`step` tokens `[B, T]` are chosen; `last` `[B]` is the latest, `ended` `[B]` the rows that need no more."""

    step: jax.Array
    last: jax.Array
    ended: jax.Array
    tokens: jax.Array
    cache: Cache


@functools.partial(jax.jit, static_argnames=("model", "settings", "ends"))
def _generate(
    model: QwenVLModel, params: Any, prompts: Prompts, keys: jax.Array, settings: TextSampling, ends: tuple[int, ...]
) -> jax.Array:
    """Token ids `[B, T]`; once a row has ended it repeats `ends[0]`."""
    variables, used = {"params": params}, prompts.meta.kind != PAD
    behind = 1 + jnp.max(jnp.where(used[..., None], prompts.positions, -1), axis=(1, 2))

    def choose(logits: jax.Array, step: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        token = jnp.where(ended, ends[0], sample(logits, step_keys, settings))
        return token, ended | jnp.isin(token, jnp.array(ends))

    def advance(loop: _Loop) -> _Loop:
        positions = behind + loop.step - 1
        logits, cache = model.apply(variables, loop.last, positions, loop.cache, method=next_logits)
        token, ended = choose(logits, loop.step, loop.ended)
        return _Loop(loop.step + 1, token, ended, loop.tokens.at[:, loop.step].set(token), cache)

    cache = qwen_vl.empty_cache(model.config, model.execution, prompts.meta, settings.max_new_tokens)
    logits, cache = model.apply(variables, prompts, cache, method=first_logits)
    token, ended = choose(logits, jnp.zeros((), jnp.int32), jnp.zeros(len(logits), bool))
    tokens = jnp.full((len(logits), settings.max_new_tokens), ends[0], token.dtype).at[:, 0].set(token)
    loop = _Loop(jnp.ones((), jnp.int32), token, ended, tokens, cache)
    return jax.lax.while_loop(
        lambda loop: (loop.step < settings.max_new_tokens) & ~jnp.all(loop.ended), advance, loop
    ).tokens


def first_logits(model: QwenVLModel, prompts: Prompts, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads the prompts into an empty cache; returns float32 logits `[B, V]` of the token behind each."""
    hidden, cache = model.extend(model.embed_prompts(prompts), prompts.positions, cache)
    used = prompts.meta.kind != PAD
    last = jnp.max(jnp.where(used, jnp.arange(used.shape[1]), 0), axis=1)
    return model.logits(hidden[jnp.arange(len(last)), last]), cache


def next_logits(model: QwenVLModel, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Adds text tokens `[B]` at positions `[B]` to the cache; returns float32 logits `[B, V]` of the next."""
    positions = jnp.broadcast_to(positions[:, None, None], (len(tokens), 1, 3))
    hidden, cache = model.extend(model.embed_text(tokens[:, None]), positions, cache)
    return model.logits(hidden[:, 0]), cache


def sample(logits: jax.Array, keys: jax.Array, settings: TextSampling) -> jax.Array:
    """Chooses a token `[B]` from logits `[B, V]` with keys `[B]`."""
    if settings.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / settings.temperature
    if settings.top_k or settings.top_p < 1:
        logits = jnp.where(logits >= _least_kept(logits, settings), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits)


def _least_kept(logits: jax.Array, settings: TextSampling) -> jax.Array:
    """The smallest logit `[B, 1]` among those that top-k, then top-p keep."""
    ranked = jnp.sort(logits, axis=-1, descending=True)[:, : settings.top_k or None]
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.min(jnp.where(before < settings.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
