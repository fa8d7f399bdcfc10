"""Whichever lists of views a scene names, it is trained and evaluated with them, or refused by the missing one."""

from itertools import product
from pathlib import Path

import pytest
from scene_formats import as_colmap, edit, parser_config, read, transforms, write_format

from fit3d_ns.support.errors import UserError

TRAINING, HELD_OUT, OTHERS = slice(0, 8), slice(8, 12), slice(12, 16)
LISTS = {"train": TRAINING, "val": HELD_OUT, "test": OTHERS}
COMBINATIONS = [
    {split: state for split, state in zip(LISTS, states) if state != "missing"}
    for states in product(("missing", "full", "empty"), repeat=3)
]


def names_of(scene):
    return sorted(frame["file_path"] for frame in transforms(scene / "transforms.json")["frames"])


def written(scene, tmp_path, kind, lists):
    names = names_of(scene)
    chosen = {split: names[LISTS[split]] if state == "full" else [] for split, state in lists.items()}
    data = tmp_path / "data"
    if kind == "nerfstudio":
        path = write_format(scene, kind, data)
        edit(path, lambda content: content.update({f"{split}_filenames": listed for split, listed in chosen.items()}))
    elif kind == "colmap":
        as_colmap(scene, data)
        for split, listed in chosen.items():
            text = "".join(f"{Path(name).name}\r\n" for name in listed)
            (data / f"{split}_list.txt").write_text(text, newline="")
    return data


@pytest.mark.parametrize("kind", ["nerfstudio", "colmap"])
@pytest.mark.parametrize("lists", COMBINATIONS, ids=str)
def test_every_combination_of_lists(scene, tmp_path, kind, lists):
    data = written(scene, tmp_path, kind, lists)
    name = {split: f"{split}_filenames" if kind == "nerfstudio" else f"{split}_list.txt" for split in LISTS}

    def read_names(split):
        return sorted(f"images/{path.name}" for path in read(kind, data, split).image_filenames)

    if lists and "train" not in lists:
        with pytest.raises(UserError, match=f"no {name['train']}"):
            read_names("train")
        return
    if lists and not {"val", "test"} & set(lists):
        with pytest.raises(UserError, match=f"neither {name['val']} nor {name['test']}"):
            read_names("train")
        return
    if not lists:
        assert len(read_names("train")) == 15 - (kind == "colmap")
        return
    names = names_of(scene)
    assert read_names("train") == (names[TRAINING] if lists["train"] == "full" else [])
    full = [split for split in ("val", "test") if lists.get(split) == "full"]
    for split in ("val", "test"):
        expected = split if split in full else next(iter(full), None)  # val and test stand for each other
        assert read_names(split) == (names[LISTS[expected]] if expected else [])


def test_colmaps_other_name_of_the_list(scene, tmp_path):
    data = written(scene, tmp_path, "colmap", {"train": "full", "val": "full"})
    (data / "val_list.txt").rename(data / "validation_list.txt")
    assert len(read("colmap", data, "val").image_filenames) == 4


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train",), ("val",)])
def test_synthetic_scenes_have_a_file_for_each_list(scene, tmp_path, splits):
    write_format(scene, "blender", tmp_path / "data")
    files = {split: tmp_path / "data" / f"transforms_{split}.json" for split in ("train", "val", "test")}
    if "test" in splits:
        files["val"].rename(files["test"])
    for split, path in files.items():
        if split not in splits:
            path.unlink(missing_ok=True)
    if len(splits) == 1:
        missing = (
            "no transforms_train.json" if splits == ("val",) else "neither transforms_val.json nor transforms_test"
        )
        with pytest.raises(UserError, match=missing) as caught:
            read("blender", tmp_path / "data")
        if splits == ("train",):  # what the sentence says helps
            assert "a copy of the first, where nothing is to be held out" in str(caught.value)
            files["val"].write_bytes(files["train"].read_bytes())
            assert len(read("blender", tmp_path / "data").image_filenames) == 12
        return
    assert len(read("blender", tmp_path / "data").image_filenames) == 12
    for split in ("val", "test"):
        assert len(read("blender", tmp_path / "data", split).image_filenames) == 4


def test_a_synthetic_scene_whose_training_views_are_its_held_out_ones_trains(
    scene, tmp_path, make_config, make_trainer
):
    data = tmp_path / "data"
    write_format(scene, "blender", data)
    (data / "transforms_val.json").write_bytes((data / "transforms_train.json").read_bytes())
    config = make_config(data)
    config.pipeline.datamanager.dataparser = parser_config("blender", data)
    assert len(make_trainer(config).pipeline.datamanager.train_dataset) == 12


@pytest.mark.parametrize("value", [None, "images/frame_00001.png", 7, [7], {}, [None], ["nowhere.png"]])
@pytest.mark.parametrize("split", LISTS)
def test_lists_that_are_none_are_refused_by_name(scene, split, value):
    names = names_of(scene)

    def change(content):
        content.update({f"{other}_filenames": names[part] for other, part in LISTS.items()})
        content[f"{split}_filenames"] = value

    edit(scene / "transforms.json", change)
    if value is None and split != "train":
        read("nerfstudio", scene)
        return
    with pytest.raises(UserError, match=f"{split}_filenames") as caught:
        read("nerfstudio", scene)
    if value == ["nowhere.png"]:
        assert "names nowhere.png, which is no view of the scene" in str(caught.value)


@pytest.mark.parametrize("kind", ["instant_ngp", "scannetpp"])
def test_lists_that_a_reader_does_not_know_are_refused(scene, tmp_path, kind):
    path = write_format(scene, kind, tmp_path / "data")
    names = names_of(scene)
    edit(path, lambda content: content.update(train_filenames=names[1:3], test_filenames=names[:1]))
    with pytest.raises(UserError, match="train_filenames, which the dataparser .* does not heed: use nerfstudio-data"):
        read(kind, tmp_path / "data")


@pytest.mark.parametrize("count", range(2, 17))
def test_instant_ngp_scenes_of_any_number_of_views(scene, count):
    edit(scene / "transforms.json", lambda content: content.update(frames=content["frames"][:count]))
    train, held_out = read("instant_ngp", scene), read("instant_ngp", scene, "val")
    assert len(train.image_filenames) + len(held_out.image_filenames) == count
    for outputs in (train, held_out):
        views = len(outputs.image_filenames)
        if views:
            assert outputs.cameras.shape == (views,) and outputs.cameras.camera_to_worlds.shape == (views, 3, 4)


def opened(trainer):
    from lifted_runs import opened

    trainer.config.save_config()
    trainer.save_checkpoint(1)
    return opened(trainer.config.get_base_dir() / "config.yml")


def test_a_scene_with_one_held_out_view_in_every_way_trains_and_is_evaluated(scene, make_config, make_trainer):
    from scene_formats import parser_config

    config = make_config(scene, steps=2)
    config.pipeline.datamanager.dataparser = parser_config("instant_ngp", scene)
    trainer = make_trainer(config)
    trainer.train()
    assert len(trainer.pipeline.datamanager.eval_dataset) == 1
    _, pipeline = opened(trainer)
    assert "psnr" in pipeline.get_average_eval_image_metrics(get_std=True)


def test_lists_of_train_and_val_are_enough_for_training_and_evaluation(scene, tmp_path, make_config, make_trainer):
    data = written(scene, tmp_path, "nerfstudio", {"train": "full", "val": "full"})
    trainer = make_trainer(make_config(data, steps=2))
    trainer.train()
    _, pipeline = opened(trainer)
    assert pipeline.datamanager.test_split == "test" and len(pipeline.datamanager.eval_dataset) == 4
    assert "psnr" in pipeline.get_average_eval_image_metrics()


def test_nothing_held_out_is_said_before_training_and_by_what_needs_it(
    scene, tmp_path, make_config, make_trainer, caplog
):
    edit(scene / "transforms.json", lambda content: content.update(frames=content["frames"][:9]))
    trainer = make_trainer(make_config(scene, steps=2))
    assert "No view of the scene is held out" in caplog.text
    trainer.train()
    _, pipeline = opened(trainer)
    sentence = f"No view of the scene {scene} is held out for evaluation: train it again and hold some out"
    with pytest.raises(UserError, match=sentence) as caught:
        pipeline.get_average_eval_image_metrics(get_std=True)  # ns-eval
    assert "\n" not in str(caught.value)

    from nerfstudio.scripts.render import DatasetRender

    render = DatasetRender(load_config=trainer.config.get_base_dir() / "config.yml", output_path=tmp_path / "renders")
    with pytest.raises(UserError, match=sentence):
        render.main()
    render.split = "train"
    render.rendered_output_names = ["rgb"]
    render.main()
    assert len(list((tmp_path / "renders" / "train" / "rgb").iterdir())) == 9


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_list_that_stands_for_another_is_called_by_its_own_name(scene, split):
    def change(content):
        names = [frame["file_path"] for frame in content["frames"]]
        content.update({"train_filenames": names[:8], f"{split}_filenames": ["nowhere.png"]})

    edit(scene / "transforms.json", change)
    with pytest.raises(UserError, match=f"^{split}_filenames of .* names nowhere.png, which is no view"):
        read("nerfstudio", scene)


@pytest.mark.parametrize("kind", ["nerfstudio", "colmap"])
def test_views_in_two_lists_or_in_none_are_said(scene, tmp_path, caplog, kind):
    data = written(scene, tmp_path, kind, {"train": "full", "test": "full"})
    names = names_of(scene)
    if kind == "nerfstudio":
        edit(data / "transforms.json", lambda content: content["test_filenames"].append(names[0]))
    else:
        path = data / "test_list.txt"
        path.write_text(path.read_text() + f"\n{Path(names[0]).name}\n")
    read(kind, data)
    said = [record.getMessage() for record in caplog.records]
    (both,) = [text for text in said if "for training too" in text]
    (nowhere,) = [text for text in said if "lists 4 of 16 views nowhere" in text]
    assert f"lists 1 of {1 + OTHERS.stop - OTHERS.start} held-out views" in both and Path(names[0]).name in both
    assert Path(names[8]).name in nowhere


def test_lists_that_say_everything_once_are_no_news(scene, tmp_path, caplog):
    data = written(scene, tmp_path, "nerfstudio", {"train": "full", "val": "full", "test": "full"})
    read("nerfstudio", data)
    assert not [record for record in caplog.records if "lists" in record.getMessage()]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train_split_fraction", 1.5, "--train-split-fraction is 1.5: name the share to train on"),
        ("train_split_fraction", 0.0, "--train-split-fraction is 0: "),
        ("train_split_fraction", -0.1, "--train-split-fraction is -0.1: "),
        ("eval_interval", 0, "--eval-interval is 0: every how many views"),
        ("eval_interval", -3, "--eval-interval is -3: "),
    ],
)
def test_numbers_that_hold_nothing_out_are_refused_by_flag(scene, field, value, said):
    with pytest.raises(UserError, match=said):
        read("nerfstudio", scene, **{field: value})


def test_held_out_by_name_where_no_name_says_so(scene, make_config, make_trainer):
    config = make_config(scene)
    config.pipeline.datamanager.dataparser.eval_mode = "filename"
    with pytest.raises(UserError, match="--eval-mode filename wants photos .* that have train or eval in their names"):
        make_trainer(config)
