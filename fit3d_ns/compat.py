"""Every workaround for a version or an upstream bug, each with the link that lets it be deleted.

Nothing here is imported at a cost: nerfstudio's model modules are touched inside the functions only.
"""

import functools
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fit3d_ns.support.errors import UserError

_LOGGER = logging.getLogger(__name__)


@contextmanager
def listing_without(is_leftover: Callable[[Path], bool]) -> Iterator[None]:
    """While active, ``Path.iterdir`` leaves out entries that are no data.

    nerfstudio's ScanNet and ARKitScenes dataparsers make a number or a photo of whatever lies in a folder
    (``scannet_dataparser.py:84``, ``arkitscenes_dataparser.py:99`` of 1.1.5; no issue there yet).

    Args:
        is_leftover: Says which.
    """
    iterdir = Path.iterdir

    def without_leftovers(self: Path) -> Iterator[Path]:
        return (entry for entry in iterdir(self) if not is_leftover(entry))

    with patch.object(Path, "iterdir", without_leftovers):
        yield


@contextmanager
def nerfstudio_needed(what: str) -> Iterator[None]:
    """Lets an import of nerfstudio fail in one sentence, where the rest of a command does without it.

    Args:
        what: What needs it, in the plural; the sentence's first words.

    Raises:
        UserError: If the block finds it, or a part of it, not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} need nerfstudio, and {error.name} is missing here: run `pip install nerfstudio`."
        ) from error


def refuse_to_render_nothing(reason: str) -> None:
    """Lets ``ns-render dataset`` say why a split has no views, where it would ask for the folder of no photos.

    Does nothing in other commands. nerfstudio 1.1.5, `DatasetRender.main`; no issue there yet.

    Args:
        reason: The sentence.
    """
    render: Any = sys.modules.get("nerfstudio.scripts.render")
    if render is None:
        return

    class Loader(render.FixedIndicesEvalDataloader):
        def __init__(self, input_dataset: Any, **kwargs: Any):
            if len(input_dataset) == 0:
                raise UserError(reason)
            super().__init__(input_dataset, **kwargs)

    render.FixedIndicesEvalDataloader = Loader


def register_safe_globals() -> None:
    """Lets torch >= 2.6 load nerfstudio's checkpoints, which hold learning rates as numpy scalars.

    The three names are plain number containers; unpickling stays restricted (``weights_only``). Upstream:
    https://github.com/nerfstudio-project/nerfstudio/issues/3683
    """
    core = getattr(np, "_core", None) or getattr(np, "core")
    torch.serialization.add_safe_globals([core.multiarray.scalar, np.dtype, type(np.dtype(np.float64))])


def float_learning_rates(scheduler: torch.optim.lr_scheduler.LambdaLR) -> torch.optim.lr_scheduler.LambdaLR:
    """Makes a scheduler return Python floats, so that checkpoints hold no numpy scalar (nerfstudio issue 3683).

    Args:
        scheduler: nerfstudio's exponential decay, whose lambdas return ``np.float64``.

    Returns:
        The same scheduler.
    """
    scheduler.lr_lambdas = [
        lambda step, rate=rate: float(rate(step))  # type: ignore[misc]
        for rate in scheduler.lr_lambdas
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr()):
        group["lr"] = float(rate)
    scheduler._last_lr = [float(rate) for rate in scheduler.get_last_lr()]
    return scheduler


class LazyLpips:
    """LPIPS that fetches its network at the first measurement, and is left out where that cannot be had.

    Splatfacto builds torchmetrics' metric in ``populate_modules``, and torchmetrics downloads AlexNet when it is built,
    so a machine without network cannot even open a run. Here training, the viewer and exports never touch the network,
    and checkpoints do not carry AlexNet.

    Args:
        **arguments: Of torchmetrics' ``LearnedPerceptualImagePatchSimilarity``.
    """

    def __init__(self, **arguments: Any):
        self._arguments = arguments
        self._metric: Any = None

    @property
    def available(self) -> bool:
        """Whether the last measurement could be taken."""
        return self._metric is not False

    def __call__(self, image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Returns LPIPS, or NaN with one warning where its weights cannot be had.

        Args:
            image: Images in [0, 1], shape [B, 3, H, W].
            reference: Images of the same shape.
        """
        if self._metric is None:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            try:
                with torch.random.fork_rng(devices=[]):  # networks are initialised on the CPU
                    self._metric = LearnedPerceptualImagePatchSimilarity(**self._arguments).to(image.device)
            except (OSError, RuntimeError) as error:  # URLError is an OSError; torch.hub raises RuntimeError
                self._metric = False
                folder = Path(torch.hub.get_dir()) / "checkpoints"
                _LOGGER.warning(
                    f"LPIPS is left out: its AlexNet weights are not in {folder} and could not be downloaded ({error})."
                )
        if self._metric is False:
            return torch.tensor(float("nan"))
        return self._metric(image, reference)


@contextmanager
def lazy_lpips() -> Iterator[None]:
    """While active, building torchmetrics' LPIPS builds a ``LazyLpips``."""
    with patch("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", LazyLpips):
        yield


class _CudaMeans(TorchFunctionMode):
    """While active in a thread, its calls of ``Tensor.cuda()`` lead to another device."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to(self._device)
        return func(*args, **(kwargs or {}))


@contextmanager
def splatfacto_on(device: torch.device) -> Iterator[None]:
    """While active, splatfacto's own methods run on ``device``, in this thread; on CUDA nothing is changed.

    Splatfacto moves tensors with ``.cuda()`` in two places, calls gsplat's CUDA rasterizer and compiles a 4x4 matrix
    inverse with torch.compile, which needs a C++ compiler
    (https://github.com/nerfstudio-project/nerfstudio/issues/3290).

    Args:
        device: Device of the model.
    """
    if device.type == "cuda":
        yield
        return
    _splatfacto_by_device()
    with _CudaMeans(device):
        yield


@functools.cache
def _splatfacto_by_device() -> None:
    """Lets splatfacto's rasterizer and matrix inverse be chosen by the device of what they are given.

    Once for the process, and on CUDA they are what they were: browsers render in threads of their own, so nothing may
    be put back while another thread still needs it.
    """
    from nerfstudio.models import splatfacto

    from fit3d_ns.rasterization import rasterize

    on_cuda = getattr(splatfacto, "rasterization", None)
    compiled = splatfacto.get_viewmat
    eager = getattr(compiled, "_torchdynamo_orig_callable", compiled)

    def rasterization(*, means: torch.Tensor, **arguments: Any) -> Any:
        return (on_cuda if means.is_cuda and on_cuda is not None else rasterize)(means=means, **arguments)

    def get_viewmat(camera_to_world: torch.Tensor) -> torch.Tensor:
        return (compiled if camera_to_world.is_cuda else eager)(camera_to_world)

    setattr(splatfacto, "rasterization", rasterization)
    setattr(splatfacto, "get_viewmat", get_viewmat)


def reset_opacities(strategy: Any) -> None:
    """Lets gsplat 1.5.3 reset opacities while it trains, as all other versions do.

    There ``step % self.reset_every == 0 & step > 0`` is a chain of comparisons that is never true
    (https://github.com/nerfstudio-project/gsplat/issues/797); conda has no newer version.

    Args:
        strategy: gsplat's strategy, changed in place.
    """
    if not hasattr(strategy, "reset_every") or version("gsplat").split("+")[0] != "1.5.3":
        return  # MCMC resets nothing
    from gsplat.strategy.ops import reset_opa

    refine = strategy.step_post_backward

    @functools.wraps(refine)
    def step_post_backward(
        params: Any, optimizers: Any, state: Any, step: int, info: Any, packed: bool = False
    ) -> None:
        refine(params, optimizers, state, step, info, packed)
        if 0 < step < strategy.refine_stop_iter and step % strategy.reset_every == 0:
            reset_opa(params, optimizers, state, value=strategy.prune_opa * 2.0)

    strategy.step_post_backward = step_post_backward


def neighbour_distances(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Returns what splatfacto takes as the distances of points to their neighbours, wherever nerfstudio keeps that.

    A method of the model in 1.1.5, a function of `nerfstudio.utils.math` on the main branch (50e0e3c7).

    Args:
        positions: [N, 3] float32.
        count: Neighbours K of each.

    Returns:
        [N, K] float32.
    """
    from nerfstudio.models.splatfacto import SplatfactoModel
    from nerfstudio.utils import math as nerfstudio_math

    if hasattr(nerfstudio_math, "k_nearest_sklearn"):
        return getattr(nerfstudio_math, "k_nearest_sklearn")(positions, count)[0]
    method: Callable[..., Any] = SplatfactoModel.k_nearest_sklearn
    return torch.from_numpy(method(None, positions, count)[0])


def compile_splatfacto(device: torch.device) -> None:
    """Lets splatfacto's matrix inverse, which is compiled when it is first called on CUDA, be compiled now.

    Args:
        device: Where the model is.
    """
    from nerfstudio.models import splatfacto

    if device.type == "cuda":
        splatfacto.get_viewmat(torch.eye(4, device=device)[None, :3])


def read_pictures_by_their_interface() -> None:
    """Lets nerfstudio's main branch read pictures with Pillow 13.

    Its ``pil_to_numpy`` calls private functions of Pillow, whose arguments changed (``data/utils/data_utils.py``
    at 50e0e3c7; 1.1.5 has no such function). What Pillow offers everybody gives the same array.
    """
    from nerfstudio.data.datasets import base_dataset
    from nerfstudio.data.utils import data_utils

    for module in (data_utils, base_dataset):
        if hasattr(module, "pil_to_numpy"):
            setattr(module, "pil_to_numpy", np.array)


def name_callers_without_their_sources() -> None:
    """Lets nerfstudio list the methods that can be installed without reading the source of every caller.

    nerfstudio 1.1.5 looks up its caller by ``inspect.stack()`` for each of 26 methods
    (``external_methods.py:298``), which is most of the time that any ``ns-*`` command takes to start; no issue there
    yet.
    """
    from nerfstudio.configs import external_methods

    def stack() -> list[SimpleNamespace]:
        frame, callers = sys._getframe(1), []
        while frame is not None:
            callers.append(SimpleNamespace(function=frame.f_code.co_name))
            frame = frame.f_back
        return callers

    external_methods.inspect = SimpleNamespace(**{**vars(inspect), "stack": stack})  # type: ignore[assignment]


def clamp_refinement_pause(strategy: Any) -> bool:
    """Lets scenes densify whose number of images would stop it for good.

    Splatfacto pauses refinement after each opacity reset for as many steps as there are images, and refines at every
    n-th step only: from about 2,900 images on, no such step is left between two resets
    (https://github.com/nerfstudio-project/nerfstudio/issues/2927). Then, and only then, a third of the steps between
    two resets is kept for refinement.

    Args:
        strategy: gsplat's strategy, changed in place.

    Returns:
        Whether the pause had to be shortened.
    """
    pause, reset = getattr(strategy, "pause_refine_after_reset", None), getattr(strategy, "reset_every", None)
    if pause is None or reset is None:
        return False  # MCMC neither resets nor pauses
    # gsplat refines where step % refine_every == 0 and step % reset >= pause; this is the largest such remainder.
    if pause <= reset - math.gcd(reset, strategy.refine_every):
        return False
    strategy.pause_refine_after_reset = reset * 2 // 3
    return True


@functools.cache
def resume_adds_steps(trainer: type[Any]) -> bool:
    """Returns whether nerfstudio counts ``max_num_iterations`` from the resumed step (1.1.5) or, later, from zero.

    Told by the source: 1.1.5 is the newest release, so there is no number yet to compare with.

    Args:
        trainer: nerfstudio's ``Trainer`` class.
    """
    return "max_num_iterations - self._start_step" not in inspect.getsource(trainer.train)
