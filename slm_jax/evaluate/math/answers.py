"""Finds the answer in a model's output, and normalises the many ways of writing it to one form.

The order of the search and what is removed follow the harness that Rho-1 (arXiv 2404.07965, appendix E) evaluates
with; docs/math_evaluation.md lists the differences.
"""

import re
import unicodedata

LONGEST = 400  # characters; a longer answer counts as none

_FINAL = re.compile(r"final answer is \$(.*?)\$\. I hope", re.DOTALL)
_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_NUMBER = re.compile(
    r"(?:(?<![\w)}])[-−])?\d*\.?\d+(?:[eE][-+]?\d+)?(?: ?(?:\\times|\\cdot|[×*]) ?10 ?(?:\^|\*\*) ?\{?[-−+]?\d+\}?)?"
)
_CHOICE = re.compile(r"(?i:answer|choice) is:?\s*\$?\(?([A-Eb-e]|a(?!\s+[a-z]))\b")
# What may follow an answer in its sentence. The second kind only follows a number: "true for all x" is one answer.
_REASON = r"[,;]?\s+\(?(?:because|since|which|thus|hence|therefore|but|so)\b|\s+[–—]\s"
_REMARK = (
    r"[,;]?\s+\(?(?:as|where|when|if|for|given|by|after|on|altogether|in (?:total|all|the end))\b"
    r"|[,;]\s+(?!(?:and|or|pi|inf|infinity|sqrt|sin|cos|tan|log|ln)\b)[a-z]{2,}\b(?!\s*[=<>])"
    r"|\s+and\s+(?:the|that|this|it|we|he|she|they|there)\b|:\s+(?=[^:]*[a-z]{2})|\s+\((?=[a-zA-Z]{2,}|[^()]*=)"
)
_LEAD = re.compile(r"(?:(?:approximately|about|roughly|therefore|thus|indeed|simply|exactly|just|equal to)\s+)+")

_FORMULA_SIGNS = (
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "•": r"\cdot ", "÷": "/", "±": r"\pm "}
    | {"∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx "}
    | {"√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "}
    | {"∅": r"\emptyset ", "⌀": r"\emptyset ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "º": r"^\circ ", "⁄": "/"}
    | {"′": "'", "’": "'", "\u200b": "", "\0": "", "\1": "", "\2": ""}
    | {"“": "", "”": "", '"': "", "∠": r"\angle "}
)
_SIGNS = str.maketrans(_FORMULA_SIGNS)
_UNICODE_ROOT = re.compile(r"([√∛∜]) ?(?:(\d+(?:\.\d+)?|[a-zA-Zπ])|\(([^()]*)\))")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_GREEK = re.compile("[α-ρσ-ωΓΔΘΛΞΠΣΦΨΩ]")

_ROW_END = "\x00"  # replaces \\, the end of a matrix row, while single backslashes are processed
_SPACING = re.compile(
    r"\\!\s*|\\[,;:> ()\[\]]|\\q?quad(?![a-zA-Z])|~|\$"
    r"|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])"
)
_TEXT = re.compile(
    r"\\(text|mbox|textnormal|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|hbox|operatorname\*?)\s*\{([^{}]*)\}"
)
_POWER = re.compile(r"\s*\^\s*(?:\d|\{\s*\d\s*\})")
_DEGREES = re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])")
_TRIGONOMETRIC = re.compile(r"(?<![a-zA-Z])\\?(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_MATRIX = re.compile(r"\\(begin|end)\s*\{(?:[bB]matrix|matrix|smallmatrix|array)\}(?:\s*\{[clr| ]*\})?")
_SYSTEM = re.compile(r"\\begin\s*\{cases\}([^&]*?)\\end\s*\{cases\}")  # with & it is a function by cases
_SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\geq": r"\ge"}
_SAME |= {r"\leqslant": r"\le", r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\lbrace": r"\{", r"\rbrace": r"\}"}
_SAME |= {r"\infin": r"\infty", r"\colon": ":", r"\lbrack": "[", r"\rbrack": "]", r"\neq": r"\ne", r"\ast": r"\cdot"}
_SAME |= {r"\varnothing": r"\emptyset", r"\bar": r"\overline", r"\lor": " or ", r"\vee": " or ", r"\land": " and "}
_SAME |= {r"\wedge": " and ", r"\ldots": "...", r"\dots": "...", r"\tbinom": r"\binom", r"\dbinom": r"\binom"}
_SAME |= {r"\langle": "(", r"\rangle": ")"}
_COMMAND = re.compile(r"\\[a-zA-Z]+")
NAME = (
    r"(?:m?\\angle *[A-Z]{1,3}|\\[a-zA-Z]+|[a-zA-Z](?:_\{?\w\}?|\([a-zA-Z]\))?|[A-Za-z]{2,}"
    r"|\([a-zA-Z](?:, *[a-zA-Z])+\))"
)
_NAMED = re.compile(rf"\s*({NAME})\s*(?:=|\\in(?![a-zA-Z]))(?=[^=]*$)")
_INTRODUCTION = re.compile(r"^\s*(?:either |both |(?:[A-Za-z]{2,} +)+(?:is|are|equals) +(?=\S))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,^_{/])(?<!\d )(\d{1,3}(?: \d{3})+)(?! ?[\d/])")
_REALS_BUT_ONE = re.compile(r"\\mathbb\{R\}(?:\\setminus|\\backslash|-)\\\{([^{},]*)\\\}")
_MIXED = re.compile(r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d./])")
_TIME = re.compile(r"(?<=\d) *([ap])\.? ?m(?:\.|(?![a-zA-Z]))", re.IGNORECASE)
_BASE = re.compile(r"(?:(?<=[0-9A-Z])|\(([0-9A-Z]+)\)) *_ *\{? *\(?(?:base *)?([0-9]+|[a-z]+)\)? *\}?$")
_BASE_IN_WORDS = re.compile(r"(?<=[0-9A-Z]) *\(?(?:in )?base[ -]*([0-9]+|[a-z]+)\)?$")
_REPEATED = re.compile(r"(?<=\.)(\d*?)(\d+?)\2{2,}\.\.\.$")
_CURRENCY = re.compile(r"^(?:\\approx(?![a-zA-Z])|[€£¥]|(?:USD?|EUR|Rs\.?) ?(?=\d)) *")
_UNIT = re.compile(r"(?<=[\d)} ])([a-zA-Z][a-zA-Z./ ]+)(?:\^ *\{?\d\}?)?$")
_NO_UNITS = frozenset("pi and or sqrt sin cos tan cot sec csc log ln exp inf infinity mod am pm a.m p.m".split())
_SHORT_UNITS = frozenset("cm mm km kg mg ml ft lb lbs mi oz yd hr hrs min sec mph kmh cl dl dm gm rs sq cu".split())
_TAKES_ARGUMENTS = re.compile(r"\\(?:frac|sqrt|overline)(?![a-zA-Z])(?:\[\d\])?")
_ARGUMENT = re.compile(r"\s*(\\(?!frac|sqrt)[a-zA-Z]+|[0-9a-zA-Z])")
_WORD_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
_ASKING = re.compile(r"\?|\b(?:find|express|give|calculate|compute|determine|write|round|answer|what|how)\b", re.I)
_PERCENT = re.compile(r"(?<![\d.}\\])(?<!\d )(?<!\d\$)(?<!\d-)(?:per ?cent(?:age)?s?\b|\\?%)", re.I)


def extract(output: str) -> str:
    """The answer as the output writes it; '' if there is none.

    The first of these counts: "final answer is $ANSWER$. I hope"; the last \\boxed{ANSWER}; what follows the last
    "he answer is"; what follows the last "final answer is"; the last number. GSM8K's calculator marks <<2+3=5>> are
    ignored.
    """
    output = _CALCULATOR_MARK.sub("", output)
    if found := _FINAL.findall(output):
        return _trim(found[0])
    if (boxed := last_boxed(output)) is not None:
        return _trim(boxed)
    for phrase in ("he answer is", "final answer is"):
        if phrase in output:
            return _trim(_clause(output.rpartition(phrase)[2]))
    numbers = _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", output))
    return numbers[-1] if numbers else ""


def extract_choice(output: str) -> str:
    """The letter A to E that the output chooses: the first after "answer is" or "choice is", or a boxed one; or ''."""
    text = output.partition("Problem:")[0]
    if found := _CHOICE.search(re.sub(r"\*\*|__|`", "", text)):
        return found[1].upper()
    letter = normalise(last_boxed(text) or "").upper()
    return letter if len(letter) == 1 and letter in "ABCDE" else ""


def asks_percent(question: str) -> bool:
    """Whether a question asks for a percentage. "What is 10% of 50?" mentions one and asks for none."""
    sentences = re.split(r"(?<=[.?!])\s+", question)
    asking = [sentence for sentence in sentences if _ASKING.search(sentence)] or sentences[-1:]
    return any(_PERCENT.search(sentence) for sentence in asking)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} (or \\fbox, or \\boxed and one word); None if there is none."""
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
    """The position of the brace that closes the one at `start`; None if none does."""
    depth = 0
    for place in range(start, len(text)):
        escaped = place and text[place - 1] == "\\"
        if text[place] in "{}" and not escaped:
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
    return None


def _clause(text: str) -> str:
    """The answer that "the answer is" announces, without Markdown, the next sentence and remarks on it."""
    # The first line, or the line after "is:"; a matrix and a displayed formula continue over lines.
    opened = re.match(r'[\s:]*([*_`"“]*)[\s:]*', text)
    assert opened
    text = _LEAD.sub("", re.sub(r"^(\$\$|\\\[)\s*", r"\1", text[opened.end() :]), count=1)
    if "\\begin" not in text:
        text = text.partition("\n")[0]
    text = re.split(r"(?<=[^.\s])\.[*_`]*\s+(?=[A-Z])|(?<=\d)\.\s", text, maxsplit=1)[0]
    # Emphasis ends before a space or a stop; ** in 2**3 is a power.
    marks = "|".join(map(re.escape, {"**", "__", "`", opened[1] or "**"}))
    text = re.sub(rf"(?<=\S)(?:{marks})(?=[\s.,;:!?)]|$)", "", text)
    for found in re.finditer(f"({_REASON})|{_REMARK}", text):
        before = text[: found.start()]
        sure = found[1] or re.search(r"\d", before) or before.strip(" $").lower() in ("yes", "no", "true", "false")
        if before and sure and before.count("(") == before.count(")"):
            return before
    return text


def _trim(answer: str) -> str:
    answer = re.sub(r"\n\s*", "" if "\\begin" not in answer else " ", answer).strip()
    return answer.lstrip(":").rstrip("/.").strip()


def normalise(answer: str, thousands: bool = True, names: bool = False) -> str:
    """One form for the many ways of writing an answer: no spaces, units, text, percent or degree signs; \\frac{a}{b}
    for every fraction of whole numbers; whole numbers without .0 and commas; number words as digits.

    Args:
        answer: as written; '' comes back for more than `LONGEST` characters.
        thousands: 45,135 is one number; otherwise it is two.
        names: x=5 stays; otherwise it is 5.
    """
    if len(answer) > LONGEST:
        return ""
    if re.fullmatch(r"-?\d+", answer):
        return answer
    text = _formula(answer, thousands)
    # What the answer is called, and the values themselves.
    name = _NAMED.match(text)
    values = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), text[name.end() if name else 0 :].strip())
    values = values.split(",") if not re.search(r"[(\[{]", values) else [values]
    text = ",".join(_value(value.strip()) for value in values)
    text = re.sub(r"^\\mathbb\{?R\}?$|^allreal(?:s|numbers)$", r"(-\\infty,\\infty)", text)
    text = _REALS_BUT_ONE.sub(r"(-\\infty,\1)\\cup(\1,\\infty)", text)
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1]
    text = f"{re.sub(' ', '', name[1])}={text}" if name and names and text else text
    return text.replace(_ROW_END, "\\\\")


def _formula(text: str, thousands: bool) -> str:
    """LaTeX with one spelling for each sign, without layout, units in \\text, percent and degree signs."""
    # 10,\!000 and 1{,}000 are one number wherever they occur, 1,000 only outside of brackets.
    text = _from_unicode(text).strip().replace("\\\\", _ROW_END).replace("\\$", "")
    text = re.sub(r"(?<=\d)(?:\{,\}|\s*,\s*\\!\s*)(?=\d{3})|(?<=\d), +(?=000(?!\d))", "", text).replace("{,}", ",")
    text = _SPACING.sub(lambda found: "" if found[0].startswith("\\!") else " ", text)
    text = re.sub(r"\\?%|(?<=\w) per ?cent\b", "", text)
    if (thousands or re.search(r",\s", text)) and not re.search(r"[(\[]|\\\{", text):
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    if _TRIGONOMETRIC.search(text):
        text = re.sub(rf"(\d+(?:\.\d+)?) *(?:{_DEGREES.pattern})", r"(\\frac{\1\\pi}{180})", text)
    # Words and commands.
    text = _TIME.sub(lambda found: f"{found[1].lower()}m", _without_text(_DEGREES.sub("", text)))
    text = re.sub(r"(?<=\d) *o'?clock\b", ":00", text)
    text = _SYSTEM.sub(lambda found: found[1].replace(_ROW_END, ","), text)
    text = _MATRIX.sub(lambda found: f"\\{found[1]}{{pmatrix}}", text)
    text = _COMMAND.sub(lambda found: _SAME.get(found[0], found[0]), text).strip().rstrip(",;")
    text = _REPEATED.sub(r"\1\\overline{\2}", text).rstrip(".,;")
    text = re.sub(r"(?<=\S)\s*\\approx(?![a-zA-Z]).*", "", text, flags=re.DOTALL)
    return re.sub(r"\s*,?\s+(?:and|or)\s+|\s*;\s*", ",", _INTRODUCTION.sub("", text))


def _value(text: str) -> str:
    """The form of one value, or of a list in brackets."""
    text = _without_unit(_CURRENCY.sub("", text))
    text = _WORD_NUMBERS.get(text.lower(), text)
    text = _BASE_IN_WORDS.sub(lambda found: f"_{_WORD_NUMBERS.get(found[1], found[1])}", text)
    text = _BASE.sub(lambda found: f"{found[1] or ''}_{_WORD_NUMBERS.get(found[2], found[2])}", text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?![\d.\\])", r"\1", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    # LaTeX for what programs print: pi, sqrt(2), 2*x**3, sin(x), x>=3.
    for sign, command in ((">=", r"\ge "), ("<=", r"\le "), ("!=", r"\ne ")):
        text = text.replace(sign, command)
    text = re.sub(r"(?<![a-zA-Z\\])sqrt *\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\*\* *(?:(\d+)|\(([^()]*)\))", lambda found: f"^{{{found[1] or found[2]}}}", text)
    text = re.sub(r" *\* *|(?<=\d) ?x ?(?=10 ?\^)", r"\\cdot ", text)
    text = re.sub(r"(?<![a-zA-Z\\])(pi|sin|cos|tan|cot|sec|csc|log|ln)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty ", text)
    text = _braced(text)
    text = re.sub(r"\^ *(\d)\s+(?=\d)", r"^{\1}\\cdot ", text)  # in TeX, 2^3 4 is a product
    text = re.sub(r"(\\log_)(\d)\s+(?=\d)", r"\1{\2}", text)
    # Spaces end a command, and separate digits: "1 2" is not 12.
    text = re.sub(r"(\\[a-zA-Z]+) +(?=[a-zA-Z])", "\\1\x01", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\x01", text)
    text = re.sub(r"\s+", "", text).replace("\x01", " ")
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![^(\[{,=<>])\+", "", text)
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)
    text = re.sub(r"(?<=[0-9A-Z])_\{(\d+)\}", r"_\1", text)  # the base of a numeral
    return r"\emptyset" if text == r"\{\}" else text


def _from_unicode(text: str) -> str:
    """LaTeX for signs outside of ASCII: ½, x², √13, θ, ≤."""
    if text.isascii():
        return text.replace('"', "")
    text = "".join(
        "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("⁄"))
        if unicodedata.decomposition(sign).startswith("<fraction>") and len(unicodedata.normalize("NFKC", sign)) > 2
        else sign
        for sign in text
    )
    text = _RAISED.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = _UNICODE_ROOT.sub(lambda found: f"{_FORMULA_SIGNS[found[1]].strip()}{{{found[2] or found[3]}}}", text)
    for letter in set(_GREEK.findall(text)):
        name = unicodedata.name(letter).split()[-1].replace("LAMDA", "LAMBDA")
        text = text.replace(letter, f"\\{name.lower() if letter.islower() else name.capitalize()} ")
    return unicodedata.normalize("NFKC", text.translate(_SIGNS))


def _without_text(text: str) -> str:
    """Text in a formula: 'and' and 'or' separate, what follows a value is its unit, everything else stays."""
    pieces, place = [], 0
    for found in _TEXT.finditer(text):
        pieces.append(text[place : found.start()])
        place = found.end()
        before, inside = "".join(pieces).rstrip(), found[2].strip()
        word = inside.strip(" .,").lower()
        if word in ("and", "or"):
            pieces.append("," if not before.endswith(",") else "")
        elif word == "base":
            pieces.append(" base ")
        elif re.fullmatch(r"[ap]\.? ?m", word):
            pieces.append(word[0] + "m")
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
    """Without words that follow a number, such as 'square feet' or 'dollars per day'."""
    found = _UNIT.search(text)
    if not found or not re.search(r"[\d)}] *$", text[: found.start()]):
        return text
    words = [word.strip(".").lower() for word in re.split(r"[ /]+", found[1])]
    shortest = 3 if text[found.start() - 1] == " " else 4  # 3xy and 3 xy are products
    is_unit = (len(words[0]) >= shortest or words[0] in _SHORT_UNITS) and words[0] != "base"
    return text[: found.start()].rstrip() if is_unit and _NO_UNITS.isdisjoint(words) else text


def _braced(text: str) -> str:
    """Braces around every argument of \\frac, \\sqrt and \\overline."""
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
