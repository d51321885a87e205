"""The words of the stories: who, when, where, and what is counted there."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where a story happens, what is counted there, and how the count goes up and down."""

    name: str
    things: list[str]
    containers: list[str]
    gains: list[str]
    losses: list[str]


def _place(name: str, things: str, containers: str, gains: str, losses: str) -> Place:
    return Place(name, *(text.split(", ") for text in (things, containers, gains, losses)))


# fmt: off
NAMES = (
    "Ada Ben Clara David Emma Farid Grace Hugo Ines Jonas Keiko Liam Maya Noah Olga Pablo Quinn Rosa Samir Tara Uma "
    "Victor Wanda Xavier Yusuf Zoe Amir Bella Carlos Dina Elias Fatima Greta Hana Ivan Julia Kofi Leila Marco Nadia "
    "Oscar Petra Ravi Sofia Theo Ursula Vera Walter Ximena Yara Zeno Anton Birgit Chen Doris Emil Flora Gustav Helga "
    "Igor Jasmin Karim Lotte Mehmet Nora Omar Paula Rashid Selma Tomas Ulla Vito Wilma Yannis Zelda Arjun Bruno Celia"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = (
    "in the morning, before lunch, at noon, in the afternoon, late in the evening, after the rain, early the next day, "
    "when the sun comes out, before closing time, during the holidays, at the end of the week, after school"
).split(", ")
GOODS = "lamps, hats, scarves, books, balls, cups, clocks, candles, maps, brushes, blankets, drums".split(", ")
PLACES = (
    _place("farm", "hens, pigs, goats, sheep, ducks, cows", "barns, pens, sheds", "are born, come from the neighbour",
           "are sold, move to another field"),
    _place("bakery", "rolls, muffins, pretzels, loaves, buns, cakes", "trays, baskets, boxes",
           "come out of the oven, are baked", "are sold, are eaten by the staff"),
    _place("library", "novels, atlases, comics, journals, cookbooks", "shelves, carts, crates",
           "are returned, are given by a reader", "are borrowed, are sent to be repaired"),
    _place("orchard", "apples, pears, plums, cherries, peaches", "baskets, crates, buckets",
           "are picked, fall from the trees", "are pressed into juice, are eaten by birds"),
    _place("harbour", "boats, ferries, barrels, nets, canoes", "docks, piers, warehouses",
           "arrive with the tide, are brought ashore", "leave for the islands, are lost in a storm"),
    _place("school", "pencils, notebooks, chairs, rulers, erasers", "classrooms, cupboards, drawers",
           "are ordered, are found in the cellar", "break, are given away"),
    _place("toy shop", "marbles, puzzles, robots, dolls, kites", "shelves, boxes, windows",
           "are delivered, are made by hand", "are bought, are wrapped as presents"),
    _place("garden", "tulips, roses, tomatoes, carrots, pumpkins", "rows, beds, pots",
           "are planted, come into bloom", "are cut, are eaten by snails"),
    _place("museum", "coins, paintings, statues, vases, masks", "rooms, glass cases, cabinets",
           "are found in the attic, are lent by a collector", "are sent to Rome, go back to their owners"),
    _place("post office", "letters, parcels, postcards, stamps", "bags, bins, vans",
           "are handed in, arrive by train", "are delivered, are sent back"),
    _place("kitchen", "plates, spoons, eggs, lemons, bowls", "cupboards, drawers, boxes",
           "are washed, are brought from the market", "are used for dinner, fall on the floor"),
    _place("workshop", "screws, bolts, planks, nails, wheels", "jars, racks, toolboxes",
           "are bought, are found under the bench", "are used for a cart, are bent and thrown away"),
    _place("pond", "frogs, fish, dragonflies, turtles, newts", "corners, inlets, pools",
           "hatch, come from the stream", "swim away, hide in the reeds"),
    _place("train station", "passengers, suitcases, bicycles, tickets", "wagons, platforms, lockers",
           "come in from the city, are counted at the gate", "go on to the coast, leave by bus"),
    _place("beach", "shells, towels, umbrellas, buckets, pebbles", "huts, bags, rows",
           "are washed up, are carried down the path", "are taken home, are swept away by a wave"),
    _place("theatre", "costumes, seats, lamps, guests, posters", "halls, rows, trunks",
           "come from the tailor, are added for the play", "are taken down, are lent to a circus"),
    _place("hospital", "bandages, beds, pillows, thermometers, blankets", "wards, cabinets, trolleys",
           "are sent by the pharmacy, are cleaned overnight", "are used up, are lent to a clinic"),
    _place("bakehouse", "pies, tarts, cookies, waffles, biscuits", "racks, tins, jars",
           "are taken from the freezer, are glazed", "are burnt, are carried to a wedding"),
    _place("airport", "planes, trolleys, pilots, helicopters, crates", "hangars, gates, terminals",
           "land from the west, roll out of the hangar", "take off, are kept for a check"),
    _place("zoo", "monkeys, penguins, zebras, parrots, lizards", "cages, islands, enclosures",
           "are rescued, arrive from another zoo", "are set free, are treated by the vet"),
    _place("office", "folders, staplers, screens, envelopes, pens", "desks, trays, cartons",
           "are unpacked, are returned by the printer", "are recycled, vanish without a trace"),
    _place("vineyard", "bottles, corks, grapes, ladders, casks", "cellars, sacks, wagons",
           "are filled, are rolled up the hill", "are shipped, are dropped on the stairs"),
    _place("stadium", "flags, tickets, drums, fans, scarves", "blocks, stands, tents",
           "are handed out, come through the tunnel", "are collected, disappear at half-time"),
    _place("castle", "knights, shields, candles, banners, swords", "towers, chambers, vaults",
           "are polished, ride in from the forest", "are hidden, are claimed by the king"),
    _place("river", "ducks, rafts, logs, salmon, kayaks", "bends, locks, jetties",
           "float down from the mountain, are tied to the bank", "drift past the mill, are pulled out"),
    _place("choir", "singers, songbooks, microphones, cushions", "benches, rows, cases",
           "join for the concert, are found backstage", "stay at home, are left on the bus"),
    _place("laboratory", "flasks, magnets, lenses, batteries, tubes", "fridges, racks, benches",
           "are calibrated, are donated by a company", "explode, are labelled wrongly"),
    _place("playground", "children, swings, balls, buckets, scooters", "sandpits, corners, huts",
           "arrive after breakfast, are repaired by parents", "go home, roll into the street"),
    _place("hotel", "keys, mirrors, guests, slippers, lanterns", "floors, suites, lobbies",
           "are checked in, are hung in the hall", "check out, are stolen"),
    _place("printing house", "calendars, maps, magazines, stickers, stamps", "bundles, pallets, drawers",
           "are printed, are cut to size", "are misprinted, are mailed abroad"),
)
# What else a sentence may say; forms are separated by " | ", an underscore is a blank.
SCENERY = (
    "It is {adjective} and {colour} outside. | The {colour} {object} stands {where}. | "
    "A {adjective} {object} lies {where}. | {name} is {feeling} {time}. | {friend} wears a {colour} {garment}. | "
    "{name} hums a {adjective} tune. | Nobody is as {feeling} as {friend}. | The wind moves the {colour} {object}. | "
    "{friend} loses the {garment}. | {friend} puts the {garment} {where}. | "
    "There is a {adjective} smell of {smell}. | {name}, who likes {smell}, is {feeling}. | "
    "{name} and {friend} are {feeling} again."
)
SCENERY_WORDS = {
    "adjective": "quiet narrow bright ancient gloomy pleasant crooked heavy tiny cosy windy sticky famous humble shiny",
    "colour": "red blue green yellow white black brown purple orange grey silver golden pink turquoise striped",
    "object": "door bench lantern ladder clock cart gate piano barrel statue bicycle carpet stove fountain mailbox",
    "garment": "coat hat scarf apron jacket glove sweater cap raincoat vest ribbon belt",
    "feeling": "happy tired curious hungry proud nervous patient cheerful bored careful sleepy surprised",
    "smell": "coffee cinnamon paint hay soap honey smoke vanilla oil flowers leather onions",
    "where": "near_the_wall under_the_roof behind_the_tree on_the_left by_the_window in_the_shade across_the_yard",
}
# fmt: on
