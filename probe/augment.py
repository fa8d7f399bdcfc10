"""Cutting, resizing and turning photos together with their truth, on the CPU, one sample at a time."""

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from probe.data.base import IGNORE
from probe.protocols import DepthRecipe, Recipe, SegmentationRecipe

KITTI_WINDOW = (352, 1216)
_ROTATION_DEGREES = 2.5
_CROP_TRIES = 10


def scaled_size(height: int, width: int, long_side: int, short_side: int) -> tuple[int, int]:
    """Returns the size (H, W) of a photo made as large as fits, with its aspect kept (mmcv's ``imrescale``).

    Args:
        height: Of the photo, pixels.
        width: Of the photo, pixels.
        long_side: Most pixels of the longer side.
        short_side: Most pixels of the shorter side.
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [H, W, 3] bilinearly without antialiasing, as the references do.

    Args:
        image: uint8 [H, W, 3].
        size: Height and width wanted, pixels.

    Returns:
        uint8 of that size.
    """
    if image.shape[:2] == size:
        return image
    return transforms.resize(_image(image), list(size), antialias=False).permute(1, 2, 0).numpy()


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes [H, W] to the nearest lower index, as OpenCV does.

    Args:
        values: [H, W] of any type.
        size: Height and width wanted, pixels.

    Returns:
        The same type, of that size.
    """
    rows = (np.arange(size[0]) * values.shape[0]) // size[0]
    columns = (np.arange(size[1]) * values.shape[1]) // size[1]
    return values[rows][:, columns]


def augment_segmentation(
    image: np.ndarray, labels: np.ndarray, recipe: SegmentationRecipe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Draws a training crop: random scale, crop without a class that fills it, mirror, padding.

    Args:
        image: uint8 [H, W, 3].
        labels: uint8 [H, W].
        recipe: Sizes and ranges.
        rng: This sample's own.

    Returns:
        Photo uint8 [crop, crop, 3] and labels [crop, crop], padded at the bottom and right with 0 and 255, and the
        height and width of what is not padding.
    """
    scale = rng.uniform(*recipe.scale_range)
    height, width = labels.shape[:2]
    size = scaled_size(height, width, int(recipe.long_side * scale), int(recipe.short_side * scale))
    photo = transforms.resize(_image(image), list(size), antialias=False)  # [3, H, W]
    mask = transforms.resize(tv_tensors.Mask(np.array(labels)), list(size))  # [H, W], nearest lower index
    crop = (recipe.crop, recipe.crop)
    top, left = _crop_corner(size, crop, rng)
    for _ in range(_CROP_TRIES):
        window = mask[top : top + recipe.crop, left : left + recipe.crop]
        counts = np.bincount(window.numpy().ravel(), minlength=IGNORE + 1)[:IGNORE]
        if np.count_nonzero(counts) > 1 and counts.max() < recipe.max_class_share * counts.sum():
            break
        top, left = _crop_corner(size, crop, rng)
    height, width = min(recipe.crop, size[0] - top), min(recipe.crop, size[1] - left)
    mirror = rng.random() < 0.5

    def cut(planes: Tensor, fill: int) -> Tensor:
        planes = transforms.crop(planes, top, left, height, width)
        if mirror:
            planes = transforms.horizontal_flip(planes)
        return transforms.pad(planes, [0, 0, recipe.crop - width, recipe.crop - height], fill=fill)

    return cut(photo, 0).permute(1, 2, 0).numpy(), cut(mask, IGNORE).numpy(), (height, width)


def depth_window(image: np.ndarray, target: np.ndarray, recipe: DepthRecipe, training: bool) -> tuple:
    """Cuts photo and truth to the part that a data set's protocol uses.

    Args:
        image: uint8 [H, W, 3].
        target: [H, W] or [H, W, 3].
        recipe: Which part, in training and in test.
        training: Whether the sample is trained on.

    Returns:
        Photo and truth, cut alike.
    """
    if recipe.kitti_window:
        height, width = KITTI_WINDOW
        top, left = max(0, image.shape[0] - height), max(0, (image.shape[1] - width) // 2)
        rows, columns = slice(top, top + height), slice(left, left + width)
        return image[rows, columns], target[rows, columns]
    if training and recipe.train_window is not None:
        top, bottom, left, right = recipe.train_window
        return image[top:bottom, left:right], target[top:bottom, left:right]
    return image, target


def crop_size(height: int, width: int, crop: tuple[int, int] | None = None) -> tuple[int, int]:
    """Returns height and width of a training crop, no larger than the photo.

    Args:
        height: Of the photo, pixels.
        width: Of the photo, pixels.
        crop: Height and width that are asked for, pixels; None: 13/15 and 17/20 of the photo's.
    """
    if crop is not None:
        return min(height, crop[0]), min(width, crop[1])
    return max(1, height * 13 // 15), max(1, width * 17 // 20)


def training_crop_size(height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """Returns height and width of the training crop of a photo, its data set's window heeded.

    Args:
        height: Of the photo, pixels.
        width: Of the photo, pixels.
        recipe: The full protocol's.
    """
    if isinstance(recipe, SegmentationRecipe):
        return recipe.crop, recipe.crop
    if not isinstance(recipe, DepthRecipe):
        return crop_size(height, width)
    photo = np.broadcast_to(np.uint8(0), (height, width))
    window, _ = depth_window(photo, photo, recipe, training=True)
    return crop_size(window.shape[0], window.shape[1], recipe.crop)


def augment_depth(
    image: np.ndarray, depth: np.ndarray, recipe: DepthRecipe, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a training crop: window, rotation by up to 2.5 degrees, mirror, crop.

    Args:
        image: uint8 [H, W, 3].
        depth: float32 [H, W], metres.
        recipe: Sizes.
        rng: This sample's own.

    Returns:
        Photo uint8 [h, w, 3] and depth [h, w]; what a rotation brings in from outside is black, and has no depth.
    """
    image, depth = depth_window(image, depth, recipe, training=True)
    if rng.random() < 0.5:
        degrees = rng.uniform(-_ROTATION_DEGREES, _ROTATION_DEGREES)
        image = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR))
        depth = np.asarray(Image.fromarray(depth).rotate(degrees, Image.Resampling.NEAREST))
    if rng.random() < 0.5:
        image, depth = image[:, ::-1], depth[:, ::-1]
    size = crop_size(depth.shape[0], depth.shape[1], recipe.crop)
    top, left = _crop_corner(depth.shape, size, rng)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    return np.ascontiguousarray(image[rows, columns]), np.ascontiguousarray(depth[rows, columns])


def augment_normals(image: np.ndarray, normals: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a training crop: mirror, crop.

    Args:
        image: uint8 [H, W, 3].
        normals: float32 [H, W, 3], zero where there are none.
        rng: This sample's own.

    Returns:
        Photo uint8 [h, w, 3] and normals [h, w, 3].
    """
    if rng.random() < 0.5:
        image, normals = image[:, ::-1], mirror_normals(normals)
    size = crop_size(normals.shape[0], normals.shape[1])
    top, left = _crop_corner(normals.shape[:2], size, rng)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    return np.ascontiguousarray(image[rows, columns]), np.ascontiguousarray(normals[rows, columns])


def mirror_normals(normals: np.ndarray) -> np.ndarray:
    """Returns the normals [H, W, 3] of the mirrored photo: their x component changes sign.

    Args:
        normals: float32 [H, W, 3], x to the right.
    """
    return normals[:, ::-1] * np.array([-1, 1, 1], np.float32)


def _image(image: np.ndarray) -> tv_tensors.Image:
    """Returns uint8 [H, W, 3] as torchvision's [3, H, W]."""
    return tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def _crop_corner(size: tuple[int, ...], crop: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    top = int(rng.integers(0, max(size[0] - crop[0], 0) + 1))
    return top, int(rng.integers(0, max(size[1] - crop[1], 0) + 1))


def draw_distortion(rng: np.random.Generator) -> np.ndarray:
    """Draws one sample's photometric distortion, each part with probability one half.

    Args:
        rng: This sample's own.

    Returns:
        float32 [5]: brightness added (of 255), contrast factor, whether contrast comes last, saturation factor, hue
        turn in degrees.
    """
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast_last = float(rng.random() < 0.5)
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    # OpenCV counts hue in steps of 2 degrees, and the reference draws from -18 to 17 of them.
    hue = 2.0 * float(rng.integers(-18, 18)) if rng.random() < 0.5 else 0.0
    return np.array([brightness, contrast, contrast_last, saturation, hue], np.float32)


def distort(images: Float[Tensor, "B 3 H W"], parameters: Float[Tensor, "B 5"]) -> Float[Tensor, "B 3 H W"]:
    """Applies mmsegmentation's PhotoMetricDistortion.

    The reference rounds to 8 bits after every step; this does not.

    Args:
        images: RGB in [0, 255].
        parameters: From `draw_distortion`.

    Returns:
        RGB in [0, 255].
    """
    brightness, contrast, last, saturation, hue = (parameters[:, k, None, None, None] for k in range(5))
    images = (images + brightness).clamp(0, 255)
    images = torch.where(last > 0, images, (images * contrast).clamp(0, 255))
    images = _turn_colors(images, saturation, hue)
    return torch.where(last > 0, (images * contrast).clamp(0, 255), images)


def draw_color_change(rng: np.random.Generator, brightness_range: tuple[float, float]) -> np.ndarray:
    """Draws one sample's change of gamma and channel gains, with probability one half.

    Args:
        rng: This sample's own.
        brightness_range: Least and largest factor of all channels.

    Returns:
        float32 [4]: gamma, gain of red, green, blue.
    """
    if rng.random() >= 0.5:
        return np.ones(4, np.float32)
    gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(*brightness_range)
    return np.array([gamma, *(brightness * rng.uniform(0.9, 1.1, 3))], np.float32)


def change_colors(images: Float[Tensor, "B 3 H W"], parameters: Float[Tensor, "B 4"]) -> Float[Tensor, "B 3 H W"]:
    """Applies gamma, on values in [0, 255] as the references do, and gains.

    Args:
        images: RGB in [0, 255].
        parameters: From `draw_color_change`.

    Returns:
        RGB in [0, 255].
    """
    gamma, gains = parameters[:, :1, None, None], parameters[:, 1:, None, None]
    return (images.pow(gamma) * gains).clamp(0, 255)


def _turn_colors(images: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scales saturation and turns hue in HSV."""
    value, strongest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    red, green, blue = images.unbind(1)
    span = chroma[:, 0].clamp_min(1e-6)
    sectors = torch.stack([(green - blue) / span, (blue - red) / span + 2, (red - green) / span + 4], 1)
    sector = sectors.gather(1, strongest) + hue / 60
    # Chroma is value times saturation, and saturation must not pass 1.
    chroma = torch.minimum(chroma * saturation, value)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[None, :, None, None]
    place = (offsets + sector) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
