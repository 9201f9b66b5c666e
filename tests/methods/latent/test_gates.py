"""The gates' settings, and each gate in a generation in which it fires."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.gates import CLOSE, CLOSE3, OPEN, OPEN3, PLAIN, Row, measured, watched
from support.tiny import BOS, EOS, PAD, shared
from transformers import LogitsProcessor

import proxytune
from proxytune.errors import InputError
from proxytune.methods.latent.decoding import LatentDecoding
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.mixture import LatentMixture

NAN = math.nan


# --- settings --------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"begin_ids": 5}, "end_ids: expected what closes the thinking span; got an empty end_ids with begin_ids"),
    ({"begin_ids": 0}, "end_ids: expected what closes"),
    *(
        (
            ({"end_ids": 4} if name == "begin_ids" else {}) | {name: value},
            f"{name}: expected a token id or several .*; got",
        )
        for name in ("begin_ids", "end_ids", "discrete_ids")
        for value in (-1, [3, -2], 1.5, [2.0], "ab", [None])
    ),
    *(({"dwell": value}, "dwell: expected a whole number, or two; got") for value in ((), (1,), (1, 2, 3))),
    *(
        ({"dwell": value}, "dwell: expected a whole number of steps, at least 0; got")
        for value in (-1, (2, -1), 1.5, (1, 2.0), True, "2", [1, 2])
    ),
    *(
        ({name: value}, f"{name}: expected a whole number {what}, at least 1; got")
        for name, what in (("cold_steps", "of steps"), ("max_run", "of steps"), ("loop_ngram", "of tokens"))
        for value in (0, -1, 2.0, True, "3")
    ),
    *(
        ({"loop_repeats": value}, "loop_repeats: expected a whole number of times, at least 2; got")
        for value in (1, 0, 2.0, True, None)
    ),
    *(
        ({"min_entropy": value}, r"min_entropy: expected a number in \[0, 1\]; got")
        for value in (-0.1, 1.1, NAN, math.inf, True, "0", None)
    ),
    *(
        ({"cold_entropy": value}, "cold_entropy: expected a finite number of nats ≥ 0; got")
        for value in (-0.1, NAN, False, "0", None)
    ),
]


@pytest.mark.parametrize(("wrong", "said"), BAD, ids=[str(x) for x, _ in BAD])
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LatentGates(**wrong)


def test_settings_take_the_forms_they_promise() -> None:
    many = LatentGates(begin_ids=3, end_ids=[4, 5], discrete_ids=[9, 7, 9], dwell=2)
    assert (many.begin_ids, many.end_ids, many.discrete_ids, many.dwell) == ((3,), (4, 5), (7, 9), (2, 2))
    assert many.with_discrete([8, 7]).discrete_ids == (7, 8, 9)
    assert many.with_discrete([8]).end_ids == (4, 5)
    assert many.largest_id == 9
    assert LatentGates().largest_id == -1
    assert LatentGates(end_ids=[], begin_ids=(), discrete_ids=set()) == LatentGates()
    assert LatentGates(end_ids=0).end_ids == (0,)
    assert LatentGates(end_ids=np.array([4, 5])).end_ids == (4, 5)
    assert LatentGates(discrete_ids={5}).discrete_ids == (5,)
    default = LatentGates()
    assert (default.cold_steps, default.cold_entropy, default.loop_ngram, default.loop_repeats) == (256, 0.01, 8, 3)
    assert (default.min_entropy, default.dwell, default.max_run) == (0.0, None, None)


# --- generations -----------------------------------------------------------------------------------------------------

WARM = 1.0
"""How far a scripted token's logit is above all others: enough to be taken, and to leave the others a share."""


class Script(LogitsProcessor):
    """Makes one token of each row the likeliest, by its own margin; −1 leaves the step to the model."""

    def __init__(self, start: int, rows: list[list[int]], margins: list[float] | None = None) -> None:
        self.start, self.rows, self.margins = start, rows, margins

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.start
        out = scores.clone()
        for row, script in enumerate(self.rows):
            if step < len(script) and script[step] >= 0:
                if self.margins:  # then Ĥ goes by the margin and hardly by the model
                    out[row] *= 0.01
                out[row, script[step]] = out[row].max() + (self.margins[step] if self.margins else WARM)
        return out


@dataclass
class Run:
    """One generation: the new tokens, where it was soft, and what came with it."""

    out: Any
    new: list[list[int]]
    soft: list[str]
    scores: torch.Tensor  # [N, B, V]


def run(
    gates: LatentGates,
    script: list[int] | list[list[int]] | None,
    *,
    prompt: Sequence[int] = (33, 44, 55),
    margins: list[float] | None = None,
    model: Any = None,
    before: Sequence[LogitsProcessor] = (),
    mixture: LatentMixture | None = None,
    **more: Any,
) -> Run:
    """Generate, and hold the outcome against the reference: the gates, and what the model was fed."""
    rows = [script] if script is not None and isinstance(script[0], int) else script
    model = shared("llama", 1) if model is None else model
    ids = torch.tensor([list(prompt)] * (len(rows) if rows else 1))
    processors = [*before, Script(len(prompt), rows, margins)] if rows else list(before)  # type: ignore[arg-type]
    defaults = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "bos_token_id": None}
    defaults |= {"max_new_tokens": max(map(len, rows))} if rows else {}  # type: ignore[arg-type]
    mixture = LatentMixture(kind="mean") if mixture is None else mixture
    with watched(model) as fed:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=LatentDecoding(mixture, gates, seed=1),
            logits_processor=processors,
            return_dict_in_generate=True,
            output_scores=True,
            **defaults | more,
        )
    new = out.sequences[:, ids.shape[1] :]
    eos = (defaults | more)["eos_token_id"]
    special = [x for x in (eos, (defaults | more)["pad_token_id"], (defaults | more)["bos_token_id"]) if x is not None]
    scores = torch.stack(out.scores)
    table = model.get_input_embeddings().weight
    soft = ["".join("S" if x else "." for x in row) for row in out.soft.tolist()]
    assert len(fed) == new.shape[1] - 1
    for b, tokens in enumerate(new.tolist()):
        reference = Row(gates.with_discrete(special), list(prompt))
        alive = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        for t, token in enumerate(tokens[:alive]):
            due = reference.due()
            assert due in (-1, token)
            entropy, spread = measured(scores[t, b], token, mixture.candidates)
            assert math.isnan(entropy) or out.entropy[b, t].item() == pytest.approx(entropy, abs=1e-4)
            expected = reference.step(token, entropy, spread)
            if t == len(tokens) - 1:  # the last token is not fed back
                assert soft[b][t] == "."
            else:
                assert (soft[b][t] == "S") == expected, (b, t, soft[b])
                if table.isfinite().all() and not spread < 1e-6:  # a mixture may be one token's
                    assert torch.equal(fed[t][b], table[token]) == (not expected), (b, t)
        assert set(soft[b][alive:]) <= {"."}
    assert scores.isfinite().any(-1).all()
    return Run(out, new.tolist(), soft, scores)


def fires(one: Run, without: Run, soft: str, row: int = 0) -> None:
    """The gate gives this outcome; without it the same steps were soft, and the model said other things after them."""
    assert one.soft[row] == soft
    assert without.soft[row] != soft
    if one.new == without.new:  # a gate only ever makes a step discrete
        assert all(b == "S" for a, b in zip(soft, without.soft[row], strict=True) if a == "S")
    first = next(i for i, (a, b) in enumerate(zip(soft, without.soft[row], strict=True)) if a != b)
    assert (soft[first], without.soft[row][first]) == (".", "S")
    assert torch.equal(one.scores[: first + 1, row], without.scores[: first + 1, row])
    assert not torch.equal(one.scores[first + 1 :, row], without.scores[first + 1 :, row])


TEXT = [100, 101, 102, 103]
SPANS: dict[str, tuple[list[int], list[int], list[int], list[int], str]] = {
    # begin, end, prompt, script, soft
    "single, opened": (OPEN, CLOSE, [33], [100, *OPEN, 101, 102, *CLOSE, 103, 104], "..SS..."),
    "several, opened": (OPEN3, CLOSE3, [33], [100, *OPEN3, 101, 102, *CLOSE3, 103, 104], "....SS....."),
    "single, in the prompt": (OPEN, CLOSE, [33, *OPEN], [100, 101, *CLOSE, 102, 103], "SS..."),
    "several, in the prompt": (OPEN3, CLOSE3, [33, *OPEN3, 34], [100, 101, *CLOSE3, 102, 103], "SS....."),
    "across the prompt's end": (OPEN3, CLOSE3, [33, 200, 201], [202, 100, 101, *CLOSE3, 102, 103], ".SS....."),
    "reopened": (OPEN, CLOSE, [*OPEN, 33], [100, *CLOSE, 101, *OPEN, 102, 103, *CLOSE, 104, 105], "S...SS..."),
    "several, reopened": (OPEN3, CLOSE3, [33], [*OPEN3, 100, *CLOSE3, *OPEN3, 101, *CLOSE3, 102], "...S......S...."),
    "never opened": (OPEN, CLOSE, [33, 34], [100, 101, *CLOSE, 102, 103], "....."),
    "half opened": (OPEN3, CLOSE3, [33, 34], [200, 201, 100, 202, 101, 102], "......"),
    "closed in the prompt": (OPEN, CLOSE, [*OPEN, 33, *CLOSE], [100, 101, 102, 103], "...."),
    "closed and reopened there": (OPEN, CLOSE, [*OPEN, *CLOSE, *OPEN], [100, 101, 102, *CLOSE, 103], "SSS.."),
    "open from the start": ([], CLOSE, [33, *CLOSE], [100, 101, *CLOSE, 102, 103], "SS..."),
    "open from the start, several": ([], CLOSE3, [33], [100, 210, 101, *CLOSE3, 102, 103], "S.S....."),
    "from the start, never again": ([], CLOSE, [33], [100, *CLOSE, 101, *CLOSE, 102, 103], "S....."),
}


@pytest.mark.parametrize("name", SPANS)
def test_the_thinking_span(name: str) -> None:
    begin, end, prompt, script, soft = SPANS[name]
    gates = replace(PLAIN, begin_ids=begin, end_ids=end)
    one = run(gates, script, prompt=prompt)
    assert one.new == [script]
    fires(one, run(PLAIN, script, prompt=prompt), soft)


def test_rows_of_a_batch_have_spans_of_their_own() -> None:
    gates = replace(PLAIN, begin_ids=OPEN, end_ids=CLOSE)
    scripts = [[100, *OPEN, 101, 102, *CLOSE, 103], [*OPEN, 100, *CLOSE, 101, 102, 103], [101, 102, 103, 104, 105, 106]]
    one = run(gates, scripts)
    assert one.soft == ["..SS..", ".S....", "......"]


def test_listed_ids_are_discrete() -> None:
    script = [100, 150, 101, 151, 150, 102, 103]
    fires(run(replace(PLAIN, discrete_ids=[150, 151]), script), run(PLAIN, script), "S.S..S.")


def test_what_ends_pads_and_begins_texts_is_discrete() -> None:
    """EOS ends one row of two, which is padded from there on; BOS and padding come up in the middle of a text, too."""
    scripts = [[100, 101, EOS, 102, 103], [100, BOS, 101, PAD, 102]]
    ids: dict[str, Any] = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": BOS}
    one = run(PLAIN, scripts, **ids)
    assert one.new == [[100, 101, EOS, PAD, PAD], scripts[1]]
    assert one.soft == ["SS...", "S.S.."]
    # Where these ids mean nothing, they are tokens as others are.
    without = run(PLAIN, scripts, eos_token_id=None, pad_token_id=250, bos_token_id=None)
    assert without.new == scripts
    assert without.soft == ["SSSS.", "SSSS."]
    fires(one, without, "S.S..", row=1)
    assert one.out.entropy[0].isnan().tolist() == [False] * 3 + [True] * 2


def test_min_entropy() -> None:
    script, margins = [100, 101, 102, 103, 104, 105], [1.0, 9.0, 1.0, 12.0, 9.0, 1.0]
    without = run(PLAIN, script, margins=margins)
    one = run(replace(PLAIN, min_entropy=0.3), script, margins=margins)
    spreads = [measured(one.scores[t, 0], token)[1] for t, token in enumerate(script)]
    assert [x >= 0.3 for x in spreads] == [True, False, True, False, False, True]
    fires(one, without, "S.S...")
    assert run(replace(PLAIN, min_entropy=1.0), script, margins=margins).soft == ["......"]


@pytest.mark.parametrize(
    ("dwell", "soft"), [(1, "S..SS.S..."), ((3, 1), "SSS.SSS..."), ((1, 4), "S.....S..."), (2, "SS..SSS...")]
)
def test_dwell(dwell: Any, soft: str) -> None:
    # The larger the margin, the smaller Ĥ.
    script = [100, 101, 102, 103, 104, 105, 106, 107, 108, 109]
    margins = [3.0, 5.0, 7.0, 4.0, 2.0, 6.0, 1.0, 9.0, 10.0, 11.0]
    one = run(replace(PLAIN, dwell=dwell), script, margins=margins)
    spreads = [measured(one.scores[t, 0], token)[1] for t, token in enumerate(script)]
    assert sorted(range(10), key=spreads.__getitem__) == sorted(range(10), key=lambda i: -margins[i])
    fires(one, run(PLAIN, script, margins=margins), soft)


def test_cold_stop_without_a_span() -> None:
    script, cold = [100, 101, 102, 103, 104, 105, 106], 30.0
    margins = [1.0, cold, 1.0, cold, cold, 1.0, 1.0]  # a warm step in between begins the count anew
    one = run(replace(PLAIN, cold_steps=2), script, margins=margins)
    assert one.new == [script]  # nothing is written
    fires(one, run(replace(PLAIN, cold_steps=3), script, margins=margins), "SSSS...")


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize(("begin", "end"), [([], CLOSE3), (OPEN, CLOSE), (OPEN3, CLOSE3)])
def test_cold_stop_ends_the_span(begin: list[int], end: list[int], do_sample: bool) -> None:
    """Every step is colder than 99 nats: after three in the span, its end is written, token by token."""
    gates = replace(PLAIN, begin_ids=begin, end_ids=end, cold_steps=3, cold_entropy=99.0)
    more: dict[str, Any] = {"prompt": [33, *begin], "max_new_tokens": 9, "do_sample": do_sample, "top_k": 20}
    more["suppress_tokens"] = sorted({*OPEN3})  # that it opens no other
    torch.manual_seed(4)
    one = run(gates, None, **more)
    torch.manual_seed(4)
    without = run(replace(gates, cold_steps=None), None, **more)
    assert one.new[0][3 : 3 + len(end)] == end
    assert without.new[0][3] != end[0]
    assert one.out.entropy[0, 3 : 3 + len(end)].tolist() == [0.0] * len(end)
    assert one.soft[0] == "SS......."
    fires(one, without, one.soft[0])


def test_cold_stop_goes_on_from_a_beginning_of_the_end_that_is_there() -> None:
    gates = replace(PLAIN, begin_ids=OPEN, end_ids=CLOSE3, cold_steps=3, cold_entropy=99.0)
    script = [100, 101, 210, -1, -1, 102, 103]
    one = run(gates, script, prompt=[*OPEN, 33])
    assert one.new[0][:5] == [100, 101, 210, 211, 212]
    assert one.soft == ["SS....."]


def test_cold_stop_counts_anew_in_the_next_span_and_only_inside() -> None:
    gates = replace(PLAIN, begin_ids=OPEN, end_ids=CLOSE, cold_steps=2, cold_entropy=99.0)
    script = [100, 101, -1, 102, 103, 104, *OPEN, 105, 106, -1, 107]
    one = run(gates, script, prompt=[*OPEN, 33])
    assert one.new == [[100, 101, *CLOSE, 102, 103, 104, *OPEN, 105, 106, *CLOSE, 107]]
    fires(one, run(replace(gates, cold_steps=None), script, prompt=[*OPEN, 33]), "S......S...")


def test_cold_stop_of_one_row_leaves_the_others_alone() -> None:
    gates = replace(PLAIN, end_ids=CLOSE3, cold_steps=2)

    class Cold(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * torch.tensor([[1.0], [1e4]])

    hot = [[100, 101, 102, 103, 104, 105], [-1, -1, -1, -1, -1, 105]]
    two = run(gates, hot, before=[Cold()])
    assert two.new[0] == hot[0]
    assert two.soft[0] == "SSSSS."
    assert two.new[1][2:5] == CLOSE3


def test_max_run() -> None:
    script = list(range(100, 109))
    without = run(PLAIN, script)
    fires(run(replace(PLAIN, max_run=2), script), without, "SS.SS.SS.")
    fires(run(replace(PLAIN, max_run=1), script), without, "S.S.S.S..")


def test_loops_of_ngrams() -> None:
    script = [100, 101, 102, 100, 101, 102, 100, 101, 102, 103, 104]
    without = run(PLAIN, script)
    fires(run(replace(PLAIN, loop_ngram=3, loop_repeats=2), script), without, "SSSSS....S.")
    fires(run(replace(PLAIN, loop_ngram=3, loop_repeats=3), script), without, "SSSSSSSS.S.")
    assert run(replace(PLAIN, loop_ngram=3, loop_repeats=4), script).soft == without.soft
    # The prompt is no part of a loop, and the default takes three times eight tokens.
    assert run(replace(PLAIN, loop_ngram=3, loop_repeats=3), script[:6], prompt=script[:6]).soft == ["SSSSS."]
    eight = list(range(100, 108))
    fires(run(LatentGates(), eight * 3 + [110]), run(PLAIN, eight * 3 + [110]), "S" * 23 + "..")


class Runner(LogitsProcessor):
    """Puts a token second at some steps, and out of reach at all others."""

    def __init__(self, token: int, start: int, steps: set[int]) -> None:
        self.token, self.start, self.steps = token, start, steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = scores.clone()
        out[:, self.token] = -math.inf
        if input_ids.shape[1] - self.start in self.steps:
            out[:, self.token] = out.max(1).values
        return out


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("kind", ["mean", "gumbel", "dirichlet", "gaussian"])
def test_a_mixture_that_is_not_finite_is_discrete(kind: Any, bad: float) -> None:
    """A row of the table that nobody emits is among the candidates at steps 1 and 3: there the token's own is fed."""
    model = copy.deepcopy(shared("llama", 1))
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        model.get_input_embeddings().weight[77, 3] = bad
    script, steps = [100, 101, 102, 103, 104], {1, 3}
    runner = [Runner(77, 3, steps)]
    mixture = LatentMixture(kind=kind, sigma=2.0 if kind == "gaussian" else 9.0 if bad == 3e38 else 0.0)
    table = model.get_input_embeddings().weight
    fed = [x for x in _fed(model, PLAIN, script, runner, mixture) if x is not None]
    assert len(fed) == 4
    for t, x in enumerate(fed):
        assert x.isfinite().all()
        if kind != "gaussian" and (bad != 3e38 or t not in steps):  # 3e38 may stay finite, by its weight
            assert torch.equal(x[0], table[script[t]]) == (t in steps), t
    if kind == "gaussian" or bad == 3e38:
        return
    one = model_run(model, PLAIN, script, runner, mixture)
    discrete = model_run(model, replace(PLAIN, discrete_ids=[101, 103]), script, runner, mixture)
    assert torch.equal(torch.stack(one.scores), torch.stack(discrete.scores))
    assert torch.isfinite(torch.stack(one.scores)).any(-1).all()
    assert one.sequences[0, 3:].tolist() == script


def model_run(
    model: Any, gates: LatentGates, script: list[int], before: list[LogitsProcessor], mixture: LatentMixture
) -> Any:
    ids = torch.tensor([[33, 44, 55]])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=LatentDecoding(mixture, gates, seed=1),
        logits_processor=[*before, Script(3, [script])],
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=len(script),
    )


def _fed(model: Any, *args: Any) -> list[torch.Tensor]:
    with watched(model) as fed:
        model_run(model, *args)
    return fed


def test_a_distribution_that_is_none_is_discrete() -> None:
    """One row's scores are NaN in one step; its neighbour does not notice, and both go on softly."""

    class Break(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] != 3 + 2:
                return scores
            out = scores.clone()
            out[0, 100] = NAN  # greedy decoding takes a NaN for the largest
            return out

    one = run(PLAIN, [[100, 101, -1, 102, 103], [100, 101, 102, 103, 104]], before=[Break()])
    assert one.new[0][2] == 100
    assert one.soft == ["SS.S.", "SSSS."]
    assert one.out.entropy[0].isnan().tolist() == [False, False, True, False, False]
    without = run(PLAIN, [[100, 101, 100, 102, 103], [100, 101, 102, 103, 104]])
    assert without.soft == ["SSSS.", "SSSS."]
    assert torch.equal(one.scores[:, 1], without.scores[:, 1])


def test_gates_of_a_composed_model() -> None:
    """Through the other door of a forward pass, where each member has its own mixture."""
    base, expert, antiexpert = shared("llama", 1), shared("gpt2", 2, 250), shared("gpt2", 3, 250)
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=0.7, check_vocabulary=False)
    ids = torch.tensor([[33, *OPEN]])
    script = [100, 101, 102, *CLOSE, 103, 104]
    for gates, soft in ((PLAIN, "SSSSS."), (replace(PLAIN, begin_ids=OPEN, end_ids=CLOSE, max_run=2), "SS....")):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=LatentDecoding("gumbel", gates, seed=1),
            logits_processor=[Script(2, [script])],
            return_dict_in_generate=True,
            do_sample=False,
            eos_token_id=None,
            max_new_tokens=6,
        )
        assert out.sequences[0, 2:].tolist() == script
        assert "".join(".S"[x] for x in out.soft[0].tolist()) == soft
