"""What stands for a scene that moved, so that a trained run can be opened without its photos."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from nerfstudio.data.datamanagers.base_datamanager import DataManager
from nerfstudio.data.scene_box import SceneBox

from fit3d_ns.backbones import describe_backbone
from fit3d_ns.datamanager import EvaluationViews, Fit3DDataManager, Fit3DDataManagerConfig
from fit3d_ns.support.errors import UserError


class AbsentPhotos(UserError, AttributeError):
    """What photos are needed for; an AttributeError too, since nerfstudio asks with ``hasattr`` what there is."""


class AbsentDataset:
    """A split without views: its size is 0, and whoever needs more of it is told why there is none.

    Args:
        reason: Why there are no photos, one sentence.
        metadata: What models read of a data set: the teacher and its size.
    """

    def __init__(self, reason: str, metadata: dict[str, Any]):
        self._reason = reason
        self.metadata = metadata
        self.scene_box = SceneBox(aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]))

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True  # ns-viewer asserts that there is a data set

    def __getattr__(self, name: str) -> NoReturn:
        # Python asks for special names itself, and must hear that they are absent.
        raise AttributeError(name) if name.startswith("_") else UserError(self._reason)


class AbsentViews(EvaluationViews):
    """No held-out views; going through them says why."""

    def __iter__(self) -> Iterator[Any]:
        raise UserError(self._datamanager.absent or "The scene has no photos.")


@dataclass
class AbsentSceneConfig(Fit3DDataManagerConfig):
    """Configuration of a run whose photos are gone."""

    _target: type = field(default_factory=lambda: AbsentScene)
    """target class to instantiate"""
    reason: str = ""
    """Why there are no photos."""


_ABSENT = ("dataparser", "train_dataparser_outputs")


class AbsentScene(Fit3DDataManager):
    """A data manager without photos, enough for the viewer, for exports and for renders along a camera path.

    Args:
        config: Of `without_photos`.
        device: Of the model.
        **kwargs: nerfstudio's, of which ``test_mode`` is kept.
    """

    absent: str

    def __init__(self, config: AbsentSceneConfig, device: torch.device | str = "cpu", **kwargs: Any):
        self.config = config
        self.absent = config.reason
        self.device = device
        self.test_mode = kwargs.get("test_mode", "test")
        self.includes_time = False
        self.teacher_info = describe_backbone(config.backbone_spec())
        metadata = {"teacher": self.teacher_info, "teacher_max_size": config.backbone_max_size}
        self.train_dataset = AbsentDataset(self.absent, metadata)  # type: ignore[assignment]
        self.eval_dataset = AbsentDataset(self.absent, metadata)  # type: ignore[assignment]
        self.train_unseen_cameras = []
        self._feature_cache = None
        self._trained_with = (None, None)
        self._keys = {}
        DataManager.__init__(self)

    def __dir__(self) -> list[str]:
        """Leaves out what is not there: nerfstudio's viewer reads every attribute that is listed."""
        return [name for name in super().__dir__() if name not in _ABSENT]

    def __getattr__(self, name: str) -> Any:
        if name in _ABSENT:
            raise AbsentPhotos(self.absent)
        return super().__getattr__(name)

    @property
    def fixed_indices_eval_dataloader(self) -> EvaluationViews:  # type: ignore[override]
        """No views; going through them says why."""
        return AbsentViews(self)

    def get_datapath(self) -> Path:
        """Returns where the scene was."""
        return self.config.data or self.config.dataparser.data

    def next_train(self, step: int) -> NoReturn:
        """Says why there is no view."""
        raise UserError(self.absent)

    next_eval = next_eval_image = next_train


def without_photos(config: Fit3DDataManagerConfig, reason: str) -> AbsentSceneConfig:
    """Returns the configuration of an `AbsentScene`.

    Args:
        config: Of the run.
        reason: Why there are no photos.
    """
    kept = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "_target"}
    return AbsentSceneConfig(**kept, reason=reason)
