"""Videos through PyAV, which nerfstudio depends on and which brings FFmpeg's libraries along."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_path

_CODEC = "libx264"
_QUALITY = "18"
"""x264's constant rate factor; visually lossless."""


def check_video() -> None:
    """Checks, before any long work, that videos can be written.

    Raises:
        UserError: If FFmpeg's libraries or their H.264 encoder are missing.
    """
    try:
        from av.codec import Codec
    except ImportError as error:
        raise UserError(
            f"Videos need FFmpeg through PyAV, which cannot be imported ({error}): `pip install av`, or add --no-video."
        ) from error
    try:
        Codec(_CODEC, "w")
    except ValueError as error:  # PyAV's own kind derives from it
        raise UserError(
            f"The FFmpeg of the installed PyAV has no H.264 encoder ({_CODEC}): `pip install --force-reinstall av` for "
            "a build that has, or add --no-video."
        ) from error


@contextmanager
def video_writer(
    path: Path, size: tuple[int, int], frames_per_second: float
) -> Iterator[Callable[[Float[Tensor, "H W 3"]], None]]:
    """Writes an MP4 (H.264), whole or not at all.

    Args:
        path: The file; what stands there is replaced.
        size: Height and width of every frame, in pixels. An odd last row or column is left out, since the codec stores
            colour for 2 x 2 pixels.
        frames_per_second: Of the video.

    Yields:
        A function that appends one frame, with values in [0, 1].

    Raises:
        UserError: If videos cannot be written here, or the disk refuses.
    """
    check_video()
    import av

    rate = Fraction(frames_per_second).limit_denominator(1000)
    with atomic_path(path) as temporary:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream: Any = container.add_stream(_CODEC, rate=rate, options={"crf": _QUALITY})
            height, width = size[0] // 2 * 2, size[1] // 2 * 2
            stream.pix_fmt, stream.height, stream.width = "yuv420p", height, width

            def append(frame: Float[Tensor, "H W 3"]) -> None:
                pixels = (frame[:height, :width].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

            yield append
            container.mux(stream.encode())
