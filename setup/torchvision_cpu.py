"""Lets PyPI's torchvision import beside a CPU-only build of torch.

PyPI has one torchvision wheel per release and platform, linked against CUDA. Beside a CPU-only torch its compiled
operators cannot be loaded, and importing torchvision ends in `operator torchvision::nms does not exist`. Only the
Python part of torchvision is used here (transforms, models), so declaring the schemas of the missing operators before
torchvision runs is enough.

Run with an environment's Python, this file copies itself into that environment, together with a `.pth` file that
imports it whenever Python starts there. Beside a CUDA build of torch it does nothing.
"""

import sys
from importlib.machinery import PathFinder

MODULE = "_fit3d_torchvision_cpu"


class _DeclareOperatorsFirst:
    """Import hook for `torchvision` alone, so that importing torch stays lazy."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            sys.meta_path.remove(_DeclareOperatorsFirst)
            _declare_operators()
            execute(module)

        spec.loader.exec_module = exec_module
        return spec


def _declare_operators():
    import torch

    if torch.version.cuda is not None or getattr(torch.version, "hip", None) is not None:
        return  # torchvision's own operators load
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declare_operators.library = library  # registrations die with their library


def _install():
    import shutil
    import sysconfig
    from pathlib import Path

    packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copyfile(__file__, packages / f"{MODULE}.py")
    (packages / f"{MODULE}.pth").write_text(f"import {MODULE}\n")


if __name__ == "__main__":
    _install()
elif __name__ == MODULE:
    sys.meta_path.insert(0, _DeclareOperatorsFirst)  # type: ignore[arg-type]
