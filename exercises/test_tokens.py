"""python -m pytest exercises/test_tokens.py          the first exercise of exercises/README.md"""

import pytest

from config import Config, check
from data import Episode, Question, Segment
from prompts import SEARCH_R1
from reward import METHODS, REWARDS

QUESTION = Question("1", "who found radium ?", ["Curie"], "people")
OPTIONS = {"tau": 0.5, "search_cost": None}  # with the group, what a training step gives to every reward


def earned(*lengths, answer="Curie", stop="answer"):
    """The reward of an episode whose segments have these numbers of tokens: policy, result, policy, .."""
    if "tokens" not in REWARDS:
        pytest.fail(
            "REWARDS of reward.py has no entry `tokens`: exercise 1, exercises/README.md", pytrace=False
        )
    texts = ["<think>a</think><search>radium</search>", "\n<information>\nCurie\n</information>\n"] * 9
    texts[len(lengths) - 1] = f"<think>b</think><answer>{answer}</answer>" if answer else "<think>c</think>"
    segments = [Segment("env" if i % 2 else "model", [7] * n, texts[i]) for i, n in enumerate(lengths)]
    episode = Episode(QUESTION, [7] * 50, segments=segments, stop=stop, template=SEARCH_R1)
    episode.ids = [token for s in segments for token in s.ids]
    episode.loss_mask = [s.kind == "model" for s in segments for _ in s.ids]
    episode.logps, episode.searches = [0.0] * len(episode.ids), len(lengths) // 2
    parts = REWARDS["tokens"](episode, QUESTION, group=[episode], **OPTIONS)
    assert parts["em"] == float(answer == "Curie")
    return parts["reward"]


def test_a_right_answer_pays_for_its_tokens():
    assert earned(40) == pytest.approx(1 - 0.040)
    assert earned(120) == pytest.approx(1 - 0.120)


def test_only_tokens_of_the_policy_count():
    """The prompt and the results cost nothing, however long they are."""
    assert earned(30, 500, 20) == pytest.approx(1 - 0.050)
    assert earned(30, 5, 20, 800, 10) == pytest.approx(1 - 0.060)


def test_a_wrong_answer_earns_nothing_at_any_length():
    assert earned(10, answer="Bohr") == earned(700, answer="Bohr") == 0
    assert earned(10, answer="", stop="length") == 0


def test_no_episode_earns_less_than_nothing():
    assert earned(999) == pytest.approx(0.001)
    assert earned(1000) == pytest.approx(0) and earned(5000) == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_use_it(method):
    earned(1)
    check(Config(method=method, reward="tokens"))
