"""Noise as it appears in crawled text: timestamps, user names, ids, advertisements, menus, tracking codes."""

import random
import string

from slm_jax.experiment.worlds.draw import characters, number, pick

MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
MENU = (
    "Home About Contact Login Register Cart Search FAQ Archive Forum Gallery Jobs Press Newsletter Imprint Privacy "
    "Sitemap Support Downloads Partners Careers Blog Events Shop Basket Wishlist Subscribe RSS Help Terms Cookies"
).split()
OFFERS = (
    "sunglasses printers mattresses loans vitamins sneakers phones cruises sofas watches hosting toner perfume "
    "casinos tyres insurance ringtones blenders carpets drones"
).split()
LETTERS = string.ascii_lowercase
CODE = string.ascii_letters + string.digits


def _timestamp(rng: random.Random) -> str:
    time = f"{number(rng, 0, 23)}:{number(rng, 0, 59):02d}"
    if rng.random() < 0.5:
        return f"<{pick(rng, MONTHS)}{number(rng, 1, 28)} {time}>"
    return f"[{number(rng, 1998, 2024)}-{number(rng, 1, 12):02d}-{number(rng, 1, 28):02d} {time}]"


def _user(rng: random.Random) -> str:
    name = characters(rng, LETTERS, number(rng, 4, 8)) + characters(rng, string.digits, number(rng, 1, 4))
    return pick(rng, ("##{} says", "@{}:", "posted by {}", "(quote {})")).format(name)


def _identifier(rng: random.Random) -> str:
    code = characters(rng, string.ascii_uppercase, 2) + "-" + characters(rng, string.digits, number(rng, 4, 6))
    return pick(rng, ("[id {}]", "#{}", "(ref. {})", "SKU {}")).format(code)


def _advertisement(rng: random.Random) -> str:
    shop = f"{characters(rng, LETTERS, number(rng, 5, 8))}.example"
    offer = f"{number(rng, 5, 95)}% off {pick(rng, OFFERS)}"
    return pick(rng, ("*{offer} at {shop}*", "AD: {offer}, {shop}!", ">> {shop}: {offer} <<")).format(
        offer=offer, shop=shop
    )


def _menu(rng: random.Random) -> str:
    return pick(rng, (" | ", " > ", " * ")).join(pick(rng, MENU) for _ in range(number(rng, 3, 5)))


def _tracking(rng: random.Random) -> str:
    key = pick(rng, ("utm_id", "sid", "gclid", "ref", "sess"))
    return f"{pick(rng, '?&')}{key}={characters(rng, CODE, number(rng, 6, 10))}"


KINDS = (_timestamp, _user, _identifier, _advertisement, _menu, _tracking)


def piece_of_noise(rng: random.Random) -> str:
    return pick(rng, KINDS)(rng)
