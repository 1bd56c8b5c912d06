"""Pictures for phi-4-nano-multimodal: coloured shapes and printed numbers, with questions.

It draws and asks; it knows neither the model nor which pictures are held out.
"""

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A disc, a square, a triangle, a star and a cross, by names that are one token each: the text
# model, which stays as it is, never learnt to put longer words together.
SHAPES = ("moon", "box", "roof", "star", "plus")
COLOURS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
}
GROUNDS = ((255, 255, 255), (240, 240, 240), (225, 235, 245), (250, 240, 225))
# (width, height) -> share; none needs resizing before it is cut into crops of 448
SIZES = {(448, 448): 0.45, (448, 336): 0.1, (448, 224): 0.3, (336, 448): 0.1, (896, 448): 0.05}
SMALL = (224, 224)  # the encoder takes these too; only training uses them, as they cost little
CELL = 28  # pixels per side of what becomes one image token
SEAM = 448  # where a wide picture is cut in two: nothing lies across it
# What a picture holds -> share
SCENES = {"one": 0.2, "few": 0.2, "same": 0.22, "number": 0.38}
LESSONS = {"one": 0.1, "few": 0.45, "same": 0.12, "number": 0.33}  # where questions are learnt
WIDE_SCENES = {"one": 0.5, "number": 0.5}
MOST = 3  # shapes in a picture, digits in a number
DIGIT = 40  # half the font size of printed numbers
STRIDE = 2 * CELL  # from one digit to the next
CLEAR = 40  # least distance from the middle of a shape whose place is asked
# Sizes of pictures in which it is: one crop, without padding beside it
PLACED = {SMALL, (448, 448), (448, 336), (448, 224)}


@dataclass(frozen=True)
class Object:
    """A shape, or a digit of a printed number; centre and radius in pixels."""

    kind: str
    colour: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Picture:
    """What is to be drawn."""

    width: int
    height: int
    ground: tuple[int, int, int]
    objects: tuple[Object, ...]

    @property
    def number(self) -> str:
        return "".join(thing.kind for thing in self.objects if thing.kind.isdigit())


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the kind it is counted under."""

    text: str
    answer: str
    kind: str


def choose(rng: random.Random, shares: dict[Any, float]) -> Any:
    """One of the keys, as often as its share says."""
    return rng.choices(list(shares), list(shares.values()))[0]


def compose(
    rng: random.Random, size: tuple[int, int], shares: dict[str, float] = SCENES
) -> Picture:
    """A random picture of `size` (width, height), its scene by `shares` where that fits."""
    width, height = size
    ground = rng.choice(GROUNDS)
    scene = choose(rng, WIDE_SCENES if width > SEAM else shares)
    if scene == "number":
        return Picture(width, height, ground, number(rng, width, height))
    if scene == "same":
        count = rng.randint(1, MOST)
        kinds = [rng.choice(SHAPES)] * count
    else:
        count = 1 if scene == "one" else rng.randint(2, MOST)
        kinds = rng.choices(SHAPES, k=count)
        if rng.random() < 0.5:
            kinds = rng.sample(SHAPES, count)
    colours = rng.sample(list(COLOURS), count)
    if scene == "same" and rng.random() < 0.7:
        colours = [colours[0]] * count
    objects: list[Object] = []
    while len(objects) < count:
        radius = rng.randint(30, 40 if size == SMALL else 56)
        x = rng.randint(radius + 4, width - radius - 4)
        y = rng.randint(radius + 4, height - radius - 4)
        index = len(objects)
        if abs(x - SEAM) < radius + 4:
            continue
        if all(math.hypot(x - o.x, y - o.y) > radius + o.radius + 12 for o in objects):
            objects.append(Object(kinds[index], colours[index], x, y, radius))
        elif rng.random() < 0.02:  # a corner that nothing more fits into
            objects.clear()
    return Picture(width, height, ground, tuple(objects))


def number(rng: random.Random, width: int, height: int) -> tuple[Object, ...]:
    """A number of one to three digits, printed on the grid of cells."""
    text = "".join(rng.choices("0123456789", k=rng.randint(1, MOST)))
    colour = rng.choice(list(COLOURS))
    left = rng.choice([0, SEAM]) if width > SEAM else 0
    spare = (min(width, SEAM) - len(text) * STRIDE) // CELL
    first = left + CELL * rng.randint(1, spare + 1)
    y = CELL * rng.randint(2, height // CELL - 2)
    return tuple(
        Object(digit, colour, first + index * STRIDE, y, DIGIT) for index, digit in enumerate(text)
    )


@cache
def font(radius: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(2 * radius)


def corners(thing: Object) -> list[tuple[float, float]]:
    """The polygon of every shape but the disc."""
    if thing.kind == "plus":
        arm, third = thing.radius, thing.radius * 0.36
        steps = [(-third, -arm), (third, -arm), (third, -third), (arm, -third), (arm, third)]
        steps += [(third, third), (third, arm), (-third, arm), (-third, third), (-arm, third)]
        steps += [(-arm, -third), (-third, -third)]
        return [(thing.x + dx, thing.y + dy) for dx, dy in steps]
    if thing.kind == "box":
        side = thing.radius * 0.85
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return [(thing.x + side * dx, thing.y + side * dy) for dx, dy in signs]
    points = 3 if thing.kind == "roof" else 10
    result = []
    for index in range(points):
        reach = thing.radius * (0.45 if points == 10 and index % 2 else 1)
        angle = 2 * math.pi * index / points - math.pi / 2
        result.append((thing.x + reach * math.cos(angle), thing.y + reach * math.sin(angle)))
    return result


def draw_object(canvas: ImageDraw.ImageDraw, thing: Object, fill: Any) -> None:
    if thing.kind.isdigit():
        place = (thing.x, thing.y)
        face = font(thing.radius)
        canvas.text(place, thing.kind, fill=fill, font=face, anchor="mm", stroke_width=3)
    elif thing.kind == "moon":
        reach = thing.radius
        box = (thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)
        canvas.ellipse(box, fill=fill)
    else:
        canvas.polygon(corners(thing), fill=fill)


def draw(picture: Picture) -> Image.Image:
    """The picture as RGB, without anti-aliasing of shapes."""
    image = Image.new("RGB", (picture.width, picture.height), picture.ground)
    canvas = ImageDraw.Draw(image)
    for thing in picture.objects:
        draw_object(canvas, thing, COLOURS[thing.colour])
    return image


# What a cell may show, for the pre-training of the encoder
CELL_KINDS = ("nothing", *SHAPES, *"0123456789")
CELL_COLOURS = ("nothing", *COLOURS)
# label -> its values; "count" and "order" of a digit in its number hold where objects are
LABELS = {
    "kind": len(CELL_KINDS),
    "colour": len(CELL_COLOURS),
    "centre": 2,
    "count": MOST + 1,
    "order": MOST + 1,
    "down": 2,
    "across": 2,
}


def halves(count: int) -> np.ndarray:
    """0 for cells of the first half, 1 for those of the second, -1 for those about the middle."""
    middles = np.arange(count) + 0.5 - count / 2
    return np.where(abs(middles) < 1, -1, (middles > 0).astype(np.int64))


def cells(picture: Picture) -> np.ndarray:
    """What each cell of the first crop shows, by LABELS. int64 [labels, 16, 16]

    -1, not counted, beyond the picture's edges and where a label has no sense.
    """
    side = 448 // CELL
    rows, columns = math.ceil(picture.height / CELL), min(side, math.ceil(picture.width / CELL))
    labels = np.full((len(LABELS), side, side), -1, np.int64)
    labels[:3, :rows, :columns] = 0
    labels[5, :rows, :columns] = halves(rows)[:, None]
    labels[6, :rows, :columns] = halves(columns)
    best = np.full((side, side), 0.12 * CELL * CELL)
    first = [thing for thing in picture.objects if thing.x < SEAM]
    for index, thing in enumerate(first, 1):
        mask = Image.new("L", (448, 448))
        draw_object(ImageDraw.Draw(mask), thing, 255)
        covered = (np.asarray(mask) > 127).reshape(side, CELL, side, CELL).sum((1, 3))
        more = covered > best
        best = np.maximum(best, covered)
        digit = thing.kind.isdigit()
        labels[0][more] = CELL_KINDS.index(thing.kind)
        labels[1][more] = CELL_COLOURS.index(thing.colour)
        labels[2, thing.y // CELL, thing.x // CELL] = 1
        labels[3][more] = -1 if digit else len(first)
        labels[4][more] = index if digit else -1
    return labels


def place(picture: Picture, thing: Object) -> str:
    """The side of the picture that a shape lies on; "" where that is not clear."""
    if (picture.width, picture.height) not in PLACED:
        return ""
    beyond = thing.x - picture.width / 2
    if abs(beyond) < CLEAR * picture.width / 448:
        return ""
    return "left" if beyond < 0 else "right"


def plural(shape: str) -> str:
    return shape + ("es" if shape[-1] in "sx" else "s")


def questions(picture: Picture) -> list[Question]:
    """Every question that the picture answers without doubt."""
    if picture.number:
        colour = picture.objects[0].colour
        return [
            Question("What number is printed?", picture.number, "number"),
            Question("What colour is the number?", colour, "colour"),
        ]
    shapes = [thing.kind for thing in picture.objects]
    colours = [thing.colour for thing in picture.objects]
    asked = []
    if len(shapes) == 1:
        asked.append(Question("What shape is it?", shapes[0], "shape"))
        asked.append(Question("What colour is it?", colours[0], "colour"))
    if len(set(shapes)) == 1:
        text = f"How many {plural(shapes[0])} are there?"
        asked.append(Question(text, str(len(shapes)), "count"))
        if len(set(colours)) == 1 and len(shapes) > 1:
            asked.append(Question("What colour are they?", colours[0], "colour"))
    else:
        asked.append(Question("How many shapes are there?", str(len(shapes)), "count"))
    for thing in picture.objects:
        where = place(picture, thing)
        if colours.count(thing.colour) == 1:
            if where:
                asked.append(Question(f"Where is the {thing.colour} shape?", where, "place"))
            asked.append(Question(f"What shape is {thing.colour}?", thing.kind, "shape"))
        if shapes.count(thing.kind) == 1:
            asked.append(Question(f"What colour is the {thing.kind}?", thing.colour, "colour"))
    return asked
