"""Upstream's splatfacto on a CPU, to compare with."""

import torch
from nerfstudio.models.splatfacto import SplatfactoModel

from fit3d_ns import compat


class PlainSplatfacto(SplatfactoModel):
    """Upstream's model, on a CPU."""

    def populate_modules(self):
        with compat.lazy_lpips(), compat.splatfacto_on(torch.device("cpu")):
            super().populate_modules()

    def get_outputs(self, camera):
        with compat.splatfacto_on(torch.device("cpu")):
            return super().get_outputs(camera)
