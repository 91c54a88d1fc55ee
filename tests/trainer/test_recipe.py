"""Recipes are compared setting by setting; the name of a section stands for all in it, a part of a name for nothing."""

import logging
from pathlib import Path

import pytest

from trainer.recipe import check_recipe, flatten, named


def test_trees_become_dotted_keys_and_nothing_is_lost():
    tree = {"a": {"b": 1, "c": [{"d": 2}, {"d": None}]}, "e": {}, "f": []}
    assert flatten(tree) == {"a.b": 1, "a.c.0.d": 2, "a.c.1.d": None, "e": {}, "f": {}}


@pytest.mark.parametrize(
    "key, name, is_in", [("data.shards", "data", True), ("data.shards", "data.shard", False), ("data", "data", True)]
)
def test_a_section_names_what_is_in_it(key, name, is_in):
    assert named(key, [name]) is is_in


def test_every_difference_is_named_also_of_settings_that_came_or_went():
    before, now = {"optim.lr": 1, "data.old": 2, "seed": 0}, {"optim.lr": 3, "data.new": 4, "seed": 0}
    with pytest.raises(ValueError, match="another recipe") as caught:
        check_recipe(before, now, [], Path("step_1"))
    for said in ("optim.lr: 1 there, 3 now", "data.old: 2 there, None now", "data.new: None there, 4 now"):
        assert said in str(caught.value)
    assert "seed" not in str(caught.value)


def test_what_is_allowed_is_said_and_what_is_no_setting_is_refused(caplog):
    with caplog.at_level(logging.WARNING):
        check_recipe({"optim.lr": 1}, {"optim.lr": 3}, ["optim"], Path("step_1"))
    assert "resume.allow_change: optim.lr: 1 there, 3 now" in caplog.text
    with pytest.raises(ValueError, match=r"optim\.lrr is no part of the recipe"):
        check_recipe({"optim.lr": 1}, {"optim.lr": 3}, ["optim.lrr"], Path("step_1"))
