"""Works on many scenes: on Ray, or in processes of this machine. Neither plans anything; the order is the list's."""

import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

from fit3d_loop.commands.steps import ThisMachine
from fit3d_loop.commands.worker import end_all
from fit3d_loop.config import LoopConfig
from fit3d_loop.scenes.machine import Packing, PhotoCounts, choose_packing
from fit3d_loop.scenes.stages import Job, Result, record_failure, work_on_scene
from fit3d_ns.support.errors import UserError, first_line

_LOGGER = logging.getLogger(__name__)
_ATTEMPTS = 3
"""How often a scene whose process is lost is tried; the last time without neighbours."""
_SECONDS_TO_ANSWER = 5.0
_OBJECT_STORE = 100 * 2**20
"""Bytes; jobs and outcomes are small, all else lies in files."""


@dataclass(frozen=True)
class Outcome:
    """What became of a scene."""

    job: Job
    """The scene and the round."""
    result: Result
    """Whether it is done."""
    sentence: str | None
    """Why, where it is not done."""


class Engine(Protocol):
    """Runs jobs."""

    name: str
    """For humans."""
    packing: Packing
    """How scenes share a machine."""

    def whole(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Does a piece of work that takes a whole machine with all its GPUs.

        Args:
            work: A function that another machine can import.
            *arguments: Of ``work``, each of which pickles.

        Returns:
            What it returns; it raises what that raises.
        """
        ...

    def run(self, jobs: Sequence[Job], show: Callable[[Sequence[Outcome]], None]) -> list[Outcome]:
        """Works on scenes until each is done or has failed.

        Args:
            jobs: One for each scene.
            show: Called about once a second, with what has come to an end.

        Returns:
            Of every job, in any order.
        """
        ...


@contextmanager
def open_engine(config: LoopConfig, photos: PhotoCounts, threads: int) -> Iterator[Engine]:
    """Opens what runs scenes.

    Args:
        config: The user's choices.
        photos: Of the scenes.
        threads: Processor threads of each scene.

    Yields:
        Ray where it is installed and not declined, else processes of this machine.

    Raises:
        UserError: If Ray is asked for and missing, or its address does not answer.
    """
    wanted = config.ray_address is not None or config.engine == "ray"
    has_ray = config.engine != "processes" and find_spec("ray") is not None
    if wanted and not has_ray:
        raise UserError("Ray is not installed here: pip install 'fit3d-ns[cluster]', or use --engine processes.")
    if not has_ray or (config.shard is not None and not wanted):
        if config.engine == "auto" and config.shard is None:
            _LOGGER.info("Ray is not installed (pip install 'fit3d-ns[cluster]'): scenes run on this machine alone.")
        yield _Processes(choose_packing(photos, threads, config.scenes_at_once))
        return
    with _signals_kept(), _ray(config, photos, threads) as engine:
        yield engine


def _again(outcome: Outcome, attempts: int) -> bool:
    """Whether a scene is tried once more; what cannot be had is recorded."""
    if outcome.result == "lost" and attempts < _ATTEMPTS:
        _LOGGER.warning(f"{outcome.job.source.name}: {outcome.sentence} It is tried again.")
        return True
    if outcome.result == "lost":
        record_failure(outcome.job, "process", f"{outcome.sentence} It was tried {attempts} times.")
    return False


class _Processes(ThisMachine):
    """Threads of this process, each waiting for the command of one scene."""

    name = "processes of this machine"

    def __init__(self, packing: Packing) -> None:
        self.packing = packing

    def run(self, jobs: Sequence[Job], show: Callable[[Sequence[Outcome]], None]) -> list[Outcome]:
        """See `Engine`."""
        done: list[Outcome] = []
        alone: list[tuple[Job, int]] = []
        gpus: queue.Queue[str | None] = queue.Queue()
        for slot in range(self.packing.at_once):
            gpus.put(_gpu_of(slot, self.packing.gpus))

        def work(job: Job, number: int) -> tuple[Job, int, Outcome]:
            gpu = gpus.get()
            try:
                here = replace(job, settings=replace(job.settings, gpu=gpu))
                return job, number, Outcome(job, *work_on_scene(here))
            finally:
                gpus.put(gpu)

        pool = ThreadPoolExecutor(self.packing.at_once, thread_name_prefix="scene")
        try:
            waiting: set[Future] = {pool.submit(work, job, 1) for job in jobs}
            while waiting or alone:
                if not waiting:  # with fewer neighbours: none
                    job, number = alone.pop(0)
                    waiting = {pool.submit(work, job, number)}
                ended, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    job, number, outcome = future.result()
                    if _again(outcome, number):
                        alone.append((job, number + 1))
                    else:
                        done.append(outcome)
                show(done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
        return done


def _gpu_of(slot: int, gpus: int) -> str | None:
    """The GPU of a slot, as its number or name among those that this process may use."""
    if not gpus:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    return names[slot % gpus]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Puts back how this process ends on SIGTERM, for which Ray has a handler that it leaves behind."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _ray(config: LoopConfig, photos: PhotoCounts, threads: int) -> Iterator["_Ray"]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A scene on a CPU keeps the GPU's variable as it is.
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    address, packing = config.ray_address, choose_packing(photos, threads, config.scenes_at_once)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    try:
        if address is None:
            ray.init(
                num_cpus=packing.cores,
                num_gpus=packing.gpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                **quiet,
            )
        else:
            _check_answers(address)
            ray.init(address=address, **quiet)
            if ray.cluster_resources().get("GPU"):  # where this process runs there may be none
                choose: Any = ray.remote(num_gpus=1)(choose_packing)
                found: Any = ray.get(choose.remote(photos, threads, config.scenes_at_once))
                packing = found
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        if isinstance(error, UserError):
            raise
        if address is not None:
            raise UserError(
                f"No Ray cluster answers at {address} ({first_line(error)}): start one with `ray start --head`, or "
                "correct --ray-address."
            ) from error
        raise UserError(f"Ray cannot start here ({first_line(error)}): use --engine processes.") from error
    try:
        yield _Ray(packing, address)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuses an address at which nobody listens; Ray itself tries for a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdigit():
        raise UserError(f"--ray-address {address}: give HOST:PORT, or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"No Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error}): start one with `ray "
            "start --head`, or correct --ray-address."
        ) from error


class _Ray:
    """Tasks of Ray, each with its cores and a share of a GPU."""

    def __init__(self, packing: Packing, address: str | None) -> None:
        import ray

        self.name = "Ray on this machine" if address is None else f"the Ray cluster at {address}"
        self.packing = packing
        self._elsewhere = address is not None
        # Ray starts a task anew whose worker or node is lost.
        self._task: Any = ray.remote(max_retries=_ATTEMPTS)(work_on_scene)

    def whole(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """See `Engine`."""
        if not self._elsewhere:
            return work(*arguments)
        import ray
        from ray.exceptions import RayTaskError

        gpus = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        task: Any = ray.remote(max_retries=_ATTEMPTS, num_gpus=gpus)(work)
        try:
            return ray.get(task.remote(*arguments))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None

    def run(self, jobs: Sequence[Job], show: Callable[[Sequence[Outcome]], None]) -> list[Outcome]:
        """See `Engine`."""
        import ray
        from ray.exceptions import RayError

        cpus, share = self.packing.threads, self.packing.gpu_share
        if self.packing.at_once * cpus > self.packing.cores:
            cpus = self.packing.cores / self.packing.at_once  # the user's own choice
        elif not self.packing.gpus:
            cpus = max(cpus, self.packing.cores // self.packing.at_once)
        waiting = {self._task.options(num_cpus=cpus, num_gpus=share).remote(job): (job, 1) for job in jobs}
        done: list[Outcome] = []
        while waiting:
            ended, _ = ray.wait(list(waiting), timeout=1.0)
            for reference in ended:
                job, number = waiting.pop(reference)
                try:
                    outcome = Outcome(job, *ray.get(reference))
                except RayError as error:
                    outcome = Outcome(job, "lost", f"Ray lost the process of a scene ({first_line(error)}).")
                if _again(outcome, number):
                    whole = self._task.options(num_cpus=cpus, num_gpus=1.0 if share else 0)
                    waiting[whole.remote(job)] = (job, number + 1)
                else:
                    done.append(outcome)
            show(done)
        return done
