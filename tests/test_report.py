"""python -m pytest tests/test_report.py

The tests are about the page: it is well-formed, small and safe, it says who wrote what and what is trained
on, and it can be made of any state of a run.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from worlds import run_main

import report
from reward import METHODS

ROOT = Path(__file__).parent.parent
VOID = {"meta", "br", "img", "link", "input", "hr", "base"}


class Page(HTMLParser):
    """Reads a page, and fails for a tag that is not closed, or closed in the wrong order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def metrics_row(step: int, **other) -> dict:
    row = {"step": step, "reward": 0.5 + step / 100, "entropy": 1.0, "kl": step / 1000}
    return row | {"frac_reward_zero_std": 0.25, "search_ratio/known": 0.4, "em/known": 0.6} | other


def episode_row(step: int, **other) -> dict:
    segments = [
        {"kind": "model", "text": "<think> hm </think> <search> x </search>", "tokens": 5},
        {"kind": "env", "text": "<result> found </result>", "tokens": 3},
        {"kind": "model", "text": "<answer> y </answer>", "tokens": 4},
    ]
    row = {"step": step, "source": "known", "id": "7", "answers": ["y", "z"], "prompt": "<user> who is y ?"}
    row |= {"segments": segments, "stop": "eos", "reward": 1.0, "f": 1.0, "f1_a1": 0.25, "advantage": -0.75}
    return row | {"ids": list(range(12)), "loss_mask": "111110001111"} | other


def lines(rows: list) -> bytes:
    """As run.Run.append writes them; bytes are taken as they are."""
    return b"".join(
        row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() + b"\n"
        for row in rows
    )


@pytest.fixture
def made(tmp_path):
    """made(metrics, episodes, evaluation) writes a run with these rows, and returns its page as text."""

    def make(metrics=None, episodes=(), evaluation=None) -> str:
        (tmp_path / "run.json").write_text(json.dumps({"method": "sem", "max_steps": 9}, indent=1))
        (tmp_path / "metrics.jsonl").write_bytes(lines(metrics or [metrics_row(1), metrics_row(2)]))
        (tmp_path / "transcripts.jsonl").write_bytes(lines(episodes))
        if evaluation is not None:
            (tmp_path / "eval.json").write_text(evaluation)
        return report.page(tmp_path)

    return make


def run_report(folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "report.py", str(folder)], cwd=ROOT, capture_output=True, text=True
    )


def curve(page: str, label: str) -> list[str]:
    """The paths of the curves of a figure."""
    [figure] = [part for part in page.split("<figure>") if part.startswith(f"<h3>{label}</h3>")]
    return re.findall(r'<path d="([^"]*)" stroke="hsl', figure)


# ------------------------------------------------------------------------------------------------------------
# the page of a real run


def test_a_real_run(world, lively, capsys):
    sets = {"eval": world["train"], "eval_size": "4"}
    assert run_main(world | sets) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    out = Path(world["output_dir"])
    assert command.endswith(f"python report.py {out}")
    done = run_report(out)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{out}/report.html\n")
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    others = "itself", "need no search"  # figures of ssrl and of boundary
    figures = [label for _, label, _ in report.FIGURES if not any(words in label for words in others)]
    assert [a["aria-label"] for a in page.all("svg") if "role" in a] == figures
    assert len(page.all("section")) == len(page.all("option")) == 4 and len(page.all("article")) == 16
    assert "who is w" in page.text and "before → after n EM" in page.text
    trained = [sum(map(int, json.loads(row)["loss_mask"])) for row in open(out / "transcripts.jsonl")]
    assert sum(map(int, re.findall(r"tokens, (\d+) trained on", page.text))) == sum(trained)


def test_the_page_loads_nothing_and_fits_a_phone(made):
    text = made(episodes=[episode_row(1)])
    page = Page(text)
    names = {name for _, attributes in page.tags for name in attributes}
    assert not names & {"src", "href", "srcset", "action"} and not [n for n in names if n.startswith("on")]
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all("viewbox" in attributes for attributes in page.all("svg"))
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    [policy] = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    key = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{key}'" in policy


def test_every_figure_has_its_text():
    assert len(report.FIGURES) == 12
    assert all(note.strip() and report.escape(label) == label for _, label, note in report.FIGURES)


# ------------------------------------------------------------------------------------------------------------
# who wrote what, and what is trained on


def heads(page: str) -> list[str]:
    return re.findall(r'<div class="piece ([^"]*)"><i>([^<]*)</i>', page)


def test_segments(made):
    page = made(episodes=[episode_row(1), episode_row(1, prompt="<user> where is z ?")])
    assert heads(page)[:3] == [
        ("model", "model: 5 tokens, 5 trained on"),
        ("env", "search result: 3 tokens, 0 trained on"),
        ("model", "model: 4 tokens, 4 trained on"),
    ]
    assert '<path d="M0 0h5v1h-5z"/><path d="M8 0h4v1h-4z"/>' in page
    text = Page(page).text
    for part in ("reward 1", "f 1", "f1_a1 0.25", "advantage -0.75", "right: y | z", "stopped by: eos"):
        assert part in text
    assert "<h3>who is y ?</h3>" in page and "<h3>where is z ?</h3>" in page


OWN = "<search> q </search> <information> a b </information> <search> r </search>"


@pytest.mark.parametrize(
    "text, mask, pieces",
    [
        (OWN, "111" + "0000" + "1111", [("model", 3), ("own", 4), ("model", 4)]),
        (OWN.replace("r </search>", "r </search> <information> cut"), "111000011100", ["model", "own"] * 2),
        ("<information> a </information>", "0001", [("own", 3), ("model", 1)]),  # the end token has no text
        (OWN, "11100001111011", [("model", 14)]),  # the tags do not fit the mask
        (OWN, "11111111111", [("model", 11)]),  # sem trains on it: there such a text is a mistake
    ],
)
def test_results_that_a_model_wrote_itself(text, mask, pieces):
    found = report.pieces("model", text, mask)
    assert "".join(t for _, t, _ in found) == text and "".join(run for *_, run in found) == mask
    assert [kind for kind, *_ in found] == [p if isinstance(p, str) else p[0] for p in pieces]
    assert not isinstance(pieces[0], tuple) or [len(run) for *_, run in found] == [n for _, n in pieces]
    assert all(set(run) == ({"0"} if kind == "own" else {"1"}) for kind, _, run in found if len(found) > 1)


def test_the_result_tags_of_all_methods_are_found():
    for method in METHODS.values():
        tag = method.template.own_result or method.template.result
        assert report.RESULT.fullmatch(f"<{tag}>x</other></{tag}>")
    assert report.RESULT.match("<memory>x</result>y</memory>").end() == 28


def test_an_episode_whose_search_failed_is_not_trained_on(made):
    row = {k: v for k, v in episode_row(1, stop="search_failed", advantage=0.0).items() if k != "reward"}
    page = made(episodes=[row])
    assert heads(page)[0][1] == "model: 5 tokens, 0 trained on" and "v1h-" not in page


def test_a_long_text_is_folded(made):
    row = episode_row(1)
    row["segments"][1]["text"] = "word " * 300
    page = made(episodes=[row])
    assert "1,500 characters" in page and "are cut here" not in page
    assert re.search(r'<details><summary><i>1,500 characters.*?<div class="text">(word ){300}</div>', page)


# ------------------------------------------------------------------------------------------------------------
# foreign texts

EVIL = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><b onclick="alert(1)">',
    "</div></article></section></style><!-- ",
    "&lt;i&gt; ]]> {x} %s \\u0041",
]


@pytest.mark.parametrize("evil", EVIL)
def test_foreign_text_is_shown_as_it_is(made, evil):
    row = episode_row(1, source=evil, id=evil, answers=[evil], prompt="<user> " + evil, stop=evil)
    row["segments"] = [
        {"kind": evil, "text": evil, "tokens": 1},
        {"kind": "env", "text": evil * 40, "tokens": 1},
    ]
    row[evil] = 0.5
    metrics = [metrics_row(1, **{"search_ratio/" + evil: 0.5})]
    table = json.dumps({"before": {evil: {"em": 1, "f1": 1, "sr": 1, "searches": 1, "n": evil}}})
    text = made(metrics, [row], table)
    page = Page(text)
    assert len(page.all("script")) == 1 and not page.all("img") and "<!--" not in text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(" ".join(evil.split())) >= 10


def test_characters_that_break_a_page(made, tmp_path):
    evil = "a\ud800b\udfffc\0d\x1be\x85f\u2028g\u202eh\ufffei\rj\nk\tl \U0001f600"
    row = episode_row(1)
    row["segments"][0]["text"] = evil
    # halves of pairs are written as escapes, everything else as it is
    raw = json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")
    raw = raw.replace("\ud800".encode(errors="surrogatepass"), b"\\ud800")
    raw = raw.replace("\udfff".encode(errors="surrogatepass"), b"\\udfff")
    page = made(episodes=[raw + b"\n"])
    page.encode()  # UTF-8 has no halves of pairs
    shown = "a\\ud800b\\udfffc\\u0000d\\u001be\\u0085f\\u2028g\\u202eh\\ufffei\\u000dj\nk\tl \U0001f600"
    assert f'<div class="text">{shown}</div>' in page
    assert "Lines of the logs that could not be read: 0." in page


# ------------------------------------------------------------------------------------------------------------
# any state of a run


def test_lines_that_are_no_rows(made):
    """A run that is going on or was killed: its last lines are cut, one of them inside of a character."""
    cut = lines([metrics_row(3)])[:-9]
    half = lines([episode_row(2, id="é")])
    episodes = [episode_row(1), b"\n", b"5\n", b"{}\n", half[: half.index("é".encode()) + 1]]
    metrics = [metrics_row(1), b"[" * 100_000 + b"\n", b'{"step": null}\n', metrics_row(2), cut]
    page = made(metrics, episodes)
    assert "Last step: 2. Lines of the logs that could not be read: 6." in page
    assert page.count("<article>") == 1


def test_a_line_ends_at_a_newline_alone(made):
    row = episode_row(1)
    row["segments"][2]["text"] = "a\u2028b\x85c\x0bd\x1ee"
    page = made([metrics_row(1, **{"em/\u2028": 0.5})], [row])
    assert "could not be read: 0." in page and page.count("<article>") == 1


def test_a_step_that_comes_twice_counts_once(made):
    """If a resumed run does steps again, the last row of a step is the one that led on."""
    metrics = [metrics_row(1, reward=0.1), metrics_row(2, reward=0.2), metrics_row(3, reward=0.3)]
    metrics += [metrics_row(2, reward=0.8), metrics_row(3, reward=0.9)]
    episodes = [episode_row(step, id=f"first {step}") for step in (1, 2, 2, 3)]
    episodes += [episode_row(step, id=f"second {step}") for step in (2, 3)]
    page = made(metrics, episodes)
    assert "reward: 0.1 to 0.9" in page
    assert re.findall(r"(first|second) (\d)", page) == [("first", "1"), ("second", "2"), ("second", "3")]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", '"x"', "1" + "0" * 400])
def test_a_value_that_is_not_finite_breaks_the_curve(made, text):
    rows = [json.dumps(metrics_row(step, kl="?")).replace('"?"', v).encode() + b"\n"
            for step, v in enumerate(["0.25", "0.5", text, "1.0", "0.75"], 1)]  # fmt: skip
    page = made(rows)
    [path] = curve(page, "KL to the start model, nats per token")
    assert [part.count("L") for part in path.split("M")[1:]] == [1, 1]
    assert page.count('fill="#b00020"') == 1 and "kl: 0.25 to 0.75" in page
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)


def test_only_values_that_are_not_finite(made):
    page = made([metrics_row(1, kl=float("nan")), metrics_row(2, kl=float("nan"))])
    assert "kl: not finite to not finite" in page and page.count('fill="#b00020"') == 2
    Page(page)


def test_a_metric_that_is_missing_in_some_steps(made):
    rows = [metrics_row(1), metrics_row(2, sandbag_suspects=0.5), metrics_row(3, sandbag_suspects=None)]
    page = made([*rows, metrics_row(4, sandbag_suspects=0.75)])
    [path] = curve(page, "share of needless searches after a wrong draft")
    assert path.count("L") == 1 and "sandbag_suspects: 0.5 to 0.75" in page
    none = made([metrics_row(1, **{"tools/self_searches": None, "em/known": None, "em/unknown": 0.5})])
    assert "results that the model wrote itself, per episode" not in none
    assert "em/unknown: 0.5 to 0.5" in none and "em/known" not in none


def test_one_step(made):
    page = made([metrics_row(7, kl=0.0)])
    assert curve(page, "KL to the start model, nats per token") == ["M48.0 164.0m-2 0h4m-2 0"]
    assert Page(page).all("section") == []


FIRST = {"x": {"em": 0.5, "f1": 0, "sr": 1, "searches": 2, "n": 9}}
EVALUATIONS = {
    "none": (None, "no complete eval.json"),
    "cut": ('{"before": {"known": {"em": 1', "no complete eval.json"),
    "of evaluate.py": ('{"config": {}, "measures": {"x": {}}}', "no complete eval.json"),
    "a list": ("[]", "no complete eval.json"),
    "before": (json.dumps({"before": FIRST}), "before n EM F1 SR searches x 9 0.50 0.00 1.00 2.00"),
    "both": (
        json.dumps({"before": FIRST, "after": {"x": FIRST["x"] | {"em": 0.75}}}),
        "x 9 0.50 → 0.75 0.00",
    ),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluations(made, case):
    text, shown = EVALUATIONS[case]
    assert shown in Page(made(evaluation=text)).text


@pytest.mark.parametrize("text", ["word " * 500, "<&\u0100x" * 300])
def test_a_long_run_is_at_most_5_mb(made, text):
    """200 steps of 4 episodes, in which every text is long. The second text grows when it is escaped."""
    rows = []
    for step in range(1, 201):
        row = episode_row(step)
        for segment in row["segments"]:
            segment["text"] = text
        rows += [row] * 4
    page = made([metrics_row(step) for step in range(1, 201)], rows)
    assert 1_000_000 < len(page.encode()) <= report.LIMIT
    shown = page.count("<article>")
    assert f"{shown} of 800 episodes" in page and shown >= 200
    cut = int(re.search(r"\[([\d,]+) characters are cut here\]", page)[1].replace(",", ""))
    assert 0 < cut < len(text)
    assert page.count("<section>") == 200


def test_a_run_of_many_steps(made):
    page = made([metrics_row(step) for step in range(1, 10_001)])
    [path] = curve(page, "mean reward")
    assert 1000 < path.count("L") <= 2000 and "reward: 0.54 to 100" in page


def test_bad_input(tmp_path):
    """Bad input is one line that names it. The exit code is 2, and nothing is written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "holds no run"),
        ("file", "holds no run"),
        ("empty", "holds no run"),
        ("run", "has no finished step"),
    ):
        with pytest.raises(report.InputError, match=message) as error:
            report.page(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    done = run_report(tmp_path / "run")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("report.py: error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
