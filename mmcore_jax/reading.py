"""Requests that begin like the one before, as in a conversation: the VLM reads what is new.

It is causal, so that the keys and values of what two requests begin with are the same. They stay from request to
request, and neither these tokens nor the images among them run again. What the last image to come needs of the VLM, the
hidden states of its text and queries, stands at the end and is always read.

L tokens of a request, S slots of the cache.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmcore_jax.data.layout import Features, Interleaved, Item
from mmcore_jax.mmcore import MMCORE, Params
from mmcore_jax.models import qwen_vl
from mmcore_jax.models.qwen_vl import Cache
from mmcore_jax.nn.masks import IMAGE

# The rest of a request is read from a multiple of this, so that few shapes are compiled.
ROUNDING = 16
FEWEST_SLOTS = 256


class Reader:
    """Reads one request after another with the VLM of `model`."""

    def __init__(self, model: MMCORE) -> None:
        self._model = model
        self._read = jax.jit(functools.partial(read, model))
        self._params: Params = {}
        self._item = self._cache = None  # of the last request

    def __call__(self, params: Params, item: Item, batch: Interleaved) -> Interleaved:
        """Returns `batch`, whose one row holds `item`, with what the VLM makes of it as features."""
        slots = max(FEWEST_SLOTS, 1 << (batch.tokens.ids.shape[1] - 1).bit_length())
        known = 0
        if params is self._params and slots <= self._cache.keys.shape[2]:
            known = common(self._item, item) // ROUNDING * ROUNDING
            slots = self._cache.keys.shape[2]
        meta = jax.tree.map(lambda field: np.pad(field, [(0, 0), (0, slots - field.shape[1])]), batch.tokens.meta)
        cache = self._cache
        if not known:
            cache = qwen_vl.empty_cache(self._model.config.vlm, self._model.execution, meta, 0)
        cache = cache._replace(meta=meta, filled=np.int32(known))
        features, cache = self._read(params, batch, rest(batch, known, self._model.config.vlm.vision.merge_size), cache)
        self._params, self._item, self._cache = params, item, cache
        return batch._replace(features=features)


def common(first: Item, second: Item) -> int:
    """How many tokens two requests begin with, up to where the text or the queries of the last image stand."""
    pairs = zip(_tokens(first), _tokens(second))
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    last = second.frames[-1]
    return min([same, *last.text, *last.queries])


def _tokens(item: Item) -> Iterator[tuple]:
    """What each token is; those of an image are all of it."""
    for token, kind, number in zip(item.ids, item.kinds, item.frame_of):
        frame = item.frames[number] if kind == IMAGE else None
        yield token, kind, frame and (frame.encoded, frame.size, frame.shape)


def rest(batch: Interleaved, known: int, merge: int) -> Interleaved:
    """A batch of one row from the token `known` on, with the patches of the images that it still needs."""
    tokens, patches = jax.tree.map(lambda x: x[:, known:], batch.tokens), batch.patches
    is_image = tokens.meta.kind == IMAGE
    if is_image.any():
        first = int(np.argmax(patches.meta.frame == tokens.meta.frame[is_image][0]))
    else:
        first = patches.values.shape[1]
    tokens = tokens._replace(source=tokens.source - is_image * (first // merge**2))
    return batch._replace(tokens=tokens, patches=jax.tree.map(lambda x: x[:, first:], patches))


def read(model: MMCORE, params: Params, batch: Interleaved, rest: Interleaved, cache: Cache) -> tuple[Features, Cache]:
    """What the VLM makes of `batch`, of which all before `rest` is in the cache, and the cache with that."""
    bound = model.bind({"params": params})
    start = cache.filled
    hidden, cache = bound.vlm.extend(bound.embed(rest), rest.tokens.positions, cache)
    whole = jnp.zeros((1, cache.keys.shape[2], hidden.shape[-1]), hidden.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(whole, hidden, start, axis=1)
    return Features(text=bound.text_embeddings(whole, batch), visual=bound.visual_embeddings(whole, batch)), cache
