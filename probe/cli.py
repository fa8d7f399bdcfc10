"""The command ``fit3d-probe``: what features are worth, with the controls that keep the answer honest."""

from collections.abc import Sequence
from functools import partial

import tyro

from fit3d_ns.support.command_line import run_command
from probe.config import (
    Command,
    CorrespondenceConfig,
    DepthConfig,
    NormalsConfig,
    RetrievalConfig,
    SegmentationConfig,
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(Command, prog="fit3d-probe", args=args, description=__doc__)
    run_command(partial(_run, config))


def _run(config: object) -> None:
    # Imported here, so that --help needs neither torch nor a second.
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
