"""What a user chooses on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fit3d_ns.backbones import Assembly, BackboneSpec
from fit3d_ns.support.errors import UserError
from probe.data.choice import DataChoice, DatasetName, Kind

if TYPE_CHECKING:  # these need torch, which --help does without
    from probe.features.partners import Partner


@dataclass
class FeatureConfig:
    """Backbones and where results go."""

    data: Path
    """Folder of the data set."""
    backbone: str | None = None
    """Named backbone, or any timm vision transformer; dinov2_small_focus needs no model hub. By default what the card
    of --tuned names, else dinov2_small."""
    backbone_weights: Path | None = None
    """Local weights of the original backbone."""
    tuned: tuple[str, ...] = ()
    """Fine-tuned backbones of the same architecture: the folder that fit3d-distill wrote, a weight file, USER/REPO of
    the Hugging Face hub, an https address, or one of FiT3D's published ones, such as dinov2_small_fine. Several are
    seeds of one recipe, whose mean and spread are shown; NAME=PATH gives one rows of its own."""
    control: tuple[str, ...] = ()
    """The same for backbones distilled without 3D, whose rows tell what fine-tuning alone brings."""
    layer: int | None = None
    """Block whose output is probed; by default the one that the card of --tuned names, else the last."""
    normalization: Literal["imagenet", "own"] | None = None
    """Mean and std of the photos: by default as the card of --tuned says, else ImageNet's, as in the paper."""
    assemblies: tuple[Assembly, ...] | None = None
    """Rows of the table; all that can be made by default."""
    output_dir: Path = Path("outputs/probe")
    """Where table.md, metrics.json and report.html are written."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; under torchrun every process takes its own GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the backbones on CUDA; heads are always float32. The paper's is fp32."""
    workers: int = 4
    """Processes that read photos ahead, for each GPU."""

    def find_backbones(
        self, norm: bool | None, default_norm: bool | None = None
    ) -> "tuple[BackboneSpec, tuple[Partner, ...], str]":
        """Finds the fine-tuned backbones, and decides how features are taken.

        Args:
            norm: Whether features are taken after the backbone's final norm, if the user says so.
            default_norm: What the protocol says where the user does not; None: what the cards say.

        Returns:
            The original, the fine-tuned backbones, and a sentence that says how features are taken.

        Raises:
            UserError: If a backbone cannot be found, or a card contradicts a flag.
        """
        from probe.features.partners import choose_spec, find_partners

        partners = find_partners(self.tuned, self.control)
        spec, sentence = choose_spec(
            self.backbone, self.backbone_weights, self.layer, norm, self.normalization, partners, default_norm
        )
        return spec, partners, sentence


@dataclass
class DataConfig(FeatureConfig):
    """Data sets with truth."""

    dataset: DatasetName = "folder"
    """Layout of the folder; see docs/probing.md."""
    split_file: tuple[Path, Path] | None = None
    """Own lists of training and test samples."""
    classes: Literal["paper", "scannet20"] = "paper"
    """Class list of ScanNet: NYU's 40, as in the paper, or its own benchmark's 20."""
    scannetpp_labels: Literal["shifted", "toolkit"] = "shifted"
    """Labels of ScanNet++: 0 is no class (FiT3D's release), or 255 is (the toolkit's)."""
    class_names: Path | None = None
    """Text file with one class name per line, for `folder`."""
    depth_scale: float | None = None
    """PNG units in a metre, for `folder` and `rooms`; 1000 by default."""
    max_depth: float | None = None
    """Cap in metres, for `folder` and `rooms`; 10 by default."""

    def choice(self, kind: Kind) -> DataChoice:
        """Returns the choice of data.

        Args:
            kind: Which probe.

        Raises:
            UserError: If a number is out of range.
        """
        for flag, value in (("--depth-scale", self.depth_scale), ("--max-depth", self.max_depth)):
            if value is not None and value <= 0:
                raise UserError(f"{flag} {value:g} must be above 0.")
        return DataChoice(
            self.dataset,
            self.data.expanduser(),
            kind,
            self.split_file,
            self.depth_scale,
            self.max_depth,
            self.classes,
            self.scannetpp_labels,
            self.class_names,
        )


@dataclass
class TrainedProbeConfig(DataConfig):
    """Linear maps and how they are found."""

    protocol: Literal["exact", "fast", "paper"] = "exact"
    """exact: convex problems that are solved, on features computed once. paper: heads trained as in the paper, hours.
    fast: those heads on cached features; they have not converged when training ends."""
    final_norm: Literal["on", "off"] | None = None
    """Whether features are taken after the backbone's final norm; by default as the card of --tuned says, else on.
    The paper's depth and normals, and their fast version, take them before it."""
    long_side: int | None = None
    """Photos are resized to one size with this long side, pixels; 448 by default (exact), 518 (fast)."""
    iterations: int | None = None
    """Steps, instead of the recipe's; warm-up keeps its share."""
    batch_size: int | None = None
    """Samples per step over all processes, instead of the recipe's."""
    learning_rates: tuple[float, ...] | None = None
    """Instead of the recipe's. Of several, the best on held-out training samples is reported."""
    validation_share: float = 0.1
    """Of the training samples, held out to choose the decay (exact; 1,000 at most), or the learning rate where there
    are several and no split for choices."""
    seeds: tuple[int, ...] = (0,)
    """Of heads, order and augmentation; the table gives mean and spread over them."""
    cache_dir: Path | None = None
    """Where features are kept (exact, fast); `features` in the output folder by default."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; a killed run goes on from the last."""
    vis: Literal["none", "tensorboard", "wandb"] = "none"
    """Where losses are shown, besides curves/seed_N/curves.jsonl."""

    @property
    def norm(self) -> bool | None:
        """Whether features are taken after the final norm, if the user says so."""
        return None if self.final_norm is None else self.final_norm == "on"

    def check(self) -> None:
        """Checks numbers.

        Raises:
            UserError: If one is out of range.
        """
        if not 0 < self.validation_share < 1:
            raise UserError(f"--validation-share {self.validation_share:g} must lie between 0 and 1.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError("--seeds needs different numbers that are not negative.")
        for flag, value, least in (
            ("--checkpoint-every", self.checkpoint_every, 1),
            ("--workers", self.workers, 0),
            ("--long-side", self.long_side, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{flag} {value} is too small: at least {least}.")


@dataclass
class SegmentationConfig(TrainedProbeConfig):
    """Linear probe for semantic segmentation."""


@dataclass
class DepthConfig(TrainedProbeConfig):
    """Linear probe for monocular depth."""

    gradient_loss: float = 0.0
    """Weight of a gradient loss. The paper's .5 is zero in effect; anything else is another protocol."""


@dataclass
class NormalsConfig(TrainedProbeConfig):
    """Linear probe for surface normals, made of depth (rooms, nyuv2)."""


@dataclass
class RetrievalConfig(DataConfig):
    """Segmentation by retrieval: labels of the nearest training patches, without training."""

    neighbours: int = 30
    """Patches that vote."""
    temperature: float = 0.02
    """Of the votes' softmax over cosines."""
    memory: int = 100_000
    """Training patches kept, drawn at random."""
    seed: int = 0
    """Of that draw."""
    long_side: int = 518
    """Photos are shrunk to this long side at most, pixels."""


@dataclass
class CorrespondenceConfig(FeatureConfig):
    """Matches between views of a posed RGB-D scene in nerfstudio's format (Probe3D's protocol)."""

    pairs_per_bin: int = 15
    """Pairs of views compared in each range of relative angles."""
    matches: int = 1000
    """Best matches by ratio test that are evaluated, per pair."""
    grid_scale: float = 0.25
    """Of the photo's size: the grid on which features and depth are sampled, and in whose pixels errors count."""
    long_side: int = 640
    """Photos are shrunk to this long side at most, pixels; Probe3D's have 640x480."""
    final_norm: bool = False
    """Whether features are taken after the backbone's final norm, as fit3d-distill trains them; Probe3D takes them
    before."""
    min_overlap: float = 0.4
    """Least share of a view's surface that the other view sees."""


Command = Annotated[
    Annotated[SegmentationConfig, tyro.conf.subcommand("segmentation")]
    | Annotated[DepthConfig, tyro.conf.subcommand("depth")]
    | Annotated[NormalsConfig, tyro.conf.subcommand("normals")]
    | Annotated[RetrievalConfig, tyro.conf.subcommand("retrieval")]
    | Annotated[CorrespondenceConfig, tyro.conf.subcommand("correspondence")],
    tyro.conf.OmitSubcommandPrefixes,
]
