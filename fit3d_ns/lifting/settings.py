"""What a user can choose about lifting."""

from dataclasses import dataclass
from typing import Literal

from fit3d_ns.support.errors import UserError

DEFAULT_REFINEMENTS = 1
"""Refinement steps without selection; docs/lifting.md says why."""
LARGEST_REFINEMENTS = 10
"""Most steps that a selection tries by default."""


@dataclass
class LiftSettings:
    """How teacher features are lifted onto fixed geometry."""

    refinements: int | None = None
    """Refinement steps k after the weighted aggregation. More steps follow the single views more closely and agree
    less between views. Without it 1; with --select fidelity or consistency, the most steps tried (10)."""
    select: Literal["fixed", "fidelity", "consistency"] = "fixed"
    """`fixed` takes `refinements` steps; `fidelity` stops where the held-out views' cosine to the teacher is highest,
    `consistency` where the lifted features of held-out views match best between views."""
    robust: int = 0
    """Re-weighting passes that bring the solution from least squares towards least absolute residuals, so that a view
    that disagrees with all others counts less; 2 or 3 are enough, 0 is plain least squares."""
    decoder: Literal["pca", "fit"] = "pca"
    """`pca`: the basis of the teacher's features as the centre tap of the decoder; `fit`: all nine taps, fitted to the
    training views by least squares."""
    decoder_ridge: float = 0.1
    """With `decoder fit`, how strongly it is held to the basis: less follows the single views more closely and agrees
    less between views."""
    unseen: Literal["zero", "nearest"] = "zero"
    """Features of Gaussians that no training view sees: zero, or those of their nearest seen neighbours."""
    views_per_batch: int = 8
    """Most views rendered in one call; less where that many do not fit in memory."""
    evaluate: bool = True
    """Whether the held-out views are measured and reported after lifting."""
    report_dims: tuple[int, ...] | None = None
    """Numbers of channels whose quality the report compares. Without it 16, 32, 64 ... up to --feature-dim, which cost
    next to nothing; larger ones take another lift, of the largest."""

    @property
    def most_steps(self) -> int:
        """The most refinement steps taken."""
        if self.refinements is not None:
            return self.refinements
        return DEFAULT_REFINEMENTS if self.select == "fixed" else LARGEST_REFINEMENTS

    def check_ranges(self) -> None:
        """Checks what needs no scene to be checked.

        Raises:
            UserError: If a number is out of range.
        """
        for name, least in (("refinements", 0), ("robust", 0), ("views_per_batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small: at least {least}.")
        if any(dim < 1 for dim in self.report_dims or ()):
            raise UserError(f"--report-dims {' '.join(map(str, self.report_dims or ()))} is out of range: at least 1.")
        if not 0 <= self.decoder_ridge < float("inf"):
            raise UserError(f"--decoder-ridge {self.decoder_ridge} is out of range: at least 0.")

    def check(self, dim: int, width: int, training: int, held_out: int) -> None:
        """Checks the settings against a teacher and a scene.

        Args:
            dim: Channels D on every Gaussian.
            width: Channels C of the teacher.
            training: Number of training views.
            held_out: Number of evaluation views that are not among them.

        Raises:
            UserError: If a setting is out of range, or a selection is asked for without held-out views.
        """
        self.check_ranges()
        if not 1 <= dim <= width:
            raise UserError(f"--feature-dim {dim} is out of range: this teacher has {width} channels.")
        if max(self.report_dims or (0,)) > width:
            raise UserError(
                f"--report-dims goes beyond the {width} channels of this teacher: leave out what is larger."
            )
        if not training:
            raise UserError("The scene has no training view to lift features from: leave some for training.")
        if self.select != "fixed" and not held_out:
            raise UserError(
                f"--select {self.select} needs held-out views, and this scene holds none out: use --select fixed, or "
                "another --eval-mode when training."
            )

    def compared_dims(self, dim: int) -> list[int]:
        """Returns the numbers of channels that the report compares, in rising order.

        Args:
            dim: Channels that are lifted.
        """
        if self.report_dims is not None:
            return sorted({*self.report_dims, dim}) if self.report_dims else []
        return [*(power for power in (16, 32, 64, 128, 256, 512) if power < dim), dim]
