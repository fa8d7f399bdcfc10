"""What surfaces are made of: textures with mip levels, and the materials that one room is furnished with."""

from dataclasses import dataclass, field, replace

import numpy as np

from fit3d_rooms.surfaces import motifs, textures


@dataclass(frozen=True)
class Surface:
    """A texture and how it lies on a patch.

    Attributes:
        texture: index in the `TextureBank`.
        size: metres that one tile of the texture covers along s and t; None stretches it over the whole patch.
        tint: linear RGB factor.
        glow: light given off, as a factor on the texture, in display units (0: only reflects).
        gloss: share of mirror reflection at grazing angles, 0..1.
        grain: the texture has a direction along s; turned where a patch is longer along t.
        scatter: each patch shows another place of the texture.
    """

    texture: int
    size: tuple[float, float] | None = (1.0, 1.0)
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    glow: float = 0.0
    gloss: float = 0.0
    grain: bool = False
    scatter: bool = False

    def tinted(self, color: str) -> "Surface":
        """Returns the same surface multiplied by a colour.

        Args:
            color: sRGB, ``#rrggbb``.
        """
        return replace(self, tint=tuple(float(c) for c in textures.linear(color)))


class TextureBank:
    """Square power-of-two textures with their mip levels, in one flat array for vectorised look-up."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []
        self._first: list[int] = []
        self._sides: list[int] = []

    def add(self, image: np.ndarray) -> int:
        """Takes a picture.

        Args:
            image: Linear RGB [n, n, 3], n a power of two.

        Returns:
            Its index.
        """
        side = image.shape[0]
        if image.shape != (side, side, 3) or side & (side - 1):
            raise ValueError(f"A texture has to be square with a power-of-two side, got {image.shape}.")
        self._first.append(len(self._levels))
        self._sides.append(side)
        level = image.astype(np.float32)
        while True:
            self._levels.append(level.reshape(-1, 3))
            if level.shape[0] == 1:
                return len(self._first) - 1
            level = (level[0::2, 0::2] + level[1::2, 0::2] + level[0::2, 1::2] + level[1::2, 1::2]) * np.float32(0.25)

    def packed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns texels [T, 3] float32, the offset of each texture's level [K, 12] int32, and the sides [K] int32.

        Levels beyond a texture's last one point to the last one.
        """
        sizes = np.array([len(level) for level in self._levels])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        offsets = np.empty((len(self._first), 12), np.int32)
        for index, (first, side) in enumerate(zip(self._first, self._sides)):
            levels = side.bit_length()
            offsets[index] = starts[[first + min(k, levels - 1) for k in range(12)]]
        return np.concatenate(self._levels), offsets, np.array(self._sides, np.int32)


@dataclass(frozen=True)
class Palette:
    """The colours of a room, sRGB ``#rrggbb``."""

    wall: str
    """Most walls."""
    feature: str
    """One wall, in some rooms."""
    wood: str
    """The main wood."""
    floor: str
    """Boards, tiles or carpet."""
    sofa: str
    """Cloth of seats."""
    curtain: str
    """Cloth of curtains."""
    accents: tuple[str, str, str]
    """Of cushions, rugs and vases."""


PALETTES = (
    Palette("#e9e4da", "#8fa08e", "#b98a5a", "#b88a5c", "#6f7b85", "#d6cfbf", ("#d29a35", "#b0563a", "#e8dfce")),
    Palette("#ecdcc6", "#b5674a", "#7c5237", "#8a5d3c", "#4c6a60", "#e4d3b8", ("#deb05a", "#c2533b", "#efe6d6")),
    Palette("#dfe4e6", "#44637c", "#a87a4f", "#c09a6c", "#b9a88d", "#8aa2b4", ("#2f5a78", "#d48848", "#efece2")),
    Palette("#e8dfd0", "#75525e", "#8b5136", "#9a6a44", "#84403d", "#c9a9a0", ("#6a3b4c", "#c9a24c", "#ebdfcc")),
    Palette("#e0e4d4", "#4d6a52", "#b48a5c", "#a87c50", "#ab9473", "#b9c3a2", ("#3f6147", "#cf9f52", "#f1ecdd")),
    Palette("#d9d4cd", "#9a5a44", "#86664a", "#7d6048", "#7a4a2f", "#8f8b84", ("#39434d", "#c07a3a", "#ddd5c6")),
)


@dataclass
class Materials:
    """The materials of one room, made once and shared by everything in it.

    Attributes:
        rng: source of every choice.
        palette: the room's colours.
        bank: where the textures go.
    """

    rng: np.random.Generator
    palette: Palette
    bank: TextureBank = field(default_factory=TextureBank)

    def __post_init__(self) -> None:
        rng, colors = self.rng, self.palette
        add = self.bank.add
        self.wood = Surface(add(textures.wood(rng, colors.wood)), (1.1, 0.55), gloss=0.12, grain=True, scatter=True)
        dark = str(rng.choice(["#5a3c28", "#4a3426", "#6b4630"]))
        self.dark_wood = Surface(add(textures.wood(rng, dark)), (1.1, 0.55), gloss=0.12, grain=True, scatter=True)
        pale = str(rng.choice(["#d9bd92", "#e3cfa8", "#cfae80"]))
        self.pale_wood = Surface(add(textures.wood(rng, pale, 0.8)), (1.1, 0.55), gloss=0.12, grain=True, scatter=True)
        plain = add(textures.mottled(rng, "#ffffff", 0.03))
        self.lacquer = Surface(plain, (0.8, 0.8), gloss=0.15, scatter=True)
        self.white = self.lacquer.tinted("#e9e6df")
        self.black = self.lacquer.tinted("#262626")
        self.metal = Surface(plain, (0.5, 0.5), gloss=0.6).tinted("#8d8d8c")
        self.brass = Surface(plain, (0.5, 0.5), gloss=0.6).tinted("#b08d4f")
        self.earth = Surface(add(textures.mottled(rng, "#4a3626", 0.3, 0.4)), (0.3, 0.3))
        self.ceramic = Surface(add(textures.mottled(rng, "#ffffff", 0.06, 0.9)), (0.4, 0.4), gloss=0.35)
        self.cardboard = Surface(add(textures.cardboard(rng)), (0.5, 0.5), scatter=True)
        self.shade = Surface(add(motifs.shade()), None, glow=4.0).tinted("#fff1d8")
        weave = str(rng.choice(["plain", "melange", "herringbone"]))
        self.sofa = Surface(add(textures.fabric(rng, colors.sofa, "#e8e2d6", weave)), (0.45, 0.45), scatter=True)
        self.curtain = Surface(add(textures.fabric(rng, colors.curtain, "#f4efe6", self._kind())), (0.6, 0.6))
        self.linen = Surface(add(textures.fabric(rng, "#ece8e0", "#d9d3c8", "melange")), (0.4, 0.4), scatter=True)
        self.cushions = [
            Surface(add(textures.fabric(rng, color, other, self._kind())), (0.42, 0.42), scatter=True)
            for color, other in zip(colors.accents, (colors.accents[2], "#e9dfcb", colors.feature))
        ]
        self.books = [Surface(add(motifs.book_back(rng)), None) for _ in range(8)]
        self.paper = Surface(add(textures.mottled(rng, "#e6dcc4", 0.08, 0.2)), (0.2, 0.2))
        greens = ("#4f7a3a", "#3b6b3f", "#6b8f4a")
        self.leaves = [Surface(add(motifs.leaf(rng, color)), None, gloss=0.15) for color in greens]

    def _kind(self) -> str:
        return str(self.rng.choice(["plain", "melange", "stripes", "plaid", "dots", "herringbone"]))

    def picture(self, image: np.ndarray, gloss: float = 0.0, glow: float = 0.0) -> Surface:
        """Returns a surface that stretches a picture over one patch.

        Args:
            image: Linear RGB [n, n, 3], n a power of two.
            gloss: Share of light that is mirrored, in [0, 1].
            glow: Light that it gives off, relative to white.
        """
        return Surface(self.bank.add(image), None, gloss=gloss, glow=glow)

    def accent(self) -> str:
        """Returns one of the palette's accent colours."""
        return self.palette.accents[self.rng.integers(3)]

    def any_wood(self) -> Surface:
        """Returns one of the room's three woods, mostly the main one."""
        return (self.wood, self.wood, self.dark_wood, self.pale_wood)[self.rng.integers(4)]
