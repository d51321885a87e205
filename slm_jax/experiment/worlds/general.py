"""General text in several styles: what a crawl holds besides the text that is wanted.

Most of it is names, codes and made-up words, as the rare words of a real crawl are to a small model: it stays hard to
predict, and so keeps taking a share of what a model learns.
"""

import random

from slm_jax.experiment.worlds.draw import characters, number, pick

# Slots in braces are filled from the lists below, or: {n} is a number, {x} a random code, {w} a made-up word and {name}
# a made-up name. " | " separates sentences.
STYLES = {
    "weather": (
        "{sky} over {name} with winds from the {wind} at {n} km/h. | Highs near {n} in {name}, lows around {n}. | "
        "A {adjective} front reaches {name} by {daytime}. | Chance of {fall} near {name} is {n} percent. | "
        "Drivers should expect {fall} on the {name} pass. | The {daytime} stays {adjective} from {name} to {name}. | "
        "Station {name} reports {n} hPa. | {name} and {name}: {fall}."
    ),
    "menu": (
        "{name} {dish} with {w} and {sauce}. | {adjective} {dish} from {name}. | Soup of the day: {w} in {sauce}. | "
        "For two: {dish} {name}, {w}, and {drink}. | {name} {drink} or {w}, {n}. | Chef {name} glazes the {dish}. | "
        "{w}, {w} or {sauce}. | Allergens: ask about {w} and {w}."
    ),
    "log": (
        "{level} {service}[{n}]: {failure} at {x}.{x}. | {level} {w}: {failure}, retrying {x}. | "
        "{level} worker {n} joined {w} as {x}-{x}. | DEBUG {service} cache {x}{x} size={n}. | "
        "{level} {service}: token {x}{x}{x} expired. | TRACE {x} {w} -> {w} {n} bytes."
    ),
    "talk": (
        "Did you see {name} {name} yesterday? | Honestly, {name} was rather {adjective}. | "
        "I liked the {part} by {name} but not the {part}. | My {relative} thinks that {name} is {adjective}. | "
        "No idea, ask {name} {name}. | Let us meet for {drink} at {name}'s. | The {part} reminded me of {name}. | "
        "Well, every {relative} in {name} says {w}. | You always say {w}, {name}!"
    ),
    "classified": (
        "For hire: {adjective} flat, {name} Street {n}. | Wanted: {job} for {name} and {name}. | "
        "Lost: {adjective} cat, answers to {name}. | {job} offers lessons in {name}. | Call {n}-{n}, ask for {name}. | "
        "Selling a {name} {x}, hardly used. | {job} seeks {adjective} room, code {x}."
    ),
    "foreign": "{w} {w} {w} {w}. | {name} {w} {w}, {w} {w} {w}. | {w} {w} {w} {w} {w}? | {w} {name} {w} {w} {name}.",
}
SLOTS = {
    "sky": "Clouds, Fog, Sunshine, Haze, Thunder, Clear sky, Drizzle, Mist",
    "wind": "north, south, east, west, northwest, southeast",
    "adjective": (
        "mild, damp, crisp, smoky, gentle, bitter, golden, heavy, quiet, tender, odd, brilliant, dull, "
        "charming, cold, slow, modern, spacious, shy, warm, clumsy, sharp, dusty, elegant, noisy, plain"
    ),
    "daytime": "evening, night, dawn, midday, weekend, dusk, midnight",
    "fall": "rain, snow, hail, sleet, frost, ice, fog, showers",
    "dish": (
        "trout, risotto, dumplings, gnocchi, lentil curry, roast duck, polenta, ravioli, goulash, mushroom pie, paella"
    ),
    "sauce": ("saffron butter, mustard cream, miso, basil oil, pepper jus, ginger broth, yoghurt, caramel, garlic oil"),
    "drink": "cider, mint tea, espresso, lemonade, red wine, cocoa, tonic, elderflower water, pale ale, black tea",
    "level": "INFO, WARN, ERROR, FATAL, NOTICE",
    "service": "gateway, scheduler, auth, mailer, indexer, storage, replica, billing, proxy",
    "failure": (
        "connection reset, lease expired, checksum mismatch, quota exceeded, handshake timeout, stale lock, "
        "out of memory, broken pipe, unknown host"
    ),
    "part": "music, ending, dialogue, camera work, costume, first act, chase, narrator, villain",
    "relative": "sister, cousin, uncle, neighbour, grandmother, flatmate, boss, dentist, brother",
    "job": "plumber, violinist, translator, gardener, welder, accountant, barista, tutor, nurse, carpenter",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
ONSETS = "b br ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t th tr v w z".split()
VOWELS = "a e i o u a e i o u ai ea ou".split()
CODAS = ("", "", "", "l", "m", "n", "nd", "r", "rk", "s", "st", "t", "x")


def _made_up(rng: random.Random) -> str:
    """A word of two or three syllables that no list holds, so that no model can know it."""
    return "".join(pick(rng, ONSETS) + pick(rng, VOWELS) for _ in range(number(rng, 2, 3))) + pick(rng, CODAS)


def _slot(rng: random.Random, name: str) -> str:
    match name:
        case "n":
            return str(number(rng, 2, 980))
        case "x":
            return characters(rng, LETTERS, number(rng, 4, 7))
        case "w":
            return _made_up(rng)
        case "name":
            return _made_up(rng).capitalize()
        case _:
            return pick(rng, SLOTS[name].split(", "))


def _filled(rng: random.Random, form: str) -> str:
    """Each slot is drawn on its own, so that one that occurs twice is filled differently."""
    pieces = form.replace("}", "{").split("{")  # text and slots in turn
    text = "".join(_slot(rng, piece) if i % 2 else piece for i, piece in enumerate(pieces))
    return text[0].upper() + text[1:]


def general_text(rng: random.Random) -> tuple[str, str]:
    """(style, text): three to seven sentences of one style."""
    style = pick(rng, tuple(STYLES))
    forms = STYLES[style].split(" | ")
    separator = "\n" if style in ("menu", "log") else " "
    return style, separator.join(_filled(rng, pick(rng, forms)) for _ in range(number(rng, 3, 7)))
