"""The words of a small model: `vocabulary.json` in a checkpoint's folder, and what of a prompt it does not cover.

A model that was trained on captions of a small world draws something wrong for a sentence from outside it. A checkpoint
that reads any text has no such file, and its prompts are not checked. docs/training.md has the format.
"""

import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from nova_video.common.errors import InputError

log = logging.getLogger(__name__)

VOCABULARY_FILE = "vocabulary.json"
FORMAT = 1
HINT = (
    "`nova words` lists what this model knows; free text needs a released checkpoint on a GPU, such as "
    "BAAI/nova-d48w1024-osp480"
)
SIMILAR = 0.8  # difflib's ratio from which on a word counts as a misspelt phrase
SUGGESTIONS = 4  # more would not help
SHORT = 3  # letters: among several unknown words, these resemble too many phrases by chance
PUNCTUATION = re.compile(r"[.,;:!?()\"“”„«»]|(?<!\w)['’]|['’](?!\w)")
TEMPLATE = re.compile(r"\{(\w+)\}|([\w'’-]+)|([\[\]])|(\S)")


@dataclass(frozen=True)
class WordList:
    """Phrases that take the same place in a sentence, such as the names of objects."""

    kind: str
    """The name of the place in sentence templates: {object}. Several lists may share one."""
    title: str
    """The heading of a printed list."""
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """All words of a model, and the sentences that they form."""

    words: tuple[WordList, ...]
    clips: tuple[str, ...]
    """Templates such as "{object} [{motion} [{speed}]] [on {background}]": what is in brackets may be absent."""
    pictures: tuple[str, ...]
    """Templates of sentences that the model knows in pictures alone."""
    ignored: tuple[str, ...] = ()
    """Words that may stand anywhere, such as articles."""

    def __post_init__(self) -> None:
        for template in (*self.clips, *self.pictures):
            _compile(template)
            for kind in _kinds(template):
                if kind not in {found.kind for found in self.words}:
                    raise InputError(f"template {template!r} has {{{kind}}}: expected the kind of a word list")

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary | None":
        """Read the file in a checkpoint's folder; None where there is none."""
        path = folder / VOCABULARY_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise InputError(f"format is {values['format']!r}: expected {FORMAT}")
            lists = tuple(
                WordList(_text(entry["kind"]), _text(entry["title"]), _texts(entry["phrases"]))
                for entry in values["words"]
            )
            return cls(lists, *(_texts(values[name]) for name in ("clips", "pictures", "ignored")))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{path} is not a vocabulary ({reason}): expected the format of docs/training.md"
            ) from None

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint's folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / VOCABULARY_FILE).write_text(text + "\n", encoding="utf-8")

    def __add__(self, other: "Vocabulary") -> "Vocabulary":
        """The words of both: a model that was trained further knows them all."""
        return Vocabulary(
            tuple(dict.fromkeys(self.words + other.words)),
            tuple(dict.fromkeys(self.clips + other.clips)),
            tuple(dict.fromkeys(self.pictures + other.pictures)),
            tuple(dict.fromkeys(self.ignored + other.ignored)),
        )

    def search(self, text: str) -> list[WordList]:
        """The word lists, with the phrases alone that contain `text`."""
        wanted = " ".join(text.casefold().split())
        found = (WordList(each.kind, each.title, _find_phrases(each.phrases, wanted)) for each in self.words)
        return [each for each in found if each.phrases]

    # Checking prompts ---------------------------------------------------------------------------------------------

    def problems(self, prompt: str, picture: bool = False) -> list[str]:
        """The parts of a prompt for a clip or a picture that the model does not know, one line each."""
        items = self._read(prompt)
        if not items:
            return []  # the empty prompt asks for nothing
        if unknown := list(self._unknown(items)):
            return unknown
        sentence = "".join(f" {item}" for item in items)
        if any(pattern.fullmatch(sentence) for pattern in self._patterns[: None if picture else len(self.clips)]):
            return []
        if any(pattern.fullmatch(sentence) for pattern in self._patterns):
            return [f'known of pictures alone, which have one frame: "{prompt.strip()}"']
        return [self._misfit(prompt, items)]

    def negative_problems(self, prompt: str) -> list[str]:
        """The words of a negative prompt that the model does not know: it need not be a sentence."""
        return [f"{line} (negative prompt)" for line in self._unknown(self._read(prompt))]

    def check(self, prompts: Sequence[str], negatives: Sequence[str], picture: bool = False) -> tuple[str, ...]:
        """The problems of all prompts of a call, each once."""
        lines = [line for prompt in prompts for line in self.problems(prompt, picture)]
        return tuple(dict.fromkeys(lines + [line for prompt in negatives for line in self.negative_problems(prompt)]))

    @cached_property
    def _phrases(self) -> dict[tuple[str, ...], str]:
        """Each phrase, as its words -> its kind."""
        return {tuple(self._split(phrase)): found.kind for found in self.words for phrase in found.phrases}

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [_compile(template) for template in (*self.clips, *self.pictures)]

    @cached_property
    def _literals(self) -> set[str]:
        """The words that templates have themselves."""
        return {match[2] for text in (*self.clips, *self.pictures) for match in TEMPLATE.finditer(text) if match[2]}

    @cached_property
    def _most(self) -> Counter[str]:
        """How often a kind is in a sentence at most."""
        most: Counter[str] = Counter()
        for template in (*self.clips, *self.pictures):
            most |= Counter(_kinds(template))
        return most

    @cached_property
    def _required(self) -> set[str]:
        """The kinds that no sentence is without."""
        templates = (*self.clips, *self.pictures)
        found = [set(_kinds(_without_brackets(template))) for template in templates]
        return set.intersection(*found) if found else set()

    def _split(self, text: str) -> list[str]:
        """The words of a text, without case, punctuation and ignored words."""
        words = PUNCTUATION.sub(" ", text.casefold()).split()
        return [word for word in words if word not in self.ignored]

    def _read(self, prompt: str) -> list[str]:
        """The prompt's words, the longest known phrases replaced by their kinds in braces."""
        words, items, at = self._split(prompt), [], 0
        longest = max(map(len, self._phrases), default=1)
        while at < len(words):
            for end in range(min(len(words), at + longest), at, -1):
                if (kind := self._phrases.get(tuple(words[at:end]))) is not None:
                    items.append(f"{{{kind}}}")
                    at = end
                    break
            else:
                items.append(words[at])
                at += 1
        return items

    def _unknown(self, items: Sequence[str]) -> Iterator[str]:
        """A line for every run of words that are neither known phrases nor words of templates."""
        counts = Counter(item[1:-1] for item in items if item.startswith("{"))
        room = {kind for kind, most in self._most.items() if counts[kind] < most}
        run: list[str] = []
        for item in [*items, "{"]:
            if not item.startswith("{") and item not in self._literals:
                run.append(item)
                continue
            if run:
                names = " or ".join(f'"{name}"' for name in self._suggestions(run, room))
                yield f'not known: "{" ".join(run)}"' + (f"; did you mean {names}?" if names else "")
            run = []

    def _suggestions(self, run: list[str], kinds: set[str]) -> list[str]:
        """Phrases of these kinds that are nearest to a run of unknown words.

        The words may be misspelt, incomplete, or lack an adjective ("apple" for "red apple").
        """
        phrases = [phrase for found in self.words if found.kind in kinds for phrase in found.phrases]
        for text in dict.fromkeys([" ".join(run), *(word for word in reversed(run) if len(word) > SHORT)]):
            near = [phrase for phrase in phrases if phrase.endswith(f" {text}") or phrase.startswith(text)]
            if not near or len(text) <= SHORT:
                ratios = {phrase: difflib.SequenceMatcher(None, text, phrase).ratio() for phrase in phrases}
                best = max(ratios.values(), default=0.0)
                near = [phrase for phrase in phrases if ratios[phrase] == best >= SIMILAR]
            if near:
                return near if len(near) <= SUGGESTIONS else []
        return []

    def _misfit(self, prompt: str, items: Sequence[str]) -> str:
        """Why a sentence of known words is none that the model was trained on."""
        counts = Counter(item[1:-1] for item in items if item.startswith("{"))
        for kind in sorted(self._required):
            if not counts[kind]:
                return f'no {kind} that is known in "{prompt.strip()}"'
        for kind, count in sorted(counts.items()):
            if count > self._most[kind]:
                return f'{count} {kind}s in "{prompt.strip()}": expected {self._most[kind]} at most'
        return f'the words are known, but not put together so: "{prompt.strip()}"'


def _kinds(template: str) -> list[str]:
    return [match[1] for match in TEMPLATE.finditer(template) if match[1]]


def _without_brackets(template: str) -> str:
    shorter = re.sub(r"\[[^\[\]]*\]", "", template)
    return shorter if shorter == template else _without_brackets(shorter)


def warn_of_words(lines: Sequence[str]) -> None:
    """Logs the lines about unknown words, if there are any, with the way to the known ones."""
    if lines:
        log.warning("%s %s", " ".join(line if line.endswith("?") else f"{line}." for line in lines), HINT)


def _compile(template: str) -> re.Pattern[str]:
    """A template as a pattern of items that each have a space before them."""
    parts = []
    for kind, word, bracket, other in TEMPLATE.findall(template):
        if other:
            raise InputError(f"template {template!r} has {other!r}: expected words, {{kind}} and brackets")
        parts.append({"[": "(?:", "]": ")?"}[bracket] if bracket else re.escape(f" {word or f'{{{kind}}}'}"))
    try:
        return re.compile("".join(parts))
    except re.error:
        raise InputError(f"template {template!r}: expected as many opening brackets as closing ones") from None


def _find_phrases(phrases: Sequence[str], wanted: str) -> tuple[str, ...]:
    return tuple(phrase for phrase in phrases if wanted in phrase.casefold())


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"got {value!r}: expected a text that is not empty")
    return value


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise InputError(f"got {values!r}: expected a list of texts")
    return tuple(map(_text, values))
