"""The command ``fit3d-probe``: what features are worth, with the controls that keep the answer honest."""

import logging
import os
from collections.abc import Sequence
from functools import partial

import tyro

from fit3d_ns.support.command_line import run_command
from probe.config import (
    Command,
    CorrespondenceConfig,
    DepthConfig,
    FeatureConfig,
    NormalsConfig,
    RetrievalConfig,
    SegmentationConfig,
)

_LOGGER = logging.getLogger("probe.cli")  # not __main__, which `python -m` makes of __name__


def main(args: Sequence[str] | None = None) -> None:
    """Entry point.

    Args:
        args: Words of the command line; None for those of this process.
    """
    config = tyro.cli(Command, prog="fit3d-probe", args=args, description=__doc__)
    run_command(partial(_run, config))


def _run(config: FeatureConfig) -> None:
    # Imports are here, so that --help needs neither torch nor a second, and the first line no more than that.
    if os.environ.get("RANK", "0") == "0":  # the first of those that torchrun started; they join each other later
        _LOGGER.info("%s on %s", type(config).__name__.removesuffix("Config"), config.data)
    if isinstance(config, CorrespondenceConfig):
        from probe.zero_shot.correspondence import run_correspondence

        run_correspondence(config)
        return
    if isinstance(config, RetrievalConfig):
        from probe.zero_shot.retrieval import run_retrieval

        run_retrieval(config)
        return
    from probe.run import run_trained_probe

    if isinstance(config, SegmentationConfig):
        run_trained_probe(config, "segmentation")
    elif isinstance(config, DepthConfig):
        run_trained_probe(config, "depth")
    elif isinstance(config, NormalsConfig):
        run_trained_probe(config, "normals")


if __name__ == "__main__":
    main()
