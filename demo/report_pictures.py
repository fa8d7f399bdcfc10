"""Pictures of the report, from the files that the commands wrote."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.config import DemoConfig
from demo.stages import places
from fit3d_ns.backbones import BackboneSpec, load_backbone, resize_to_patches
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.support.samples import evenly_spaced

Picture = tuple[str, np.ndarray]
"""Caption, and uint8 [H, W, 3]."""


def photos(room: Path, count: int) -> list[Picture]:
    """Returns photos of a room, spread over the walk through it, named by their files.

    Args:
        room: Folder of a room.
        count: Most photos.
    """
    return [(path.stem, read_picture(path)) for path in evenly_spaced(sorted((room / "images").glob("*.png")), count)]


def evaluation_views(folder: Path, count: int) -> list[list[Picture]]:
    """Returns held-out views as ``ns-eval`` saved them: photo, render, teacher's and lifted features.

    Args:
        folder: That ``ns-eval`` was told to write to.
        count: Most views.
    """
    rows = []
    for path in evenly_spaced(sorted(folder.glob("eval_img_*.png")), count):
        photo, render = _halves(read_picture(path))
        teacher, lifted = _halves(read_picture(path.with_name(path.name.replace("img", "features"))))
        rows.append([("photo", photo), ("render", render), ("teacher", teacher), ("lifted", lifted)])
    return rows


@torch.no_grad()
def feature_pictures(config: DemoConfig, count: int) -> list[list[Picture]]:
    """Returns photos of the held-out room beside what each backbone makes of them, in the original's colours.

    Args:
        config: Of a demo whose backbones are distilled.
        count: Photos.
    """
    where = places(config)
    weights: dict[str, Path | None] = {"original": config.backbone_weights}
    weights["tuned"] = where.distilled("lifted") / "backbone.safetensors"
    if config.control:
        weights["control"] = where.distilled("control") / "backbone.safetensors"
    chosen = photos(where.held_out_room, count)
    maps: dict[str, list[torch.Tensor]] = {}
    for name, path in weights.items():
        backbone = load_backbone(BackboneSpec(str(config.backbone), path), torch.device("cpu"))
        for _, photo in chosen:
            image = torch.from_numpy(photo.transpose(2, 0, 1).copy())[None].float() / 255
            tokens = backbone(resize_to_patches(image, backbone.info.patch_size)).patch_tokens[0]
            maps.setdefault(name, []).append(tokens.permute(1, 2, 0))
    basis = ColorBasis.fit(torch.cat([patches.flatten(0, 1) for patches in maps["original"]]))
    return [
        [("photo", photo), *((name, basis.to_rgb(maps[name][index]).mul(255).byte().numpy()) for name in weights)]
        for index, (_, photo) in enumerate(chosen)
    ]


def panels(folder: Path, count: int) -> list[list[Picture]]:
    """Returns test photos of a probe with truth and predictions, as the probe drew them.

    Args:
        folder: Output folder of a probe.
        count: Most test photos.
    """
    places_ = sorted({path.name.partition("_")[0] for path in (folder / "panels").glob("[0-9]*_photo.png")})
    rows = []
    for place in evenly_spaced(places_, count):
        named = {path.stem.partition("_")[2]: path for path in (folder / "panels").glob(f"{place}_*.png")}
        order = [name for name in ("photo", "truth", "original", "duplicate", "tuned", "concat") if name in named]
        rows.append([(name, read_picture(named[name])) for name in order])
    return rows


def read_picture(path: Path) -> np.ndarray:
    """Reads a picture as uint8 [H, W, 3].

    Args:
        path: A PNG that a command wrote.

    Returns:
        uint8 [H, W, 3].
    """
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _halves(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = picture.shape[1] // 2
    return picture[:, :middle], picture[:, middle:]
