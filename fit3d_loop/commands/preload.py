"""Imported once by the process that commands are forked from; must start neither threads nor CUDA."""

import gc
import importlib
import warnings
from contextlib import suppress

import torch

HAS_CUDA = torch.cuda.is_available()
"""Found out here: whoever is forked from this process could not use what asking may have started."""

with warnings.catch_warnings(), suppress(ImportError):  # said by the command that needs it
    warnings.simplefilter("ignore")  # what others' modules say of themselves is no news of a command
    from fit3d_ns.commands.training import SLOW_IMPORTS

    for _module in (*SLOW_IMPORTS, "distill.session"):
        with suppress(ImportError):
            importlib.import_module(_module)
    if not HAS_CUDA:
        for _module in ("cpu", "spherical_harmonics"):
            importlib.import_module(f"fit3d_ns.rasterization.{_module}")
        importlib.import_module("fit3d_ns.rasterization.kernel_runner").compile_kernels(torch.float32)
gc.freeze()  # what is here is shared by all, and no collection need write to it
