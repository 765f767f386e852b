"""Settings and fixtures for all tests. The hub is switched off. Torch has one thread, because the models are
small, and on a busy machine two threads would wait for each other. A fixture imports what it needs when it is
used, so that a test of data.py does not wait for transformers."""

import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # this must come before huggingface_hub is imported

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path):
    """The flags of a run in a world of a few words."""
    from worlds import write_world

    return write_world(tmp_path)


@pytest.fixture
def model(world):
    """The start model of the world."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world["model"], dtype=torch.float32)


@pytest.fixture
def lively(monkeypatch):
    """Replaces the reward of sem by `worlds.lively_reward`, which differs within a group."""
    from worlds import lively_reward

    from reward import METHODS

    monkeypatch.setitem(METHODS, "sem", replace(METHODS["sem"], reward=lively_reward))
