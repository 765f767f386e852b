"""--method hybrid: the model looks a fact up in its own weights, or asks the search engine, as needed.

SSRL (arXiv 2508.10874) trains a model to search itself, SEM (arXiv 2505.07903) to search an engine only where
it has to. Here one episode may do both, in any order. This method is ours; no paper is known to train it.

    <think> .. </think>
    <recall> query </recall> <memory> what the model writes itself </memory>     as often as it likes
    <search> query </search> <result> what the engine finds </result>            costs, see boundary.py
    <think> .. </think> <answer> .. </answer>

A memory is not trained on, as in SSRL: it is what the model believes, and training on it would teach it to
believe whatever happened to earn a reward. There is no draft. The reward is that of boundary.py. It says
whether a question needs the engine by half of each group that has none. That half can still recall, so what
can be recalled counts as known.

    python grpo.py --method hybrid
"""

from __future__ import annotations

import boundary  # noqa: F401 (it adds its rewards to REWARDS)
from prompts import ANSWER_RULE, Template
from reward import METHODS, REWARDS, Method

HYBRID = Template(
    "You answer questions from your own knowledge, and with a search engine where that is not enough. Reason "
    "between <think> and </think> every time you learn something new. To look a fact up in your own "
    "knowledge, write a query between <recall> and </recall>, and then yourself write what you know about it "
    "between <memory> and </memory>. To ask the search engine, write a query between <search> and </search>; "
    "what it finds comes back between <result> and </result>. Do either as often as you need, and the search "
    "engine only if you have to. At the end give the answer alone between <answer> and </answer>. "
    f"{ANSWER_RULE}",
    recall="recall",
    memory="memory",
)

METHODS["hybrid"] = Method(HYBRID, REWARDS["boundary"])
