"""Stage one of fit3d-ns: features of 2D backbones, lifted into Gaussian splats, as a nerfstudio plugin."""
