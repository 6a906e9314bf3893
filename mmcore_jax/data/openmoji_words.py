"""What the OpenMoji dataset says: names of drawings in natural English, and the texts that mention them.

Captions, questions and requests for edits come from templates, chosen by a stable hash of a key: equal keys give equal
words.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

# --- Names ------------------------------------------------------------------------------------------------------------

_RENAMED = {
    "a button (blood type)": "blood type a button",
    "b button (blood type)": "blood type b button",
    "o button (blood type)": "blood type o button",
    "ab button (blood type)": "blood type ab button",
    "bald": "bald head",
    "breast-feeding": "woman breast-feeding",
    "chart decreasing": "falling chart",
    "chart increasing": "rising chart",
    "cooking": "egg in a frying pan",
    "dashing away": "puff of wind",
    "divide": "division sign",
    "dizzy": "dizzy star",
    "e-mail": "e-mail envelope",
    "face with hand over mouth": "face with a hand over its mouth",
    "flower playing cards": "flower playing card",
    "foggy": "foggy city",
    "hourglass done": "hourglass",
    "hourglass not done": "hourglass with flowing sand",
    "input latin letters": "sign with abc letters",
    "input latin lowercase": "sign with lowercase letters",
    "input latin uppercase": "sign with uppercase letters",
    "input numbers": "sign with numbers",
    "input symbols": "sign with symbols",
    "kiss": "kissing couple",
    "litter in bin sign": "sign for a litter bin",
    "locked": "closed padlock",
    "locked with key": "padlock with key",
    "locked with pen": "padlock with pen",
    "meat on bone": "meat on the bone",
    "metro": "metro train",
    "multiply": "multiplication sign",
    "om": "om symbol",
    "palms up together": "two upturned palms",
    "performing arts": "theatre masks",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "speaker high volume": "speaker at high volume",
    "speaker low volume": "speaker at low volume",
    "speaker medium volume": "speaker at medium volume",
    "star-struck": "star-struck face",
    "unlocked": "open padlock",
    "zzz": "zzz symbol",
}
_CALLED_SIGN = {
    "baggage claim", "biohazard", "children crossing", "construction", "copyright", "customs", "high voltage",
    "infinity", "information", "left luggage", "minus", "mobile phone off", "no bicycles", "no entry",
    "no littering", "no mobile phones", "no one under eighteen", "no pedestrians", "no smoking", "non-potable water",
    "passport control", "place of worship", "plus", "potable water", "prohibited", "radioactive", "registered",
    "trade mark", "vibration mode", "warning", "wireless",
}  # fmt: skip
_ALIASES = {
    "angel", "apple", "athletic_shoe", "beer", "bee", "bento", "bicyclist", "bike", "boat", "book", "boot", "bulb",
    "cake", "car", "champagne", "cheese", "cocktail", "coffee", "computer", "corn", "couple", "curry", "eyeglasses",
    "fax", "film_strip", "fish_cake", "football", "fox_face", "fried_egg", "fries", "gem", "gift", "golfer",
    "headphones", "heart", "high_heel", "ice_cube", "iphone", "jigsaw", "knife", "lantern", "lion_face", "lips",
    "mandarin", "mountain_bicyclist", "ocean", "open_umbrella", "panda_face", "paperclips", "phone", "pouch",
    "racing_motorcycle", "ramen", "robot_face", "runner", "sandal", "santa", "scales", "sheep", "shell", "shirt",
    "shoe", "space_invader", "steam_locomotive", "stew", "surfer", "sweet_potato", "swimmer", "tea", "tickets",
    "traffic_light", "trident", "truck", "tv", "unicorn_face", "weight_lifter",
}  # fmt: skip
_PLURALS = {"man": "men", "woman": "women", "child": "children"}
_ARTICLE_INSIDE = re.compile(
    r"\b(with|in|wearing|getting|taking|feeding|bouncing|rowing|raising|tipping|behind) "
    r"(massage|haircut|bath|baby|ball|boat|hand|turban|veil|tuxedo|lotus position|skullcap|headscarf|steamy room|crown|"
    r"suit|motorized wheelchair|manual wheelchair|white cane|monocle|thermometer|medical mask|head-bandage|halo|"
    r"key|pen|cowboy hat|raised eyebrow|diagonal mouth|wry smile|raised flag|lowered flag|hearing aid|spoon|straw)\b"
)


def natural_name(cldr: str, first: str) -> str:
    """Turns a CLDR name such as "man_red_hair" into words that fit into a sentence: "man with red hair".

    Args:
      cldr: the name, with or without underscores.
      first: the first code point in hexadecimal; clocks and zodiac signs are told by it.
    """
    name = cldr.replace("_", " ").replace("’", "'").replace("“", "").replace("”", "").lower()
    if len(first) == 5 and "1F550" <= first <= "1F567":
        return f"clock showing {name}"
    if "2648" <= first <= "2653" or first == "26CE":
        return f"{name} zodiac sign"
    if name in _CALLED_SIGN:
        return f"{name} sign"
    name = _RENAMED.get(name, name)
    name = re.sub(r"^family (.*)", lambda match: f"family with {_people(match[1])}", name)
    name = re.sub(r"^couple with heart (.+)", lambda match: f"couple with a heart, {_people(match[1])}", name)
    name = re.sub(r"^kiss ((?:man|woman).*)", lambda match: f"kiss between {_people(match[1])}", name)
    name = re.sub(r"^(person|man|woman) (\w+ hair)$", r"\1 with \2", name)
    name = re.sub(r"^(person|man|woman) beard", r"\1 with a beard", name)
    name = re.sub(r"^(person|man|woman) bald", r"bald \1", name)
    name = re.sub(r"\bindex pointing", "index finger pointing", name)
    return _ARTICLE_INSIDE.sub(r"\1 a \2", name)


def natural_aliases(aliases: Iterable[str]) -> tuple[str, ...]:
    """Returns those aliases of the `emoji` package, such as ":fox_face:", that people would say: "fox face"."""
    return tuple(alias.replace("_", " ") for alias in (a.strip(":") for a in aliases) if alias in _ALIASES)


def plural(noun: str) -> str:
    """Returns the plural of a noun for people: "women", "boys"."""
    return _PLURALS.get(noun, f"{noun}s")


def _people(members: str) -> str:
    """Turns "man man girl" into "two men and a girl", and "man woman boy" into "a man, woman and boy"."""
    counts = Counter(members.split())
    phrases = [with_article(m) if n == 1 else f"two {plural(m)}" for m, n in counts.items()]
    if set(counts.values()) == {1}:
        phrases[1:] = list(counts)[1:]
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


# --- Articles ---------------------------------------------------------------------------------------------------------

_PROPER = re.compile(r"^(mount fuji|tokyo tower|santa( claus)?|mrs\. claus|mx claus)\b")
_UNIQUE = {"sun", "milky way", "statue of liberty", "ocean"}
_MASS = {
    "bacon", "badminton", "beer", "bento", "bowling", "bread", "broccoli", "butter", "camping", "candy", "champagne",
    "cheese", "clothes", "coffee", "coral", "corn", "custard", "curry", "dango", "dna", "falafel", "fire", "flatbread",
    "fog", "fondue", "food", "garlic", "ginger", "hair", "hockey", "ice", "jewelry", "lacrosse", "liquid", "luggage",
    "lipstick", "mate", "meat", "money", "oden", "pong", "poo", "polish", "popcorn", "racing", "ramen", "rice", "sake",
    "salt", "soap", "spaghetti", "stew", "sushi", "tea", "tennis", "thread", "trash", "wood", "yarn",
}  # fmt: skip
_PLURAL_WORDS = {"people", "men", "women", "teeth", "children"}
_HEAD_ENDS = re.compile(r" (?:with|of|in|on|at|facing|for|to|behind|between|over|under|without|and|holding)\b|,")
_AN = re.compile(r"^(?:[aeio]|u(?!ni|k|r|s[eu])|hour|x-|sos\b|ng\b|mri\b)")
_A = re.compile(r"^(?:one\b|one-|once|eu|ewe)")


def with_article(name: str) -> str:
    """Returns a noun phrase as it stands in a sentence: "an apple", "scissors", "the sun", "bread"."""
    if name in _UNIQUE:
        return f"the {name}"
    if _PROPER.match(name) or _is_uncountable(name):
        return name
    return f"an {name}" if _AN.match(name) and not _A.match(name) else f"a {name}"


def _is_uncountable(name: str) -> bool:
    words = _HEAD_ENDS.split(name)[0].split()
    verb = next((i for i, word in enumerate(words[1:], 1) if word.endswith("ing") and i + 1 < len(words)), len(words))
    head = words[verb - 1] if words[verb - 1] not in _PLURAL_WORDS else "people"
    if words[-1] == "sign":
        return False
    if words[0] in _PLURAL_WORDS or head in _MASS | _PLURAL_WORDS:
        return True
    return head.endswith("s") and not re.search(r"(ss|us|os|lis|wards|'s)$", head)


# --- Texts ------------------------------------------------------------------------------------------------------------

_CAPTIONS = (
    "a drawing of {a}", "draw {a}", "{a} on a white background", "an emoji of {a}", "a picture of {a}",
    "a simple drawing of {a}", "show me {a}", "{name}", "an icon of {a}", "please draw {a}",
)  # fmt: skip
_CAPTION_VARIANTS = 4
_MAX_WORDS = 14  # with punctuation: about as many tokens
_WORD_OR_MARK = re.compile(r"[^\W_]+|[^\w\s]")
_QUESTIONS = (
    "what is this?", "what does this show?", "describe the picture", "what do you see?", "name this drawing",
    "what is in the picture?",
)  # fmt: skip
_QUESTION_VARIANTS = 2
_EDITS = {
    "edit_tone": (
        "make the skin tone {tone}", "change the skin tone to {tone}", "use a {tone} skin tone", "make the skin {tone}",
        "give it a {tone} skin tone", "change it to {tone} skin",
    ),
    "edit_gender": (
        "change to {a_target}", "make {it} {a_target}", "turn the {source} into {a_target}", "show {a_target} instead",
        "change the {source} to {a_target}", "replace the {source} with {a_target}",
    ),
    "edit_colour": (
        "make the {shape} {colour}", "turn the {shape} {colour}", "change the colour to {colour}", "make it {a_target}",
        "recolour it {colour}", "paint the {shape} {colour}", "turn it into {a_target}",
    ),
}  # fmt: skip
_EDITS["edit_recolour"] = _EDITS["edit_colour"]
_COMPOSITIONS = (
    "combine them: {name}", "combine the two into {a}", "put them together to make {a}", "join the two: {name}",
    "merge them into {a}", "combine the two", "make {a} from these",
)  # fmt: skip
# What asks for half of one drawing with half of another.
ARRANGEMENTS = {"beside": "put them beside each other", "above": "put the first above the second"}
# How far to go in a sequence: in a list of every five minutes, or of phases.
STEPS = {
    "clock": {6: "half an hour later", 12: "an hour later"},
    "moon": {1: "the next phase of the moon", -1: "the phase of the moon before"},
}
STEPS["clock"] |= {-step: text.replace("later", "earlier") for step, text in STEPS["clock"].items()}
SCALES = {"darker": "make the skin one tone darker", "lighter": "make the skin one tone lighter"}


def captions(name: str, aliases: Sequence[str], key: str) -> list[str]:
    """Returns captions: the name, then other wordings, one of them with an alias if there is one.

    Args:
      name: of a drawing, without an article.
      aliases: other names for it.
      key: chooses among the wordings.
    """
    first = zlib.crc32(key.encode())
    subjects = [name] * (_CAPTION_VARIANTS - 2) + [*aliases, name][:1]
    texts = [with_article(name)]
    for i, subject in enumerate(subjects):
        wordings = _wordings(_CAPTIONS, a=with_article(subject), name=subject)
        wordings = [wording for wording in wordings if wording != texts[0]]
        texts.append(wordings[(first + 3 * i) % len(wordings)])
    return texts


def questions(key: str) -> list[str]:
    """Returns questions that the name of a drawing answers; `key` chooses among the wordings."""
    first = zlib.crc32(key.encode())
    return [_QUESTIONS[(first + variant) % len(_QUESTIONS)] for variant in range(_QUESTION_VARIANTS)]


def instructions(task: str, noun: str, source: str, target: str, key: str) -> list[str]:
    """Returns texts that ask for an edit: two wordings for a change of colour, of which there are few, else one.

    Args:
      task: "edit_tone", "edit_gender", "edit_colour" or "edit_recolour".
      noun: what a colour is changed of.
      source: the state to change from.
      target: the state to change to.
      key: chooses among the wordings.
    """
    fields = {"source": source, "it": "them" if source in _PLURAL_WORDS else "it", "a_target": with_article(target)}
    if task == "edit_tone":
        fields = {"tone": target}
    if task in ("edit_colour", "edit_recolour"):
        fields = {"shape": noun, "colour": target, "a_target": with_article(f"{target} {noun}")}
    first, templates = zlib.crc32(key.encode()), _EDITS[task]
    chosen = [templates[(first + 3 * i) % len(templates)] for i in range(2 if task == "edit_colour" else 1)]
    return [template.format(**fields) for template in chosen]


def composition(name: str, key: str) -> str:
    """Returns the text that asks to make what is called `name` from two drawings; `key` chooses among the wordings."""
    return _choose(_wordings(_COMPOSITIONS, a=with_article(name), name=name), key)


def steps(step: str, names: Sequence[str]) -> list[list[str]]:
    """Returns texts that ask for the next drawings of a sequence: by the `step`, and by `names` if all have one."""
    named = [[f"next, {with_article(name)}" for name in names]] if all(names) else []
    return [[step] * len(names), *named]


def _wordings(templates: Sequence[str], **fields: str) -> list[str]:
    """Fills in the templates, and leaves out what gets too long."""
    texts = [template.format(**fields) for template in templates]
    return [text for text in texts if len(_WORD_OR_MARK.findall(text)) <= _MAX_WORDS]


def _choose(texts: Sequence[str], key: str) -> str:
    return texts[zlib.crc32(key.encode()) % len(texts)]
