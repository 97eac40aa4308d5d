"""The closed vocabulary of the made-up world: colors, shapes, words, labels, categories.

Every list here is an answer set, so adding or reordering an entry changes records: raise `world.WORLD_VERSION` with it.
Nothing here draws or chooses.
"""

Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "red": (222, 38, 38),
    "orange": (250, 140, 22),
    "yellow": (250, 222, 40),
    "green": (36, 160, 64),
    "blue": (40, 102, 235),
    "purple": (138, 48, 178),
    "pink": (255, 150, 200),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")

LIGHT_BACKGROUNDS: dict[str, Rgb] = {"white": (255, 255, 255), "light gray": (222, 224, 226), "cream": (246, 240, 222)}
DARK_BACKGROUNDS: dict[str, Rgb] = {"black": (16, 16, 18), "dark gray": (62, 64, 68), "navy": (24, 32, 62)}
BACKGROUNDS = LIGHT_BACKGROUNDS | DARK_BACKGROUNDS

# Three to five letters, so that a word can be large in a picture 80 pixels wide. No color and no shape among them: the
# word on a sign must not be confused with what the sign looks like.
_WORDS = """
ant ape apple arm bag ball bank bath bean bear bed bee bell bike bird boat bone book boot bowl box bread bus cake
camp car card cat chair chin city clock cloud coat coin cold cook corn cow crab cup dance day deer desk dish dog
door drum duck ear east egg exit farm film fire fish flag food fork fox frog game gate gift girl goat hand hat hill
home hope horse hotel house ice iron jam key king kite lake lamp leaf lion list lock map milk moon mouse music nail
nest night north nose ocean open paint park pen piano pizza pony pool post rain rice ring road rock room rope salt
sand seal shoe shop sing snow soap sofa south stop sugar sun table tea tent town toy train tree truck wall watch
water west wind wolf wood yard zoo
"""
WORDS = tuple(_WORDS.split())

# On signs and below bars. Few, and unlike each other, so that a toy can learn to tell them apart; no A to D (they are
# option letters) and none that looks like a digit.
ALPHABET = tuple("HLTVX")

# Category pairs whose members nobody would argue about.
CATEGORIES: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("fruit", "vegetable"): (
        ("banana", "cherry", "grape", "mango", "peach", "pear"),
        ("carrot", "onion", "potato", "cabbage", "leek", "turnip"),
    ),
    ("bird", "mammal"): (
        ("duck", "eagle", "goose", "owl", "parrot", "swan"),
        ("cow", "dog", "horse", "lion", "mouse", "wolf"),
    ),
    ("tool", "garment"): (
        ("chisel", "drill", "hammer", "rake", "saw", "wrench"),
        ("coat", "dress", "jacket", "scarf", "shirt", "sweater"),
    ),
    ("vehicle", "instrument"): (
        ("bus", "car", "ferry", "train", "tram", "truck"),
        ("cello", "drum", "flute", "guitar", "piano", "violin"),
    ),
}


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
