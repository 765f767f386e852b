"""--method hybrid: the model recalls a fact from its own weights, or asks the search engine, as needed.

A model may know two facts and still not be able to answer a question that needs both ("the home of the friend
of N"). SEM (arXiv 2505.07903) has to search twice for it. SSRL (arXiv 2508.10874) looks both facts up in the
model's own weights, but then has no engine for what the weights do not hold. Here one episode may do both, in
any order, as often as it likes:

    <think> home of the friend of N </think>
    <recall> friend of N </recall> <memory> friend of N is M . </memory>      written by the model; free
    <search> home of M </search> <result> home of M is oslo . </result>       by the engine; costs, see below
    <think> home of M is oslo </think> <answer> oslo </answer>

The method is ours: we found no paper that trains it. There is no draft. RL does not train on a memory, as in
SSRL, so that a model does not learn to believe what happened to earn a reward; a cold start does, since it
has to teach the form. Recalls are limited by --max_completion_length alone, not by --max_searches.

The reward is that of boundary.py. Half of each group is sampled without the engine. If at least half of these
episodes are right, the question does not need it, and each search of the other half costs 0.05. That half can
still recall, so what can be recalled counts as known. Groups must be even, of at least 4:

    python grpo.py --method hybrid --max_steps 100                            # in the toy world
    python grpo.py --method hybrid --num_generations 8 --model ...

What to watch: search_ratio/composed should fall while self_search_ratio/composed rises, and
search_ratio/unknown should come back after a fall at the start.
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
