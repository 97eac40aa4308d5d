"""Questions about a scene, in the four groups of Cambrian-1's benchmarks: `ask(scene, groups, turns, rng)`.

general (what, color, how many), knowledge (needs no image), ocr_chart (read a letter, number, word, or bar chart) and
vision_centric (what is in one half or beside another object; left or right, above or below, nearer or farther, relative
distance, of objects that are named by their shape, so that they have to be recognized). Answers are one or two
words; an eighth of the questions offers options and wants a letter. What is true comes from `facts`, `knowledge`.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from numpy.random import Generator

from vlm_lab.data.scenes import facts, knowledge
from vlm_lab.data.scenes.facts import Fact
from vlm_lab.data.scenes.layout import pick, shuffled
from vlm_lab.data.scenes.world import Scene

Template = Callable[[Scene, Generator], Iterator[Fact]]

TEMPLATES: dict[str, tuple[Template, ...]] = {
    "general": (facts.shape_by_color, facts.color_by_shape, facts.color_of_sign, facts.count),
    "knowledge": (knowledge.total, knowledge.difference, knowledge.neighbor, knowledge.category),
    "ocr_chart": (
        facts.sign_text,
        facts.label_of_bar,
        facts.color_of_bar,
        facts.value_of_bar,
        facts.taller_shorter,
    ),
    "vision_centric": (
        facts.shape_in_half,
        facts.shape_beside,
        facts.left_right,
        facts.above_below,
        facts.closer,
        facts.nearer,
    ),
}
GROUPS = tuple(TEMPLATES)

# What a conversation asks, by kind of scene: the groups take turns, each as often as it stands here. Only some scenes
# have something to read, and those make up for the others.
TURNS: dict[str, tuple[str, ...]] = {
    "alone": ("general", "vision_centric", "knowledge"),
    "two": ("vision_centric", "general", "knowledge"),
    "objects": ("general", "vision_centric", "knowledge"),
    "depth": ("vision_centric", "general", "knowledge"),
    "text": ("ocr_chart", "general", "ocr_chart", "general", "knowledge"),
    "chart": ("ocr_chart", "general", "ocr_chart", "ocr_chart", "ocr_chart", "knowledge"),
}

WORDINGS: dict[str, tuple[str, ...]] = {
    "shape": ("What shape is the {color} object?", "Which shape does the {color} object have?"),
    "color": ("What color is the {thing}?", "Which color does the {thing} have?"),
    "count": ("How many {things} are there?", "How many {things} are in the image?"),
    "sum": ("What is {a} plus {b}?", "{a} + {b} = ?"),
    "difference": ("What is {a} minus {b}?", "{a} - {b} = ?"),
    "neighbor": ("Which letter comes {which} {letter}?", "What letter is {which} {letter} in the alphabet?"),
    "category": ("Is {item} {a} or {b}?",),
    "sign_text": ("What {what} is written on the {sign}?", "Read the {what} on the {sign}."),
    "label_of_bar": ("Which bar is the {which}?", "What is the label of the {which} bar?"),
    "value_of_bar": ("What is the value of {bar}?", "How high is {bar}?"),
    "shape_in_half": ("What shape is in the {half} half?", "Which shape is in the {half} half of the image?"),
    "shape_beside": ("What shape is {side} {b}?", "Which shape is {side} {b}?"),
    "left_right": ("Is {a} to the left or to the right of {b}?", "Is {a} left or right of {b}?"),
    "above_below": ("Is {a} above or below {b}?", "Compared to {b}, is {a} above or below?"),
    "taller_shorter": ("Is {a} taller or shorter than {b}?", "Compared to {b}, is {a} taller or shorter?"),
    "closer": ("Which is closer to {to}: {a} or {b}?", "What is closer to {to}, {a} or {b}?"),
    "nearer": ("Which is {which} the viewer: {a} or {b}?", "What is {which} the viewer, {a} or {b}?"),
}
# With options these would have too many different texts for a small training set to cover.
OPEN_ONLY = ("sum", "difference", "neighbor")
OPTION_SHARE = 0.125
LETTERS = "ABCD"
INSTRUCTION = "Answer with the option's letter."


@dataclass(frozen=True)
class Question:
    """`choices` is empty for an open question. `chance` is what guessing from the question alone scores.

    `answer` is an option's letter if there are options, and that of `fact` otherwise.
    """

    group: str
    template: str
    prompt: str
    answer: str
    choices: tuple[str, ...]
    chance: float
    fact: Fact


def bears(kind: str, groups: Sequence[str]) -> bool:
    """Whether scenes of this kind have something to ask in any of the groups."""
    return any(group in groups for group in TURNS[kind])


def ask(scene: Scene, groups: Sequence[str], turns: int, rng: Generator) -> list[Question]:
    """Up to `turns` different questions on one scene, in random order; at least one if the scene bears the groups."""
    waiting = shuffled(rng, [group for group in TURNS[scene.kind] if group in groups])
    told: set[Hashable] = set()
    wells = {group: _well(scene, group, told, rng) for group in waiting}
    asked: list[Question] = []
    while waiting and len(asked) < turns:
        group = waiting.pop(0)
        fact = next(wells[group], None)
        if fact is not None:
            asked.append(word(group, fact, WORDINGS[fact.template], rng))
            if group != "knowledge" or len(wells) == 1:  # it never runs dry: beside others it has one turn
                waiting.append(group)
    return shuffled(rng, asked)


def _well(scene: Scene, group: str, told: set[Hashable], rng: Generator) -> Iterator[Fact]:
    """The group's facts about this scene, without those `told` already, one template after the other."""
    # Only the few depth scenes can be asked what is nearer, so there it goes first.
    templates = sorted(shuffled(rng, TEMPLATES[group]), key=lambda each: not (scene.fronts and each is facts.nearer))
    running = [template(scene, rng) for template in templates]
    while running:
        source = running.pop(0)
        fact = next((fact for fact in source if fact.key not in told), None)
        if fact is not None:
            told.add(fact.key)
            running.append(source)
            yield fact


def word(group: str, fact: Fact, wordings: Sequence[str], rng: Generator) -> Question:
    """A fact as a question in one of the wordings, open or with options."""
    prompt = pick(rng, wordings).format(**fact.slots)
    if fact.template in OPEN_ONLY or rng.random() >= OPTION_SHARE:
        return Question(group, fact.template, prompt, fact.answer, (), 1 / len(fact.pool), fact)
    others = [answer for answer in fact.pool if answer != fact.answer]
    choices = tuple(shuffled(rng, [fact.answer, *shuffled(rng, others)[: len(LETTERS) - 1]]))
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    prompt = "\n".join([prompt, *options, INSTRUCTION])
    return Question(group, fact.template, prompt, LETTERS[choices.index(fact.answer)], choices, 1 / len(choices), fact)
