"""Examples of the sources, on their way into rows: read, checked, tokenised, decoded."""

import bisect
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mmcore_jax.config import Config, UserError
from mmcore_jax.data import features, geometry, layout, packing, workers
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample, Example
from mmcore_jax.data.geometry import Shape
from mmcore_jax.data.layout import Interleaved, Lengths, Pairs
from mmcore_jax.data.sources import check_found, open_sources
from mmcore_jax.data.text import Encoder, load_tokenizer
from mmcore_jax.progress import Progress


class Prepared(NamedTuple):
    """An example that is ready to be written into a row, once its images are decoded."""

    id: str
    content: Any  # a layout.Item, or the token ids of a pair
    shortened: str | None  # how it was made to fit
    decode: Callable[[], list]
    images: list | None = None  # a layout.Picture each, or the pixels of a pair

    def load(self) -> "Prepared":
        """Itself with its images; raises `BadExample` where one does not decode."""
        return self if self.images is not None else self._replace(images=self.decode())


def check_there(config: Config) -> None:
    """Raises `UserError` if the tokenizer, or a source of a run or of its gauges, is missing; reads no shard."""
    load_tokenizer(config.data.tokenizer)
    check_found(config.data.sources)
    if config.gauges and config.gauges.every:
        check_found(config.gauges.sources)


class Reader:
    """Random access over the examples of all sources of a config; in other processes it has no `tokenizer`."""

    def __init__(self, config: Config, weights: Mapping[str, str] | None = None) -> None:
        """Opens the sources.

        Args:
          config: of the run.
          weights: for each kind of features that prepared examples bring along, what stands for the weights behind it.

        Raises:
          UserError: for missing data or features, a tokenizer that does not fit, or sizes that do not.
        """
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        _check_vocabulary(config, len(self.tokenizer))
        chat = layout.ChatFormat(self.tokenizer) if config.data.layout == "interleaved" else None
        sources = open_sources(config.data.sources)
        self.__setstate__((config, weights or {}, sources, Encoder(self.tokenizer), chat, [], None))
        self._stores = [features.stores(config, self, number, self._weights) for number in range(len(sources))]
        for source, stores in zip(self.sources, self._stores):
            for store in stores:
                features.check(config, source.name, store)

    def __getstate__(self) -> tuple:
        return self._config, self._weights, self.sources, self.encode, self._chat, self._stores, self.identities

    def __setstate__(self, state: tuple) -> None:
        config, self._weights, self.sources, self.encode, self._chat, self._stores, identities = state
        if identities:  # which take a while to compute
            self.identities = identities
        self._config, self._data, self.sizes, self.shown = config, config.data, None, None
        if self._chat:
            self.sizes = geometry.derive(config.model, config.data)
            self._smaller_sizes = _smaller(self.sizes)
            self._user_text = bool(config.objectives.next_token and config.objectives.next_token.user_text)
            self.shown = geometry.without(self.sizes, self._weights)
        self._policies = [source.too_long for source in config.data.sources.values()]

    @functools.cached_property
    def identities(self) -> list[tuple[str, str]]:
        """Of each source, what stands for its records, and for the tokenizer that reads them."""
        tokenizer = (pathlib.Path(self._data.tokenizer) / "tokenizer.json").read_bytes()
        return [(source.fingerprint(), hashlib.sha256(tokenizer).hexdigest()) for source in self.sources]

    def read(self, source: int, index: int) -> Example:
        """Returns an example as it is; raises `BadExample`."""
        return self.sources[source][index]

    def measure(self, source: int, index: int) -> tuple[Lengths, int]:
        """What an example takes of each budget, and 1 + its bucket, or 0 if it generates nothing.

        Its images are read no further than their headers.

        Raises:
          BadExample: if it cannot be used.
        """
        example = self.read(source, index)
        if self._data.layout == "pairs":
            encoded, _ = self._pair(example)
            image_lib.read_size(encoded)
            return Lengths(0, 0, 0, 0, 1), 0
        item, _ = self._fit(example, self._policies[source])
        for frame in item.frames:
            if frame.size is None:  # of the others it follows from the header
                image_lib.read_size(frame.encoded)
        shape = item.frames[0].shape if item.frames else None
        return layout.lengths(item, self.sizes), 1 + self.sizes.buckets.index(shape) if shape else 0

    def prepare(self, source: int, index: int) -> Prepared:
        """Reads, checks, tokenises and decodes an example; raises `BadExample`."""
        return self.parse(source, index).load()

    def parse(self, source: int, index: int) -> Prepared:
        """As `prepare`, but for decoding."""
        example = self.read(source, index)
        if self._data.layout == "pairs":
            encoded, tokens = self._pair(example)
            size = self._config.model.vision_target.vision.image_size
            return Prepared(example["id"], tokens, None, lambda: [image_lib.decode(encoded, size)])
        item, shortened = self._fit(example, self._policies[source])
        return Prepared(item.id, item, shortened, lambda: self._pictures(source, index, item))

    def _pictures(self, source: int, index: int, item: layout.Item) -> list[layout.Picture]:
        pictures = [layout.picture(frame, self.shown) for frame in item.frames]
        if self._weights:
            given = features.joined(item, [store[index] for store in self._stores[source]])
            pictures = [shown._replace(features=found) for shown, found in zip(pictures, given)]
        return pictures

    def assemble(
        self, rows: Sequence[Iterable[Prepared]], first: int, bucket: Shape | None = None
    ) -> Interleaved | Pairs:
        """Writes rows of examples into arrays.

        Args:
          rows: of examples, each of which is written as it comes.
          first: the place of the first row in the global batch.
          bucket: that all examples share, if they have to.
        """
        if self._data.layout == "pairs":
            target = self._config.model.vision_target
            pairs = [next(((one.images[0], one.content) for one in row), None) for row in rows]
            return packing.assemble_pairs(pairs, first, target.vision.image_size, target.text.max_length)
        packed = [((prepared.content, prepared.images) for prepared in row) for row in rows]
        given = features.empty(len(rows), self._config, self.sizes, self._weights) if self._weights else None
        sizes = dataclasses.replace(self.shown, buckets=(bucket,)) if bucket else self.shown
        return packing.assemble(packed, first, self._data.budgets, sizes, given)

    def _pair(self, example: Example) -> tuple[bytes, list[int]]:
        return layout.make_pair(example, self.encode, self._config.model.vision_target.text.max_length)

    def _fit(self, example: Example, policy: str) -> tuple[layout.Item, str | None]:
        """The item of an example, shortened by the policy of its source if it is too long for a row, and how."""
        item, excess = self._item(example, self.sizes)
        if excess and policy == "truncate":
            kept = bisect.bisect_left(
                range(len(item.ids)), True, key=lambda n: bool(self._item(example, self.sizes, n)[1])
            )
            if kept > 1:
                return self._item(example, self.sizes, kept - 1)[0], "text truncated"
        if excess and policy == "downscale":
            for sizes in self._smaller_sizes:
                smaller, still = self._item(example, sizes)
                if not still:
                    return smaller, "images downscaled"
        if excess:
            raise BadExample(excess)
        return item, None

    def _item(
        self, example: Example, sizes: geometry.Geometry, text_limit: int | None = None
    ) -> tuple[layout.Item, str | None]:
        """An example as tokens, and the budget that it exceeds."""
        item = layout.make_item(example, self._chat, sizes, self._user_text, text_limit)
        dit = self._config.model.dit
        if dit and dit.visibility == "full" and sum(frame.generate for frame in item.frames) > 1:
            raise BadExample("generates several images, which config.model.dit.visibility 'full' shows each other")
        return item, layout.exceeded(layout.lengths(item, sizes), self._data.budgets)


def _check_vocabulary(config: Config, tokens: int) -> None:
    part, path = config.model.vlm, "vlm"
    if config.data.layout == "pairs":
        part, path = config.model.vision_target.text, "vision_target.text"
    if part and tokens > part.vocab_size:
        raise UserError(
            f"the tokenizer {config.data.tokenizer} has {tokens} tokens, more than config.model.{path}.vocab_size "
            f"{part.vocab_size}: take the one that the network was trained with, or a larger vocabulary."
        )


def _smaller(sizes: geometry.Geometry) -> list[geometry.Geometry]:
    """The same with images that the VLM sees at a half, a quarter, ... of the pixels, down to one token."""
    smaller, (least, most), token = [], sizes.vlm_pixels, sizes.merged_patch**2
    while most > token:
        most = max(most // 2, token)
        smaller.append(dataclasses.replace(sizes, vlm_pixels=(min(least, most), most)))
    return smaller


def over_source(
    function: Callable[[Reader, int, int, int], Any],
    size: int,
    reader: Reader,
    number: int,
    progress: Progress,
    label: str,
    worker_count: int = 1,
) -> list:
    """The values, in order, of `function(reader, number, first, last)` over chunks of `size` examples of a source."""
    source = reader.sources[number]
    chunks = [(number, first, min(first + size, len(source))) for first in range(0, len(source), size)]
    done = workers.run(functools.partial(_call, function), reader, chunks, worker_count)
    values = dict(progress(done, len(chunks), f"{label} {source.name}"))
    return [values[chunk] for chunk in range(len(chunks))]


def _call(function: Callable, reader: Reader, chunk: tuple[int, int, int]) -> Any:
    return function(reader, *chunk)
