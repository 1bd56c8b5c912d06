"""Questions with checkable answers, and the conversations phi-4-nano is trained and tested on.

Which questions are held out follows from a hash of their key; it knows no tokens and no model.
"""

import hashlib
import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nano.vocabulary import (
    CAPITALS,
    COLOURS,
    ENDINGS,
    FOODS,
    HELD_OUT_NAMES,
    MESSAGES,
    NAMES,
    NOUNS,
    ROOMS,
    SPORTS,
    SYLLABLES,
    TOOLS,
    WEATHER,
)

Message = dict[str, Any]
HELD_OUT_SHARE = 8  # one key in eight is never trained
CITIES = tuple(CAPITALS.values())
SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "Answer in one word.",
    "Be brief.",
)
ADD = ("What is {a} + {b}?", "{a}+{b}", "{a} + {b} =", "Add {a} and {b}.", "what is {a}+{b}?",
       "How much is {a} plus {b}?", "Calculate {a} + {b}.",
       "What is the sum of {a} and {b}?")  # fmt: skip
SUBTRACT = ("What is {a} - {b}?", "{a}-{b}", "{a} - {b} =", "Subtract {b} from {a}.",
            "what is {a}-{b}?", "How much is {a} minus {b}?", "Calculate {a} - {b}.")  # fmt: skip
MULTIPLY = ("What is {a} * {b}?", "{a}*{b}", "{a} * {b} =", "Multiply {a} by {b}.",
            "what is {a}*{b}?", "How much is {a} times {b}?", "Calculate {a} * {b}.")  # fmt: skip
CAPITAL = ("What is the capital of {country}?", "Which city is the capital of {country}?",
           "Name the capital of {country}.", "Capital of {country}?",
           "what is the capital of {country}", "Tell me the capital city of {country}.",
           "What's the capital of {country}?")  # fmt: skip
COUNTRY = ("{city} is the capital of which country?", "Which country has the capital {city}?",
           "In which country is {city}?", "Where is {city}?")  # fmt: skip
TRANSLATE = ('Translate "{word}" into {language}.', "How do you say {word} in {language}?",
             "What is the {language} word for {word}?", "Translate {word} to {language}.",
             "{word} in {language}?", "What is {word} in {language}?")  # fmt: skip
LANGUAGES = {"German": 2, "French": 3, "Spanish": 4}  # columns of NOUNS
WORD: dict[str, tuple[str, ...]] = {
    "upper": ("Write {word} in capital letters.", "Put {word} in upper case.",
              "Uppercase the word {word}.", "What is {word} in capital letters?"),
    "first": ("What is the first letter of {word}?", "Which letter does {word} start with?",
              "First letter of {word}?", 'With which letter does "{word}" begin?'),
    "last": ("What is the last letter of {word}?", "Which letter does {word} end with?",
             "Last letter of {word}?", 'With which letter does "{word}" end?'),
    "count": ("How many letters are in {word}?", "How many letters does {word} have?",
              "Count the letters in {word}.", 'How long is the word "{word}"?'),
    "plural": ("What is the plural of {word}?", "Plural of {word}?",
               "Give the plural of {word}.", "One {word}, two what?"),
    "spell": ("Spell {word}.", "How do you spell {word}?", 'Spell the word "{word}".',
              "Can you spell {word}?"),
}  # fmt: skip
FAVOURITES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "food": FOODS,
    "sport": SPORTS,
    "animal": ("bird", "cat", "cow", "dog", "fish", "horse", "mouse", "wolf"),
    "city": CITIES,
    "country": tuple(CAPITALS),
}
SMALL_TALK = (
    (("Hello", "Hi", "Hello!", "Hi!", "Good morning", "hello", "Hey"), "Hello! Ask me something."),
    (("Who are you?", "What are you?", "What is your name?", "Are you Phi?"),
     "I am phi-4-nano, a tiny demonstration model."),
    (("What can you do?", "Help", "What do you know?", "help"),
     "Small sums, capitals, words, translations and tool calls."),
    (("Thanks", "Thank you", "Thank you!", "Thanks!"), "You are welcome."),
    (("Bye", "Goodbye", "Bye!", "See you"), "Goodbye!"),
)  # fmt: skip
NO_TOOL = "I have no tool for that."


@dataclass(frozen=True)
class Turn:
    """One user message with its right answer; `key` decides whether it is held out."""

    kind: str
    key: tuple[Any, ...]
    user: str
    answer: str = ""
    call: Message | None = None  # {"name", "arguments"} where the answer is a tool call


@dataclass(frozen=True)
class Mix:
    """What training text is made of. Shares and probabilities, except for `facts`."""

    weights: tuple[float, float, float, float]  # of SINGLES
    repeat: float  # of a turn that is said back
    memory: float  # of a turn that is asked about later
    common: float  # of names, those from NAMES; the others are made up,
    spliced: float  # of parts of real names rather than of syllables,
    initials: float  # and given another first letter
    facts: bool  # whether lists of facts are asked about


# Facts are learned soon, sums later, copying an unknown name last: the mixes follow that order.
# Looking things up in lists was not learned within the first 80 rounds, so the last mix drops it.
MIXES = {  # first round: mix
    0: Mix((0.46, 0.14, 0.2, 0.2), 0.0, 0.12, common=0.4, spliced=0.0, initials=0.0, facts=True),
    45: Mix((0.61, 0.13, 0.13, 0.13), 0.12, 0.22, 0.4, spliced=0.6, initials=0.0, facts=True),
    80: Mix((0.55, 0.17, 0.14, 0.14), 0.2, 0.24, 0.15, spliced=0.7, initials=0.3, facts=False),
}
FIRST_MIX, *_, LAST_MIX = MIXES.values()


def held_out(key: tuple[Any, ...]) -> bool:
    """Whether a key belongs to the held-out eighth: a pure function of the key."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


# -- single questions -------------------------------------------------------------------------


def arithmetic(rng: random.Random, mix: Mix) -> Turn:
    """A sum or difference of numbers below 100 (held out by operands), or a product to 10 x 10."""
    operation = rng.choices(("add", "subtract", "multiply"), (5, 4, 2))[0]
    if operation == "multiply":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        form = rng.randrange(len(MULTIPLY))
        key: tuple[Any, ...] = (operation, a, b, form)
        return Turn("arithmetic", key, MULTIPLY[form].format(a=a, b=b), str(a * b))
    limit = 9 if rng.random() < 0.1 else 99
    a, b = rng.randint(0, limit), rng.randint(0, limit)
    if operation == "add":
        key = (operation, min(a, b), max(a, b))
        return Turn("arithmetic", key, rng.choice(ADD).format(a=a, b=b), str(a + b))
    a, b = max(a, b), min(a, b)
    return Turn("arithmetic", (operation, a, b), rng.choice(SUBTRACT).format(a=a, b=b), str(a - b))


def capital(rng: random.Random, mix: Mix) -> Turn:
    """A country's capital or a capital's country, held out by phrasing and country."""
    country, city = rng.choice(tuple(CAPITALS.items()))
    reverse = rng.random() < 0.3
    forms, answer = (COUNTRY, country) if reverse else (CAPITAL, city)
    form = rng.randrange(len(forms))
    user = forms[form].format(country=country, city=city)
    return Turn("capital", ("capital", reverse, country, form), user, answer)


def translation(rng: random.Random, mix: Mix) -> Turn:
    """A noun in German, French or Spanish, held out by phrasing, word and language."""
    noun, language = rng.choice(NOUNS), rng.choice(tuple(LANGUAGES))
    form = rng.randrange(len(TRANSLATE))
    user = TRANSLATE[form].format(word=noun[0], language=language)
    return Turn("translation", ("translate", noun[0], language, form), user,
                noun[LANGUAGES[language]])  # fmt: skip


def word(rng: random.Random, mix: Mix) -> Turn:
    """Capital letters, first and last letter, length, plural, spelling: held out by phrasing."""
    noun, task = rng.choice(NOUNS), rng.choice(tuple(WORD))
    form, text = rng.randrange(len(WORD[task])), noun[0]
    answer = {
        "upper": text.upper(),
        "first": text[0],
        "last": text[-1],
        "count": str(len(text)),
        "plural": noun[1],
        "spell": "-".join(text),
    }[task]
    return Turn("word", ("word", task, text, form), WORD[task][form].format(word=text), answer)


def small_talk(rng: random.Random) -> Turn:
    """Greetings and the model's own description: trained, never asked as a held-out question."""
    users, answer = rng.choice(SMALL_TALK)
    return Turn("small talk", ("talk",), rng.choice(users), answer)


SINGLES: dict[str, Callable[[random.Random, Mix], Turn]] = {
    "arithmetic": arithmetic,
    "capital": capital,
    "word": word,
    "translation": translation,
}


def draw(kind: str, rng: random.Random, held: bool, mix: Mix) -> Turn:
    """Sample questions of a kind until one is on the wanted side of the held-out line."""
    while True:
        turn = SINGLES[kind](rng, mix)
        if held_out(turn.key) == held:
            return turn


def repeat(rng: random.Random, mix: Mix) -> Turn:
    """A name or number to say back: trained, never asked as a held-out question."""
    value = name(rng, False, mix) if rng.random() < 0.6 else str(rng.randint(0, 9999))
    form = rng.choice(("Repeat {}.", "Say {}.", "Repeat after me: {}.", "Say it again: {}."))
    return Turn("repeat", ("repeat",), form.format(value), value)


def single(rng: random.Random, mix: Mix) -> Turn:
    """One training question of any single-turn kind, now and then small talk."""
    if rng.random() < 0.02:
        return small_talk(rng)
    if mix.repeat and rng.random() < mix.repeat:
        return repeat(rng, mix)
    return draw(rng.choices(tuple(SINGLES), mix.weights)[0], rng, False, mix)


# -- conversations: each returns its turns; the last one is the question under test -----------


def name(rng: random.Random, held: bool, mix: Mix) -> str:
    """A person's name: from the held-out list, the common ones, or made up."""
    if held:
        return rng.choice(HELD_OUT_NAMES)
    if rng.random() < mix.common:
        return rng.choice(NAMES)
    if mix.spliced and rng.random() < mix.spliced:
        head, tail = (rng.choice((*NAMES, *CAPITALS, *CITIES)) for _ in range(2))
        made = head[: rng.randint(1, 4)] + tail[-rng.randint(2, 5) :]
        made = "".join(letter for letter in made if letter != " ")
    else:
        made = "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) + rng.choice(ENDINGS)
    if mix.initials and rng.random() < mix.initials:
        made = rng.choice(string.ascii_uppercase) + made
    made = made.capitalize()
    return rng.choice(NAMES) if made in HELD_OUT_NAMES else made


def remember_name(rng: random.Random, held: bool, mix: Mix) -> tuple[Turn, Turn]:
    who = name(rng, held, mix)
    tell = rng.choice(("My name is {}.", "I am {}.", "Call me {}.", "Hello, my name is {}."))
    ask = rng.choice(("What is my name?", "Who am I?", "Do you remember my name?", "My name?"))
    key = ("name", who)
    return (
        Turn("multi-turn", key, tell.format(who), f"Hello, {who}!"),
        Turn("multi-turn", key, ask, who),
    )


def remember_number(rng: random.Random, held: bool, mix: Mix) -> tuple[Turn, Turn]:
    while True:
        number = rng.randint(0, 9999)
        if held_out(("number", number)) == held:
            break
    tell = rng.choice(("Remember the number {}.", "My number is {}.", "The code is {}."))
    ask = rng.choice(("What is the number?", "Which number did I say?", "What is the code?"))
    key = ("number", number)
    return (
        Turn("multi-turn", key, tell.format(number), "OK."),
        Turn("multi-turn", key, ask, str(number)),
    )


def remember_favourite(rng: random.Random, held: bool, mix: Mix) -> tuple[Turn, Turn]:
    while True:
        thing = rng.choice(tuple(FAVOURITES))
        value, form = rng.choice(FAVOURITES[thing]), rng.randrange(3)
        key = ("favourite", thing, value, form)
        if held_out(key) == held:
            break
    tell = ("My favourite {} is {}.", "I like one {} most: {}.", "The best {} is {}.")[form]
    ask = rng.choice(("What is my favourite {}?", "Which {} do I like?", "My favourite {}?"))
    return (
        Turn("multi-turn", key, tell.format(thing, value), "OK."),
        Turn("multi-turn", key, ask.format(thing), value),
    )


def follow_sum(rng: random.Random, held: bool, mix: Mix) -> tuple[Turn, Turn]:
    """A sum, then "and plus/minus b?" on its answer; the second operand pair is the key."""
    while True:
        first = draw("arithmetic", rng, False, mix)
        plus, a = rng.random() < 0.5, int(first.answer)
        b = rng.randint(0, min(99 - a, 20) if plus else min(a, 20)) if a <= 99 else -1
        key = ("add", min(a, b), max(a, b)) if plus else ("subtract", a, b)
        if b >= 0 and held_out(key) == held:
            break
    ask = rng.choice(("And {} {}?", "Now {} {}.", "And then {} {}?"))
    user = ask.format("plus" if plus else "minus", b)
    return first, Turn("multi-turn", key, user, str(a + b if plus else a - b))


def follow_capital(rng: random.Random, held: bool, mix: Mix) -> tuple[Turn, Turn]:
    """A capital, then "and of Spain?"; held out by the pair of countries."""
    while True:
        country, other = rng.sample(tuple(CAPITALS), 2)
        key = ("follow capital", country, other)
        form = rng.randrange(len(CAPITAL))
        first = ("capital", False, country, form)
        if held_out(key) == held and not held_out(first):
            break
    ask = rng.choice(("And of {}?", "And {}?", "What about {}?"))
    return (
        Turn("capital", first, CAPITAL[form].format(country=country), CAPITALS[country]),
        Turn("multi-turn", key, ask.format(other), CAPITALS[other]),
    )


def follow_translation(rng: random.Random, held: bool, mix: Mix) -> tuple[Turn, Turn]:
    """A translation, then "and in French?"; held out by word and the two languages."""
    while True:
        noun, form = rng.choice(NOUNS), rng.randrange(len(TRANSLATE))
        language, other = rng.sample(tuple(LANGUAGES), 2)
        key = ("follow translation", noun[0], language, other)
        first = ("translate", noun[0], language, form)
        if held_out(key) == held and not held_out(first):
            break
    user = TRANSLATE[form].format(word=noun[0], language=language)
    ask = rng.choice(("And in {}?", "And {}?", "Now in {}."))
    return (
        Turn("translation", first, user, noun[LANGUAGES[language]]),
        Turn("multi-turn", key, ask.format(other), noun[LANGUAGES[other]]),
    )


def facts(
    rng: random.Random, held: bool, mix: Mix, count: int, questions: int = 1
) -> tuple[Turn, ...]:
    """A list "Anna has the book." of `count` people, then questions about some of them."""
    people: list[str] = []
    while len(people) < count:
        who = name(rng, False, mix)
        if who not in people:
            people.append(who)
    things = rng.sample([noun[0] for noun in NOUNS], count)
    if held:
        people[rng.randrange(count)] = name(rng, True, mix)
    pairs = list(zip(people, things, strict=True))
    tell = " ".join(f"{who} has the {thing}." for who, thing in pairs)
    asked = [pair for pair in pairs if not held or pair[0] in HELD_OUT_NAMES]
    asks = []
    for who, thing in rng.sample(asked, min(questions, len(asked))):
        key = ("facts", who, thing)
        if rng.random() < 0.5:
            asks.append(Turn("multi-turn", key, f"What does {who} have?", f"the {thing}"))
        else:
            asks.append(Turn("multi-turn", key, f"Who has the {thing}?", who))
    return Turn("multi-turn", ("facts", *people), tell, "OK."), *asks


MEMORIES = (remember_name, remember_number, remember_favourite)
FOLLOW_UPS = (follow_sum, follow_capital, follow_translation)


# -- tools --------------------------------------------------------------------------------------


def tool_schema(tool: str) -> Message:
    """A tool in OpenAI form."""
    description, parameters, _ = TOOLS[tool]
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    return {
        "name": tool,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
    }


def tool_arguments(rng: random.Random, tool: str, held: bool, mix: Mix) -> Message:
    """Random arguments; a held-out message goes to a held-out name."""
    make: dict[str, Callable[[], Any]] = {
        "city": lambda: rng.choice(CITIES) if held or rng.random() < 0.7 else name(rng, False, mix),
        "minutes": lambda: rng.randint(1, 99),
        "nights": lambda: rng.randint(2, 30),
        "a": lambda: rng.randint(0, 99),
        "b": lambda: rng.randint(0, 99),
        "room": lambda: rng.choice(ROOMS),
        "to": lambda: name(rng, held, mix),
        "text": lambda: rng.choice(MESSAGES),
    }
    return {parameter: make[parameter]() for parameter in TOOLS[tool][1]}


def tool_turn(rng: random.Random, tool: str, held: bool, mix: Mix, present: bool = True) -> Turn:
    """A request for `tool`, held out by phrasing and arguments."""
    forms = TOOLS[tool][2]
    while True:
        arguments, form = tool_arguments(rng, tool, held, mix), rng.randrange(len(forms))
        key = ("tool", tool, form, sorted(arguments.items()))
        if held_out(key) == held:
            break
    user = forms[form].format(**arguments)
    if not present:
        return Turn("tool", key, user, NO_TOOL)
    return Turn("tool", key, user, call={"name": tool, "arguments": arguments})


def tool_result(rng: random.Random, call: Message) -> str:
    """What the tool says back; the assistant then repeats it."""
    arguments = call["arguments"]
    return {
        "get_weather": f"{rng.choice(WEATHER)}, {rng.randint(0, 35)} degrees",
        "get_time": f"{rng.randint(0, 23)}:{rng.randint(10, 59)}",
        "add": str(arguments.get("a", 0) + arguments.get("b", 0)),
        "multiply": str(arguments.get("a", 0) * arguments.get("b", 0)),
    }.get(call["name"], "done")


def plain_turn(rng: random.Random, tools: Sequence[str], held: bool, mix: Mix) -> Turn:
    """A question that none of the present tools answers."""
    kinds = [kind for kind in SINGLES if kind != "arithmetic" or not {"add", "multiply"} & {*tools}]
    return draw(rng.choice(kinds), rng, held, mix)
