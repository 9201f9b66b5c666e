"""The page in a browser: what it shows, its keyboard, its size, and texts that try to be more than text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import SOURCES, text_of, trace_of

from proxytune.errors import InputError
from proxytune.trace import Trace, TracedText
from proxytune.view import page, write_page
from proxytune.view.html import framed

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

EVIL = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "<!--",
    "\x1b[2J\u202e",
    "",
)
ALPHA = 0.5


def seen_in(html: str, script: str, tmp_path: Path, *options: str, hash_: str = "") -> tuple[Any, str]:
    """What a script, run after the page's own, returns as JSON; and the whole DOM afterwards."""
    script = (
        "async function seen() { while (!document.documentElement.dataset.ready) "
        "await new Promise((done) => setTimeout(done, 5));\n" + script + "\n}\n"
        "seen().catch((problem) => 'failed: ' + problem.stack).then((told) => {\n"
        "const box = document.createElement('pre');\n"
        "box.id = 'seen'; box.textContent = JSON.stringify(told); document.body.append(box); });"
    )
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
    file = tmp_path / "page.html"
    file.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1000,800",
            "--virtual-time-budget=10000",
            *options,
            "--dump-dom",
            file.as_uri() + hash_,
        ],
        capture_output=True,
        timeout=120,
    )
    dom = done.stdout.decode()
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, done.stderr.decode()[-2000:]
    told = json.loads(unescape(found[1]))
    assert not str(told).startswith("failed"), told
    return told, dom


def steered_text(count: int = 40, *, seed: int = 0, vocabulary: int = 30, top: int = 5) -> tuple[TracedText, Any]:
    """A greedy text of ProxyTuning, and all logits of base, expert and antiexpert, `[T, 3, V]`."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2.0, (count, 3, vocabulary))
    combined = logits[:, 0] + ALPHA * (logits[:, 1] - logits[:, 2])
    all_ = np.concatenate([combined[:, None], logits], axis=1)
    all_ -= np.log(np.exp(all_).sum(-1, keepdims=True))
    ids = np.argsort(-all_, axis=-1)[..., :top]
    chosen = ids[:, 0, 0]
    logprobs = np.take_along_axis(all_[:, 0], chosen[:, None], 1)[:, 0]
    probabilities = np.exp(all_[:, 0])
    names = {i: f" w{i}" for i in range(vocabulary)}
    text = text_of(
        count,
        top=top,
        tokens=chosen.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        entropy=-(probabilities * all_[:, 0]).sum(-1).astype(np.float32),
        kl=(probabilities * (all_[:, 0] - all_[:, 1])).sum(-1).astype(np.float32),
        top_ids=ids.astype(np.int32),
        top_logprobs=np.take_along_axis(all_, ids, -1).astype(np.float32),
        base_rank=(all_[:, 1] > np.take_along_axis(all_[:, 1], chosen[:, None], 1)).sum(-1).astype(np.int32),
        prompt="Which words? ",
        pieces=tuple(names[i] for i in chosen.tolist()),
        names=names,
    )
    return text, logits


@pytest.fixture(scope="module")
def steered() -> tuple[Trace, Any]:
    text, logits = steered_text()
    other = steered_text(5, seed=1)[0]
    ids = other.top_ids + np.int32(30)
    ids[:, 2] = -1  # the expert did not run
    evil = replace(
        other,
        tokens=other.tokens + np.int32(30),
        top_ids=ids,
        prompt=EVIL[0],
        pieces=EVIL,
        names=dict.fromkeys(range(30, 60), EVIL[1]),
        fork=np.array([0, 1, 0, 0, 0], np.int8),
        answer=EVIL[1],
        grade=0.0,
        facts={EVIL[0]: EVIL[1]},
    )
    return Trace(
        sources=SOURCES,
        top=5,
        texts=(text, evil),
        about={"model": EVIL[1], "formula": f"ProxyTuning(alpha={ALPHA})"},
    ), logits


TREE = {
    "text": EVIL[0],
    "weight": 1.0,
    "children": [{"text": "left", "weight": 0.75, "leaf": 0, "finished": True}, {"text": "right", "weight": 0.25}],
}

SCRIPT = """
const told = {}, press = (key, more = {}) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
const at0 = () => document.activeElement.dataset.i, tipped = () => !$("tip").hidden;

// What was packed, as it was unpacked.
told.tokens = [...Array(text.count).keys()].map(piece);
told.lists = run.sources.map((_, s) => [...Array(text.count).keys()].map((i) =>
  likeliest(s, i).map(({ token, logprob }) => [run.names[token], logprob])));
const fields = ["logprobs", "entropy", "kl", "shift", "rank"];
told.numbers = Object.fromEntries(fields.map((name) => [name, [...slice(name)]]));
told.said = [$("title").textContent, $("text").textContent, $("facts").textContent];
told.colours = [...document.querySelectorAll("#colours input")].map((one) => one.value);
told.changed = $("text").querySelectorAll(".changed").length;
told.greedy = [0, 0.3, 0.7, 1, 1.6].map((r) => [...Array(text.count).keys()].map((i) => {
  const { token, sure } = greedy(i, r); return [run.names[token], sure]; }));

// Each colouring paints otherwise.
told.painted = told.colours.map((name) => {
  const radio = document.querySelector(`#colours input[value=${name}]`);
  radio.checked = true;
  radio.dispatchEvent(new Event("change", { bubbles: true }));
  return [...tokens()].map((one) => getComputedStyle(one).backgroundColor).join();
});

// The keyboard.
told.stops = $("text").querySelectorAll("[tabindex='0']").length;
tokens()[0].focus();
press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
told.moved = at0();
press("End"); told.end = at0();
press("ArrowRight"); told.past = at0();
press("ArrowUp"); told.up = at0();
press("ArrowDown"); press("Home"); told.home = at0();
press("Enter"); told.opened = tipped();
told.tip = $("tip").innerText;
told.described = tokens()[0].getAttribute("aria-describedby");
press("ArrowRight"); told.follows = $("tip").innerText.includes("token 2 of");
press("Escape"); told.closed = !tipped();
told.kept = at0();
told.outline = getComputedStyle(document.activeElement).boxShadow !== "none";

// The mouse.
const over = (one, type) => one.dispatchEvent(new PointerEvent(type, { bubbles: true, pointerType: "mouse" }));
over(tokens()[4], "pointerover"); told.hovered = tipped() && $("tip").innerText.includes("token 5 of");
$("text").dispatchEvent(new PointerEvent("pointerleave")); told.left = !tipped();
tokens()[6].click(); told.clicked = tipped() && at0() === "6";
document.body.click(); told.elsewhere = !tipped();

// The brush, by mouse and by keyboard.
const plot = document.querySelector("#chart svg"), box = plot.getBoundingClientRect();
const drag = (type, i, on) => on.dispatchEvent(new PointerEvent(type, { bubbles: true, cancelable: true,
  clientX: box.left + (i + 0.5) / text.count * box.width, clientY: box.top + 9 }));
const brushed = () => [...tokens()].flatMap((one, i) => one.classList.contains("brushed") ? [i] : []);
drag("pointerdown", 10, plot); drag("pointermove", 13, window); drag("pointerup", 13, window);
told.dragged = brushed(); told.range = $("range").textContent;
press("Escape"); told.cleared = brushed();
$("brush").focus(); press("Home"); press("ArrowRight");
press("ArrowRight", { shiftKey: true }); press("ArrowRight", { shiftKey: true });
told.shifted = brushed(); told.valued = $("brush").getAttribute("aria-valuenow");

// Side by side, another alpha, the tree.
told.sides = [...document.querySelectorAll("#columns > div")].map((one) =>
  [one.querySelector("h3").textContent, one.querySelector(".reading").textContent]);
$("alpha").value = 0; $("alpha").dispatchEvent(new Event("input"));
told.alpha = [$("alpha-value").textContent, $("alpha-text").textContent, $("alpha-summary").textContent];
told.tree = [document.querySelectorAll(".tree details[open]").length, $("trees").textContent];
document.querySelector(".tree summary").click();
told.folded = document.querySelectorAll(".tree details[open]").length;

// Themes.
const paper = () => getComputedStyle(document.body).backgroundColor;
told.paper = ["", "light", "dark"].map((name) => {
  $("theme").value = name; $("theme").dispatchEvent(new Event("change")); return paper(); });

// Another text, which tries to be more than text.
const links = [...$("texts").children];
links[0].focus(); press("ArrowDown"); told.link = document.activeElement === links[1];
links[1].click();
while (number !== 1) await new Promise((done) => setTimeout(done, 5));
tokens()[1].focus(); press("Enter");
told.evil = [$("text"), $("facts"), $("tip"), links[1], $("about")].map((one) => one.textContent);
told.absent = document.querySelectorAll("#columns > div")[1].textContent;
told.forks = [$("text").querySelectorAll(".fork").length, document.querySelector("#colours [value=fork]") !== null];
const inline = document.createElement("script");
inline.textContent = "window.hacked = 3";
document.body.append(inline);
inline.remove();
try { eval("window.hacked = 4"); } catch { told.evaluated = false; }
told.hacked = window.hacked ?? null;
told.elements = [document.querySelectorAll("img").length, document.querySelectorAll("script").length];
return told;
"""


@pytest.fixture(scope="module")
def told(steered: tuple[Trace, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    html = page(steered[0], title="A run", trees=[TREE])
    return seen_in(html, SCRIPT, tmp_path_factory.mktemp("page"))[0]


def test_what_was_packed_is_unpacked(told: Any, steered: tuple[Trace, Any]) -> None:
    text = steered[0][0]
    assert tuple(told["tokens"]) == text.pieces
    for s in range(4):
        for i, listed in enumerate(told["lists"][s]):
            assert [name for name, _ in listed] == [f" w{token}" for token in text.top_ids[i, s]]
            np.testing.assert_allclose([x for _, x in listed], text.top_logprobs[i, s], atol=0.02)
    for name in ("logprobs", "entropy", "kl", "shift"):
        np.testing.assert_allclose(told["numbers"][name], getattr(text, name), atol=0.002)
    assert told["numbers"]["rank"] == text.base_rank.tolist()


def test_the_text_is_shown_and_coloured(told: Any, steered: tuple[Trace, Any]) -> None:
    text = steered[0][0]
    title, shown, facts = told["said"]
    assert (title, shown) == ("A run", f"Which words? {text.text}")
    assert facts.startswith(
        f"40 tokens · {int(text.steered.sum())} not the base's first choice · KL {text.kl.mean():.2f}"
    )
    assert told["changed"] == text.steered.sum()
    assert told["colours"] == ["kl", "entropy", "probability", "decided"]
    assert len(set(told["painted"])) == 4
    (base, base_text), (expert, expert_text), (steering, steered_text_) = told["sides"]
    assert (base, expert, steering) == (
        f"base {(text.top_ids[:, 1, 0] != text.tokens).sum()} of 40 differ",
        f"expert {(text.top_ids[:, 2, 0] != text.tokens).sum()} of 40 differ",
        "steered 0 of 40 differ",
    )
    assert base_text == "".join(f" w{token}" for token in text.top_ids[:, 1, 0])
    assert expert_text == "".join(f" w{token}" for token in text.top_ids[:, 2, 0])
    assert steered_text_ == text.text


def test_keys_and_mouse_reach_every_token(told: Any, steered: tuple[Trace, Any]) -> None:
    assert told["stops"] == 1  # one stop for the Tab key
    assert (told["moved"], told["end"], told["past"], told["home"]) == ("1", "39", "39", "0")
    assert 0 < int(told["up"]) < 39
    assert told["opened"]
    assert told["described"] == "tip"
    assert (told["follows"], told["closed"], told["kept"], told["outline"]) == (True, True, "1", True)
    text = steered[0][0]
    for source, name in enumerate(("steered", "base", "expert", "antiexpert")):
        assert name in told["tip"]
        assert all(f"w{token}" in told["tip"] for token in text.top_ids[0, source])
    assert f"{100 * np.exp(text.top_logprobs[0, 0, 0]):.0f} %" in told["tip"]
    assert all(told[name] for name in ("hovered", "left", "clicked", "elsewhere"))


def test_a_brushed_range_is_lit_in_the_text(told: Any, steered: tuple[Trace, Any]) -> None:
    text = steered[0][0]
    assert told["dragged"] == [10, 11, 12, 13]
    assert told["range"].startswith(f"tokens 11 to 14 · entropy {text.entropy[10:14].mean():.2f} nats")
    assert told["cleared"] == []
    assert (told["shifted"], told["valued"]) == ([1, 2, 3], "4")


def test_another_alpha_claims_no_token_that_it_does_not_know(told: Any, steered: tuple[Trace, Any]) -> None:
    trace, logits = steered
    sure = {}
    for r, found in zip((0.0, 0.3, 0.7, 1.0, 1.6), told["greedy"], strict=True):
        truth = (logits[:, 0] + r * ALPHA * (logits[:, 1] - logits[:, 2])).argmax(-1)
        sure[r] = [name == f" w{token}" for (name, certain), token in zip(found, truth, strict=True) if certain]
        assert all(sure[r])
    assert [len(sure[r]) for r in (0.0, 1.0, 1.6)] == [40, 40, 0]
    assert 10 < len(sure[0.3]) < 40
    assert 10 < len(sure[0.7]) < 40
    value, words, summary = told["alpha"]
    assert (value, words) == ("0", "".join(f" w{token}" for token in trace[0].top_ids[:, 1, 0]))
    assert summary.startswith(f"{int(trace[0].steered.sum())} of 40 greedy tokens differ")


def test_the_tree_folds(told: Any) -> None:
    opened, words = told["tree"]
    assert (opened, told["folded"]) == (1, 0)
    assert f"{EVIL[0]} weight 1.000" in words
    assert "left weight 0.750 · leaf 0" in words


def test_light_and_dark(told: Any) -> None:
    white, dark = "rgb(255, 255, 255)", "rgb(21, 23, 27)"
    assert told["paper"] == [white, white, dark]


def test_a_text_that_holds_html_is_inert(told: Any, steered: tuple[Trace, Any]) -> None:
    words, facts, tip, link, about = told["evil"]
    assert words == EVIL[0] + "".join(EVIL).replace("\x1b", "␛")
    assert facts.endswith(f"answer: {EVIL[1]} · grade: 0 · {EVIL[0]}: {EVIL[1]}")
    assert EVIL[1] in tip
    assert "expertnothing recorded" in tip
    assert told["absent"] == "expert 0 of 5 differ·····"
    assert link.startswith("1 </script>")
    assert about == "formula: ProxyTuning(alpha=0.5)"
    assert told["forks"] == [1, True]
    assert told["hacked"] is None
    assert told["evaluated"] is False
    assert told["elements"] == [0, 3]  # what was packed, the page's script, the test's
    assert told["link"]
    html = page(steered[0], title=EVIL[0])
    assert "hacked" not in re.sub(r"<title>.*?</title>", "", html)
    assert f"<title>{EVIL[0].replace('<', '&lt;').replace('>', '&gt;')}</title>" in html


@browser
def test_a_plain_trace_in_a_dark_system_at_a_link(tmp_path: Path) -> None:
    trace = Trace(
        sources=("combined", "base"),
        top=3,
        texts=(
            text_of(0, sources=2),
            text_of(4, sources=2, facts={"x": np.nan}),
            *(
                text_of(
                    30, sources=2, prompt=f"<user>{40 * 'w'} make {ends}2.\n<assistant>\n", pieces=pieces, answer="7"
                )
                for ends in "12"
                for pieces in (("same",) * 29 + ("!",), ("same",) * 29 + ("?",))
            ),
        ),
    )
    script = """return [getComputedStyle(document.body).backgroundColor, number, at, !$("tip").hidden, colour,
      [...document.querySelectorAll("#colours input")].map((one) => one.value), $("sides").hidden, $("strength").hidden,
      $("trees").hidden, $("text").textContent, $("facts").textContent.endsWith("x: NaN"),
      [...$("texts").children].map((one) => [...one.children].map((part) => part.textContent))];"""
    dark = "--blink-settings=preferredColorScheme=0"
    told, _ = seen_in(page(trace), script, tmp_path, dark, hash_="#text=1&token=3&colour=probability")
    words = "".join(f" #{token}" for token in trace[1].tokens)
    colours = ["entropy", "probability"]
    *told, links = told
    assert [len(link) for link in links] == [2, 2, 3, 3, 3, 3]
    same = 6 * "same"
    assert [link[0] for link in links[2:]] == [
        f"{i} {same}…{'ame' + 5 * 'same' + end}" for i, end in enumerate("!?!?", 2)
    ]
    assert [link[1] for link in links[2:]] == [f"…{27 * 'w'} make {ends}2." for ends in "1122"]
    assert links[2][2] == "30 tokens · answer 7"
    assert told == ["rgb(21, 23, 27)", 1, 2, True, "probability", colours, True, True, True, words, True]


def usual(texts: int, count: int, vocabulary: int = 50_000) -> Trace:
    """A trace as large models leave it: members that agree on much, and tokens of Zipf's law."""
    random = np.random.default_rng(0)
    n, candidates, kept = texts * count, 24, 5
    ids = (np.exp(random.random((n, candidates)) * np.log(vocabulary)).astype(np.int64) * 7919 % vocabulary).astype(
        np.int32
    )
    sharp = np.exp(random.normal(1.0, 0.7, (n, 1)))
    common = -1.2 * sharp * np.log1p(np.arange(candidates)) + random.normal(0, 0.6, (n, candidates))
    base = common + random.normal(0, 0.5, (n, candidates))
    expert = common + random.normal(0, 0.9, (n, candidates))
    antiexpert = expert + random.normal(0, 0.5, (n, candidates))
    logprobs = np.stack([base + expert - antiexpert, base, expert, antiexpert], 1)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    order = np.argsort(-logprobs, -1)[..., :kept]
    top_ids = np.take_along_axis(np.broadcast_to(ids[:, None], logprobs.shape), order, -1)
    top = np.take_along_axis(logprobs, order, -1).astype(np.float32)
    chosen = (logprobs[:, 0] + random.gumbel(size=(n, candidates))).argmax(-1)[:, None]
    tokens = np.take_along_axis(ids, chosen, 1)[:, 0]
    mine = np.take_along_axis(logprobs, chosen[:, None], -1)[..., 0]
    probabilities = np.exp(logprobs[:, 0])
    names = {int(i): f" {int(i) * 2654435761 % 2**32:x}"[: 3 + int(i) % 6] for i in np.unique(ids)}
    arrays = {
        "tokens": tokens,
        "logprobs": mine[:, 0].astype(np.float32),
        "entropy": -(probabilities * logprobs[:, 0]).sum(-1).astype(np.float32),
        "kl": (probabilities * (logprobs[:, 0] - logprobs[:, 1])).sum(-1).astype(np.float32),
        "shift": (mine[:, 0] - mine[:, 1]).astype(np.float32),
        "base_rank": (logprobs[:, 1] > mine[:, 1:2]).sum(-1).astype(np.int32),
        "drafted": random.integers(0, 2, n).astype(np.int8),
        "fork": (random.random(n) < 0.1).astype(np.int8),
        "top_ids": top_ids,
        "top_logprobs": top,
    }
    parts = (slice(i, i + count) for i in range(0, n, count))
    made = [{name: array[part] for name, array in arrays.items()} for part in parts]
    return Trace(
        sources=SOURCES,
        top=kept,
        texts=tuple(
            text_of(
                count, top=kept, pieces=tuple(names[int(i)] for i in one["tokens"]), names={} if i else names, **one
            )
            for i, one in enumerate(made)
        ),
        about={"formula": "ProxyTuning(alpha=1.0)"},
    )


def test_fifty_texts_of_five_hundred_tokens_take_less_than_a_megabyte() -> None:
    assert 100_000 < len(page(usual(50, 500)).encode()) <= 1_000_000


def test_a_page_needs_nothing_else(steered: tuple[Trace, Any], tmp_path: Path) -> None:
    file = write_page(steered[0], tmp_path / "run.html", title="A run")
    html = file.read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"\b(?:src|href)=", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))
    assert "default-src 'none'" in html
    assert file == write_page(steered[0], file)  # again, over it


def test_a_page_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a trace with texts.*nothing was recorded.*a loop of your own"):
        page(trace_of())
    with pytest.raises(InputError, match=r"trees\[0\].*got list"):
        page(trace_of(text_of()), trees=[["no", "mapping"]])  # type: ignore[list-item]
    with pytest.raises(InputError, match="NAME.html"):
        write_page(trace_of(text_of()), tmp_path / "run.txt")
    with pytest.raises(InputError, match="a folder that exists"):
        write_page(trace_of(text_of()), tmp_path / "none" / "run.html")


def test_notebooks_show_a_trace_in_a_frame_of_its_own() -> None:
    trace = trace_of(text_of(pieces=tuple("abcde")))
    shown = trace._repr_html_()
    assert shown == framed(trace)
    assert shown is not None
    assert shown.startswith('<iframe sandbox="allow-scripts"')
    assert unescape(re.findall(r'srcdoc="([^"]*)"', shown)[0]) == page(trace)
    assert trace_of()._repr_html_() is None
    assert repr(trace[0]).startswith("TracedText('abcde', 5 tokens, ")
