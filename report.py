"""One page about a run: its curves, its evaluation, and its transcripts with who wrote what and what is
trained on. The page is a single file that loads nothing, and it fits a phone.

    python report.py out/toy                            # writes out/toy/report.html

A run can be read while it is going on. Lines of a log that are not complete are skipped and counted. The
texts in a log are foreign, because models and corpora wrote them. They reach the page through `escape` alone,
and the content security policy of the page allows no script but the one in this file.

The program takes the figures of the page from this list: the metrics as a regular expression, the label, and
the text below the figure. A figure is left out if no step has one of its metrics.

    reward | mean reward
        Lies between 0 and 1 (flat: may be below 0; ikea: from -1 to 1.6), and should rise and then level off.
        Flat from the start: see the groups with equal rewards. A sudden fall: see KL and entropy at that
        step.
    search_ratio/.* | SR: share of episodes that searched
        Should fall where the model knows the answers, and stay high elsewhere. All curves at 0 or all at 1:
        the policy does not decide by the question.
    em/.* | EM: share of right answers
        Should rise, or stay high. A curve that falls together with its search ratio: the model no longer
        searches for what it does not know.
    frac_reward_zero_std | share of groups with equal rewards
        Such a group teaches nothing. Near 1 from the start: the questions are too easy or too hard, or the
        format is never valid. A late rise is normal, when most questions are solved.
    entropy | entropy, nats per token
        Should fall slowly. Almost 0 after a few steps: the episodes of a group are all alike, and little is
        left to learn from. A steady climb: the text is falling apart.
    tag_probability | mean probability of the tokens of the tags
        Should stay, or rise to 1. A fall: the policy forgets the format.
    kl | KL to the start model, nats per token
        Should start at 0 and grow slowly. A jump: a step was too large (learning rate), or the text broke.
    sandbag_suspects | share of needless searches after a wrong draft
        Should not rise. A rise: the policy may write junk drafts in order to search. High in step 1: the
        drafts of the start model are bad, see the transcripts.
    self_search_ratio/.* | share of episodes in which the model asked itself
        These searches do not count in the search ratio. At 0 the model answers at once, or asks the engine.
    labels/nosearch/.* | boundary: share of questions that need no search
        Should be near 1 for what the model knows, and near 0 for what it has to look up. 0 everywhere: of the
        half without the engine less than half is right, so a search costs only beyond the fewest that were
        needed.
    format|completions/clipped_ratio|tools/failure_frequency | share of episodes: valid, cut off, failed
        The format should soon be near 1, the others near 0. Clipped: the token budget is too small. Failed:
        the retriever was down. Whether it finds the right thing stands only in the transcripts.
    sampler_logp_diff/.* | sampler against scorer: difference of log-probs
        Should be flat: about 1e-6 in fp32, on average about 0.01 in bf16. A mean of 0.05 or a climb: the two
        do not compute the same, or tokens are trained on that the policy did not choose; see look.py.

Above the figures are the alarms of the run (alarms.py), computed from metrics.jsonl.

Not here: how the figures are computed (measures.py, grpo.update), and how the logs are written (disk.py)."""

import base64
import hashlib
import html
import json
import re
from itertools import groupby
from os.path import commonprefix
from pathlib import Path

from alarms import Alarms
from config import METHODS, REWARDS
from data import InputError
from disk import read_lines
from flags import Parser, fail

FIGURES = re.findall(r"^    (\S+) \| (.+)\n((?: {8}.+\n)+)", __doc__ or "", re.MULTILINE)
WRITERS = {"env": "search result", "own": "result that the model wrote itself", "forced": "forced tag"}
LIMIT = 5_000_000  # bytes of the page
RESULT = "|".join(rf"<{tag}>.*?(?:</{tag}>|\Z)" for tag in ("result", "information", "memory"))
RESULT = re.compile(f"({RESULT})", re.DOTALL)
# What would vanish, break the page, or reorder the text after it: control characters, halves of surrogate
# pairs (UTF-8 cannot write them), marks of the writing direction.
UNSEEN = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
STYLE = """
body { font: 15px/1.45 sans-serif; margin: auto; max-width: 1200px; padding: 10px; color: #222;
  background: #fff; overflow-wrap: anywhere } h3, p { margin: 4px 0; font-size: 15px } nav * { font: inherit }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px }
figure, article { margin: 0 0 12px; border: 1px solid #ddd; border-radius: 8px; padding: 10px; min-width: 0 }
svg { width: 100%; display: block } .strip { height: 8px; background: #ccc } td { padding-right: 8px }
text { font: 11px sans-serif; fill: #555 } i, td { font-size: 13px } i { color: #555 }
nav { position: sticky; top: 0; background: #fff } .wide { overflow-x: auto; white-space: nowrap }
b { font-weight: normal; background: #eee; padding: 1px 7px; margin: 2px; display: inline-block }
.up { background: #d9f2df } .down { background: #fbdcdc } [open] > summary .text { display: none }
.piece { border-left: 5px solid #7b4fb0; background: #f5f0fb; margin: 5px 0; padding: 3px 8px }
.model { border-color: #2a8f4f; background: #eefaf1 } .env { border-color: #0b6fb8; background: #edf5fc }
.own { border-color: #b7791f; background: #fdf6e6 } .text { white-space: pre-wrap; font: 13px/1.4 monospace }
"""
SCRIPT = """
const steps = document.querySelectorAll("section"), pick = document.querySelector("select");
const show = () => steps.forEach((step, k) => { step.hidden = k != pick.selectedIndex; });
document.querySelectorAll("button").forEach((b, k) => { b.onclick = () => {
  pick.selectedIndex = Math.max(0, Math.min(steps.length - 1, pick.selectedIndex + 2 * k - 1)); show(); }; });
pick.selectedIndex = steps.length - 1; pick.onchange = show; show();
"""


def escape(text) -> str:
    return html.escape(UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text)))


def number(value) -> float | None:
    """None for what cannot be drawn: NaN, the infinities, and what is no number."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e100 else None


def read_rows(path: Path, *keys: str) -> tuple[list[dict], int]:
    """(rows of a log that have a step and these keys, number of other lines)."""
    if not path.exists():
        return [], 0
    lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))  # the log may grow meanwhile
    rows = [row for _, row in read_lines(path)]
    rows = [row for row in rows if number(row.get("step")) is not None and all(key in row for key in keys)]
    return rows, max(0, lines - len(rows))


# ------------------------------------------------------------------------------------------------------------
# the curves and the table


def figure(rows: list[dict], metrics: str, label: str, note: str) -> str:
    """The curves of these metrics. A step without a metric is passed over. A value that is no finite number
    breaks the curve, and gets a red mark at the top."""
    names = sorted({name for row in rows for name in row if re.fullmatch(metrics, name)})
    lines = {n: [(row["step"], number(row[n])) for row in rows if row.get(n) is not None] for n in names}
    lines = {name: line for name, line in lines.items() if line}
    values = [value for line in lines.values() for _, value in line if value is not None]
    low, high = min([0.0, *values]), max([float("share" in label), *values])
    high, first, last = high + (high == low), rows[0]["step"], rows[-1]["step"]
    drawn = legend = ""
    for k, anchor in enumerate(("start", "middle", "end")):  # three values of each axis
        y, value, step = 164 - 74 * k, low + (high - low) * k / 2, first + (last - first) * k / 2
        place = f"{step:g}" if k == 0 or last > first else ""
        drawn += f'<path d="M48 {y}h302" stroke="#ddd"/><text x="2" y="{y + 4}">{value:.2g}</text>'
        drawn += f'<text x="{48 + 151 * k}" y="179" text-anchor="{anchor}">{place}</text>'
    for i, (name, line) in enumerate(lines.items()):
        path, pen, colour = "", "M", f"hsl({(210 + i * 137.5) % 360:.0f} 65% 40%)"
        for step, value in line:
            x = 48 + 302 * (step - first) / ((last - first) or 1)
            if value is None:
                drawn, pen = f'{drawn}<path d="M{x - 4:.1f} 6h8l-4 8z" fill="#b00020"/>', "M"
            else:  # the first of a line gets a dash, which is all that shows of a value without neighbours
                y, dash = 164 - 148 * (value - low) / (high - low), "m-2 0h4m-2 0" if pen == "M" else ""
                path, pen = f"{path}{pen}{x:.1f} {y:.1f}{dash}", "L"
        drawn += f'<path d="{path}" stroke="{colour}" stroke-width="2" stroke-linecap="round" fill="none"/>'
        ends = " to ".join("not finite" if v is None else f"{v:.3g}" for _, v in (line[0], line[-1]))
        legend += f'<b><span style="color: {colour}">&#9644;</span> {escape(name)}: {ends}</b>'
    page = f"""<figure><h3>{label}</h3><svg viewBox="0 0 360 198" role="img" aria-label="{label}">{drawn}
        <text x="199" y="194" text-anchor="middle">step</text></svg><p>{legend}</p><i>{note}</i></figure>"""
    return page if lines else ""


def alarm_lines(rows: list[dict], out: Path) -> str:
    """The alarms of the run, with the step in which each was given."""
    alarms, lines = Alarms(is_priced(out)), []
    for row in rows:
        metrics = {name: value for name in row if (value := number(row[name])) is not None}
        lines += [
            f'<p><b class="down">alarm in step {row["step"]:g}</b> {escape(x)}</p>' for x in alarms(metrics)
        ]
    return "".join(lines) or "<p>No alarm was given (alarms.py).</p>"


def is_priced(out: Path) -> bool:
    """Whether the reward of the run is one of ours and can make a search cost something."""
    try:
        settings = json.loads((out / "run.json").read_bytes())
        method, name = settings["method"], settings["reward"]
        return (REWARDS[name] if name else METHODS[method].reward).priced
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def evaluation(out: Path) -> str:
    """The table of eval.json. Each cell holds the figure before and after training."""
    try:
        stored = json.loads((out / "eval.json").read_bytes())
        times = [when for when in ("before", "after") if when in stored]
        table = [(" → ".join(times), "n", "EM", "F1", "SR", "searches")]
        for name in stored[times[0]]:
            sets = [stored[when][name] for when in times]
            cells = (" → ".join(f"{s[key]:.2f}" for s in sets) for key in ("em", "f1", "sr", "searches"))
            table.append((name, sets[0]["n"], *cells))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none yet, or that of evaluate.py
        return "<p>There is no complete eval.json of this run.</p>"
    rows = ("</td><td>".join(map(escape, cells)) for cells in table)
    return f'<div class="wide"><table><tr><td>{"</td></tr><tr><td>".join(rows)}</td></tr></table></div>'


# ------------------------------------------------------------------------------------------------------------
# the transcripts


def pieces(kind: str, text: str, mask: str) -> list[tuple[str, str, str]]:
    """(writer, text, loss mask) of each piece of a segment. The log has no text of single tokens, so the
    results that a model wrote itself are found by their tags. If they do not fit the mask, the segment stays
    whole."""
    parts, runs = list(filter(None, RESULT.split(text))), re.findall("0+|1+", mask)
    parts += [""] * (len(runs) - len(parts) == 1)  # an end token has no text
    own = ["0" in run for run in runs]
    if kind != "model" or not any(own) or own != [bool(RESULT.match(part)) for part in parts]:
        return [(kind, text, mask)]
    return [("own" if o else kind, part, run) for o, part, run in zip(own, parts, runs, strict=True)]


def fold(text: str, cut: int, shown: int) -> str:
    """A text without its middle if it is longer than `cut`, folded if it is longer than `shown`."""
    n, head, tail = len(text), text[: cut // 2], text[cut // 2 - cut :]
    note = f"<i> [{n - cut:,} characters are cut here] </i>"
    whole = f"{escape(head)}{note}{escape(tail)}" if n > cut else escape(text)
    body, start = f'<div class="text">{whole}</div>', escape(text[:80])
    head = f'<summary><i>{n:,} characters</i> <span class="text">{start} ...</span></summary>'
    return f"<details>{head}{body}</details>" if n > shown else body


def article(row: dict, cut: int, start: int, end: int) -> str:
    """One episode. `start` and `end` are the lengths of what all prompts begin and end with."""
    body, at, prompt, mask = "", 0, row["prompt"], row["loss_mask"]
    if row["stop"] == "search_failed":  # grpo.train_step leaves it out
        mask = "0" * len(mask)
    for segment in row["segments"]:
        part = mask[at : (at := at + segment["tokens"])]
        for kind, text, run in pieces(segment["kind"], segment["text"], part):
            head = f"{WRITERS.get(kind, escape(kind))}: {len(run)} tokens, {run.count('1')} trained on"
            text = fold(text, cut, 1500 if kind == "model" else 400)
            body += f'<div class="piece {escape(kind)}"><i>{head}</i>{text}</div>'
    runs = [(m.start(), len(m[0])) for m in re.finditer("1+", mask)]
    strip, chips = "".join(f'<path d="M{first} 0h{n}v1h-{n}z"/>' for first, n in runs), ""
    for name, value in row.items():
        if isinstance(value, int | float) and name != "step":
            chips += f'<b class="{"up" * (value > 0)}{"down" * (value < 0)}">{escape(name)} {value:.3g}</b>'
    question, right = prompt[start : len(prompt) - end].strip() or prompt[-300:], " | ".join(row["answers"])
    return f"""<article><h3>{escape(question[:600])}</h3><p>right: {escape(right[:300])}</p><p>{chips}
        stopped by: {escape(row["stop"])} <i>{escape(row["source"])} {escape(row["id"])}</i></p>
        <svg class="strip" viewBox="0 0 {len(mask) or 1} 1" preserveAspectRatio="none" fill="#2a8f4f">{strip}
        </svg>{body}<p>prompt:</p>{fold(prompt, cut, 0)}</article>"""


# ------------------------------------------------------------------------------------------------------------
# the page


def page(out: Path) -> str:
    """The whole page. Raises InputError if the directory holds no run, or no step is finished."""
    if not (out / "run.json").exists():
        raise InputError(f"{out} holds no run: run.json is missing")
    rows, lost = read_rows(out / "metrics.jsonl")
    if not rows:
        raise InputError(f"{out}: metrics.jsonl has no finished step")
    rows = [row for _, row in sorted({row["step"]: row for row in rows}.items())]  # the last of each step
    keys = "prompt segments loss_mask answers source id stop".split()
    episodes, unread = read_rows(out / "transcripts.jsonl", *keys)
    # What all prompts share, up to a line or a tag: the questions too can begin or end with the same words.
    prompts = [row["prompt"] for row in episodes]
    both = commonprefix(prompts), commonprefix([prompt[::-1] for prompt in prompts])  # noqa: RUF071
    start, end = (len(re.sub(r"[^\n<>]*\Z", "", shared)) for shared in both)
    every, total, name = len(rows) // 2000 + 1, len(episodes), escape(out.resolve().name)
    cut = min(16_000, LIMIT // max(1, total))
    settings = escape((out / "run.json").read_text(encoding="utf-8", errors="replace"))
    figures = "".join(figure(rows[::-every][::-1], *entry) for entry in FIGURES)  # 2,000 steps are enough
    key = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    while True:
        steps = {step: list(group) for step, group in groupby(episodes, key=lambda row: row["step"])}
        articles = {step: [article(row, cut, start, end) for row in group] for step, group in steps.items()}
        sections = "".join(f"<section><h2>step {s:g}</h2>{''.join(a)}</section>" for s, a in articles.items())
        content = f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{key}'">
<style>{STYLE}</style></head><body><h1>{name}</h1>
<p>Last step: {rows[-1]["step"]:g}. Lines of the logs that could not be read: {lost + unread}.</p>
<details><summary>settings</summary><div class="text">{settings}</div></details>
<h2>Training</h2>{alarm_lines(rows, out)}<div class="charts">{figures}</div>
<h2>Evaluation</h2>{evaluation(out)}
<h2>Transcripts</h2><p>{len(episodes)} of {total} episodes. The bar is an episode from left to right; green
tokens are trained on. <b class="piece model">model</b> <b class="piece env">search result</b>
<b class="piece own">result that the model wrote itself</b> <b class="piece">reminder, forced tag</b></p>
<nav><button>previous</button> <select>{"".join(f"<option>step {step:g}</option>" for step in steps)}</select>
<button>next</button></nav>{sections}<script>{SCRIPT}</script></body></html>"""
        if len(content.encode()) <= LIMIT or len(episodes) < 2:
            return content
        cut, episodes = (cut // 2, episodes) if cut > 400 else (cut, episodes[::-2][::-1])


def main():
    parser = Parser(prog="report.py", description="Writes report.html, a page about a run.")
    parser.add_argument("run", type=Path, help="the --output_dir of the run")
    out = parser.parse_args().run
    try:
        (out / "report.html").write_text(page(out), encoding="utf-8")
    except (InputError, OSError) as error:
        fail("report.py", error)
    print(out / "report.html")


if __name__ == "__main__":
    main()
