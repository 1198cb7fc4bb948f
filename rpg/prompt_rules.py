"""Descriptions to sets of classes without a language model: a table of words per label set and a little grammar.

Words of one phrase narrow each other down ("flying animals"), phrases joined by "and", "or" or a comma add up ("cats
and dogs"), and what follows "except" is taken away ("vehicles except trucks"). "not X" and "non-X" stand for all
classes but X.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.errors import ConfigError
from rpg.tasks import CLASS_NAMES

Classes = frozenset[int]

CIFAR10 = CLASS_NAMES
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LABEL_SETS = {"cifar10": CIFAR10, "digits": DIGITS}

EVERYTHING = ("all", "every", "everything", "anything", "any")
EXCEPT = r"\b(?:except(?:\s+for)?|excluding|other than|apart from|besides|without|but not|but)\b"
JOINED = r"\s*(?:,|;|\band\b|\bor\b|\bplus\b|&)\s*"
NEGATED = r"\b(?:not|non|no|neither|nor|isn't|aren't|never)\b[\s-]*"

CIFAR10_WORDS: dict[str, tuple[str, ...]] = {
    "airplane": ("plane", "aeroplane", "aircraft", "jet", "airliner"),
    "automobile": ("car", "auto", "sedan", "taxi"),
    "ship": ("boat", "vessel"),
    "truck": ("lorry",),
    "cat": ("kitten", "feline"),
    "dog": ("puppy", "canine"),
    "airplane bird": ("fly", "flying", "flies", "wing", "winged", "wings", "sky", "air", "airborne"),
    "airplane automobile ship truck": (
        "vehicle", "transport", "transportation", "machine", "engine", "motor", "artificial", "manmade", "man-made",
        "inanimate", "nonliving", "lifeless", "metal", "object",
    ),
    "bird cat deer dog frog horse": (
        "living", "alive", "live", "animal", "creature", "being", "organism", "animate", "biological", "breathing",
        "natural", "eye", "eyes",
    ),
    "cat deer dog horse": ("mammal", "fur", "furry"),
    "cat deer dog frog horse": ("leg", "legs", "four-legged", "quadruped"),
    "cat dog": ("pet", "carnivore", "paw", "paws"),
    "deer horse": ("hoof", "hooves", "hoofed", "herbivore", "grazing"),
    "deer": ("antler", "antlers", "stag", "doe"),
    "horse": ("pony", "stallion", "mare"),
    "frog": ("amphibian", "toad", "cold-blooded"),
    "bird": ("feather", "feathers", "feathered", "beak"),
    "cat dog horse": ("domestic", "domesticated", "tame"),
    "bird deer frog": ("wild", "wildlife"),
    "frog ship": ("swim", "swimming", "water", "aquatic", "sea", "sail", "float", "floating"),
    "automobile truck": ("wheel", "wheels", "wheeled", "road", "drive", "driving"),
    "automobile cat deer dog frog horse truck": ("land", "ground"),
}  # fmt: skip

DIGIT_WORDS: dict[str, tuple[str, ...]] = {
    "zero two four six eight": ("even",),
    "one three five seven nine": ("odd",),
    "two three five seven": ("prime",),
    "four six eight nine": ("composite",),
    "zero one four nine": ("square",),
    "zero six eight nine": ("loop", "loops", "closed", "hole", "holes"),
    "one two three four five six seven eight nine": ("positive", "nonzero"),
}

PRONOUNS = ("one", "ones")  # after another word ("the odd ones") they name no class


@dataclass(frozen=True)
class Vocabulary:
    """Words and the classes they stand for.

    Attributes:
        names: of the classes, in their order.
        words: lower case, singular.
        rewrite: text before it is cut into words, e.g. comparisons of numbers.
    """

    names: tuple[str, ...]
    words: Mapping[str, Classes]
    rewrite: Callable[[str], str] = field(default=lambda text: text)

    def __len__(self) -> int:
        return len(self.names)

    def look_up(self, word: str) -> Classes | None:
        """Classes of a word, in the singular or the plural; None if it is not known."""
        if "/" in word:  # alternatives
            found = [classes for part in word.split("/") if (classes := self.look_up(part)) is not None]
            return frozenset().union(*found) if found else None
        return next((self.words[form] for form in _singulars(word) if form in self.words), None)


def build_vocabulary(names: Sequence[str]) -> Vocabulary:
    """The table for these classes: CIFAR-10 and digits with properties, others with their names alone."""
    names = tuple(name.lower().removeprefix("digit ") for name in names)
    words: dict[str, Classes] = {}
    groups: Mapping[str, Iterable[str]] = {}
    rewrite: Callable[[str], str] = lambda text: text  # noqa: E731 - the default of a field
    if names == CIFAR10:
        groups = CIFAR10_WORDS
    elif names in (DIGITS, tuple("0123456789")):
        groups, rewrite = DIGIT_WORDS, _compare_numbers
        words = {str(index): frozenset([index]) for index in range(10)}
        names = DIGITS
    for group, synonyms in groups.items():
        classes = frozenset(names.index(name) for name in group.split())
        words |= dict.fromkeys(synonyms, classes)
    words |= {name: frozenset([index]) for index, name in enumerate(names)}
    words |= dict.fromkeys(EVERYTHING, frozenset(range(len(names))))
    return Vocabulary(names, words, rewrite)


def select(description: str, vocabulary: Vocabulary) -> Classes:
    """Classes that the description names.

    Raises: ConfigError if no word of it is known, listing those that are.
    """
    text = vocabulary.rewrite(description.lower().replace("\u2019", "'"))
    wanted_text, *unwanted_texts = re.split(EXCEPT, text)
    everything = frozenset(range(len(vocabulary)))
    wanted = _union(wanted_text, vocabulary)
    if wanted is None and unwanted_texts:
        wanted = everything
    if wanted is None:
        others = sorted(word for word in vocabulary.words if word not in (*EVERYTHING, *vocabulary.names))
        raise ConfigError(
            f"the description {description.strip()!r} holds no word that chat_model=rules knows; it knows "
            f"{', '.join((*vocabulary.names, *others))}. Use these, or a chat model: chat_model=FOLDER."
        )
    for part in unwanted_texts:
        wanted -= _union(part, vocabulary) or frozenset()
    return wanted


def _union(text: str, vocabulary: Vocabulary) -> Classes | None:
    """Classes of all phrases together; None if no word is known."""
    found = [classes for phrase in re.split(JOINED, text) if (classes := _phrase(phrase, vocabulary)) is not None]
    return frozenset().union(*found) if found else None


def _phrase(text: str, vocabulary: Vocabulary) -> Classes | None:
    """Classes that fit every known word of the phrase; of names that exclude each other, either."""
    everything = frozenset(range(len(vocabulary)))
    found: list[Classes] = []
    negated = False
    for word in re.findall(r"!|[\w'/-]+", re.sub(NEGATED, " ! ", text)):
        classes = vocabulary.look_up(word)
        if word == "!":
            negated = True
        elif classes is not None and not (word in PRONOUNS and found):
            found.append(everything - classes if negated else classes)
            negated = False
    if not found:
        return None
    both = frozenset.intersection(*found)
    return both or frozenset.union(*found)


def _singulars(word: str) -> list[str]:
    forms = [word]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("s"):
        forms.append(word[:-1])
    return forms


_NUMBER = rf"(\d|{'|'.join(DIGITS)})"


def _compare_numbers(text: str) -> str:
    """Comparisons replaced by the digits that fulfil them."""

    def value(word: str) -> int:
        return int(word) if word.isdigit() else DIGITS.index(word)

    def digits(low: int, high: int) -> str:
        return "/".join(map(str, range(max(low, 0), min(high, 9) + 1)))

    text = re.sub(rf"\bbetween {_NUMBER} and {_NUMBER}", lambda found: digits(value(found[1]), value(found[2])), text)
    text = re.sub(rf"\bfrom {_NUMBER} to {_NUMBER}", lambda found: digits(value(found[1]), value(found[2])), text)
    text = re.sub(
        rf"\b(?:greater|larger|bigger|higher|more) than {_NUMBER}|\b(?:above|over) {_NUMBER}",
        lambda found: digits(value(found[1] or found[2]) + 1, 9),
        text,
    )
    text = re.sub(
        rf"\b(?:less|smaller|lower|fewer) than {_NUMBER}|\b(?:below|under) {_NUMBER}",
        lambda found: digits(0, value(found[1] or found[2]) - 1),
        text,
    )
    text = re.sub(rf"\bat least {_NUMBER}", lambda found: digits(value(found[1]), 9), text)
    return re.sub(rf"\bat most {_NUMBER}", lambda found: digits(0, value(found[1])), text)
