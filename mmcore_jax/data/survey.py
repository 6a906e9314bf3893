"""What is in the sources of a config: every example read, decoded and tokenised once, as training would."""

import collections
import hashlib
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from mmcore_jax.config import Config
from mmcore_jax.data import image as image_lib
from mmcore_jax.data import layout
from mmcore_jax.data.example import BadExample, Example, encode
from mmcore_jax.data.layout import Item
from mmcore_jax.data.plan import Planner
from mmcore_jax.data.reader import Prepared, Reader, over_source
from mmcore_jax.data.scan import Scan
from mmcore_jax.nn.tokens import QUERY, TEXT
from mmcore_jax.progress import Progress

_CHUNK = 256  # examples
_PLANNED_WINDOWS = 8
_BAR = 40  # characters


class Survey(NamedTuple):
    """Counts over examples; of texts by tokens and of images by the root of their area, in powers of two."""

    tasks: collections.Counter[str]
    texts: collections.Counter[int]
    images: collections.Counter[int]
    bad: collections.Counter[str]
    shortened: collections.Counter[str]
    hashes: np.ndarray  # of what examples hold, uint64 [n]

    @property
    def duplicates(self) -> int:
        """How many examples hold what another one before them holds."""
        return len(self.hashes) - len(np.unique(self.hashes))


def survey(reader: Reader, number: int, progress: Progress, workers: int = 1) -> Survey:
    """Reads all of source `number`, with `workers` processes."""
    return _merge(over_source(_count, _CHUNK, reader, number, progress, "reading", workers))


def utilisation(config: Config, scans: list[Scan]) -> dict[str, float]:
    """The share of each budget that the examples of the first windows fill."""
    planner, limits = Planner(config, scans), config.data.budgets
    end = planner.start
    while end.window < _PLANNED_WINDOWS:
        end = planner.after(end)
    taken = [scans[s].table["lengths"][i] for row in range(end.row) for s, i in planner.row(row)]
    used = dict(zip(layout.Lengths._fields, np.sum(taken, axis=0) / end.row))
    return {name: count / getattr(limits, name) for name, count in used.items() if getattr(limits, name)}


def lines(found: Survey) -> list[str]:
    """A report of a survey."""
    return [
        *(f"task {task}: {count:,}" for task, count in found.tasks.most_common()),
        *_histogram("tokens of a text", found.texts),
        *_histogram("pixels along a side", found.images),
        f"duplicates: {found.duplicates:,}",
        *(f"bad: {count:,}: {reason}" for reason, count in found.bad.most_common()),
        *(f"shortened: {count:,}: {how}" for how, count in found.shortened.most_common()),
    ]


def bucket_lines(reader: Reader, found: Scan) -> list[str]:
    """How many examples of a source take each of several buckets."""
    if not reader.sizes or len(reader.sizes.buckets) == 1:
        return []
    counts = np.bincount(found.table["bucket"][found.table["reason"] == 0], minlength=1 + len(reader.sizes.buckets))[1:]
    return [f"aspect ratio {cols / rows:.2f}: {n:,}" for (rows, cols), n in zip(reader.sizes.buckets, counts)]


def view(prepared: Prepared, tokenizer: Any) -> list[tuple[np.ndarray, str]]:
    """An example as captioned images, as the model sees it; the text comes first, what carries loss in brackets."""
    if not isinstance(prepared.content, Item):
        return [(prepared.images[0], tokenizer.decode(prepared.content))]
    item, text = prepared.content, ""
    runs = itertools.groupby(range(len(item.ids)), lambda i: (item.kinds[i], item.frame_of[i], item.learned[i]))
    for (kind, _, learned), places in runs:
        ids = item.ids[list(places)].tolist()
        words = tokenizer.decode(ids) if kind == TEXT else f"<{len(ids)} {'queries' if kind == QUERY else 'patches'}>"
        text += f"[{words}]" if learned else words
    cells = []
    for number, (frame, picture) in enumerate(zip(item.frames, prepared.images)):
        role = "generated" if frame.generate else "given"
        for part in ("vlm", "target", "pixels"):
            if (image := getattr(picture, part)) is not None:
                cells.append((image, f"image {number}, {role}, {part} {image.shape[0]} x {image.shape[1]}"))
    width = max([image.shape[1] for image, _ in cells], default=32)
    return [(np.full((1, width, 3), 255, np.uint8), f"{prepared.id}: {text}"), *cells]


def _merge(parts: list[Survey]) -> Survey:
    *counters, hashes = zip(*parts) if parts else ((),) * len(Survey._fields)
    totals = [collections.Counter() for _ in counters]
    for total, counts in zip(totals, counters):
        for count in counts:
            total.update(count)
    return Survey(*totals, np.concatenate([np.zeros(0, np.uint64), *hashes]))


def _count(reader: Reader, number: int, first: int, last: int) -> Survey:
    tasks, texts, images, bad, shortened = (collections.Counter() for _ in range(5))
    hashes = []
    for index in range(first, last):
        try:
            example = reader.read(number, index)
            how = reader.prepare(number, index).shortened
        except BadExample as reason:
            bad[str(reason)] += 1
            continue
        tasks[example["task"]] += 1
        hashes.append(_hash(example))
        if how:
            shortened[how] += 1
        for segment in example["segments"]:
            if segment["type"] == "text":
                texts[_power(len(reader.encode(segment["text"])))] += 1
            else:
                images[_power(math.sqrt(math.prod(image_lib.read_size(segment["image"]))))] += 1
    return Survey(tasks, texts, images, bad, shortened, np.array(hashes, np.uint64))


def _hash(example: Example) -> int:
    content = encode({**example, "id": ""})
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _power(value: float) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, math.ceil(math.log2(max(value, 1))))


def _histogram(title: str, counts: collections.Counter[int]) -> list[str]:
    most = max(counts.values(), default=1)
    return [
        f"{title}, up to {bound:>6,}: {n:>10,} {'#' * round(_BAR * n / most)}" for bound, n in sorted(counts.items())
    ]
