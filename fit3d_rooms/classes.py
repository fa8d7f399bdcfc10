"""The semantic classes of the rooms: the same ids, names and colours in every room ever made."""

VOID = 255
"""Index in label images for pixels without a class; the renderer closes every room, so it stays unused."""

_CLASSES = (
    ("wall", "#c8bfae"),
    ("floor", "#8c6a4a"),
    ("ceiling", "#efece4"),
    ("door", "#b5651d"),
    ("window", "#6fc3ff"),
    ("curtain", "#b58fd8"),
    ("radiator", "#9fb0b8"),
    ("table", "#e6a832"),
    ("chair", "#d94f30"),
    ("sofa", "#2f7d6b"),
    ("bed", "#3f5fbf"),
    ("wardrobe", "#7a3f2a"),
    ("cabinet", "#c98a5b"),
    ("bookshelf", "#5b4a8a"),
    ("book", "#e85d9b"),
    ("lamp", "#fff27a"),
    ("plant", "#2fae3f"),
    ("picture", "#17becf"),
    ("rug", "#a83253"),
    ("television", "#303040"),
    ("box", "#d8b070"),
    ("cushion", "#ff9896"),
    ("vase", "#98df8a"),
)

CLASS_NAMES: tuple[str, ...] = tuple(name for name, _ in _CLASSES)
"""Class names; the position is the id stored in the label images."""

CLASS_IDS: dict[str, int] = {name: index for index, name in enumerate(CLASS_NAMES)}
"""Name -> id."""


def class_table() -> list[dict]:
    """Returns the content of ``classes.json``: one ``{"id", "name", "color": [r, g, b]}`` per class (0..255)."""
    return [
        {"id": index, "name": name, "color": [int(color[i : i + 2], 16) for i in (1, 3, 5)]}
        for index, (name, color) in enumerate(_CLASSES)
    ]
