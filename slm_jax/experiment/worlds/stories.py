"""Small arithmetic stories: the text that the models of a world are meant to learn.

A story is a plot (a running total, two kinds put together, groups, sharing, a comparison, money, a journey) told in a
place, with every intermediate result written out. The plots keep the arithmetic as `Step`s, which a test can check.
"""

import itertools
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from slm_jax.experiment.worlds.draw import number, pick, pick_two
from slm_jax.experiment.worlds.words import DAYS, GOODS, NAMES, PLACES, SCENERY, SCENERY_WORDS, TIMES, Place


class Step(NamedTuple):
    """`left operator right = result`, with operator one of + - * /."""

    left: int
    operator: str
    right: int
    result: int


class Story(NamedTuple):
    """results: [start, end) characters of the results that the text states, once or several times each."""

    text: str
    steps: list[Step]
    place: str
    results: list[tuple[int, int]]


# Where a sentence has several forms, " | " separates them; one is drawn.
OPENINGS = (
    "{name} works at the {place}. | {name} visits the {place} {time}. | On {day}, {name} goes to the {place}. | "
    "It is {day} at the {place}, and {name} counts everything. | {name} and {friend} look after the {place}. | "
    "Every {day}, {name} helps at the {place}. | {friend} asks {name} to make a list for the {place}."
)
TOTALS = (
    "totaling {result} {what}. | which makes {result} {what} in all. | so there are {result} {what} altogether. | "
    "and {left} {sign} {right} gives {result} {what}. | and the sum is {left} {sign} {right} = {result} {what}."
)
NOW = (
    "Now there are {left} {sign} {right} = {result} {what}. | {name} counts again and finds {result} {what}. | "
    "After that, {result} {what} are there. | {friend} writes down {left} {sign} {right} = {result}. | "
    "So the {place} has {result} {what} now."
)
LEFT = "That leaves {result} {what}. | Now {result} {what} are left. | Only {left} {sign} {right} = {result} remain."
ENDINGS = (
    "How many {what} are there in the end? There are {result}. | In the end, the {place} has {result} {what}. | "
    "The answer is {result}. | {name} tells {friend} that the number is {result}. | So the result is {result} {what}. "
    "| {friend} asks how many {what} there are. The answer is {result}."
)
RESULT_MARKS = "\x02{}\x03"  # around results while a story is told
SIGNS = {"+": "+", "-": "-", "*": "x", "/": "/"}


class Teller:
    """Collects the sentences and the arithmetic of one story; `words` are what every sentence may mention."""

    def __init__(self, rng: random.Random, place: Place):
        name, friend = pick_two(rng, NAMES)
        self.rng, self.place = rng, place
        self.words = {"name": name, "friend": friend, "place": place.name}
        self.sentences: list[str] = []
        self.steps: list[Step] = []

    def say(self, forms: str, **words: object) -> None:
        moment = {"day": pick(self.rng, DAYS), "time": pick(self.rng, TIMES)}
        sentence = pick(self.rng, forms.split(" | ")).format(**self.words, **moment, **words)
        self.sentences.append(sentence[0].upper() + sentence[1:])

    def calculate(self, left: int, operator: str, right: int) -> int:
        results = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}
        self.steps.append(Step(left, operator, right, results[operator]))
        return results[operator]

    def say_result(self, forms: str, **words: object) -> None:
        """A sentence about the last step of the arithmetic."""
        step = self.steps[-1]
        result = RESULT_MARKS.format(step.result)
        self.say(forms, left=step.left, sign=SIGNS[step.operator], right=step.right, result=result, **words)


def _scenery(teller: Teller) -> None:
    """A sentence about something else, half of the time: stories are not sums alone."""
    if teller.rng.random() < 0.5:
        words = {slot: pick(teller.rng, words.split()).replace("_", " ") for slot, words in SCENERY_WORDS.items()}
        teller.say(SCENERY, **words)


def _event(teller: Teller, total: int, what: str) -> int:
    """The count of `what` goes up or down, and the new total is said."""
    rng = teller.rng
    _scenery(teller)
    goes_down = total >= 6 and rng.random() < 0.6
    change = number(rng, 2, total - 3 if goes_down else 60)
    happens = pick(rng, teller.place.losses if goes_down else teller.place.gains)
    teller.say(
        "{time}, {change} {of} {what} {happens}. | On {day}, {change} {of} {what} {happens}. | "
        "Then {change} {of} {what} {happens}. | {name} sees that {change} {of} {what} {happens}. | "
        "{friend} says that {change} {of} {what} {happens} {time}.",
        change=change,
        of="of the" if goes_down else "more",
        what=what,
        happens=happens,
    )
    total = teller.calculate(total, "-" if goes_down else "+", change)
    teller.say_result(f"{NOW} | {LEFT}" if goes_down else NOW, what=what)
    return total


def _events(teller: Teller, total: int, what: str, count: int) -> None:
    for _ in range(count):
        total = _event(teller, total, what)
    if teller.rng.random() < 0.6:
        teller.say(ENDINGS, what=what, result=RESULT_MARKS.format(total))


def _running_total(teller: Teller) -> None:
    what, total = pick(teller.rng, teller.place.things), number(teller.rng, 8, 90)
    teller.say(
        "The {place} has {total} {what}. | There are {total} {what} {time}. | {name} finds {total} {what} there. | "
        "At first {friend} counts {total} {what}.",
        what=what,
        total=total,
    )
    _events(teller, total, what, number(teller.rng, 2, 3))


def _two_kinds(teller: Teller) -> None:
    rng = teller.rng
    first, second = pick_two(rng, teller.place.things)
    a, b = number(rng, 5, 95), number(rng, 5, 95)
    total = teller.calculate(a, "+", b)
    what = f"{first} and {second}"
    start = pick(rng, ("The {place} has", "{name} counts", "{friend} knows of", "Today there are"))
    end = pick(rng, TOTALS.split(" | "))
    teller.say_result(f"{start} {{a}} {first} and {{b}} {second}, {end}", a=a, b=b, what=what)
    _events(teller, total, what, number(rng, 1, 2))


def _groups(teller: Teller) -> None:
    rng = teller.rng
    what, container = pick(rng, teller.place.things), pick(rng, teller.place.containers)
    groups, each = number(rng, 3, 12), number(rng, 3, 15)
    teller.say(
        "There are {groups} {container} with {each} {what} each. | "
        "{name} fills {groups} {container} with {each} {what} each. | "
        "Each of the {groups} {container} holds {each} {what}.",
        groups=groups,
        each=each,
        what=what,
        container=container,
    )
    total = teller.calculate(groups, "*", each)
    teller.say_result(NOW, what=what)
    _events(teller, total, what, 1)


def _sharing(teller: Teller) -> None:
    rng = teller.rng
    what, friends, each = pick(rng, teller.place.things), number(rng, 2, 9), number(rng, 3, 14)
    total = friends * each
    teller.say(
        "{name} has {total} {what}. | {friend} gives {name} {total} {what}. | {total} {what} stand ready {time}.",
        what=what,
        total=total,
    )
    teller.say(
        "They are shared equally among {friends} friends. | {name} divides them fairly by {friends}. | "
        "{friends} people want the same number of {what}.",
        friends=friends,
        what=what,
    )
    teller.calculate(total, "/", friends)
    teller.say_result(
        "Everyone gets {left} {sign} {right} = {result} {what}. | Each share is {result} {what}. | "
        "{friend} works out {left} {sign} {right} = {result}.",
        what=what,
    )
    extra = number(rng, 2, 20)
    teller.calculate(each, "+", extra)
    teller.say_result(
        "On {day}, {friend} finds {right} more and has {result}. | With {right} more, {friend} has {result} {what}.",
        what=what,
    )


def _comparison(teller: Teller) -> None:
    rng = teller.rng
    what, own = pick(rng, teller.place.things), number(rng, 4, 50)
    teller.say(
        "{name} counts {own} {what}. | {name} brings {own} {what} {time}. | There {name} finds {own} {what}.",
        own=own,
        what=what,
    )
    if rng.random() < 0.5:
        other = teller.calculate(own, "*", number(rng, 2, 5))
        teller.say_result("{friend} has {right} times as many. | {right} times that number belong to {friend}.")
    else:
        other = teller.calculate(own, "+", number(rng, 3, 40))
        teller.say_result("{friend} has {right} more than {name}. | {name} has {right} fewer than {friend}.")
    teller.say_result(
        "So {friend} has {left} {sign} {right} = {result} {what}. | That is {result} {what} for {friend}.", what=what
    )
    total = teller.calculate(own, "+", other)
    teller.say_result(
        "Together they have {left} {sign} {right} = {result} {what}. | Both together have {result} {what}. | "
        "{name} and {friend} have {result} {what} in all.",
        what=what,
    )
    _events(teller, total, what, number(rng, 0, 1))


def _money(teller: Teller) -> None:
    rng = teller.rng
    what, price, count = pick(rng, GOODS), number(rng, 2, 12), number(rng, 3, 12)
    teller.say(
        "{name} wants {count} of the {what}, and each costs ${price}. | "
        "There are {what} for ${price} each, and {name} buys {count} of them. | "
        "{friend} sells {name} {count} {what} for ${price} each.",
        what=what,
        count=count,
        price=price,
    )
    cost = teller.calculate(count, "*", price)
    teller.say_result(
        "The price is {left} {sign} {right} = {result} dollars. | {name} pays ${result} for all of them. | "
        "That comes to ${result}."
    )
    teller.calculate(cost + number(rng, 1, 50), "-", cost)
    teller.say_result(
        "{name} had ${left} and now has ${result}. | From ${left}, {result} dollars come back. | "
        "{name} hands over ${left} and gets ${result} back."
    )


def _journey(teller: Teller) -> None:
    rng = teller.rng
    daily, days = number(rng, 3, 30), number(rng, 3, 14)
    teller.say(
        "The way from the {place} is long: {name} goes {daily} km a day for {days} days. | "
        "For {days} days, {name} rides {daily} km a day to the {place}. | "
        "{name} walks {daily} km every day, and after {days} days reaches the {place}.",
        daily=daily,
        days=days,
    )
    total = teller.calculate(days, "*", daily)
    teller.say_result(
        "That is a journey of {result} km. | {left} {sign} {right} = {result} km. | {name} goes {result} km."
    )
    teller.calculate(total, "-", number(rng, 2, total - 2))
    teller.say_result(
        "{friend} takes a train for {right} km and walks only {result} km. | "
        "The path of {friend} is {right} km shorter, only {result} km."
    )


# The first two are drawn twice as often: they are nearest to the example that the stories imitate.
PLOTS: tuple[Callable[[Teller], None], ...] = (
    *(_running_total, _two_kinds) * 2,
    *(_groups, _sharing, _comparison, _money, _journey),
)


def clean_story(rng: random.Random) -> Story:
    """One story, most of four to nine sentences; all its results are right."""
    teller = Teller(rng, pick(rng, PLACES))
    if rng.random() < 0.8:
        teller.say(OPENINGS)
    _scenery(teller)
    pick(rng, PLOTS)(teller)
    pieces = re.split("\x02|\x03", " ".join(teller.sentences))  # text and results in turn
    ends = list(itertools.accumulate(map(len, pieces)))
    results = [(ends[i - 1], ends[i]) for i in range(1, len(pieces), 2)]
    return Story("".join(pieces), teller.steps, teller.place.name, results)
