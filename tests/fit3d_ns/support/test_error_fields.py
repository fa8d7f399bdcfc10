"""Errors name the flags of whichever command they are seen in."""

import ast
import pickle
import re

import pytest
from paths import ROOT

from fit3d_ns.backbones import BackboneSpec, describe_backbone
from fit3d_ns.support.errors import FLAGS, UserError, flags_are

FIELD = re.compile(r"\{([a-z]+(?:_[a-z]+)*)\}")


def test_fields_are_filled_by_the_innermost_caller():
    with pytest.raises(UserError) as caught, flags_are(backbone="--outer", backbone_weights="--file"):
        with flags_are(backbone="--inner"):
            raise UserError("{backbone} x: see {backbone_weights} and {backbone_layer}, not {other} or {}.")
    wanted = "--inner x: see --file and --pipeline.datamanager.backbone-layer, not {other} or {}."
    assert str(caught.value) == wanted and f"{caught.value}" == wanted
    assert str(pickle.loads(pickle.dumps(caught.value))) == wanted, "as between processes"
    with pytest.raises(ValueError, match="no fields of an error: backbonne"), flags_are(backbonne="--x"):
        raise AssertionError("never reached")


def test_what_is_raised_deep_inside_has_the_callers_words():
    with pytest.raises(UserError, match="^--pipeline.datamanager.backbone nosuch: neither"):
        describe_backbone(BackboneSpec("nosuch"))
    with pytest.raises(UserError, match="^--student nosuch: neither"), flags_are(backbone="--student"):
        describe_backbone(BackboneSpec("nosuch"))


def sentences(call: ast.Call):
    """The texts of a call's arguments as they are at run time, what is put in left out."""
    for part in ast.walk(call):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def test_every_field_of_a_sentence_can_be_filled():
    found = set()
    for package in ("fit3d_ns", "distill", "probe", "fit3d_loop", "fit3d_rooms"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "UserError":
                    fields = {field for text in sentences(node) for field in FIELD.findall(text)}
                    assert fields <= FLAGS.keys(), f"{path}: {fields - FLAGS.keys()}"
                    found |= fields
    assert {"backbone", "backbone_weights", "backbone_layer", "feature_cache_dir", "scene_advice"} <= found
