"""The names that stand in files: of the method, of what a run's folder holds, and of the tensors in a checkpoint.

Whoever changes one can no longer open what was trained before. Those without ``fit3d`` or ``lift`` are nerfstudio's.
"""

METHOD = "fit3d-splat"
"""As ``ns-train`` and the ``method_name`` in a run's config.yml know it."""

CONFIG = "config.yml"
CHECKPOINTS = "nerfstudio_models"
"""The folder of a run's ``step-*.ckpt``."""
COORDINATES = "dataparser_transforms.json"
"""How the dataparser moved and scaled the scene."""
RECORD = "lift.json"
"""What was lifted, how, and how well; written last, so a run that has it is whole."""
REPORT = "lift.html"
"""What was lifted as pictures, tables and curves."""
LIFTED = "lift.safetensors"
"""Tensors beside the checkpoint: ``fit3d_variance`` and ``fit3d_coverage`` of every Gaussian, both [N] float32; of a
lift that stands apart from its geometry also ``fit3d_features`` [N, D] and the ``fit3d_decoder`` [C, D, 3, 3]."""
LIFTS = "lifts"
"""The folder of a run in which the lifts onto its geometry stand, as nerfstudio places runs: ``lifts/METHOD/NAME``."""
HASH_LETTERS = 8
"""Of a file's hash, where it is part of a name."""
GEOMETRY = "geometry"
"""In the checkpoint of a lift: which file holds its Gaussians, and how many they are."""

SPLAT = ("means", "scales", "quats", "features_dc", "features_rest", "opacities")
"""Splatfacto's own parameters: centres, log scales, quaternions, colours, logit opacities."""

GEOMETRY_RECORD = "geometry.json"
"""How well a trained run renders its held-out views, where `fit3d_ns.commands.training` trained it."""

FEATURES = "fit3d_features"
"""Among the model's ``gauss_params``, and the group of its optimizer."""
DECODER = "fit3d_decoder"
"""The decoder among the model's modules, and the group of its optimizer."""

MODEL = "_model."
"""What the names of the model's tensors begin with in a checkpoint's ``pipeline``."""
GAUSSIANS = f"{MODEL}gauss_params."
DECODER_WEIGHT = f"{MODEL}{DECODER}.weight"
POSE_ADJUSTMENT = f"{MODEL}camera_optimizer.pose_adjustment"
EXTRA_STATE = "_extra_state"
