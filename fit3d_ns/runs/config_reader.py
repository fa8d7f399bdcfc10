"""Finds nerfstudio runs, reads their configurations and checkpoints without executing anything stored in them."""

import dataclasses
import enum
import importlib
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from fit3d_ns.runs.names import CHECKPOINTS, CONFIG
from fit3d_ns.support.errors import UserError, first_line

_OWN_PACKAGES = ("nerfstudio", "fit3d_ns")
_PLUGINS = ("nerfstudio.method_configs", "nerfstudio.dataparser_configs")
"""Entry points by which other packages register what configurations are made of."""
_PLUGIN_VARIABLES = ("NERFSTUDIO_METHOD_CONFIGS", "NERFSTUDIO_DATAPARSER_CONFIGS")
"""Environment variables that do the same, as ``name=module:attribute`` with commas between."""
_TAG = "tag:yaml.org,2002:python/"
_LAST = "vis"
"""Field of every version that nerfstudio writes last: they stand in the order of their names."""
_PARTS: dict[str, tuple[type, ...]] = {
    "pipeline": (),
    "pipeline.datamanager": (),
    "pipeline.model": (),
    "output_dir": (str, Path),
    "max_num_iterations": (int,),
    "data": (str, Path, type(None)),
    "pipeline.datamanager.data": (str, Path, type(None)),
    "pipeline.datamanager.dataparser.data": (str, Path, type(None)),
}
"""What readers of a configuration go into, and what it may be; a dataclass where nothing is named."""


def find_runs(root: Path) -> list[Path]:
    """Finds the ``config.yml`` of every run with a checkpoint.

    Args:
        root: Any folder above them, such as nerfstudio's ``outputs``.

    Returns:
        Their paths, sorted.

    Raises:
        UserError: If there is no such folder.
    """
    root = root.expanduser()
    if not root.is_dir():
        raise UserError(f"The folder {root} does not exist: check --runs.")
    configs = (path for path in root.rglob(CONFIG) if ".tmp" not in path.parent.suffixes)
    return sorted(path for path in configs if any((path.parent / CHECKPOINTS).glob("step-*.ckpt")))


def read_config(path: Path) -> Any:
    """Reads a run's configuration with a restricted loader.

    nerfstudio writes configurations as YAML with Python tags and reads them with a loader that runs whatever they say.
    This one reads what `parse_configuration` reads; everything else is refused, and nothing is called.

    Relative paths are taken from the folder that the run was started in, as far as the place of ``config.yml`` tells
    it, and the run is where it was found, so it may have been moved.

    Args:
        path: A run's ``config.yml``, or its folder.

    Returns:
        nerfstudio's ``TrainerConfig``, with absolute paths.

    Raises:
        UserError: If the file is missing, damaged, no configuration, or holds anything else.
    """
    path = path.expanduser().absolute()
    path = path / CONFIG if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The configuration {path} cannot be read ({reason}): check the path.") from error
    config = parse_run_configuration(text, path)
    _check_parts(config, path)
    _check_fields(config, path)
    _resolve_paths(config, path.parent)
    return config


def parse_run_configuration(text: str, path: Path | None) -> Any:
    """Builds what the text of a run's ``config.yml`` says, as `parse_configuration` does.

    Args:
        text: YAML with Python tags, as nerfstudio writes it.
        path: For the error's sentence.

    Returns:
        nerfstudio's ``TrainerConfig``.

    Raises:
        UserError: If the text is damaged, holds anything else, or is no run's configuration.
    """
    config = parse_configuration(text, path)
    if not _is_run(config):
        name = path or "The file"
        raise UserError(f"{name} is not the configuration of a nerfstudio run: name the config.yml of a run.")
    return config


def _is_run(config: Any) -> bool:
    return any(kind.__name__ == "TrainerConfig" for kind in type(config).__mro__)


def parse_configuration(text: str, path: Path | None) -> Any:
    """Builds what a configuration's text says, and runs nothing of it.

    Allowed are dataclasses of nerfstudio, of this package and of the plugins registered with nerfstudio, paths, tuples,
    enumerations, classes of these packages and of ``torch.optim``, generic classes of them, and the functions that
    registered methods' own configurations name.

    Args:
        text: YAML with Python tags, as nerfstudio writes it.
        path: For the error's sentence.

    Returns:
        Whatever stands there, for a run's ``config.yml`` nerfstudio's ``TrainerConfig``.

    Raises:
        UserError: If the text is damaged or holds anything else.
    """
    name = f"The configuration {path}" if path is not None else "The configuration"
    try:
        config = yaml.load(text, Loader=_ConfigLoader)  # noqa: S506  a SafeLoader with few additions
    except _Forbidden as error:
        raise UserError(
            f"{name} asks for {error}, which is no part of a registered method's configuration; nothing was loaded: "
            "use a run of a method of nerfstudio, of fit3d-ns or of an installed plugin."
        ) from error
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({first_line(error)}): restore it or train again.") from error
    if _is_run(config) and _LAST not in vars(config):  # cut off between two fields
        raise UserError(f"{name} is damaged (it ends before `{_LAST}`): restore it or train again.")
    return config


def _check_parts(config: Any, path: Path) -> None:
    """Refuses a configuration in which something else stands in the place of a part that readers go into."""
    for name, kinds in _PARTS.items():
        part = config
        for step in name.split("."):
            part = getattr(part, step, None)
        fits = isinstance(part, kinds) if kinds else dataclasses.is_dataclass(part) and not isinstance(part, type)
        if not fits:
            raise UserError(
                f"The configuration {path} is damaged ({name} is {type(part).__name__}): restore it or train again."
            )
        wanted = _config_of(getattr(part, "_target", None))
        if wanted is not None and not isinstance(part, wanted):
            kinds_said = f"{type(part).__name__}, not {wanted.__name__}"
            raise UserError(f"The configuration {path} is damaged ({name} is {kinds_said}): restore it or train again.")


def _config_of(target: Any) -> type | None:
    """The class of configurations that a part is built from, as far as it says so."""
    try:
        wanted = get_type_hints(target).get("config") if isinstance(target, type) else None
    except (NameError, TypeError):  # names that only its own module knows
        return None
    return wanted if isinstance(wanted, type) else None


def _check_fields(config: Any, path: Path, name: str = "") -> None:
    """Refuses fields of another kind: no number where a number stands by default, no part where a part does.

    Only what the class says by a plain type or by words, since nerfstudio's other annotations are not kept to.
    """
    hints = _plain_hints(type(config))
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name, None), f"{name}.{field.name}".removeprefix(".")
        hint = hints.get(field.name)
        wrong = hint is not None and value != field.default and not _is_of(hint, value)
        wrong = wrong or (field.name == "_target" and not callable(value))
        if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory):
            wrong = wrong or not dataclasses.is_dataclass(value)
        if wrong:
            shown = repr(value)[:40]
            raise UserError(f"The configuration {path} is damaged ({where} is {shown}): restore it or train again.")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            _check_fields(value, path, where)


def _is_of(hint: Any, value: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


@cache
def _plain_hints(kind: type) -> dict[str, Any]:
    try:
        hints = get_type_hints(kind)
    except (NameError, TypeError):  # names that only its own module knows
        return {}
    return {name: hint for name, hint in hints.items() if hint in (int, float, bool) or get_origin(hint) is Literal}


def _resolve_paths(config: Any, run: Path) -> None:
    """Makes paths absolute; the run is where it was found."""
    started_in = Path.cwd()
    if run.parts[-3:] == (config.experiment_name, config.method_name, config.timestamp):
        outputs = run.parents[2]
        stored = Path(config.output_dir)
        depth = len(stored.parts)
        if not stored.is_absolute() and ".." not in stored.parts and outputs.parts[-depth:] == stored.parts:
            started_in = outputs.parents[depth - 1]
        config.output_dir = outputs
    else:
        config.output_dir = Path(config.output_dir).absolute()
    datamanager = config.pipeline.datamanager
    for holder in (config, datamanager, getattr(datamanager, "dataparser", None)):
        stored = getattr(holder, "data", None)
        if stored is None or stored == Path() or Path(stored).is_absolute():
            continue
        candidates = [base / stored for base in (started_in, Path.cwd(), run)]
        holder.data = next((place for place in candidates if place.exists()), candidates[0])  # type: ignore[union-attr]


class _Forbidden(Exception):
    """Names what a configuration must not hold."""


class _ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader plus what nerfstudio's configurations are made of."""


def _named_class(name: str) -> type:
    """Finds a class by its full name, only in modules whose classes configurations mention."""
    module_name, _, class_name = name.rpartition(".")
    if not _is_ours(module_name) and not _is_optimizer(module_name):
        raise _Forbidden(f"`{name}`")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise _Forbidden(f"`{name}` (which cannot be imported here)") from error
    # Modules hold what they import, so the class itself must come from such a module too.
    if not isinstance(found, type) or not (_is_ours(found.__module__) or _is_optimizer(found.__module__)):
        raise _Forbidden(f"`{name}`")
    return found


def _is_ours(module: str) -> bool:
    package = module.partition(".")[0]
    return package in _OWN_PACKAGES or package in _plugin_packages()


@cache
def _plugin_packages() -> frozenset[str]:
    """Returns the packages that have registered a method or a dataparser with nerfstudio."""
    modules = [point.value for group in _PLUGINS for point in entry_points(group=group)]
    for variable in _PLUGIN_VARIABLES:
        modules += [entry.partition("=")[2] for entry in os.environ.get(variable, "").split(",")]
    return frozenset(package for module in modules if (package := re.split("[.:]", module.strip())[0]))


@cache
def _configured_names() -> frozenset[str]:
    """Returns every class and function that the registered methods' own configurations name."""
    from nerfstudio.configs.method_configs import all_methods

    return frozenset(re.findall(r"!!python/name:(\S+)", yaml.dump(list(all_methods.values()))))


def _is_optimizer(module: str) -> bool:
    return module == "torch.optim" or module.startswith("torch.optim.")


def _construct_dataclass(loader: _ConfigLoader, name: str, node: yaml.Node) -> Iterator[Any]:
    """Fills a dataclass without running its code; fields that an older version did not have get their defaults."""
    kind = _named_class(name)
    if not dataclasses.is_dataclass(kind) or not isinstance(node, yaml.MappingNode):
        raise _Forbidden(f"an object of `{name}`")
    instance = object.__new__(kind)
    yield instance  # before its fields, which may refer to it
    state = {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}
    for field in dataclasses.fields(kind):
        if field.name not in state and field.default_factory is not dataclasses.MISSING:
            state[field.name] = field.default_factory()
    instance.__dict__.update(state)


def _construct_value(loader: _ConfigLoader, name: str, node: yaml.Node) -> Any:
    """Paths and enumerations, which YAML writes as a call with arguments."""
    if not isinstance(node, yaml.SequenceNode):
        raise _Forbidden(f"a call of `{name}`")
    arguments = loader.construct_sequence(node, deep=True)
    if re.fullmatch(r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path", name):
        if not all(isinstance(argument, (str, PurePath)) for argument in arguments):
            raise _Forbidden("a path that is not made of words")
        return Path(*arguments)
    if name in ("_operator.getitem", "operator.getitem"):  # a generic class: VanillaDataManager[DepthDataset]
        parameters = arguments[1:] if len(arguments) == 2 else [None]
        parameters = list(parameters[0]) if isinstance(parameters[0], tuple) else parameters
        if not all(isinstance(kind, type) for kind in (arguments[0], *parameters)):
            raise _Forbidden(f"a call of `{name}`")
        return arguments[0][arguments[1]]
    if not _is_ours(name):
        raise _Forbidden(f"a call of `{name}`")
    kind = _named_class(name)
    if not issubclass(kind, enum.Enum) or len(arguments) != 1:
        raise _Forbidden(f"a call of `{name}`")
    return kind(arguments[0])


def _construct_name(loader: _ConfigLoader, name: str, node: yaml.Node) -> Any:
    """A class, or a function that a registered method's configuration names too, such as a data loader's collate."""
    try:
        return _named_class(name)
    except _Forbidden:
        module_name, _, attribute = name.rpartition(".")
        if not _is_ours(module_name) or name not in _configured_names():
            raise
        return getattr(importlib.import_module(module_name), attribute)


def _construct_tuple(loader: _ConfigLoader, node: Any) -> tuple:
    return tuple(loader.construct_sequence(node, deep=True))


_ConfigLoader.add_multi_constructor(f"{_TAG}object:", _construct_dataclass)
_ConfigLoader.add_multi_constructor(f"{_TAG}object/apply:", _construct_value)
_ConfigLoader.add_multi_constructor(f"{_TAG}name:", _construct_name)
_ConfigLoader.add_constructor(f"{_TAG}tuple", _construct_tuple)
