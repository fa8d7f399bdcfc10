"""Procedural pictures of materials: tileable unless named otherwise, linear RGB, float32 [n, n, 3].

Row 0 is the bottom of the picture (t = 0). Noise comes from filtered spectra, which tile without a seam.
"""

import numpy as np

Color = tuple[float, float, float]


def linear(color: str) -> np.ndarray:
    """Returns linear RGB [3] of an sRGB colour.

    Args:
        color: sRGB, ``#rrggbb``.
    """
    srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def spectral_noise(
    rng: np.random.Generator, n: int, slope: float, stretch: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """Returns tileable Gaussian noise [n, n] with zero mean and unit deviation.

    Args:
        rng: source of randomness.
        n: side in texels.
        slope: fall of the amplitude with frequency; 0 is white, 1 grain, 2 clouds.
        stretch: how much longer features are along rows (t) and columns (s).
    """
    frequency_t = np.fft.fftfreq(n)[:, None] * n * stretch[0]
    frequency_s = np.fft.rfftfreq(n)[None, :] * n * stretch[1]
    radius = np.sqrt(frequency_t**2 + frequency_s**2)
    radius[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((n, n))) * radius**-slope
    noise = np.fft.irfft2(spectrum, s=(n, n))
    return noise / noise.std()


def _grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Texel centres (s, t), each [n, n] in (0, 1)."""
    axis = (np.arange(n) + 0.5) / n
    t, s = np.meshgrid(axis, axis, indexing="ij")
    return s, t


def _shaded(color: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    return (color * np.clip(brightness, 0.05, 4.0)[..., None]).clip(0.0, 1.0).astype(np.float32)


def _mix(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return a + (b - a) * np.clip(weight, 0.0, 1.0)[..., None]


def plaster(rng: np.random.Generator, color: str, contrast: float = 0.035, n: int = 512) -> np.ndarray:
    """Returns painted wall: faint roller grain and patches.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        contrast: Deviation of the brightness, relative.
        n: Side in texels, a power of two.
    """
    brightness = 1 + contrast * (0.6 * spectral_noise(rng, n, 0.5) + 0.35 * spectral_noise(rng, n, 1.5))
    return _shaded(linear(color), brightness)


def wallpaper(rng: np.random.Generator, color: str, accent: str, kind: str, n: int = 512) -> np.ndarray:
    """Returns printed paper; ``kind`` is stripes, damask, flowers or trellis.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        accent: Second colour, sRGB, ``#rrggbb``.
        kind: ``stripes``, ``damask``, ``flowers`` or ``trellis``.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    base, ink = linear(color), linear(accent)
    if kind == "stripes":
        weight = 0.75 * (np.mod(s * 4, 1) < 0.5) + 0.25 * (np.abs(np.mod(s * 4, 1) - 0.75) < 0.03)
    elif kind == "damask":
        x, y = np.mod(s * 2, 1) - 0.5, np.mod(t * 2 + 0.5 * (np.floor(s * 2) % 2), 1) - 0.5
        angle, radius = np.arctan2(y, x), np.hypot(x, y * 0.8)
        petal = 0.27 + 0.1 * np.cos(6 * angle) + 0.05 * np.cos(12 * angle + 1)
        weight = 0.8 * (radius < petal) * (1 - 0.8 * (np.abs(radius - petal * 0.6) < 0.03)) + 0.8 * (
            np.abs(radius - 0.45) < 0.012
        )
    elif kind == "flowers":
        weight = np.zeros((n, n))
        for _ in range(26):
            cx, cy, turn, size = *rng.random(2), rng.uniform(0, 6.3), rng.uniform(0.03, 0.075)
            x, y = np.mod(s - cx + 0.5, 1) - 0.5, np.mod(t - cy + 0.5, 1) - 0.5
            radius, angle = np.hypot(x, y), np.arctan2(y, x) + turn
            flower = (radius < size * (0.65 + 0.35 * np.cos(5 * angle))) & (radius > size * 0.2)
            stem = (np.abs(x - 0.25 * y) < 0.004) & (y < 0) & (y > -2.2 * size)
            weight = np.maximum(weight, 0.9 * flower + 0.5 * stem)
    else:
        line = np.minimum(np.abs(np.mod((s + t) * 3, 1) - 0.5), np.abs(np.mod((s - t) * 3, 1) - 0.5))
        weight = 0.85 * (line < 0.06)
    return _shaded(_mix(base, ink, weight * 0.8), 1 + 0.03 * spectral_noise(rng, n, 0.5))


def bricks(rng: np.random.Generator, color: str, mortar: str = "#b9b0a4", n: int = 512) -> np.ndarray:
    """Returns running bond, 12 courses of 4 bricks.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        mortar: sRGB, ``#rrggbb``.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    s = s + 0.002 * spectral_noise(rng, n, 1.5)
    t = t + 0.002 * spectral_noise(rng, n, 1.5)
    course = np.floor(t * 12)
    shifted = s * 4 + 0.5 * (course % 2)
    tone = rng.normal(1.0, 0.17, (12, 4))[course.astype(int) % 12, np.floor(shifted).astype(int) % 4]
    edge = np.minimum(
        np.minimum(np.mod(shifted, 1), 1 - np.mod(shifted, 1)) * 3, np.minimum(np.mod(t * 12, 1), 1 - np.mod(t * 12, 1))
    )
    face = _shaded(linear(color), tone * (1 + 0.14 * spectral_noise(rng, n, 0.8)))
    joint = _shaded(linear(mortar), 0.8 + 0.12 * spectral_noise(rng, n, 0.6))
    return _mix(joint, face, (edge - 0.07) / 0.06).astype(np.float32)


def wood(rng: np.random.Generator, color: str, contrast: float = 1.0, n: int = 512) -> np.ndarray:
    """Returns board with its grain along s.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        contrast: Of the grain, relative.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    warp = spectral_noise(rng, n, 1.8, (1.0, 6.0))
    rings = np.sin(2 * np.pi * (7 * t + 0.55 * warp))
    fibre = spectral_noise(rng, n, 0.8, (1.0, 30.0))
    pores = spectral_noise(rng, n, 0.1, (1.0, 14.0)) > 1.9
    brightness = 1 + contrast * (0.07 * rings + 0.07 * fibre + 0.05 * warp - 0.14 * pores)
    return _shaded(linear(color), brightness)


def planks(rng: np.random.Generator, color: str, rows: int = 10, n: int = 1024) -> np.ndarray:
    """Returns floor boards along s: each its own tone, grain and length.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        rows: Boards side by side.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    row = np.floor(t * rows).astype(int)
    start = rng.random(rows)[row]
    column = np.floor(np.mod(s + start, 1) * 2).astype(int)
    board = row * 2 + column
    tone = 1 + 0.13 * rng.standard_normal(rows * 2)[board]
    hue = 1 + 0.02 * rng.standard_normal((rows * 2, 3))[board]
    grain = spectral_noise(rng, n, 0.9, (1.0, 22.0)) * 0.075 + spectral_noise(rng, n, 1.8, (1.0, 8.0)) * 0.05
    # Each board shows another piece of the tree.
    shift = rng.integers(0, n, rows * 2)[board]
    columns = (np.arange(n)[None, :] + shift) % n
    grain = np.take_along_axis(grain, columns, axis=1)
    gap_t = np.minimum(np.mod(t * rows, 1), 1 - np.mod(t * rows, 1)) / rows
    along = np.mod(s + start, 1) * 2
    gap_s = np.minimum(np.mod(along, 1), 1 - np.mod(along, 1)) / 2
    gap = np.clip(np.minimum(gap_t, gap_s) * n / 2.2, 0.3, 1.0)
    return (linear(color) * hue * ((tone + grain) * gap)[..., None]).clip(0.01, 1.0).astype(np.float32)


def parquet(rng: np.random.Generator, color: str, blocks: int = 6, n: int = 1024) -> np.ndarray:
    """Returns basket-weave parquet: squares of five staves, turned alternately.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        blocks: Squares along a side.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    block_s, block_t = np.floor(s * blocks).astype(int), np.floor(t * blocks).astype(int)
    turned = (block_s + block_t) % 2 == 0
    inner_s, inner_t = np.mod(s * blocks, 1), np.mod(t * blocks, 1)
    across = np.where(turned, inner_s, inner_t) * 5
    along = np.where(turned, inner_t, inner_s)
    stave = ((block_s * blocks + block_t) * 5 + np.floor(across).astype(int)) % (blocks * blocks * 5)
    tone = 1 + 0.12 * rng.standard_normal(blocks * blocks * 5)[stave]
    fibre = 0.06 * np.where(turned, spectral_noise(rng, n, 0.8, (18.0, 1.0)), spectral_noise(rng, n, 0.8, (1.0, 18.0)))
    edge = np.minimum(np.minimum(np.mod(across, 1), 1 - np.mod(across, 1)) / 5, np.minimum(along, 1 - along)) / blocks
    return _shaded(linear(color), (tone + fibre) * np.clip(edge * n / 2.0, 0.35, 1.0))


def tiles(
    rng: np.random.Generator, color: str, accent: str, count: int = 4, checker: bool = False, n: int = 512
) -> np.ndarray:
    """Returns square tiles with grout; all of one colour or a chequerboard.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        accent: Second colour, sRGB, ``#rrggbb``.
        count: Tiles along a side.
        checker: Whether two colours alternate.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    i, j = np.floor(s * count).astype(int), np.floor(t * count).astype(int)
    tone = (1 + 0.05 * rng.standard_normal((count, count)))[i, j]
    vein = np.abs(spectral_noise(rng, n, 1.6))
    face = _mix(linear(color), linear(accent), ((i + j) % 2) * 1.0 if checker else np.zeros((n, n)))
    face = face * (tone * (1 + 0.04 * spectral_noise(rng, n, 1.2) - 0.12 * (vein < 0.06)))[..., None]
    edge = np.minimum.reduce(
        [np.mod(s * count, 1), 1 - np.mod(s * count, 1), np.mod(t * count, 1), 1 - np.mod(t * count, 1)]
    )
    grout = linear("#8f8a82")
    return _mix(grout, face, (edge - 0.012) / 0.01).clip(0, 1).astype(np.float32)


def fabric(rng: np.random.Generator, color: str, accent: str, kind: str = "plain", n: int = 512) -> np.ndarray:
    """Returns woven cloth; ``kind`` is plain, melange, stripes, plaid, dots or herringbone.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        accent: Second colour, sRGB, ``#rrggbb``.
        kind: ``plain``, ``melange``, ``stripes``, ``plaid``, ``dots`` or ``herringbone``.
        n: Side in texels, a power of two.
    """
    s, t = _grid(n)
    base, other = linear(color), linear(accent)
    weight = np.zeros((n, n))
    if kind == "melange":
        weight = 0.35 + 0.3 * spectral_noise(rng, n, 0.15)
    elif kind == "stripes":
        weight = 1.0 * (np.mod(t * 4, 1) < 0.3) + 0.7 * (np.abs(np.mod(t * 4, 1) - 0.65) < 0.04)
    elif kind == "plaid":
        weight = 0.45 * (np.mod(s * 3, 1) < 0.35) + 0.45 * (np.mod(t * 3, 1) < 0.35)
        weight += 0.3 * (np.abs(np.mod(s * 3, 1) - 0.7) < 0.03) + 0.3 * (np.abs(np.mod(t * 3, 1) - 0.7) < 0.03)
    elif kind == "dots":
        column = np.floor(s * 6)
        radius = np.hypot(np.mod(s * 6, 1) - 0.5, np.mod(t * 6 + 0.5 * (column % 2), 1) - 0.5)
        weight = 1.0 * (radius < 0.22)
    elif kind == "herringbone":
        weight = 0.6 * (np.mod((t + np.abs(np.mod(s * 6, 1) - 0.5) / 3) * 18, 1) < 0.5)
    weave = np.sin(2 * np.pi * 64 * s) * np.sin(2 * np.pi * 64 * t)
    brightness = 1 + 0.05 * weave + 0.06 * spectral_noise(rng, n, 0.3) + 0.04 * spectral_noise(rng, n, 1.5)
    return _shaded(_mix(base, other, weight), brightness)


def carpet(rng: np.random.Generator, color: str, n: int = 512) -> np.ndarray:
    """Returns wall-to-wall carpet: tufts and worn patches.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        n: Side in texels, a power of two.
    """
    brightness = 1 + 0.14 * spectral_noise(rng, n, 0.35) + 0.05 * spectral_noise(rng, n, 1.8)
    return _shaded(linear(color), brightness)


def mottled(
    rng: np.random.Generator, color: str, contrast: float = 0.05, slope: float = 1.4, n: int = 256
) -> np.ndarray:
    """Returns anything nearly plain: lacquer, ceramic, leather, paper, earth.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        contrast: Deviation of the brightness, relative.
        slope: Of `spectral_noise`.
        n: Side in texels, a power of two.
    """
    return _shaded(linear(color), 1 + contrast * spectral_noise(rng, n, slope))


def cardboard(rng: np.random.Generator, n: int = 256) -> np.ndarray:
    """Returns corrugated card with its flutes along t.

    Args:
        rng: Draws what differs from room to room.
        n: Side in texels, a power of two.
    """
    s, _ = _grid(n)
    brightness = 1 + 0.03 * np.sin(2 * np.pi * 40 * s) + 0.06 * spectral_noise(rng, n, 1.2, (5.0, 1.0))
    return _shaded(linear("#b58a58"), brightness)


def marble(rng: np.random.Generator, color: str, vein: str, n: int = 512) -> np.ndarray:
    """Returns stone with thin veins.

    Args:
        rng: Draws what differs from room to room.
        color: sRGB, ``#rrggbb``.
        vein: sRGB, ``#rrggbb``.
        n: Side in texels, a power of two.
    """
    field = spectral_noise(rng, n, 1.7)
    weight = np.exp(-((field / 0.07) ** 2)) * 0.6 + 0.08 * spectral_noise(rng, n, 1.5)
    return _mix(linear(color), linear(vein), weight).clip(0, 1).astype(np.float32)
