"""Postcards: what is on one, and the drawing of it.

A `Scene` says everything that is true of a postcard and is a function of its seed alone; `draw` makes a picture of
it at any size. Both use Pillow and the standard library only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (243, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 70),
    "blue": (30, 90, 220),
    "purple": (140, 60, 180),
    "white": (248, 248, 248),
}
PLACES = ("meadow", "sea", "mountains", "city")
WEATHERS = ("clear", "cloudy", "rainy", "snowy")
TIMES = ("day", "night")
GROUND = ("house", "tree", "car", "boat", "person", "dog", "flower")
SKY = ("balloon", "kite")
KINDS = (*GROUND, *SKY)  # things that come in colours and numbers
LIGHTS = ("sun", "moon")
ALLOWED = {
    "meadow": ("house", "tree", "car", "person", "dog", "flower"),
    "sea": ("boat", "person", "dog", "tree", "house"),
    "mountains": ("house", "tree", "car", "person", "dog", "flower"),
    "city": ("house", "tree", "car", "person", "dog", "flower"),
}
THIRDS = ("left", "middle", "right")
EDGES = (1 / 3, 2 / 3)

# Width over height of the postcards; the sizes in pixels are free
ASPECTS = (1.0, 1.5, 1.333, 0.667, 0.75, 1.78, 2.4, 0.5625)
CELLS = 34  # squares of one `unit` in a postcard, about as many as it has tokens


@dataclass(frozen=True)
class Group:
    """All things of one kind in a scene: one colour, `spots` their centres as fractions of width and height."""

    kind: str
    colour: str
    spots: tuple[tuple[float, float], ...]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.spots)


@dataclass(frozen=True)
class Scene:
    """Everything that is true of one postcard."""

    seed: str
    place: str
    time: str
    weather: str
    aspect: float
    groups: tuple[Group, ...]
    light: tuple[float, float] | None  # where sun or moon stands, if it is seen

    @property
    def light_kind(self) -> str:
        """What may stand in the sky at this time."""
        return "sun" if self.time == "day" else "moon"

    def group(self, kind: str) -> Group | None:
        """The group of one kind; sun and moon count as groups of one, without a colour."""
        if kind in LIGHTS:
            return Group(kind, "", (self.light,)) if self.light and kind == self.light_kind else None
        return next((group for group in self.groups if group.kind == kind), None)


def third(x: float) -> str:
    """The third of the picture in which `x`, a fraction of its width, lies."""
    return THIRDS[(x > EDGES[0]) + (x > EDGES[1])]


def make_scene(seed: str, *, aspect: float | None = None) -> Scene:
    """The scene of a seed; `aspect` is width over height, one of `ASPECTS` by default."""
    rng = random.Random(seed)
    place, time = rng.choice(PLACES), rng.choice(TIMES)
    weather = rng.choices(WEATHERS, (4, 3, 3, 3))[0]
    aspect = aspect or rng.choice(ASPECTS)
    width, height = math.sqrt(CELLS * aspect), math.sqrt(CELLS / aspect)  # in units
    taken: list[tuple[float, float]] = []

    def spot(low: float, high: float) -> tuple[float, float] | None:
        for _ in range(40):
            x, y = rng.uniform(0.75, width - 0.75), rng.uniform(low * height, high * height)
            clear_of_edges = all(abs(x / width - edge) > 0.035 for edge in EDGES)
            if clear_of_edges and all(abs(x - a) > 1.3 or abs(y - b) > 1.35 for a, b in taken):
                taken.append((x, y))
                return x, y
        return None

    def fraction(at: tuple[float, float]) -> tuple[float, float]:
        return at[0] / width, at[1] / height

    top = max(0.14, 0.85 / height)  # sky things keep clear of the upper edge
    light = None
    if rng.random() < {"clear": 0.7, "cloudy": 0.5}.get(weather, 0.25):
        at = spot(top, 0.32)
        light = fraction(at) if at else None
    ground = rng.sample(ALLOWED[place], rng.choices((1, 2, 3), (3, 4, 3))[0])
    sky = [rng.choice(SKY)] if rng.random() < 0.45 else []
    groups = []
    for kind in (*ground, *sky):
        wanted = rng.choices((1, 2, 3, 4), (11, 4, 3, 2))[0]
        low, high = (top, 0.40) if kind in SKY else (0.56, 1 - 0.8 / height)
        spots = [fraction(at) for at in (spot(low, high) for _ in range(wanted)) if at]
        if spots:
            groups.append(Group(kind, rng.choice(list(COLOURS)), tuple(spots)))
    groups.sort(key=lambda group: KINDS.index(group.kind))
    return Scene(seed, place, time, weather, aspect, tuple(groups), light)


def draw(scene: Scene, width: int, height: int, *, smooth: int = 1) -> Image.Image:
    """The postcard, `width` × `height` pixels, RGB; drawn `smooth` times larger and reduced."""
    pen = _Pen(scene, width * smooth, height * smooth)
    pen.background()
    for group in scene.groups:
        for x, y in group.spots:
            pen.thing(group.kind, COLOURS[group.colour], x, y)
    pen.weather()
    pen.border()
    picture = pen.image
    return picture if smooth == 1 else picture.resize((width, height), Image.Resampling.BOX)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    mixed = [round(p + (q - p) * share) for p, q in zip(a, b, strict=True)]
    return mixed[0], mixed[1], mixed[2]


DARK, WHITE, SKIN = (35, 35, 45), (255, 255, 255), (240, 195, 160)


class _Pen:
    """One drawing under way. Lengths of things are in `unit`s about their centre."""

    def __init__(self, scene: Scene, width: int, height: int) -> None:
        self.scene = scene
        self.rng = random.Random(scene.seed + " drawing")
        self.width, self.height = width, height
        self.unit = math.sqrt(width * height / CELLS)
        self.image = Image.new("RGB", (width, height))
        self.pen = ImageDraw.Draw(self.image)
        self.night = scene.time == "night"
        self.line = max(1, round(self.unit * 0.05))

    # -- the whole card ------------------------------------------------------------------------------------------

    def background(self) -> None:
        scene, rng = self.scene, self.rng
        horizon = rng.uniform(0.46, 0.52)
        grey = {"clear": 0.0, "cloudy": 0.35, "rainy": 0.6, "snowy": 0.45}[scene.weather]
        if self.night:
            high, low = _mix((12, 16, 58), (38, 40, 52), grey), _mix((44, 44, 110), (66, 68, 84), grey)
        else:
            high, low = _mix((90, 170, 245), (150, 158, 168), grey), _mix((195, 228, 252), (196, 200, 206), grey)
        self._gradient(0.0, horizon, high, low)
        if self.night and scene.weather == "clear":
            for _ in range(26):
                self._dot(rng.random(), rng.uniform(0.02, horizon - 0.04), 0.035, (250, 245, 215))
        ground = {"meadow": (112, 176, 74), "sea": (52, 128, 180), "mountains": (134, 156, 92), "city": (150, 148, 150)}
        near = {"meadow": (82, 148, 56), "sea": (226, 204, 148), "mountains": (104, 130, 72), "city": (122, 120, 124)}
        far, front = ground[scene.place], near[scene.place]
        if scene.weather == "snowy":
            far, front = _mix(far, WHITE, 0.55 if scene.place == "sea" else 0.75), _mix(front, WHITE, 0.75)
        if self.night:
            far, front = _mix(far, (10, 14, 40), 0.5), _mix(front, (10, 14, 40), 0.45)
        if scene.place == "mountains":
            self._peaks(horizon)
        if scene.place == "city":
            self._skyline(horizon)
        if scene.place == "sea":
            shore = rng.uniform(0.72, 0.80)
            self._gradient(horizon, shore, far, _mix(far, WHITE, 0.15))
            self._gradient(shore, 1.0, front, front)
            for _ in range(9):
                self._wave(rng.random(), rng.uniform(horizon + 0.03, shore - 0.02), _mix(far, WHITE, 0.45))
        else:
            self._gradient(horizon, 1.0, far, front)
        if scene.place == "city":
            self._road(rng.uniform(0.66, 0.78))
        if scene.place == "meadow":
            for _ in range(22):
                self._tuft(rng.random(), rng.uniform(horizon + 0.04, 0.98), _mix(front, (20, 70, 20), 0.35))
        if scene.weather != "clear":
            for number in range(rng.randint(2, 3)):
                self._cloud((number + rng.uniform(0.15, 0.85)) / 3, rng.uniform(0.08, 0.22))
        if scene.light:  # in front of the clouds, so that it is always seen
            (self._moon if self.night else self._sun)(*scene.light)

    def weather(self) -> None:
        rng = self.rng
        drops = round(CELLS * 2.2)
        if self.scene.weather == "rainy":
            colour = (150, 180, 225) if self.night else (70, 110, 180)
            for _ in range(drops):
                x, y = rng.random() * self.width, rng.random() * self.height
                self.pen.line(
                    (x, y, x - 0.12 * self.unit, y + 0.38 * self.unit),
                    fill=colour,
                    width=max(1, round(self.unit * 0.04)),
                )
        if self.scene.weather == "snowy":
            for _ in range(drops):
                self._dot(rng.random(), rng.random(), rng.uniform(0.045, 0.075), WHITE)

    def border(self) -> None:
        thick = round(0.16 * self.unit)
        for offset in range(thick):
            edge = (offset, offset, self.width - 1 - offset, self.height - 1 - offset)
            self.pen.rectangle(edge, outline=(252, 250, 244))

    def _gradient(self, top: float, bottom: float, high: Colour, low: Colour) -> None:
        first, last = round(top * self.height), round(bottom * self.height)
        bands = 1 if high == low else 12
        for band in range(bands):
            y0, y1 = first + (last - first) * band // bands, first + (last - first) * (band + 1) // bands
            self.pen.rectangle((0, y0, self.width, y1), fill=_mix(high, low, band / max(1, bands - 1)))

    def _peaks(self, horizon: float) -> None:
        rng = self.rng
        x = -0.1
        while x < 1.1:
            half, peak = rng.uniform(0.12, 0.22), horizon - rng.uniform(0.16, 0.30)
            rock = (72, 74, 98) if self.night else (132, 126, 142)
            points = [(x, horizon), (x + half, peak), (x + 2 * half, horizon)]
            self.pen.polygon([(a * self.width, b * self.height) for a, b in points], fill=rock)
            cap = [(x + half * 0.7, peak + 0.3 * (horizon - peak)), (x + half, peak),
                   (x + half * 1.3, peak + 0.3 * (horizon - peak))]  # fmt: skip
            self.pen.polygon([(a * self.width, b * self.height) for a, b in cap], fill=(236, 240, 246))
            x += half * rng.uniform(1.0, 1.5)

    def _skyline(self, horizon: float) -> None:
        rng = self.rng
        x = 0.0
        while x < 1.0:
            wide, top = rng.uniform(0.06, 0.12), horizon - rng.uniform(0.10, 0.26)
            wall = (40, 42, 66) if self.night else (164, 160, 172)
            box = (x * self.width, top * self.height, (x + wide) * self.width, horizon * self.height)
            self.pen.rectangle(box, fill=_mix(wall, DARK, rng.uniform(0, 0.25)))
            pane = (248, 214, 110) if self.night else (208, 220, 232)
            step = 0.03
            for row in range(int((horizon - top) / step)):
                for column in range(int(wide / step)):
                    if rng.random() < 0.6:
                        a, b = (x + 0.01 + column * step) * self.width, (top + 0.01 + row * step) * self.height
                        self.pen.rectangle((a, b, a + 0.07 * self.unit, b + 0.07 * self.unit), fill=pane)
            x += wide

    def _road(self, y: float) -> None:
        u = self.unit
        top = y * self.height
        self.pen.rectangle((0, top, self.width, top + 0.9 * u), fill=(58, 58, 64))
        x = 0.1 * u
        while x < self.width:
            self.pen.rectangle((x, top + 0.42 * u, x + 0.4 * u, top + 0.48 * u), fill=(226, 226, 226))
            x += 0.8 * u

    def _wave(self, x: float, y: float, colour: Colour) -> None:
        u, a, b = self.unit, x * self.width, y * self.height
        self.pen.arc((a - 0.25 * u, b - 0.06 * u, a + 0.25 * u, b + 0.14 * u), 200, 340, fill=colour, width=self.line)

    def _tuft(self, x: float, y: float, colour: Colour) -> None:
        u, a, b = self.unit, x * self.width, y * self.height
        for lean in (-0.06, 0.0, 0.06):
            self.pen.line((a, b, a + lean * u, b - 0.12 * u), fill=colour, width=max(1, self.line // 2))

    def _dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        a, b, r = x * self.width, y * self.height, radius * self.unit
        self.pen.ellipse((a - r, b - r, a + r, b + r), fill=colour)

    def _cloud(self, x: float, y: float) -> None:
        dark = self.scene.weather in ("rainy", "snowy")
        colour = (150, 154, 164) if dark else (246, 247, 250)
        if self.night:
            colour = _mix(colour, (30, 34, 60), 0.45)
        for dx, dy, r in ((-0.55, 0.08, 0.3), (-0.1, -0.1, 0.42), (0.4, 0.02, 0.34), (0.75, 0.12, 0.22)):
            a, b, size = x * self.width + dx * self.unit, y * self.height + dy * self.unit, r * self.unit
            self.pen.ellipse((a - size, b - size * 0.8, a + size, b + size * 0.8), fill=colour)

    def _sun(self, x: float, y: float) -> None:
        a, b, u = x * self.width, y * self.height, self.unit
        for turn in range(12):
            angle = turn * math.pi / 6
            far = (a + 0.66 * u * math.cos(angle), b + 0.66 * u * math.sin(angle))
            self.pen.line((a, b, *far), fill=(255, 196, 30), width=2 * self.line)
        r = 0.42 * u
        self.pen.ellipse((a - r, b - r, a + r, b + r), fill=(255, 214, 40))

    def _moon(self, x: float, y: float) -> None:
        a, b, u = x * self.width, y * self.height, self.unit
        rim = []
        for step in range(17):  # the outer half circle, then back along a shallower one
            angle = -math.pi / 2 + math.pi * step / 16
            rim.append((a - 0.15 * u + 0.55 * u * math.cos(angle), b + 0.55 * u * math.sin(angle)))
        for step in range(17):
            angle = math.pi / 2 - math.pi * step / 16
            rim.append((a - 0.15 * u + 0.22 * u * math.cos(angle), b + 0.55 * u * math.sin(angle)))
        self.pen.polygon(rim, fill=(252, 246, 214))

    # -- the things ----------------------------------------------------------------------------------------------

    def thing(self, kind: str, colour: Colour, x: float, y: float) -> None:
        if self.night:
            colour = _mix(colour, (10, 10, 40), 0.12)
        at = _At(self, x * self.width, y * self.height, self.unit * self.rng.uniform(1.2, 1.4))
        _THINGS[kind](at, colour)


class _At:
    """A pen about a thing's centre: coordinates run from -0.5 to 0.5 over the thing."""

    def __init__(self, card: _Pen, x: float, y: float, size: float) -> None:
        self.card, self.x, self.y, self.size = card, x, y, size
        self.flip = card.rng.choice((-1, 1))
        self.edge = max(1, round(size * 0.035))

    def _points(self, points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
        return [(self.x + self.flip * a * self.size, self.y + b * self.size) for a, b in points]

    def shape(self, colour: Colour, *points: tuple[float, float]) -> None:
        corners = self._points(points)
        self.card.pen.polygon(corners, fill=colour)
        self.card.pen.line([*corners, corners[0]], fill=DARK, width=self.edge)

    def oval(self, colour: Colour, x: float, y: float, rx: float, ry: float, *, outline: bool = True) -> None:
        ((a, b),) = self._points(((x, y),))
        box = (a - rx * self.size, b - ry * self.size, a + rx * self.size, b + ry * self.size)
        self.card.pen.ellipse(box, fill=colour, outline=DARK if outline else None, width=self.edge)

    def line(self, colour: Colour, width: float, *points: tuple[float, float]) -> None:
        self.card.pen.line(self._points(points), fill=colour, width=max(1, round(width * self.size)))


def _box(x0: float, y0: float, x1: float, y1: float) -> tuple[tuple[float, float], ...]:
    return (x0, y0), (x1, y0), (x1, y1), (x0, y1)


def _house(at: _At, colour: Colour) -> None:
    at.shape(colour, *_box(-0.38, -0.08, 0.38, 0.46))
    at.shape((120, 62, 40), (-0.48, -0.08), (0.0, -0.5), (0.48, -0.08))
    at.shape((92, 60, 40), *_box(-0.08, 0.16, 0.1, 0.46))
    pane = (255, 226, 120) if at.card.night else (206, 232, 250)
    at.shape(pane, *_box(0.18, 0.02, 0.32, 0.16))
    at.shape(pane, *_box(-0.32, 0.02, -0.18, 0.16))


def _tree(at: _At, colour: Colour) -> None:
    at.shape((110, 74, 44), *_box(-0.07, 0.1, 0.07, 0.48))
    at.oval(colour, 0.0, -0.16, 0.36, 0.34)


def _car(at: _At, colour: Colour) -> None:
    at.shape(colour, (-0.24, 0.0), (-0.14, -0.22), (0.2, -0.22), (0.3, 0.0))
    at.shape((200, 226, 244), *_box(-0.1, -0.16, 0.16, -0.03))
    at.shape(colour, *_box(-0.5, -0.02, 0.5, 0.22))
    for x in (-0.28, 0.28):
        at.oval((28, 28, 30), x, 0.22, 0.13, 0.13)
        at.oval((190, 190, 190), x, 0.22, 0.05, 0.05, outline=False)


def _boat(at: _At, colour: Colour) -> None:
    at.line((96, 66, 44), 0.05, (0.0, 0.2), (0.0, -0.5))
    at.shape(_mix(colour, WHITE, 0.25), (0.05, -0.46), (0.4, 0.1), (0.05, 0.1))
    at.shape(_mix(colour, WHITE, 0.25), (-0.05, -0.34), (-0.32, 0.1), (-0.05, 0.1))
    at.shape(colour, (-0.48, 0.18), (0.5, 0.18), (0.34, 0.44), (-0.34, 0.44))


def _person(at: _At, colour: Colour) -> None:
    for x in (-0.08, 0.08):
        at.line((44, 48, 76), 0.09, (x, 0.2), (x, 0.5))
    at.line(SKIN, 0.07, (-0.12, -0.12), (-0.28, 0.12))
    at.line(SKIN, 0.07, (0.12, -0.12), (0.28, 0.12))
    at.shape(colour, (-0.13, -0.2), (0.13, -0.2), (0.2, 0.26), (-0.2, 0.26))
    at.oval(SKIN, 0.0, -0.34, 0.14, 0.15)
    at.line((70, 44, 26), 0.07, (-0.12, -0.43), (0.12, -0.43))


def _dog(at: _At, colour: Colour) -> None:
    for x in (-0.24, -0.12, 0.14, 0.26):
        at.line(_mix(colour, DARK, 0.3), 0.08, (x, 0.1), (x, 0.38))
    at.line(_mix(colour, DARK, 0.3), 0.07, (-0.3, 0.0), (-0.48, -0.2))
    at.oval(colour, 0.0, 0.04, 0.34, 0.16)
    at.oval(colour, 0.34, -0.14, 0.16, 0.14)
    at.shape(_mix(colour, DARK, 0.45), (0.22, -0.26), (0.3, -0.24), (0.24, -0.02))
    at.oval(DARK, 0.48, -0.12, 0.035, 0.035, outline=False)


def _flower(at: _At, colour: Colour) -> None:
    at.line((40, 120, 50), 0.06, (0.0, 0.0), (0.0, 0.5))
    at.shape((60, 150, 70), (0.0, 0.36), (0.2, 0.22), (0.1, 0.38))
    for petal in range(6):
        angle = petal * math.pi / 3
        at.oval(colour, 0.2 * math.cos(angle), -0.16 + 0.2 * math.sin(angle), 0.13, 0.13)
    at.oval((120, 70, 30), 0.0, -0.16, 0.1, 0.1)


def _balloon(at: _At, colour: Colour) -> None:
    at.line((90, 90, 90), 0.03, (0.0, 0.2), (0.05, 0.32), (-0.03, 0.42), (0.02, 0.54))
    at.oval(colour, 0.0, -0.12, 0.27, 0.34)
    at.oval(_mix(colour, WHITE, 0.6), -0.09, -0.24, 0.06, 0.09, outline=False)


def _kite(at: _At, colour: Colour) -> None:
    at.line((90, 90, 90), 0.04, (0.0, 0.16), (0.14, 0.28), (-0.02, 0.4), (0.12, 0.52))
    at.shape(colour, (0.0, -0.5), (0.32, -0.18), (0.0, 0.2), (-0.32, -0.18))
    at.line(DARK, 0.035, (0.0, -0.5), (0.0, 0.2))
    at.line(DARK, 0.035, (-0.32, -0.18), (0.32, -0.18))


_THINGS: dict[str, Callable[[_At, Colour], None]] = {
    "house": _house, "tree": _tree, "car": _car, "boat": _boat, "person": _person, "dog": _dog, "flower": _flower,
    "balloon": _balloon, "kite": _kite,
}  # fmt: skip
