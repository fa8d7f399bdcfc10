"""COLMAP's models."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from nerfstudio.data.dataparsers import colmap_dataparser
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig

from fit3d_ns.data.dataparsers.base import LENS, SceneReader, make_cameras
from fit3d_ns.data.dataparsers.colmap_cameras import check_camera_models, colmap_lens, named_tables
from fit3d_ns.data.layouts import find_model, layout_advice
from fit3d_ns.data.points.seed_points import read_colmap_points
from fit3d_ns.data.scene_file import FrameLens, odd_lenses
from fit3d_ns.data.splits import check_listed, complete_lists, list_remarks, read_list
from fit3d_ns.support.errors import UserError


class ColmapReader(SceneReader):
    """Reads a COLMAP model, with lists of views as text files beside it.

    Args:
        parser: nerfstudio's COLMAP dataparser.
        seeds: Whether points are wanted that Gaussians start from.
    """

    _files = {"train": ("train_list.txt",), "val": ("val_list.txt", "validation_list.txt"), "test": ("test_list.txt",)}

    def __init__(self, parser: DataParser, seeds: bool) -> None:
        super().__init__(parser, seeds)
        self._parser._load_3D_points = self._load_points
        self._read_model = self._parser._get_all_images_and_cameras
        self._choose = self._parser._get_image_indices
        self._parser._get_all_images_and_cameras = self._model
        self._parser._get_image_indices = self._indices

    def _read(self, split: str, **kwargs: Any) -> DataparserOutputs:
        config = self._parser.config
        if not (self._data / config.colmap_path).exists():
            self._find_model(config)
        outputs = self._generate(split, **kwargs)
        lenses = [self._lenses[index] for index in self._indices_of_split]
        poses, rounding = outputs.cameras.camera_to_worlds, config.downscale_rounding_mode
        factor = self._parser._downscale_factor
        outputs.cameras = make_cameras(poses, lenses, outputs.cameras, str(self._data), factor, rounding)
        return outputs

    def _find_model(self, config: Any) -> None:
        """Takes the model from where it lies, if nobody named its place; else says what there is."""
        folder = find_model(self._data)
        if folder is None:
            advice = layout_advice(self._data)
            raise UserError(f"The scene {self._data} {advice}." if advice else f"{self._data} holds no COLMAP model.")
        if config.colmap_path != ColmapDataParserConfig().colmap_path:
            raise UserError(
                f"The COLMAP model of {self._data} does not lie in {config.colmap_path} but in {folder}: leave "
                "--colmap-path out, or name that."
            )
        self._say([f"The COLMAP model of {self._data} is taken from {folder}."])
        config.colmap_path = Path(folder)

    def _model(self, folder: Path) -> dict[str, Any]:
        """Stands for the dataparser's ``_get_all_images_and_cameras``."""
        check_camera_models(folder)

        def pinhole(camera: Any) -> dict[str, Any]:
            lens = colmap_lens(camera, folder)
            names = {"fl_x": lens.fx, "fl_y": lens.fy, "cx": lens.cx, "cy": lens.cy, "w": lens.width, "h": lens.height}
            return {**names, "camera_model": "OPENCV", LENS: lens}

        with named_tables(folder), patch.object(colmap_dataparser, "parse_colmap_camera_params", pinhole):
            model = self._read_model(folder)
        frames = model["frames"]
        self._transform = np.array(model.get("applied_transform", np.eye(4)[:3]), dtype=np.float64)
        self._lenses: list[FrameLens] = [frame[LENS] for frame in frames]
        names = [Path(frame["file_path"]).name for frame in frames]
        self._say(odd_lenses(self._lenses, names, str(folder)))
        for frame, matrix in zip(
            frames, self._near([frame["transform_matrix"] for frame in frames], names, str(folder))
        ):
            frame["transform_matrix"] = matrix
        return model

    def _indices(self, image_filenames: list[Path], split: str) -> np.ndarray:
        """Stands for the dataparser's ``_get_image_indices``, which knows one spelling of one list each."""
        found = {kind: read_list(self._data, names) for kind, names in self._files.items()}
        names = {kind: self._files[kind][0] if item is None else item[0] for kind, item in found.items()}
        given = {kind: None if item is None else item[1] for kind, item in found.items()}
        lists = complete_lists(given, names, str(self._data))
        if lists:
            root = self._data / self._parser.config.images_path
            known = [str(path.relative_to(root)) for path in image_filenames]
            check_listed(given, known, names, str(self._data))
            self._say(list_remarks(lists, known, str(self._data)))
            listed = {root / name for name in lists[split]}
            indices = np.array([index for index, path in enumerate(image_filenames) if path in listed], dtype=np.int32)
        else:
            indices = self._choose(image_filenames, split)
        self._indices_of_split = [int(index) for index in indices]
        return indices

    def _applied(self) -> np.ndarray:
        return self._transform

    def _read_points(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        return read_colmap_points(path)

    def _point_origin(self) -> np.ndarray:
        return np.linalg.solve(self._transform[:, :3], self._origin)
