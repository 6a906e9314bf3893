"""Examples a second of our pipeline, beside webdataset and Hugging Face datasets with PyTorch's DataLoader.

All read the same photographs and captions, each from its own kind of shard, decode, crop and resize in as many workers,
ours in threads (twice as many, since they wait for each other), the others in processes, and make batches of pixels and
tokens. Ours packs several examples into a row; the others put one into a row and pad it to the longest of the batch,
and what they make of every example must be what ours makes of it: the same tokens, and pixels but for rounding. Opening
the shards and starting the workers, to the first batch, is timed apart from what follows when each thread has given a
batch; what is made once for all passes (our scan, the Arrow files) is there already. The ceiling is what decodes, crops
and resizes the same files, held in memory, in a thread a worker.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import pathlib
import resource
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import datasets
import matplotlib.cbook
import numpy as np
import torch
import webdataset
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmcore_jax import config as config_lib
from mmcore_jax.benchmarks.timing import CEILING, OURS, Comparison, Contestant, compare
from mmcore_jax.config import Config, UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.layout import ChatFormat, Tokens
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.data.sources.array_record import WRITER_OPTIONS
from mmcore_jax.data.text import load_tokenizer, train_tokenizer
from mmcore_jax.nn import masks

WARMUP = 1
THREADS = 2  # of ours for each worker
STRIDE = 16  # of the pixels that are compared
TOLERANCE = 0.05  # of 255 levels: ours resizes in SIMD, which rounds otherwise than Pillow
LATENT_PATCH = 16
FULL = dict(vlm=1.0, diffusion=1.0)
WORDS = """a an the of in on at with and two three small large old new red blue white dark bright wooden woman man cat
cup table ship window uniform smile flag portrait photograph street morning light shadow beside under behind"""


@dataclasses.dataclass(frozen=True)
class DataSizes:
    """`examples` show `images` distinct photographs, the shorter side of each one of `sides` pixels.

    Ours makes batches of `rows` rows, the others of `batch` examples, which is about as many.
    """

    examples: int = 2000
    images: int = 48
    sides: tuple[int, ...] = (512, 640, 768, 1024)
    image_size: int = 384
    query_grid: int = 8
    rows: int = 2
    row_tokens: int = 2048
    row_images: int = 18
    batch: int = 32


class Pair(NamedTuple):
    """A JPEG file, and what to read in it."""

    encoded: bytes
    caption: str


class Batch(NamedTuple):
    """How many examples there are, how much of the batch's tokens of each kind is no padding, and what to compare.

    `examples` gives (number, some uint8 pixels, token ids) of each, once the pass is over.
    """

    count: int
    used: dict[str, float]
    examples: Callable[[], list[tuple[int, np.ndarray, np.ndarray]]]


class Pass(NamedTuple):
    """Times of a pass, in seconds. `cpu` is of all processes, opening included."""

    opening: float  # to the first batch
    each: float  # an example, once every thread of ours could have given a batch
    cpu: float  # an example


class Throughput(NamedTuple):
    """What was measured, by contestant: the passes that count, and `used` as in its batches."""

    comparison: Comparison
    examples: int
    workers: int
    passes: dict[str, list[Pass]]
    used: dict[str, dict[str, float]]

    def rates(self, name: str) -> np.ndarray:
        """Examples a second and core, of every repeat."""
        return 1 / self.workers / self.times(name, "each")

    def times(self, name: str, field: str) -> np.ndarray:
        """A field of `Pass`, of every repeat."""
        return np.array([getattr(one, field) for one in self.passes[name]])

    def record(self) -> dict[str, Any]:
        """All of it, for JSON; `ratio` is our time an example over that of the faster of the others."""
        medians = {name: float(np.median(self.times(name, "each"))) for name in (OURS, *LOADERS)}
        passes = {name: [one._asdict() for one in passes] for name, passes in self.passes.items()}
        return self.comparison.record() | {
            "ratio": medians.pop(OURS) / min(medians.values()),
            "examples": self.examples,
            "workers": self.workers,
            "passes": passes,
            "used": self.used,
        }


def measure(sizes: DataSizes, repeats: int, workers: int) -> Throughput:
    """Times passes over the examples, which it writes into a temporary directory first.

    Raises:
      UserError: if there are too few examples for a batch after the first ones.
    """
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        pairs = make_pairs(sizes)
        write(directory, pairs, workers)
        chat = ChatFormat(load_tokenizer(directory / "tokenizer"))
        before, after = frame(chat, sizes)
        tokens = [np.array(before + chat.encode(pair.caption) + after) for pair in pairs]
        config = make_config(directory, sizes, workers, max(map(max, tokens)) + 1)
        # Asked for no batch beyond a pass, the pipeline prepares none.
        config = dataclasses.replace(config, total_steps=sum(1 for _ in our_batches(config)))
        used, passes = {}, collections.defaultdict(list)

        def run(name: str, batches: Callable[[], Iterable[Batch]]) -> np.ndarray:
            used[name], found, times = digest(batches, len(pairs), workers)
            passes[name].append(times)
            return found

        sources = {OURS: lambda: our_batches(config)}
        for peer, load in LOADERS.items():
            sources[peer] = functools.partial(their_batches, load, directory, sizes, workers, chat)
        sources[CEILING] = lambda: decoded(pairs, tokens, sizes.image_size, workers)
        contestants = [Contestant(name, functools.partial(run, name, batches)) for name, batches in sources.items()]
        comparison = compare("data", dataclasses.asdict(sizes), contestants, WARMUP, repeats, TOLERANCE)
    counted = {name: times[-repeats:] for name, times in passes.items()}
    return Throughput(comparison, len(pairs), workers, counted, used)


def digest(
    batches: Callable[[], Iterable[Batch]], count: int, workers: int
) -> tuple[dict[str, float], np.ndarray, Pass]:
    """The share of tokens used, what came of every example, and times of a pass.

    Of an example `[count, n]` there are some pixels and a checksum of the tokens; not a number where one is missing.
    """
    came, start, cpu, first = [], time.perf_counter(), cpu_seconds(), THREADS * workers
    for batch in batches():
        came.append((time.perf_counter(), batch))
    if len(came) <= first:
        raise UserError(f"{count} examples make {len(came)} batches, none after the first {first}.")
    since, last = came[first - 1][0], came[-1][0]
    each = (last - since) / sum(batch.count for _, batch in came[first:])
    times = Pass(came[0][0] - start, each, (cpu_seconds() - cpu) / count)
    found, shares = {}, [batch.used for _, batch in came]
    for number, pixels, ids in itertools.chain.from_iterable(batch.examples() for _, batch in came):
        checksum = zlib.crc32(np.asarray(ids, np.int32)).to_bytes(4)
        found[number] = np.append(pixels, np.frombuffer(checksum, np.uint8))
    values = np.stack(list(found.values()))
    every = np.full((count, values.shape[1]), np.nan, np.float32)
    every[list(found)] = values
    return {kind: float(np.mean([share[kind] for share in shares])) for kind in shares[0]}, every, times


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    usages = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- The examples -----------------------------------------------------------------------------------------------------


def make_pairs(sizes: DataSizes) -> list[Pair]:
    """Photographs cropped, resized and encoded anew, and captions whose lengths vary as those of people do."""
    rng = np.random.default_rng(0)
    files = [photograph(rng, int(side)) for side in rng.choice(sizes.sides, sizes.images)]
    lengths = np.clip(rng.lognormal(3.0, 0.7, sizes.examples), 3, 150).astype(int)
    return [
        Pair(files[n % len(files)], " ".join(rng.choice(WORDS.split(), length))) for n, length in enumerate(lengths)
    ]


def photograph(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of quality 90, its shorter side of `side` pixels."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")
    height, width = side, int(side * rng.choice([1, 4 / 3, 3 / 2]))
    if rng.random() < 0.5:
        height, width = width, height
    scale = rng.uniform(0.8, 1.0) * min(image.width / width, image.height / height)
    left, top = (rng.uniform(0, whole - scale * part) for whole, part in zip(image.size, (width, height)))
    box = (left, top, left + scale * width, top + scale * height)
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS, box).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(directory: pathlib.Path, pairs: list[Pair], shards: int) -> None:
    """Writes a tokenizer, and the same shards as ArrayRecord, tar and parquet."""
    train_tokenizer((pair.caption for pair in pairs), 512, directory / "tokenizer")
    for shard in range(shards):
        chosen = {number: pairs[number] for number in range(shard, len(pairs), shards)}
        native = ArrayRecordWriter(str(directory / f"{shard}.array_record"), WRITER_OPTIONS)
        with webdataset.TarWriter(str(directory / f"{shard}.tar")) as tar:
            for number, (encoded, caption) in chosen.items():
                segments = [example_lib.text(caption), example_lib.image(encoded, generate=True)]
                native.write(example_lib.encode({"id": str(number), "task": "benchmark", "segments": segments}))
                tar.write({"__key__": str(number), "jpg": encoded, "txt": caption})
        native.close()
        table = dict(
            number=list(chosen),
            image=[{"bytes": pair.encoded, "path": None} for pair in chosen.values()],
            caption=[pair.caption for pair in chosen.values()],
        )
        features = datasets.Features(
            number=datasets.Value("int64"), image=datasets.Image(), caption=datasets.Value("string")
        )
        datasets.Dataset.from_dict(table, features).to_parquet(directory / f"{shard}.parquet")


# --- Contestants ------------------------------------------------------------------------------------------------------


def our_batches(config: Config) -> Iterator[Batch]:
    """A pass of the pipeline: the batches until every example has come."""
    batches, left = Batches(config), config.data.window
    for batch in batches.iterate(0):
        tokens, pixels = batch.arrays.tokens, some_of(batch.arrays.images.pixels)
        used = dict(vlm=tokens.meta.kind, diffusion=batch.arrays.diffusion.latent_meta.kind)
        used = {name: np.mean(kind != masks.PAD) for name, kind in used.items()}
        left -= (count := sum(map(len, batch.ids)))
        yield Batch(count, used, functools.partial(our_examples, batch.ids, tokens, pixels))
        if left <= 0:
            return


def our_examples(names: list[list[str]], tokens: Tokens, pixels: np.ndarray) -> list:
    """The examples of rows: of each row the documents in order."""
    examples = []
    for row, documents in enumerate(names):
        taken = tokens.meta.kind[row] != masks.PAD
        for document, name in enumerate(documents):
            ids = tokens.ids[row, taken & (tokens.meta.document[row] == document)]
            examples.append((int(name), pixels[row, document], ids))
    return examples


def some_of(pixels: np.ndarray) -> np.ndarray:
    """The pixels to compare, of `[..., height, width, 3]`."""
    return pixels[..., ::STRIDE, ::STRIDE, :].copy()


def their_batches(
    load: Callable[..., Iterable], directory: pathlib.Path, sizes: DataSizes, workers: int, chat: ChatFormat
) -> Iterator[Batch]:
    """A pass of a DataLoader; each row has the words of the chat format and the queries around its caption."""
    before, after = frame(chat, sizes)
    for batch in load(directory, sizes, workers, load_tokenizer(directory / "tokenizer")):
        numbers, ids, valid, pixels = (batch[name].numpy() for name in ("number", "ids", "valid", "pixels"))
        examples = functools.partial(their_examples, numbers, some_of(pixels), ids, valid == 1, before, after)
        around = len(before) + len(after)
        used = dict(vlm=(valid.sum(axis=1) + around).mean() / (valid.shape[1] + around), diffusion=1.0)
        yield Batch(len(numbers), used, examples)


def their_examples(
    numbers: np.ndarray, pixels: np.ndarray, ids: np.ndarray, valid: np.ndarray, before: list[int], after: list[int]
) -> list:
    """The examples of padded rows, with the words around their captions."""
    tokens = (np.concatenate([before, row[kept], after]) for row, kept in zip(ids, valid))
    return list(zip(numbers.tolist(), pixels, tokens))


def decoded(pairs: list[Pair], tokens: list[np.ndarray], size: int, workers: int) -> Iterator[Batch]:
    """Our decoder alone, in as many threads, beside tokens that are there already."""
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        ahead = collections.deque()
        for number, pair in enumerate(pairs):
            ahead.append((number, threads.submit(image_lib.decode, pair.encoded, size)))
            if len(ahead) > 2 * workers:
                yield decoded_example(*ahead.popleft(), tokens)
        for one in ahead:
            yield decoded_example(*one, tokens)


def decoded_example(number: int, pixels: concurrent.futures.Future, tokens: list[np.ndarray]) -> Batch:
    example = number, some_of(pixels.result()), tokens[number]
    return Batch(1, FULL, lambda: [example])


def frame(chat: ChatFormat, sizes: DataSizes) -> tuple[list[int], list[int]]:
    """What the chat format puts before a caption, and after it, with the queries of the image to draw."""
    queries = [chat.vision_start, *[chat.image_pad] * sizes.query_grid**2, chat.vision_end]
    return chat.preamble + chat.open["user"], chat.close + chat.open["assistant"] + queries


def make_config(directory: pathlib.Path, sizes: DataSizes, workers: int, vocabulary: int) -> Config:
    """Text-to-image, as stage 2 has it; of the networks, only what the pipeline asks about matters."""
    side, images = sizes.image_size // LATENT_PATCH, sizes.row_images
    vision = config_lib.QwenVision(8, 1, 1, 8, patch_size=14, merge_size=2, window_size=112, full_attention_blocks=())
    vlm = config_lib.QwenVL(8, 1, 1, 8, vocabulary, 1, (1, 1, 2), 1e6, 1e-6, True, vision)
    dit = config_lib.MMDiT(8, 1, 1, 0, True, LATENT_PATCH, 3, 8, 0, "rotary", side, side, 1.0, "velocity")
    shards = str(directory / "*.array_record")
    source = config_lib.ArrayRecord(kind="array_record", shards=shards, weight=1.0)
    return Config(
        stage="benchmark",
        recipe="data",
        seed=0,
        total_steps=sizes.examples,
        batch_size=sizes.rows,
        model=config_lib.Model(vlm, config_lib.Queries(sizes.query_grid), None, None, dit, config_lib.Pixels("pixel")),
        init={},
        data=config_lib.Data(
            layout="interleaved",
            sources={"photographs": source},
            tokenizer=str(directory / "tokenizer"),
            image_size=sizes.image_size,
            aspect_ratios=(1.0,),
            vlm_pixels=(28 * 28, 28 * 28),
            budgets=config_lib.Budgets(
                vlm_tokens=sizes.row_tokens,
                vision_patches=0,
                context_tokens=sizes.row_tokens,
                latent_tokens=images * side**2,
                images=images,
            ),
            window=sizes.examples,
            index=str(directory / "index"),
            features=(),
            workers=0,
            threads=THREADS * workers,
            bad_record_limit=0.0,
        ),
        objectives=config_lib.Objectives(None, None, None, None),
        **dict.fromkeys(("tuning", "optimizer", "sampling", "checkpoint", "telemetry", "mesh", "execution")),
    )


# --- The others, as their users write them ----------------------------------------------------------------------------


def webdataset_loader(directory: pathlib.Path, sizes: DataSizes, workers: int, tokenizer: Any) -> Iterable[dict]:
    """webdataset: workers read shards of their own, decode, and collate."""
    shards = sorted(map(str, directory.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False)
        .decode("pil")
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(int, functools.partial(square, size=sizes.image_size), str)
        .batched(sizes.batch)
        .map(functools.partial(collate, tokenizer))
    )
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)


def datasets_loader(directory: pathlib.Path, sizes: DataSizes, workers: int, tokenizer: Any) -> Iterable[dict]:
    """Hugging Face datasets: random access into Arrow files made of the parquet files once, with a transform."""
    shards = sorted(map(str, directory.glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(directory / "arrow"))
    dataset.set_transform(functools.partial(transform, size=sizes.image_size))
    return torch.utils.data.DataLoader(
        dataset, sizes.batch, num_workers=workers, collate_fn=functools.partial(collate_rows, tokenizer)
    )


def transform(rows: dict[str, list], size: int) -> dict[str, list]:
    return rows | {"image": [square(image.convert("RGB"), size) for image in rows["image"]]}


def collate_rows(tokenizer: Any, rows: list[dict]) -> dict[str, torch.Tensor]:
    return collate(tokenizer, [[row[name] for row in rows] for name in ("number", "image", "caption")])


def collate(tokenizer: Any, columns: Any) -> dict[str, torch.Tensor]:
    """Stacks the images and pads the captions of a batch."""
    numbers, images, captions = columns
    tokens = tokenizer(list(captions), add_special_tokens=False, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.stack(images))
    return dict(number=torch.tensor(numbers), pixels=pixels, ids=tokens.input_ids, valid=tokens.attention_mask)


def square(image: Image.Image, size: int) -> np.ndarray:
    """The square in the middle, resized by area where its side is a multiple of `size`, else bicubically."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    resample = Image.Resampling.BICUBIC if side % size else Image.Resampling.BOX
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size), resample))


LOADERS = {"webdataset": webdataset_loader, "datasets": datasets_loader}
SIZES = DataSizes()
