"""Pictures that are stretched over one surface: paintings, rugs, book backs, screens, the view outside.

Linear RGB, float32 [n, n, 3], row 0 at the bottom.
"""

import numpy as np

from fit3d_rooms.surfaces.textures import _grid, _mix, _shaded, linear, spectral_noise


def landscape(rng: np.random.Generator, n: int = 256) -> np.ndarray:
    """Returns painted hills below a sky with a sun.

    Args:
        rng: Draws what differs from room to room.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    skies = [("#f4d6a0", "#5f8fb8"), ("#f7b98b", "#6a5a8c"), ("#dfe9ef", "#7fa9c9"), ("#f3e3c3", "#c96f4a")]
    low, high = (linear(c) for c in skies[rng.integers(len(skies))])
    image = _mix(low, high, (t - 0.35) / 0.65)
    sun = np.hypot(s - rng.uniform(0.2, 0.8), t - rng.uniform(0.6, 0.85))
    image = _mix(image, linear("#fff3d0"), (rng.uniform(0.06, 0.11) - sun) * 60)
    hills = ["#8aa07a", "#5d7f5f", "#3f5f4a", "#2f4538", "#6b5a45", "#94785a", "#4c6478"]
    start = rng.integers(len(hills))
    for layer in range(4):
        profile = (
            0.55
            - 0.13 * layer
            + (0.09 - 0.01 * layer)
            * np.interp((np.arange(n) + 0.5) / n, np.linspace(0, 1, 7 + layer), rng.uniform(-1, 1, 7 + layer))
        )
        image = _mix(image, linear(hills[(start + layer) % len(hills)]), (profile[None, :] - t) * n / 2)
    return _shaded(image, 1 + 0.08 * spectral_noise(rng, n, 0.8))


def abstract(rng: np.random.Generator, colors: list[str], n: int = 256) -> np.ndarray:
    """Returns overlapping bars, discs and arcs in a given palette.

    Args:
        rng: Draws what differs from room to room.
        colors: sRGB, ``#rrggbb`` each.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    palette = [linear(c) for c in colors]
    image = np.broadcast_to(linear("#ece4d4"), (n, n, 3)).copy()
    for _ in range(rng.integers(7, 12)):
        color = palette[rng.integers(len(palette))]
        cx, cy, size = *rng.uniform(0.15, 0.85, 2), rng.uniform(0.08, 0.3)
        kind = rng.integers(3)
        if kind == 0:
            distance = np.maximum(np.abs(s - cx) / rng.uniform(0.5, 2.0), np.abs(t - cy) * rng.uniform(0.5, 2.0)) - size
        elif kind == 1:
            distance = np.hypot(s - cx, t - cy) - size
        else:
            distance = np.abs(np.hypot(s - cx, t - cy) - size) - 0.03
        image = _mix(image, color, -distance * n * 0.7)
    return _shaded(image, 1 + 0.05 * spectral_noise(rng, n, 0.8))


def botanical(rng: np.random.Generator, n: int = 256) -> np.ndarray:
    """Returns a pressed branch on paper.

    Args:
        rng: Draws what differs from room to room.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    image = np.broadcast_to(linear("#efe8d8"), (n, n, 3)).copy()
    green = linear(str(rng.choice(["#45643f", "#5b7d4f", "#7a6a3a", "#3d5c5c"])))
    stem = 0.5 + 0.08 * np.sin(2.5 * t + rng.uniform(0, 6))
    image = _mix(image, green, (0.008 - np.abs(s - stem)) * n * (t > 0.12) * (t < 0.9))
    for i, height in enumerate(np.linspace(0.22, 0.86, 9)):
        side = 1 if i % 2 else -1
        x, y = (s - np.interp(height, t[:, 0], stem[:, 0])) * side, t - height
        along, across = 0.85 * x + 0.5 * y, -0.5 * x + 0.85 * y
        length = 0.3 * (1.1 - 0.6 * abs(height - 0.45))
        leaf = 0.055 * np.sin(np.pi * np.clip(along / length, 0, 1)) - np.abs(across)
        image = _mix(image, green * (0.8 + 0.5 * rng.random()), leaf * n * (along > 0))
    return _shaded(image, 1 + 0.04 * spectral_noise(rng, n, 1.0))


def rug(rng: np.random.Generator, colors: list[str], kind: str, n: int = 512) -> np.ndarray:
    """Returns a woven rug with a border; ``kind`` is medallion, bands, diamonds or shag.

    Args:
        rng: Draws what differs from room to room.
        colors: Three of sRGB, ``#rrggbb`` each: ground and two for motifs.
        kind: ``medallion``, ``bands``, ``diamonds`` or ``shag``.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    base, first, second = (linear(c) for c in colors[:3])
    x, y = np.abs(s - 0.5) * 2, np.abs(t - 0.5) * 2
    border = np.maximum(x, y)
    image = np.broadcast_to(base, (n, n, 3)).copy()
    if kind == "medallion":
        angle, radius = np.arctan2(t - 0.5, s - 0.5), np.hypot(x, y)
        motif = np.abs(np.mod(x * 9, 1) - 0.5) + np.abs(np.mod(y * 9, 1) - 0.5)
        image = _mix(image, second, (0.16 - motif) * 40)
        image = _mix(image, first, (np.abs(motif - 0.5) < 0.05) * 0.35)
        for size, color in ((0.66, second), (0.62, first), (0.4, base), (0.36, second), (0.2, first), (0.1, base)):
            image = _mix(image, color, (size * (1 + 0.06 * np.cos(16 * angle)) - radius) * 60)
        star = np.abs(np.mod(angle * 8 / np.pi, 1) - 0.5) + np.abs(radius - 0.5) * 5
        image = _mix(image, second, (0.35 - star) * 20 * ((radius > 0.42) & (radius < 0.58)))
    elif kind == "bands":
        stripe = np.floor(t * 22).astype(int)
        pick = rng.integers(0, 3, 22)[stripe]
        image = np.stack([base, first, second])[pick]
        zigzag = np.abs(np.mod(s * 16, 1) - 0.5) + np.mod(t * 22, 1) * 0.5
        image = _mix(image, base, (zigzag < 0.4) * 0.6 * (stripe % 3 == 1))
    elif kind == "diamonds":
        lattice = np.abs(np.mod(s * 5, 1) - 0.5) + np.abs(np.mod(t * 5, 1) - 0.5)
        image = _mix(image, first, (np.abs(lattice - 0.5) < 0.07) * 1.0)
        image = _mix(image, second, (lattice < 0.16) * 1.0)
    if kind != "shag":
        image = _mix(image, first, ((border > 0.8) & (border < 0.93)) * 1.0)
        teeth = np.mod(np.where(x > y, t, s) * 24, 1) < 0.5
        image = _mix(image, second, ((border > 0.84) & (border < 0.89) & teeth) * 1.0)
    pile = 0.16 if kind == "shag" else 0.09
    return _shaded(image, 1 + pile * spectral_noise(rng, n, 0.3) + 0.04 * spectral_noise(rng, n, 1.5))


def book_back(rng: np.random.Generator, n: int = 64) -> np.ndarray:
    """Returns a book's back in white, to be tinted: bands and lines of a title.

    Args:
        rng: Draws what differs from room to room.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    ink = rng.choice([0.25, 0.35, 1.7])
    brightness = np.full((n, n), 0.75)
    for height in rng.uniform(0.08, 0.92, rng.integers(1, 4)):
        brightness = np.where(np.abs(t - height) < rng.uniform(0.008, 0.03), ink * 0.75, brightness)
    low, high = np.sort(rng.uniform(0.25, 0.8, 2))
    letters = (
        (np.mod(t * rng.integers(14, 24), 1) < 0.6) & (t > low) & (t < max(high, low + 0.2)) & (np.abs(s - 0.5) < 0.18)
    )
    brightness = np.where(letters, ink * 0.75, brightness)
    return _shaded(np.ones(3), brightness * (1 + 0.05 * spectral_noise(rng, n, 1.0)))


def screen(rng: np.random.Generator, n: int = 256) -> np.ndarray:
    """Returns what a switched-on screen shows: a dusky landscape with a bar of tiles.

    Args:
        rng: Draws what differs from room to room.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    image = landscape(rng, n) * 0.8
    tile = (t > 0.06) & (t < 0.2) & (np.mod(s * 7, 1) > 0.12) & (s > 0.07) & (s < 0.93)
    colors = rng.uniform(0.05, 0.7, (8, 3))[np.floor(s * 7).astype(int).clip(0, 7)]
    return np.where(tile[..., None], colors, image).astype(np.float32)


def outdoors(rng: np.random.Generator, n: int = 512) -> np.ndarray:
    """Returns the view from a window: bright sky with clouds, trees, roofs, lawn. Values may exceed 1.

    Args:
        rng: Draws what differs from room to room.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    image = _mix(linear("#e9f1f6") * 1.25, linear("#8fbbe6") * 1.1, (t - 0.35) / 0.65)
    clouds = spectral_noise(rng, n, 1.7, (2.0, 1.0))
    image = _mix(image, np.full(3, 1.35), (clouds - 0.4) * 0.7 * (t > 0.35))
    horizon = rng.uniform(0.28, 0.4)
    x = (np.arange(n) + 0.5) / n

    def skyline(base: float, height: float, knots: int, roughness: float) -> np.ndarray:
        profile = base + height * np.interp(x, np.linspace(0, 1, knots), rng.random(knots))
        fine = spectral_noise(rng, n, 1.0)[0] * roughness
        return (profile + fine)[None, :] - t

    image = _mix(image, linear("#8fa5ab") * 0.9, skyline(horizon, 0.07, 9, 0.003) * n / 4)
    for _ in range(3):
        left, width, top = rng.uniform(-0.1, 0.9), rng.uniform(0.12, 0.25), horizon + rng.uniform(0.03, 0.14)
        wall = np.minimum(width / 2 - np.abs(s - left - width / 2), top - t)
        roof = np.minimum(
            width * 0.6 - (t - top) * 1.2 - np.abs(s - left - width / 2), np.minimum(t - top, top + width * 0.4 - t)
        )
        image = _mix(image, linear(str(rng.choice(["#cdb9a0", "#b59a86", "#d8cfc2"]))), wall * n / 2)
        image = _mix(image, linear(str(rng.choice(["#8a5340", "#6f6a68"]))), roof * n / 2)
    leaves = 0.75 + 0.3 * spectral_noise(rng, n, 0.8).clip(-2, 2)
    trees = linear("#55733f")[None, None] * leaves[..., None]
    weight = np.clip(skyline(horizon - 0.1, 0.2, 12, 0.012) * n / 4, 0, 1)[..., None]
    image = image + (trees - image) * weight
    lawn = linear("#7d9a55")[None, None] * (0.8 + 0.1 * spectral_noise(rng, n, 1.0))[..., None]
    weight = np.clip((horizon - 0.12 - t) * n / 4, 0, 1)[..., None]
    return (image + (lawn - image) * weight).clip(0, 2).astype(np.float32)


def leaf(rng: np.random.Generator, color: str, n: int = 64) -> np.ndarray:
    """Returns a leaf with its midrib along t.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    vein = np.mod((t - np.abs(s - 0.5) * 0.9) * 7, 1) < 0.12
    brightness = 0.85 + 0.3 * np.abs(s - 0.5) + 0.25 * (np.abs(s - 0.5) < 0.03) + 0.12 * vein
    return _shaded(linear(color), brightness + 0.06 * spectral_noise(rng, n, 1.0))


def shade(n: int = 64) -> np.ndarray:
    """Returns the glow of a lamp shade: brightest in the middle.

    Args:
        n: Side in texels, a power of two.
    """
    _, t = _grid(n)
    glow = 0.62 + 0.38 * np.exp(-(((t - 0.45) / 0.28) ** 2))
    return (np.ones(3) * glow[..., None]).astype(np.float32)
