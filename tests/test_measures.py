"""python -m pytest tests/test_measures.py

The metrics of a training step are compared with numbers that were computed by hand, with and without failed
searches. Twelve questions stand in a table, so that every measure over them can be computed by hand. The
judge is a server that the test starts.
"""

import json
import math
import statistics
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_reward import GOLD, dialogue, written

import measures
from data import Question
from measures import (
    Record,
    bootstrap,
    markdown,
    measure,
    report,
    sandbag_suspects,
    self_searches,
    step_metrics,
    summary,
    wilson,
)
from prompts import SEARCH_R1, SSRL
from reward import REWARDS, sem
from web import RequestError

# ------------------------------------------------------------------------------------------------------------
# the metrics of a training step


def sampled(line, tokens, source="towers", stop="eos"):
    """An episode of SEM with `tokens` tokens of the policy, and three tokens for each of its results."""
    e = written(line, stop)
    e.question = replace(GOLD, source=source)
    e.loss_mask = [True] * tokens + [False] * 3 * e.searches
    e.ids, e.logps = [0] * len(e.loss_mask), [0.0] * len(e.loss_mask)
    return e


def failed(source="towers"):
    """An episode whose search failed. Any figure that counted it would change."""
    return sampled("T right S R S", 1000, source, "search_failed")


def two_groups():
    return [
        [
            sampled("T right", 10),
            sampled("T wrong S R right", 20),
            sampled("T right S R right", 31),
            sampled("T wrong", 7, stop="length"),
        ],
        [
            sampled("T wrong S R S R right", 40, "rivers"),
            sampled("T wrong S R half", 24, "rivers"),
            sampled("T part S R wrong", 9, "rivers"),
            sampled("T half", 8, "rivers"),
        ],
    ]


FIGURES_OF_TWO_GROUPS = {
    "reward": (2 + 7 / 3) / 8,
    "reward_std": (statistics.stdev([1, 1, 0, 0]) + statistics.stdev([1, 2 / 3, 0, 2 / 3])) / 2,
    "frac_reward_zero_std": 0.0,
    "completions/mean_length": 149 / 8,
    "completions/min_length": 7,
    "completions/max_length": 40,
    "completions/mean_terminated_length": 142 / 7,  # without the episode that ran out of tokens
    "completions/clipped_ratio": 1 / 8,
    "tools/call_frequency": 6 / 8,
    "tools/failure_frequency": 0.0,
    "num_tokens": 149,
    "format": 7 / 8,
    "sandbag_suspects": 4 / 5,  # of the five that searched, one has a right draft
    "search_ratio/towers": 2 / 4,
    "search_ratio/rivers": 3 / 4,
    "em/towers": 3 / 4,
    "em/rivers": 1 / 4,
    "em_searched/towers": 2 / 2,
    "em_searched/rivers": 1 / 3,
}


def metrics_of(groups, reward=sem):
    """Calls step_metrics as train_step does: an episode whose search failed has no parts."""
    episodes = [e for group in groups for e in group]
    parts = [reward(e, e.question) if e.stop != "search_failed" else {} for e in episodes]
    return step_metrics(episodes, parts, len(groups[0]), 0.5)


def without_failures(metrics):
    return {name: value for name, value in metrics.items() if name != "tools/failure_frequency"}


def test_the_figures_of_a_step():
    metrics = metrics_of(two_groups())
    assert metrics == pytest.approx(FIGURES_OF_TWO_GROUPS)
    assert set(metrics) == set(FIGURES_OF_TWO_GROUPS)


@pytest.mark.parametrize("places", [[0], [4], [2], [1, 1], [0, 5], [0, 0, 0, 0]])
def test_further_members_whose_search_failed_change_only_the_failure_frequency(places):
    """A member whose search failed is inserted into each group at each of the positions `places`."""
    groups = two_groups()
    for source, group in zip(("towers", "rivers"), groups, strict=True):
        for place in places:
            group.insert(place, failed(source))
    metrics = metrics_of(groups)
    assert without_failures(metrics) == without_failures(metrics_of(two_groups()))
    assert metrics["tools/failure_frequency"] == pytest.approx(len(places) / (4 + len(places)))


def test_a_member_whose_search_failed_is_not_counted():
    """Seven members of the two groups are counted. The failed one takes the place of the only member of the
    first group that earned a reward without a search, so no member of that group is a suspect now."""
    groups = two_groups()
    groups[0][0] = failed()
    metrics = metrics_of(groups)
    changed = {
        "reward": (1 + 7 / 3) / 7,
        "reward_std": (statistics.stdev([1, 0, 0]) + statistics.stdev([1, 2 / 3, 0, 2 / 3])) / 2,
        "completions/mean_length": 139 / 7,
        "completions/mean_terminated_length": 132 / 6,
        "completions/clipped_ratio": 1 / 7,
        "tools/call_frequency": 6 / 7,
        "tools/failure_frequency": 1 / 8,
        "num_tokens": 139,
        "format": 6 / 7,
        "sandbag_suspects": 3 / 3,
        "search_ratio/towers": 2 / 3,
        "em/towers": 2 / 3,
    }
    assert metrics == pytest.approx(FIGURES_OF_TWO_GROUPS | changed)
    for group, source in zip(groups, ("towers", "rivers"), strict=True):  # one more failed member
        group.append(failed(source))
    assert without_failures(metrics_of(groups)) == without_failures(metrics)


@pytest.mark.parametrize("left", [0, 1])
def test_a_group_with_fewer_than_two_members_left_has_no_spread(left):
    first, second = two_groups()
    metrics = metrics_of([first[:left] + [failed() for _ in range(4 - left)], second])
    alone = metrics_of([second])
    assert metrics["reward_std"] == alone["reward_std"] > 0 == metrics["frac_reward_zero_std"]
    assert ("em/towers" in metrics) == ("search_ratio/towers" in metrics) == (left > 0)
    if left == 0:  # the other group is all that is left of the step
        assert without_failures(metrics) == without_failures(alone)


def test_a_failed_member_does_not_make_equal_rewards_differ():
    first, second = two_groups()
    equal = [sampled("T right", 10) for _ in range(3)]
    metrics = metrics_of([[*equal, failed()], second])
    assert metrics["frac_reward_zero_std"] == 1 / 2
    assert metrics["reward_std"] == pytest.approx(statistics.stdev([1, 2 / 3, 0, 2 / 3]) / 2)
    assert metrics_of([[*equal, first[3]], second])["frac_reward_zero_std"] == 0


def test_a_step_in_which_every_search_failed_has_finite_figures():
    metrics = metrics_of([[failed() for _ in range(4)], [failed("rivers") for _ in range(4)]])
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["tools/failure_frequency"] == 1
    assert not any(without_failures(metrics).values())
    by_reward = {"format", "sandbag_suspects"}  # only the results of a reward show whether it has these parts
    by_source = {name for name in FIGURES_OF_TWO_GROUPS if "rivers" in name or "towers" in name}
    assert set(metrics) == set(FIGURES_OF_TWO_GROUPS) - by_reward - by_source


def test_figures_that_only_the_reward_of_sem_has():
    groups = [[dialogue(line, "answer", GOLD, SEARCH_R1) for line in ("T right", "T S R T wrong")]]
    metrics = metrics_of(groups, REWARDS["search-r1"])
    assert "format" not in metrics and "sandbag_suspects" not in metrics
    assert metrics["reward"] == metrics["em/people"] == metrics["search_ratio/people"] == 1 / 2


def test_an_answer_terminates_an_episode_as_an_end_token_does():
    stops = ("answer", "eos", "length", "turns", "bad_query")
    metrics = metrics_of([[sampled("T right", i, stop=stop) for i, stop in enumerate(stops, 3)]])
    assert metrics["completions/mean_terminated_length"] == (3 + 4) / 2
    assert metrics["completions/clipped_ratio"] == 1 / 5


def test_searches_that_the_model_answers_itself_are_counted_apart():
    lines = ("T S I T S I T right", "T S I T wrong", "T right", "T right")
    group = [dialogue(line, "eos", GOLD, SSRL) for line in lines]
    metrics = metrics_of([group], REWARDS["ssrl"])
    assert metrics["tools/self_searches"] == 3 / 4 and metrics["tools/call_frequency"] == 0
    group.append(dialogue("T S I T S I T S", "search_failed", GOLD, SSRL))
    assert without_failures(metrics_of([group], REWARDS["ssrl"])) == without_failures(metrics)
    assert "tools/self_searches" not in metrics_of(two_groups())
    assert self_searches(dialogue("T S R T S I T right", "eos", GOLD, SSRL)) == 1  # the engine answered one


# ------------------------------------------------------------------------------------------------------------
# suspects of sandbagging


def member(paid, searched, draft):
    return {"reward": paid, "s": float(searched), "f1_a1": draft}


KNOWS = member(1.0, False, 1.0)  # right without a search
JUNK = member(1.0, True, 0.0)  # a wrong draft, then a search
HONEST = member(0.0, True, 1.0)  # a right draft, then a search
FAILS = member(0.0, False, 0.0)  # wrong without a search
CLOSE = member(0.0, True, 0.5)  # a draft with an F1 of 0.5, then a search


@pytest.mark.parametrize(
    "groups, expected",
    [
        ([], (0, 0)),
        ([[KNOWS, JUNK]], (1, 1)),
        ([[JUNK, KNOWS]], (1, 1)),
        ([[KNOWS, HONEST]], (0, 1)),
        ([[KNOWS, FAILS]], (0, 0)),
        ([[KNOWS, JUNK, HONEST, JUNK, FAILS]], (2, 3)),
        ([[JUNK, JUNK, FAILS]], (0, 0)),
        ([[JUNK, HONEST, JUNK]], (0, 0)),
        ([[KNOWS, FAILS], [JUNK, JUNK]], (0, 0)),
        ([[KNOWS, JUNK], [JUNK, JUNK], [HONEST, KNOWS], [JUNK, KNOWS]], (2, 3)),
        ([[member(0.5, False, 0.5), JUNK]], (1, 1)),
    ],
)
def test_sandbag_suspects(groups, expected):
    assert sandbag_suspects(groups) == expected


def test_sandbag_suspects_at_tau():
    assert sandbag_suspects([[KNOWS, CLOSE]]) == (0, 1)
    assert sandbag_suspects([[KNOWS, CLOSE]], tau=0.51) == (1, 1)


def test_sandbag_suspects_of_episodes():
    lines = ["T right", "T wrong S R right", "T right S R right", "T part S R wrong", "T wrong", "T right S"]
    parts = [sem(written(line), GOLD) for line in lines]
    assert sandbag_suspects([parts]) == (2, 4)
    assert sandbag_suspects([parts[:3], parts[3:]]) == (1, 2)


# ------------------------------------------------------------------------------------------------------------
# twelve questions

# draft, searches, last answer, right closed-book, right when forced, known to the base model, right for the
# judge, number of right samples out of four
TWELVE = [
    ("right", 0, "", True, True, True, True, 4),
    ("right", 0, "", False, False, True, True, 4),
    ("right", 0, "", False, True, True, True, 3),
    ("right", 1, "right", True, True, False, True, 3),
    ("right", 1, "wrong", True, True, False, False, 2),
    ("wrong", 1, "right", True, True, True, True, 2),
    ("wrong", 2, "right", False, True, True, True, 2),
    ("wrong", 3, "wrong", False, False, False, False, 1),
    ("wrong", 0, "", False, True, False, False, 1),
    ("wrong", 0, "", True, False, False, False, 0),
    ("", 1, "right", False, False, False, None, 0),  # it has no draft
    ("half", 0, "", False, True, False, True, 0),  # F1 is 2/3, so the draft is right, but no exact match
]
EXPECTED_SHARES = {  # measure: the rows that it is about, and those of them that count, by number
    "em": (range(12), [0, 1, 2, 3, 5, 6, 10]),
    "lj": ([i for i in range(12) if i != 10], [0, 1, 2, 3, 5, 6, 11]),
    "sr": (range(12), [3, 4, 5, 6, 7, 10]),
    "self_sr": (range(4), [1, 3]),
    "known": (range(12), [0, 3, 4, 5, 9]),
    "over_search": ([0, 3, 4, 5, 9], [3, 4, 5]),
    "over_search_base": ([0, 1, 2, 5, 6], [5, 6]),
    "under_search": ([2, 6, 8, 11], [2, 8, 11]),  # 1, 7 and 10 are wrong with a search too
    "wrong_without_search": ([0, 1, 2, 8, 9, 11], [8, 9, 11]),
    "draft_right_given_search": ([3, 4, 5, 6, 7, 10], [3, 4]),
    "sandbag_rate": ([3, 4, 5], [5]),
}
EXPECTED_FIGURES = {
    "f1": (7 + 2 / 3) / 12,
    "searches": 9 / 12,
    # five are known, six did not search, and rows 0 and 9 are both
    "f1_aware": 2 * (2 / 6) * (2 / 5) / (2 / 6 + 2 / 5),
    "tool_productivity": 7 / 9,
    "pass@1": 22 / 48,
    # 1 - C(4 - c, 2) / C(4, 2) is 1, 1, 5/6, 1/2, 0 for c = 4, 3, 2, 1, 0
    "pass@2": (4 * 1 + 3 * 5 / 6 + 2 * 1 / 2) / 12,
    "pass@4": 9 / 12,
}


def numbered(i: int) -> Question:
    """Question i of the twelve, in one of two data sets."""
    return Question(f"q{i}", f"What is number {i}?", [f"gold {i}"], "towers" if i < 5 else "rivers")


def records() -> list[Record]:
    rows = []
    for i, (draft, searches, last, known, forced, base, judged, c) in enumerate(TWELVE):
        final = last if searches else draft
        score = {"right": 1.0, "half": 2 / 3}.get(final, 0.0)
        draft_is_right = draft in ("right", "half")
        row = Record(str(i), final == "right", score, searches, 10 * i, draft_is_right)
        row.known, row.known_base, row.forced, row.judged = known, base, forced, judged
        row.sampled = [member < c for member in range(4)]
        row.self_searches = [0, 1, 0, 2][i] if i < 4 else None
        rows.append(row)
    return rows


def test_every_measure_on_twelve_records():
    table = measure(records())
    assert set(table) == {*EXPECTED_SHARES, *EXPECTED_FIGURES, "tokens"}
    for name, (among, counted) in EXPECTED_SHARES.items():
        k, n = len(counted), len(among)
        assert table[name]["value"] == pytest.approx(k / n), name
        assert table[name]["n"] == n, name
        assert (table[name]["low"], table[name]["high"]) == wilson(k, n)
    for name, value in {**EXPECTED_FIGURES, "tokens": 55.0}.items():
        assert table[name]["value"] == pytest.approx(value), name
        assert table[name]["n"] == 12 and table[name]["low"] <= value <= table[name]["high"], name
    assert list(measures.SHARES) == list(EXPECTED_SHARES)  # a new measure needs its value here
    assert [*measures.FIGURES] == ["f1", "searches", "tokens", "f1_aware", "tool_productivity"]


def test_summary():
    assert summary(records()) == pytest.approx(
        {"em": 7 / 12, "f1": 92 / 144, "sr": 0.5, "searches": 0.75, "n": 12}
    )
    assert summary([]) == {"em": 0, "f1": 0, "sr": 0, "searches": 0, "n": 0}


def test_the_table_of_a_training_run():
    before = {"towers": {"em": 0.5, "f1": 0.625, "sr": 1.0, "searches": 1.5, "n": 8}}
    after = {"towers": {"em": 0.75, "f1": 0.8, "sr": 0.25, "searches": 0.25, "n": 8}}
    assert markdown({"before": before, "after": after}).splitlines() == [
        "| questions | n | EM before | F1 before | SR before | searches before"
        " | EM after | F1 after | SR after | searches after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| towers | 8 | 0.50 | 0.62 | 1.00 | 1.50 | 0.75 | 0.80 | 0.25 | 0.25 |",
    ]


def test_a_measure_about_nothing_is_a_dash():
    """A measure that no record is about is left out, and is printed as a dash and not as 0."""
    bare = [Record(str(i), True, 1.0, 0, 5) for i in range(3)]
    table = measure(bare)
    assert set(table) == {"em", "sr", "wrong_without_search", "f1", "searches", "tokens"}
    unknown = measure([Record("0", False, 0.0, 2, 5, draft=False, known=False, forced=False)])
    assert "over_search" not in unknown and "sandbag_rate" not in unknown and "under_search" not in unknown
    assert "f1_aware" not in unknown  # the question is neither known nor without a search
    assert unknown["tool_productivity"]["value"] == 0
    text = report({"full": measure(records()), "bare": table, "empty": measure([])})
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    lines = {name: cells for name, *cells in rows}
    assert lines["over_search"][1:] == ["-", "-"] and lines["em"][1] != "-" and lines["em"][2] == "-"
    assert lines["sr"][1] == "0.000 (0.000 to 0.562; 3)"  # it is not printed as -0.000
    assert report({"empty": {}}).startswith("| measure | empty |")


def test_every_line_of_the_table_is_explained():
    table = measure(records())
    text = report({"a": table, "b": table})
    for name in table:
        assert f"\n| {name} | " in text and f"\n{name}: " in text
    assert "| over_search | 0.600 (0.231 to 0.882; 5) | 0.600 (0.231 to 0.882; 5) |" in text


# ------------------------------------------------------------------------------------------------------------
# intervals


@pytest.mark.parametrize(
    "k, n, low, high",  # Wilson's formula with z = 1.96, as published tables print it
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(k, n, low, high):
    assert wilson(k, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_stays_within_0_and_1_and_is_symmetric(share):
    k, n = share
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    assert math.copysign(1, low) == 1  # a rounded -1e-17 would be printed as -0.000
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n), abs=1e-12)


def test_bootstrap_repeats_itself_and_covers_the_mean():
    def mean(rows):
        return sum(rows) / len(rows)

    rng, hits, widths = np.random.default_rng(1), 0, []
    for _ in range(100):
        values = rng.normal(3.0, 2.0, size=60).tolist()
        low, high = bootstrap(mean, values)
        hits += low <= 3.0 <= high
        widths.append(high - low)
    assert 88 <= hits <= 100
    assert sum(widths) / 100 == pytest.approx(2 * 1.96 * 2 / math.sqrt(60), rel=0.1)
    assert bootstrap(mean, values) == (low, high)
    assert bootstrap(mean, [0.5] * 9) == (0.5, 0.5)


def test_bootstrap_leaves_out_draws_without_a_value():
    """The model searched for one of five questions, so a third of the draws contain no search and have no
    tool productivity."""
    rows = [Record(str(i), i < 2, 1.0, int(i == 0), 1) for i in range(5)]
    low, high = bootstrap(measures.tool_productivity, rows)
    assert 0 < low <= 2 <= high < 6


# ------------------------------------------------------------------------------------------------------------
# the judge


@contextmanager
def endpoint(reply):
    """An OpenAI-compatible server. `reply(prompt)` returns a status and a body, or the text of its answer.

    Yields the address and the list of the requests seen, (path, headers, body)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            answer = reply(body["messages"][0]["content"])
            status, content = answer if isinstance(answer, tuple) else (200, chat(answer))
            if status is None:  # the reply is no HTTP at all
                return self.wfile.write(content)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/", seen
    finally:
        server.shutdown()
        server.server_close()


def chat(answer: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": answer}}]}).encode()


RIGHT = '{"rationale": "same", "judgement": "correct"}'
WRONG = '{"rationale": "no", "judgement": "incorrect"}'


@pytest.mark.parametrize(
    "reply, verdict",
    [
        (RIGHT, True),
        (WRONG, False),
        (f"Sure:\n```json\n{RIGHT}\n```", True),
        ('{"judgement": " Correct"}', True),
        (f"<think>Is it {WRONG}? No: {{x}}.</think>\n{RIGHT}", True),
        (f"<think>{RIGHT}</think>{{not JSON}} {WRONG} I am sure.", False),
        ('{"judgement": "correct", "scores": {"a": 1}}', True),
        ('{"judgement": "Incorrect."} {}', False),
        ('{"rationale": "a\nb \\\\( c", "judgement": "correct",}', True),  # line breaks and LaTeX are no JSON
        ('{"rationale": "it says \\"judgement\\": \\"correct\\"", "judgement": "incorrect"}', False),
        ('{"steps": [{"judgement": "correct"}], "judgement": "incorrect"}', False),
        (f"<think>{RIGHT} or not", "no verdict"),
        ("correct", "no verdict in its reply: .*correct"),
        ('{"judgement": "maybe"}', "no verdict in its reply: .*maybe"),
        ('{"judgement": ["correct"]}', "no verdict"),
        ('{"rationale": "cut', "no verdict"),
        ("{}", "no verdict"),
        ("", "no verdict"),
        (None, "no verdict"),  # an endpoint that refuses sends no content
        ((500, b"oops"), "^HTTP 500 Internal Server Error: oops$"),
        (
            (401, b'{"error": {"message": "Incorrect API key", "code": 1}}'),
            "HTTP 401 Unauthorized: Incorrect API key$",
        ),
        ((404, b'{"error": "no model judge-1"}'), "HTTP 404 Not Found: no model judge-1$"),
        ((422, b'{"detail": [{"msg": "field required"}]}'), "HTTP 422 .*field required"),
        (
            (429, b"<html><p>Too many\n<b>requests</b>\x1b[2J</p>"),
            r"HTTP 429 Too Many Requests: Too many requests \[2J$",
        ),
        ((200, b"not JSON"), "no verdict in its reply: not JSON"),
        ((200, b"[]"), "no verdict"),
        ((200, b'{"choices": []}'), "no verdict"),
        ((None, b"no HTTP at all\r\n\r\n"), "no HTTP at all"),
    ],
)
def test_what_the_judge_replies(reply, verdict):
    with endpoint(lambda prompt: reply) as (url, _):
        if isinstance(verdict, bool):
            assert measures.judge(numbered(3), "gold", url, "judge-1") is verdict
        else:
            with pytest.raises(measures.JudgeError, match=verdict):
                measures.judge(numbered(3), "gold", url, "judge-1")


def test_what_is_sent_to_the_judge(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key of a test")
    question = Question("1", "Who wrote it?", ["Ana Lee", "A. Lee"], "x")
    with endpoint(lambda prompt: RIGHT) as (url, seen):
        assert measures.judge(question, "Lee, Ana", url, "judge-1") is True
    [(path, head, body)] = seen
    assert path == "/v1/chat/completions" and head["Authorization"] == "Bearer key of a test"
    assert body["model"] == "judge-1" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    assert all(part in text for part in ("Who wrote it?", "Ana Lee", "A. Lee", "Answer: Lee, Ana", "JSON"))


def test_no_judge_at_the_address():
    for address, reason in {"http://127.0.0.1:9": "refused", "no address": "unknown url type"}.items():
        with pytest.raises(measures.JudgeError, match=reason):
            measures.judge(numbered(3), "gold", address, "judge-1")


def test_the_judge_on_this_machine_is_asked_without_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "a key with a line break\n")
    with endpoint(lambda prompt: RIGHT) as (url, seen):
        for host in ("127.0.0.1", "localhost", "127.1"):
            assert measures.judge(numbered(3), "gold", url.replace("127.0.0.1", host), "judge-1") is True
    assert len(seen) == 3 and seen[0][1]["Authorization"] == "Bearer a key with a line break"
    with pytest.raises(measures.JudgeError, match="refused"):  # this one goes through the proxy
        measures.judge(numbered(3), "gold", "http://judge.invalid", "judge-1")


def test_a_silent_judge_is_sent_no_further_answers(monkeypatch, capsys):
    """Each missing verdict may cost a minute, so 32 in a row are enough. A verdict begins the count anew."""
    sent = []

    def verdict(question, answer, url, model):
        assert (url, model) == ("http://judge", "judge-1")
        sent.append(answer)
        if answer == "x40":
            return True
        raise measures.JudgeError("HTTP 401 Unauthorized")

    monkeypatch.setattr(measures, "judge", verdict)
    answers = [(numbered(i), f"x{i}") for i in range(100)]
    judged = measures.verdicts(answers, "http://judge", "judge-1", "towers")
    assert judged == [None] * 100 and len(sent) == 32
    sent.clear()
    judged = measures.verdicts(answers[16:], "http://judge", "judge-1", "towers")
    assert judged == [None] * 24 + [True] + [None] * 59 and len(sent) == 64
    said = capsys.readouterr()
    line = "towers: the judge gave no verdict on 83 of 84 questions; the first reason: HTTP 401 Unauthorized"
    assert line in said.out + said.err


def test_a_pass_that_was_not_made_is_not_a_wrong_answer():
    """Records without a closed-book pass or without samples change no measure about these."""
    bare = [Record(str(i), False, 0.0, 0, 5, forced=True, sampled=[]) for i in range(4)]
    with_them, without = measure(records() + bare), measure(records())
    for name in ("known", "over_search", "under_search", "f1_aware", "pass@1", "pass@4"):
        assert with_them[name]["value"] == without[name]["value"], name


def test_the_judge_sees_the_options():
    """A gold of a multiple-choice question is a letter; the judge gets the text of that option too."""
    question = Question("1", "Which city?", ["B"], "x", ["Oslo", "Lima"])
    with endpoint(lambda prompt: RIGHT) as (url, seen):
        measures.judge(question, "Lima", url, "judge-1")
    [(_, _, body)] = seen
    text = body["messages"][0]["content"]
    assert "A. Oslo\nB. Lima\n" in text and '["B", "Lima"]' in text


def test_the_judge_has_a_minute(monkeypatch):
    waited = []

    def post(url, body, timeout, headers):
        waited.append(timeout)
        raise RequestError("timed out", again=True)

    monkeypatch.setattr(measures, "post", post)
    with pytest.raises(measures.JudgeError, match="timed out"):
        measures.judge(numbered(3), "gold", "http://judge", "judge-1")
    assert waited == [60]
