"""The registered method: what importing it costs, and that it has not drifted from splatfacto."""

import subprocess
import sys

import pytest


def test_importing_the_config_loads_neither_timm_nor_open3d_nor_the_cpu_kernels():
    program = (
        "import sys, nerfstudio.configs.method_configs as methods;"
        "assert 'fit3d-splat' in methods.all_methods;"
        "import fit3d_ns.config;"
        "print([name for name in ('timm', 'open3d', 'numba', 'onnx') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def methods():
    from nerfstudio.configs.method_configs import all_methods

    return all_methods


def _values(group):
    scheduler = group["scheduler"]
    optimizer = {name: value for name, value in vars(group["optimizer"]).items() if name != "_target"}
    if scheduler is None:
        return optimizer, None
    return optimizer, {name: value for name, value in vars(scheduler).items() if name != "_target"}


def test_optimizers_do_not_drift_from_the_installed_splatfacto(methods):
    splatfacto = methods["splatfacto"].optimizers
    ours = methods["fit3d-splat"].optimizers
    assert set(ours) == set(splatfacto) | {"fit3d_features", "fit3d_decoder"}
    for name, group in splatfacto.items():
        assert _values(ours[name]) == _values(group), name


def test_trainer_settings_do_not_drift_from_the_installed_splatfacto(methods):
    splatfacto, ours = methods["splatfacto"], methods["fit3d-splat"]
    for name in ("steps_per_save", "steps_per_eval_batch", "steps_per_eval_image", "steps_per_eval_all_images"):
        assert getattr(ours, name) == getattr(splatfacto, name), name
    assert ours.max_num_iterations == splatfacto.max_num_iterations
    assert ours.mixed_precision == splatfacto.mixed_precision
    theirs = vars(splatfacto.pipeline.model)
    mine = vars(ours.pipeline.model)
    assert {name: mine[name] for name in theirs if name != "_target"} == {
        name: value for name, value in theirs.items() if name != "_target"
    }


def test_learning_rates_are_plain_floats(methods):
    """Numpy scalars in checkpoints break torch's restricted loader."""
    import torch

    for name, group in methods["fit3d-splat"].optimizers.items():
        if group["scheduler"] is None:
            continue
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = group["optimizer"].setup(params=[parameter])
        reference = methods["splatfacto"].optimizers[name]
        reference_optimizer = reference["optimizer"].setup(params=[torch.nn.Parameter(torch.zeros(1))])
        scheduler = group["scheduler"].setup().get_scheduler(optimizer, group["optimizer"].lr)
        expected = reference["scheduler"].setup().get_scheduler(reference_optimizer, group["optimizer"].lr)
        for _ in range(3):
            assert type(optimizer.param_groups[0]["lr"]) is float, name
            assert all(type(rate) is float for rate in scheduler.state_dict()["_last_lr"]), name
            assert optimizer.param_groups[0]["lr"] == reference_optimizer.param_groups[0]["lr"]
            for each, schedule in ((optimizer, scheduler), (reference_optimizer, expected)):
                each.step()
                schedule.step()


def test_pictures_are_read_by_what_pillow_offers_everybody(monkeypatch):
    """The main branch of nerfstudio has a reader that calls private functions of Pillow; 1.1.5 has none."""
    import numpy as np
    from nerfstudio.data.datasets import base_dataset
    from nerfstudio.data.utils import data_utils
    from PIL import Image

    from fit3d_ns.compat import read_pictures_by_their_interface

    def broken(image):
        raise TypeError("function takes exactly 2 arguments (1 given)")

    for module in (base_dataset, data_utils):
        monkeypatch.setattr(module, "pil_to_numpy", broken, raising=False)
    read_pictures_by_their_interface()
    values = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for module in (base_dataset, data_utils):
        found = module.pil_to_numpy(Image.fromarray(values))  # type: ignore[attr-defined]
        assert found.dtype == np.uint8 and (found == values).all() and found.flags.writeable


def test_methods_to_install_are_listed_without_reading_sources_and_still_offered(monkeypatch, capsys):
    """Upstream asks for the source of each caller of each of them; one that a user chooses says how to install it."""
    import inspect

    from nerfstudio.configs import external_methods

    monkeypatch.setattr(inspect, "findsource", lambda object: pytest.fail("a source was read"))
    methods, _ = external_methods.get_external_methods()
    assert len(methods) > 10
    name, config = next((name, one) for name, one in methods.items() if one.method.pip_package)
    monkeypatch.setattr(external_methods.Confirm, "ask", lambda *_, **__: False)
    with pytest.raises(SystemExit) as ended:
        type(config)(method_name=name, method=config.method)
    assert ended.value.code == 0 and "For more information visit" in capsys.readouterr().out
