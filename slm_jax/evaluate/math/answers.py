"""Where the answer stands in a model's text, and one form for all the ways in which it is written.

The order of looking, and what normalising removes, are those of the harness that Rho-1 (arXiv 2404.07965, appendix E)
evaluates with; where this differs docs/math_evaluation.md says so.
"""

import re

LONGEST = 400  # characters of an answer; what is longer is none

_FINAL = re.compile(r"final answer is \$(.*?)\$\. I hope", re.DOTALL)
_MARKS = re.compile(r"<<[^<>\n]*>>")
_NUMBER = re.compile(r"-?\d*\.?\d+")
_CHOICE = re.compile(r"(?i:answer|choice) is:?\s*\$?\(?([A-Eb-e]|a(?!\s+[a-z]))\b")

_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "}
    | {"√": r"\sqrt ", "∪": r"\cup ", "°": "", "′": "'", "\u00a0": " ", "\u202f": " ", "\0": "", "\1": ""}
)
_ROW_END = "\x00"  # stands for \\, which ends the row of a matrix, while single backslashes are looked at
_SPACING = re.compile(
    r"\\!\s*|\\[,;:> ()\[\]]|\\q?quad(?![a-zA-Z])|~|\$"
    r"|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])"
)
_TEXT = re.compile(
    r"\\(text|mbox|textnormal|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|hbox|operatorname\*?)\s*\{([^{}]*)\}"
)
_POWER = re.compile(r"\s*\^\s*(?:\d|\{\s*\d\s*\})")
_DEGREES = re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])")
_MATRIX = re.compile(r"\\(begin|end)\s*\{(?:[bB]matrix|matrix|smallmatrix|array)\}(?:\s*\{[clr| ]*\})?")
_SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\geq": r"\ge"}
_SAME |= {r"\leqslant": r"\le", r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\lbrace": r"\{", r"\rbrace": r"\}"}
_SAME |= {r"\infin": r"\infty", r"\colon": ":", r"\lbrack": "[", r"\rbrack": "]", r"\neq": r"\ne", r"\ast": r"\cdot"}
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_NAMED = re.compile(
    r"^\s*(?:\\[a-z]+|[a-zA-Z](?:_\{?\w\}?|\([a-zA-Z]\))?|[A-Za-z]{2})\s*(?:=|\\in(?![a-zA-Z]))(?=[^=]*$)"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_MIXED = re.compile(r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d./])")
_UNIT = re.compile(r"(?<=[\d)} ])([a-zA-Z][a-zA-Z./ ]+)(?:\^ *\{?\d\}?)?$")
_NO_UNITS = frozenset("pi and or sqrt sin cos tan cot sec csc log ln exp inf infinity mod am pm a.m p.m".split())
_TAKES_ARGUMENTS = re.compile(r"\\(?:frac|sqrt)(?![a-zA-Z])")
_ARGUMENT = re.compile(r"\s*(\\(?!frac|sqrt)[a-zA-Z]+|[0-9a-zA-Z])")
_SHORT_UNITS = frozenset("cm mm km kg mg ml ft lb lbs mi oz yd hr hrs min sec mph kmh cl dl dm gm rs sq cu".split())
_WORD_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}


def extract(output: str) -> str:
    """The answer as the text writes it; '' where there is none.

    Looked for in this order: "final answer is $ANSWER$. I hope"; the last \\boxed{ANSWER}; what follows the last
    "he answer is"; what follows the last "final answer is"; the last number. The calculator's marks of GSM8K,
    <<2+3=5>>, are no part of the text.
    """
    output = _MARKS.sub("", output)
    if found := _FINAL.findall(output):
        return _trim(found[0])
    if (boxed := last_boxed(output)) is not None:
        return _trim(boxed)
    for phrase in ("he answer is", "final answer is"):
        if phrase in output:
            return _trim(_sentence(output.rpartition(phrase)[2]))
    numbers = _NUMBER.findall(output.replace(",", ""))
    return numbers[-1] if numbers else ""


def extract_choice(output: str) -> str:
    """The letter A to E that the text chooses: the first behind "answer is" or "choice is", or a boxed one; or ''."""
    text = output.partition("Problem:")[0]
    if found := _CHOICE.search(text):
        return found[1].upper()
    letter = normalise(last_boxed(text) or "").upper()
    return letter if len(letter) == 1 and letter in "ABCDE" else ""


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} (or \\fbox, or \\boxed followed by one word); None where nothing does."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("boxed" if text[start + 1] == "b" else "fbox")[2].lstrip()
    if not rest.startswith("{"):
        word = re.match(r"[^$\s]+", rest)
        return word[0] if word else None
    end = closing(rest, 0)
    return rest[1:end] if end is not None else None


def closing(text: str, start: int) -> int | None:
    """The place of the brace that closes the one at `start`; None where none does."""
    depth = 0
    for place in range(start, len(text)):
        escaped = place and text[place - 1] == "\\"
        if text[place] in "{}" and not escaped:
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
    return None


def _sentence(text: str) -> str:
    """The first line, and of that what stands before the next sentence; a matrix may go on over lines."""
    text = text.strip()
    if "\\begin" not in text:
        text = text.partition("\n")[0]
    return re.split(r"(?<=[^.\s])\.\s+(?=[A-Z])", text, maxsplit=1)[0]


def _trim(answer: str) -> str:
    answer = re.sub(r"\n\s*", "" if "\\begin" not in answer else " ", answer).strip()
    return answer.lstrip(":").rstrip("/.").strip()


def normalise(answer: str, thousands: bool = True) -> str:
    """One form for the many ways of writing an answer: no spaces, units, text, percent or degree signs, \\frac{a}{b}
    for every fraction of whole numbers, whole numbers without .0 and commas, names of numbers as digits.

    thousands: 45,135 is a number; otherwise it is two. '' for what is longer than `LONGEST`.
    """
    if len(answer) > LONGEST:
        return ""
    if re.fullmatch(r"-?\d+", answer):
        return answer
    text = answer.translate(_SIGNS).strip().replace("\\\\", _ROW_END).replace("{,}", ",").replace("\\$", "")
    text = (
        _SPACING.sub(lambda found: "" if found[0].startswith("\\!") else " ", text).replace("\\%", "").replace("%", "")
    )
    if thousands and not re.search(r"[(\[]|\\\{", text):
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    text = _without_text(_DEGREES.sub("", text))
    text = _MATRIX.sub(lambda found: f"\\{found[1]}{{pmatrix}}", text)
    text = _COMMAND.sub(lambda found: _SAME.get(found[0], found[0]), text).strip().rstrip(".,;")
    text = re.sub(r"\.(?=\s*$)", "", text)
    text = re.sub(r"(?<=\S)\s*\\approx(?![a-zA-Z]).*", "", text, flags=re.DOTALL)
    text = _without_unit(re.sub(r"^(?:\\approx(?![a-zA-Z])|[€£¥]) *", "", _NAMED.sub("", text).strip()))
    text = _WORD_NUMBERS.get(text.lower(), text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?![\d.])", r"\1", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _braced(_from_plain(text))
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])", "\\1\x01", text)  # the space that ends a command
    text = re.sub(r"\s+", "", text).replace("\x01", " ")
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)
    text = re.sub(r"(?<=[0-9A-Z])_\{(\d+)\}", r"_\1", text)  # the base of a numeral
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1]
    return text.replace(_ROW_END, "\\\\")


def _without_text(text: str) -> str:
    """Text within mathematics: 'and' and 'or' separate, what stands behind a value is its unit, the rest stays."""
    pieces, place = [], 0
    for found in _TEXT.finditer(text):
        pieces.append(text[place : found.start()])
        place = found.end()
        before, inside = "".join(pieces).rstrip(), found[2].strip()
        word = inside.strip(" .,").lower()
        if word in ("and", "or"):
            pieces.append("," if not before.endswith(",") else "")
        elif word.replace(".", "") in ("am", "pm"):
            pieces.append(word.replace(".", ""))
        elif found[1].startswith("operatorname"):
            pieces.append("\\" + inside)
        elif len(found[2]) == 1 and found[1].startswith("math"):
            pieces.append(inside)
        elif before and before[-1] not in "([{,=<>+-*/^_:;&" + _ROW_END:
            power = _POWER.match(text, place)
            place = power.end() if power else place
        else:
            pieces.append(inside)
    return "".join(pieces) + text[place:]


def _without_unit(text: str) -> str:
    """Without words behind a number, such as 'square feet' or 'dollars per day'."""
    found = _UNIT.search(text)
    if not found or not re.search(r"[\d)}] *$", text[: found.start()]):
        return text
    words = [word.strip(".").lower() for word in re.split(r"[ /]+", found[1])]
    shortest = 3 if text[found.start() - 1] == " " else 4  # 3xy and 3 xy are products
    is_unit = len(words[0]) >= shortest or words[0] in _SHORT_UNITS
    return text[: found.start()].rstrip() if is_unit and _NO_UNITS.isdisjoint(words) else text


def _from_plain(text: str) -> str:
    """LaTeX for what programs print: pi, sqrt(2), 2*x**3."""
    text = re.sub(r"(?<![a-zA-Z\\])sqrt *\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\*\* *(?:(\d+)|\(([^()]*)\))", lambda found: f"^{{{found[1] or found[2]}}}", text)
    text = re.sub(r" *\* *", r"\\cdot ", text)
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", text)
    return re.sub(r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty ", text)


def _braced(text: str) -> str:
    """Braces around every argument of \\frac and \\sqrt."""
    start = 0
    while found := _TAKES_ARGUMENTS.search(text, start):
        start = place = found.end()
        for _ in range(2 if found[0] == "\\frac" else 1):
            bare = _ARGUMENT.match(text, place)
            if bare:
                text = f"{text[:place]}{{{bare[1]}}}{text[bare.end() :]}"
            place = len(text) - len(text[place:].lstrip())
            end = closing(text, place) if text[place : place + 1] == "{" else None
            if end is None:
                break
            place = end + 1
    return text
