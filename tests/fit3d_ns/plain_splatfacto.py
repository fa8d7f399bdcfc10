"""Upstream's splatfacto on a CPU, to compare with."""

import torch
from nerfstudio.models.splatfacto import SplatfactoModel

from fit3d_ns import compat


class PlainSplatfacto(SplatfactoModel):
    """Upstream's model, on a CPU, with opacities that are reset whatever gsplat's version."""

    def populate_modules(self):
        with compat.lazy_lpips(), compat.splatfacto_on(torch.device("cpu")):
            super().populate_modules()
        compat.reset_opacities(self.strategy)

    def get_outputs(self, camera):
        with compat.splatfacto_on(torch.device("cpu")):
            return super().get_outputs(camera)
