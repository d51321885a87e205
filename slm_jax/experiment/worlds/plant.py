"""Plants text that is not worth learning into documents, at known characters.

| kind | what | to a model | to a reference of clean text |
|---|---|---|---|
| `noise` | timestamps, ids, advertisements, menus, tracking codes | cannot be learnt | a surprise |
| `boilerplate` | one of 200 fixed sentences | soon known by heart | a surprise |
| `foreign` | sentences of contracts, from a small grammar | learnt like other text | a surprise |
| `wrong` | a calculation's result, altered | as hard as the right one | as hard as the right one, or harder |
"""

import random
import re
from collections.abc import Sequence

from slm_jax.errors import UserError
from slm_jax.experiment.worlds.draw import number, pick
from slm_jax.experiment.worlds.noise import MENU, MONTHS, piece_of_noise

KINDS = ("noise", "boilerplate", "foreign", "wrong")
Span = tuple[int, int]

_SENTENCE_END = re.compile(r"[.?!](?=\s|$)")
# The result of a calculation that a text spells out: "12 + 5 = 17", or GSM8K's "#### 17".
RESULT = re.compile(r"(?:= \$?|#### )(\d+)(?![\d.,]*\d)")

_ACTIONS = (
    "Subscribe to our newsletter, Sign in to your account, Accept all cookies, Download the free guide, "
    "Share this page with friends, Leave a comment below, Follow us on social media, Rate this article, "
    "Read the full terms of use, Contact the support team"
).split(", ")
_REASONS = (
    "to get weekly offers, to continue reading, for a better experience, and win a voucher, before you leave, "
    "to unlock all features, and stay up to date, to see related products, at no extra cost, within thirty days, "
    "for members only, to support this site, and save ten percent, to skip the queue, on any device, "
    "to confirm your choice, as seen on television, while stocks last, for new customers, in three easy steps"
).split(", ")
BOILERPLATE = tuple(f"{action} {reason}." for action in _ACTIONS for reason in _REASONS)

_CONTRACT = (
    "The {party} shall {duty} the {thing} within {n} days of {event}.",
    "Any {thing} under clause {n} is void unless the {party} consents in writing.",
    "Notwithstanding section {n}, the {party} may {duty} the {thing} upon {event}.",
    "The {party} warrants that the {thing} is free of any {burden}.",
    "In case of {event}, the {party} is liable for the {burden} and the {thing}.",
    "This agreement binds the {party} and its {heirs} until {event}.",
    "The {party} waives each {burden} that follows from {event}.",
)
_CONTRACT_WORDS = {
    "party": "lessee lessor licensor licensee guarantor assignee trustee contractor purchaser insurer".split(),
    "duty": "indemnify surrender disclose assign terminate register audit redeem escrow transfer".split(),
    "thing": "premises collateral licence deposit instrument covenant warranty parcel mortgage invoice".split(),
    "event": "default, termination, delivery, insolvency, arbitration, notice, expiry, force majeure".split(", "),
    "burden": "encumbrance, levy, claim, lien, penalty, surcharge, forfeiture, dispute".split(", "),
    "heirs": "successors, assigns, heirs, agents, affiliates, subcontractors".split(", "),
}


class Planter:
    """Plants into one document after another, so that the share holds over all of them.

    kinds: some of KINDS, drawn from with equal weight; empty plants nothing.
    share: in [0, 1) of the characters after planting; of `wrong`, which cannot be mixed with others, of the results.
    """

    def __init__(self, rng: random.Random, kinds: Sequence[str], share: float):
        if "wrong" in kinds and len(kinds) > 1:
            raise UserError(
                "world-wrong-mixed", "planted kind 'wrong' alters results, the others add text: plant it alone"
            )
        self._rng, self._kinds, self._share = rng, kinds, share
        self._due = 0.0  # characters, may be negative: what was planted too much before

    def plant(self, text: str, results: Sequence[Span] = ()) -> tuple[str, list[Span]]:
        """The text with its plants, and their [start, end) characters in order. A span that was added begins with the
        blank before it: without the spans the text is the one given. `results`: the calculations' results in it."""
        if not self._kinds or not self._share:
            return text, []
        if self._kinds[0] == "wrong":
            return self._alter(text, results)
        self._due += self._share / (1 - self._share) * len(text)
        added: list[tuple[int, str]] = []
        while self._due > 0:
            kind = pick(self._rng, self._kinds)
            piece = " " + _piece(self._rng, kind)
            added.append((pick(self._rng, _places(text, kind)), piece))
            self._due -= len(piece)
        return _insert(text, sorted(added, key=lambda each: each[0]))

    def _alter(self, text: str, results: Sequence[Span]) -> tuple[str, list[Span]]:
        """Results off by 1 to 9."""
        pieces, spans, last, length = [], [], 0, 0
        for start, end in results:
            if self._rng.random() >= self._share:
                continue
            right, change = int(text[start:end]), number(self._rng, 1, 9)
            wrong = str(right - change if self._rng.random() < 0.5 and right >= change else right + change)
            length += start - last
            pieces += [text[last:start], wrong]
            spans.append((length, length + len(wrong)))
            length, last = length + len(wrong), end
        return "".join([*pieces, text[last:]]), spans


def _places(text: str, kind: str) -> list[int]:
    """Where a piece may be added: noise at any blank, sentences after sentences."""
    if kind == "noise":
        places = [i for i, character in enumerate(text) if character == " "]
    else:
        places = [found.end() for found in _SENTENCE_END.finditer(text)]
    return places or [len(text)]


def _insert(text: str, added: Sequence[tuple[int, str]]) -> tuple[str, list[Span]]:
    pieces, spans, last, length = [], [], 0, 0
    for place, piece in added:
        length += place - last
        pieces += [text[last:place], piece]
        spans.append((length, length + len(piece)))
        length, last = length + len(piece), place
    return "".join([*pieces, text[last:]]), spans


def _piece(rng: random.Random, kind: str) -> str:
    if kind == "noise":
        return piece_of_noise(rng)
    if kind == "boilerplate":
        return pick(rng, BOILERPLATE)
    words = {slot: pick(rng, words) for slot, words in _CONTRACT_WORDS.items()}
    return pick(rng, _CONTRACT).format(n=number(rng, 2, 60), **words)


_WORDS = "|".join(MENU)
# A piece of noise as far as it can be told from text: what identifies it, and around that what belongs to the piece.
_GRAMMAR = re.compile(
    rf"<({'|'.join(MONTHS)})\d[\d :]*>?|\[\d{{4}}-\d[-\d :]*\]?|##\w+ says|@\w+\d:|posted by \w+\d|\(quote \w+\d\)?|"
    r"\[id [-\w]*\]?|#[A-Z]{2}-\d*|\(ref\. [-\w]*\)?|SKU [A-Z][-\w]*|"
    r"(AD: |>> )?(\w+\.example: )?\*?\d*% off \w*(( at |, )\w+\.example)?[*!]?( <<)?|(AD: |>> )?\w*\.example[:!*]?|"
    rf"({_WORDS})( [|>*] ({_WORDS}))+|[?&](utm_id|sid|gclid|ref|sess)=\w*"
)


def noise_in(text: str) -> list[Span]:
    """[start, end) characters of what a text, such as a model's sample, has of the kinds `noise` and `boilerplate`, in
    order: by the grammar that planted it."""
    spans = [found.span() for found in _GRAMMAR.finditer(text)]
    for sentence in BOILERPLATE:
        start = text.find(sentence[:-1])
        while start >= 0:
            spans.append((start, start + len(sentence) - 1))
            start = text.find(sentence[:-1], start + 1)
    return sorted(spans)
