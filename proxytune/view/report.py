"""What runs show of their policies, as a report: what was lost, how sure that is, what to do, and each diagnosis.

It reads traces alone (`proxytune.diagnostics`). Every figure comes with its interval; a diagnosis that a trace cannot
give says why, and gives no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from proxytune.diagnostics import (
    Finding,
    calibration,
    coverage,
    crossing,
    degenerate,
    distinct_answers,
    entropy_law,
    entropy_profile,
    fork_change,
    formats,
    kl_drift,
    length_effect,
    on_policy_signature,
    search_scaling,
    spread,
)
from proxytune.diagnostics.losses import LOSSES, Loss, LossName, Order, compared
from proxytune.diagnostics.prompts import as_trace, said
from proxytune.errors import InputError
from proxytune.stats.bootstrap import Interval
from proxytune.trace import Trace
from proxytune.view.plots import Plot, Series

__all__ = ["CURES", "Cure", "Figure", "Part", "Report", "report"]


@dataclass(frozen=True)
class Cure:
    """What to do about a loss.

    Attributes:
        decoding: What this library does about it at decoding time, each with the page that says how.
        training: What only training mends.
    """

    decoding: tuple[tuple[str, str], ...]
    training: str


CURES: Mapping[LossName, Cure] = {
    "diversity": Cure(
        (
            ("sample hotter at forks alone", "proxytune/methods/forks/README.md"),
            ("branch at forks, or let samples of a prompt repel each other", "proxytune/methods/trees/README.md"),
            ("if it is steered, steer less: a smaller α, or a gate", "proxytune/formulas/README.md"),
        ),
        "answers that the policy no longer holds: an entropy bonus, Clip-Cov, KL-Cov or GPPO while it is trained by "
        "reinforcement, or SFT on diverse text",
    ),
    "calibration": Cure(
        (
            ("do not read the share of a vote as a probability; weight votes by a confidence whose AUROC is told above "
             "½ here", "proxytune/voting/README.md"),
            ("sample hotter at forks alone", "proxytune/methods/forks/README.md"),
        ),
        "a policy that says how sure it is, and is right about it: a Brier reward",
    ),
    "over-thinking": Cure(
        (
            ("cap thinking", "proxytune/methods/thinking/README.md"),
            ("spend the budget on more samples instead of longer ones", "proxytune/search/README.md"),
            ("vote over them, with confidence", "proxytune/voting/README.md"),
        ),
        "thoughts that get worse as they go on: rewards for right answers that are short, or SFT on them",
    ),
    "drift": Cure(
        (("steer less: a smaller α, or a gate that shifts only where the base is unsure",
          "proxytune/formulas/README.md"),),
        "nothing: the base's weights are as they were",
    ),
    "degenerate texts": Cure(
        (
            ("leave them out of votes: `degenerate(trace).sound`", "proxytune/diagnostics/README.md"),
            ("if it is steered, steer less: a smaller α, or a gate", "proxytune/formulas/README.md"),
            ("give confident texts the votes", "proxytune/voting/README.md"),
        ),
        "a policy that loops at temperature 1: SFT on diverse text",
    ),
}  # fmt: skip
"""What helps against each loss."""


@dataclass(frozen=True)
class Figure:
    """A number of a run with its interval."""

    name: str
    value: Interval
    percent: bool = False

    @property
    def shown(self) -> str:
        """As it is written."""
        return said(self.value, percent=self.percent)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A diagnosis of all runs.

    Attributes:
        title: Its name.
        means: What the figures mean.
        means_not: What they do not.
        said: Run → what was found, in a sentence, and on how much it rests.
        figures: Run → its figures.
        refused: Run → why it has none.
        plot: The plot, if a run has points.
    """

    title: str
    means: str
    means_not: str
    said: Mapping[str, str]
    figures: Mapping[str, tuple[Figure, ...]]
    refused: Mapping[str, str]
    plot: Plot | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report on runs.

    Attributes:
        runs: Run → its size in words, those with the most told losses first.
        losses: Run → each loss.
        orders: Of each loss, the runs in its order, where there are several.
        lost: What was lost, in words: one sentence for each run, and how sure that is.
        todo: What to do about it, one item for each loss that is told: (loss, at decoding time, by training).
        parts: Each diagnosis.
        examples: Run → texts that are degenerate, as the model wrote them.
    """

    runs: Mapping[str, str]
    losses: Mapping[str, Mapping[LossName, Loss]]
    orders: tuple[Order, ...]
    lost: tuple[str, ...]
    todo: tuple[tuple[LossName, tuple[tuple[str, str], ...], str], ...]
    parts: tuple[Part, ...]
    examples: Mapping[str, tuple[str, ...]]


def report(
    runs: Mapping[str, Trace],
    *,
    checkpoints: bool = False,
    by: str = "tokens",
    threshold: float | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """What runs show of their policies. The order of `runs` makes no difference, unless they are checkpoints.

    Args:
        runs: Name → trace. Graded, with answers: `proxytune.trace.graded`.
        checkpoints: Whether they are checkpoints of one training, the earliest first.
        by: What accuracy is held against: "tokens", or the name of a fact, e.g. "budget".
        threshold: h above which a token is a fork, in nats. None: the forks that the runs recorded.
        level: Confidence level of the intervals.
        draws: Number of resamples, of whole prompts.
        seed: Seed of the resamples.
        progress: Told before each diagnosis: what comes, how many are done, and of how many.

    Raises:
        InputError: If there is no run, or one has no texts.
    """
    if not runs:
        raise InputError.of("runs", expected="at least one trace", got="none", remedy="Record one first.")
    for name, trace in runs.items():
        if not len(as_trace(trace, name)):
            raise InputError.of(name, expected="a trace with texts", got="none", remedy="Record a run first.")
    settings: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    named = runs if checkpoints else {name: runs[name] for name in sorted(runs)}
    diagnoses = _parts(named, checkpoints, by, threshold, settings)
    told_of = progress or (lambda what, done, total: None)
    told_of("losses", 0, 1 + len(diagnoses))
    found, orders = compared(runs, **settings)
    parts = []
    for done, diagnose in enumerate(diagnoses, 1):
        told_of("diagnoses", done, 1 + len(diagnoses))
        parts.append(diagnose())
    by_evidence = sorted(runs, key=lambda name: (-sum(one.told for one in found[name].values()), name))
    several = len(runs) > 1
    told = [name for name in LOSSES if any(each[name].told for each in found.values())]
    return Report(
        runs={name: _size(runs[name]) for name in by_evidence},
        losses={name: found[name] for name in by_evidence},
        orders=tuple(orders.values()) if several else (),
        lost=tuple(_lost(name, found[name], level, several) for name in by_evidence),
        todo=tuple((name, CURES[name].decoding, CURES[name].training) for name in told),
        parts=tuple(parts),
        examples={name: shown for name in by_evidence if (shown := _examples(runs[name]))},
    )


def _size(trace: Trace) -> str:
    texts = sum(len(text) > 0 for text in trace)
    return f"{texts} texts, {len(trace.groups())} prompts, {sum(map(len, trace)):,} tokens"


_HAS_LOST: Mapping[LossName, str] = {
    "diversity": "diversity (it has collapsed: its mistakes repeat)",
    "calibration": "calibration (its samples agree more often than they are right)",
    "over-thinking": "the use of thinking on (its longer texts are worse: over-thinking)",
    "drift": "its closeness to the base (drift)",
    "degenerate texts": "sound texts (too many are degenerate)",
}


def _lost(name: str, found: Mapping[LossName, Loss], level: float, several: bool) -> str:
    """What one run has lost, how sure that is, and what is not told."""
    told = [one for one in found.values() if one.told]
    quiet = [one.name for one in found.values() if one.value is not None and not one.told]
    silent = [one.name for one in found.values() if one.value is None]
    who = name if several else "This policy"
    if told:
        out = f"{who} has lost {_and([_HAS_LOST[one.name] for one in told])}. {' '.join(one.says for one in told)}"
        rests = _and(sorted({str(one.prompts) for one in told}))
        out += f" Brackets are {100 * level:g} % intervals over {rests} prompts."
    else:
        most = max(one.prompts for one in found.values())
        out = f"{who}: nothing is told to be lost{f', by {most} prompts' if most else ''}."
    if quiet:
        out += f" Not told: {_and(quiet)}."
    if silent:
        out += f" The trace cannot say: {_and(silent)}."
    return out


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _examples(trace: Trace, most: int = 3, length: int = 300) -> tuple[str, ...]:
    from proxytune.diagnostics.degenerate import faults_of

    out: list[str] = []
    for text, faults in zip(trace, faults_of(trace), strict=True):
        if faults and text.text is not None and len(out) < most:
            words = text.text if len(text.text) <= length else f"{text.text[:length]}…"
            out.append(f"{', '.join(faults)}: {words}")
    return tuple(out)


# --- each diagnosis ---------------------------------------------------------------------------------------------------

Found = tuple[Finding, tuple[Figure, ...]]


def _parts(
    runs: Mapping[str, Trace], checkpoints: bool, by: str, threshold: float | None, settings: Mapping[str, Any]
) -> list[Callable[[], Part]]:
    def part(
        title: str,
        means: str,
        means_not: str,
        diagnose: Callable[[Trace], Any],
        figures: Callable[[Any], Sequence[Figure]],
        points: Callable[[Any], Sequence[tuple[float, Interval]]],
        **plot: Any,
    ) -> Callable[[], Part]:
        diagnoses = {name: partial(diagnose, trace) for name, trace in runs.items()}
        return partial(_part, title, means, means_not, diagnoses, figures, points, plot)

    def entropy(found: Any) -> list[Figure]:
        forks = [] if found.above is None else [Figure("share of forks", found.above, percent=True)]
        return [Figure("mean entropy, nats per token", found.mean), *forks]

    def by_answers(trace: Trace) -> Any:
        try:
            return calibration(trace, "agreement", **settings)
        except InputError:
            return calibration(trace, **settings)

    def reliable(found: Any) -> list[Figure]:
        aurocs = [Figure(f"AUROC of {name}, within prompts", one) for name, one in found.auroc.items()]
        return [
            Figure("Brier score", found.brier),
            Figure("calibration error", found.ece, percent=True),
            Figure(f"{found.by} above accuracy", found.gap, percent=True),
            *aurocs,
        ]

    def lengths(found: Any) -> list[Figure]:
        turn = [] if found.beyond is None else [Figure(f"accuracy falls beyond, {by}", found.beyond)]
        return [
            Figure("doubling the length adds to accuracy", found.overall, percent=True),
            Figure("the same at long texts", found.at_end, percent=True),
            *turn,
        ]

    def no_signal(found: Any) -> list[tuple[float, Interval]]:
        shares = (found.without, found.all_right, found.all_wrong)
        return list(enumerate(shares))

    parts = [
        part(
            "Entropy and forks",
            "How unsure the policy is, token by token; at forks (tokens of high entropy) samples part.",
            "A low entropy is no loss by itself: a policy that knows the answer has it too. Read it with the answers.",
            lambda trace: entropy_profile(trace, threshold=threshold, **settings),
            entropy,
            _along,
            x="position in the text",
            y="entropy, nats",
        ),
        part(
            "Own text against text from elsewhere",
            "About 1 for base models, 3 to 4 after training by reinforcement: how narrow the policy's own path is.",
            "It does not say whether what lies beside that path would be right.",
            lambda trace: on_policy_signature(trace, **settings),
            lambda found: [
                Figure("ratio", found.ratio),
                Figure("from elsewhere, nats", found.elsewhere),
                Figure("own, nats", found.own),
            ],
            lambda found: [(0.0, found.own), (1.0, found.elsewhere)],
            x="text",
            y="entropy, nats",
            ticks=("own", "from elsewhere"),
        ),
        part(
            "Different answers",
            "How many different answers more samples bring. A curve that is flat has nothing left to explore.",
            "Few different answers are right where there is one answer: see the chance of a right one below.",
            lambda trace: distinct_answers(trace, **settings),
            lambda found: [
                Figure(f"different answers of {max(found.curve)} samples", found.curve[max(found.curve)]),
                Figure("texts without an answer", found.unanswered, percent=True),
            ],
            lambda found: list(found.curve.items()),
            x="samples of a prompt",
            y="different answers",
            log_x=True,
        ),
        part(
            "Formats",
            "How much all texts look the same: layout, not wording.",
            "One format may be what was asked for.",
            lambda trace: formats(trace, **settings),
            lambda found: [Figure(f"most frequent: {found.top}", found.top_share, percent=True)],
            lambda found: [(0.0, found.top_share)],
            x="format",
            y="share of texts",
            ticks=("the most frequent",),
            percent=True,
        ),
        part(
            "The chance of a right answer",
            "pass@k: what more samples would find. A collapsed policy starts high and stays flat.",
            "Finding a right answer is not choosing it: a vote may still lose it.",
            lambda trace: coverage(trace, weighted=_weighted(trace), **settings),
            lambda found: [
                Figure(f"with {k} sample{'s' * (k > 1)}", found.curve[k], percent=True)
                for k in sorted({min(found.curve), max(found.curve)})
            ],
            lambda found: list(found.curve.items()),
            x="samples of a prompt",
            y="chance of a right answer",
            log_x=True,
            percent=True,
        ),
        part(
            "Prompts without variance",
            "Where all samples are right, or all wrong, a vote changes nothing, and training that compares samples "
            "(GRPO) learns nothing.",
            "All right is no loss.",
            lambda trace: spread(trace, **settings),
            lambda found: [
                Figure("prompts without variance", found.without, percent=True),
                Figure("all wrong", found.all_wrong, percent=True),
                *([] if found.disagreement is None else [Figure("two samples differ", found.disagreement, True)]),
            ],
            no_signal,
            x="samples of a prompt",
            y="share of prompts",
            ticks=("one grade", "all right", "all wrong"),
            percent=True,
        ),
        part(
            "Accuracy and length",
            "Whether longer texts of a prompt are more often right, and up to what length.",
            "A length that the model chose shows what goes with it, not what it does: for that, set budgets.",
            lambda trace: length_effect(trace, by=by, **settings),
            lengths,
            lambda found: [
                ((one.shortest * one.longest) ** 0.5, one.accuracy) for one in found.bins if one.accuracy is not None
            ],
            x=by,
            y="accuracy",
            log_x=True,
            percent=True,
        ),
        part(
            "Calibration",
            "Whether the policy knows when it is right: points on the diagonal are. An AUROC of ½ is no signal.",
            "Agreement is of these samples at this temperature; it is no probability that another question is right.",
            by_answers,
            reliable,
            lambda found: [(one.confidence, one.accuracy) for one in found.points if one.accuracy is not None],
            x="confidence",
            y="share of right texts",
            diagonal=True,
            percent=True,
        ),
        part(
            "Drift from the base",
            "How far steering moves each token's distribution, KL(combined ‖ base).",
            "Far is not bad: that the expert decides is what it is for.",
            lambda trace: kl_drift(trace, **settings),
            lambda found: [
                Figure("KL, nats per token", found.mean),
                Figure("KL, nats per text", found.per_text),
                Figure("tokens that are not the base's first choice", found.steered, percent=True),
            ],
            _along,
            x="position in the text",
            y="KL, nats",
        ),
        part(
            "Degenerate texts",
            "Texts that loop, copy their prompt, or give an answer without the computation that their siblings needed.",
            "Found by token ids and lengths; nothing here has read them.",
            lambda trace: degenerate(trace, **settings),
            lambda found: [
                Figure("degenerate", found.share, percent=True),
                *(Figure(name, one, percent=True) for name, one in found.shares.items()),
            ],
            lambda found: [
                (float(i), found.shares[name])
                for i, name in enumerate(("repeating", "copying", "skipping"))
                if name in found.shares
            ],
            x="fault",
            y="share of texts",
            ticks=("repeating", "copying", "skipping"),
            percent=True,
        ),
        part(
            "Budget",
            "What a larger search would find.",
            "The fit holds for the budgets that were tried and one doubling more.",
            lambda trace: search_scaling(trace, **settings),
            lambda found: [
                Figure("another doubling adds", found.doubling, percent=True),
                Figure("ceiling of the fit", found.ceiling, percent=True),
            ],
            lambda found: list(found.measured.items()),
            x="budget, tokens",
            y="prompts solved",
            log_x=True,
            percent=True,
        ),
    ]
    if len(runs) > 1:
        parts += _pairs(runs, settings)
    if checkpoints:
        parts += _over_training(runs, threshold, settings)
    return parts


def _part(
    title: str,
    means: str,
    means_not: str,
    diagnoses: Mapping[str, Callable[[], Any]],
    figures: Callable[[Any], Sequence[Figure]],
    points: Callable[[Any], Sequence[tuple[float, Interval]]],
    plot: Mapping[str, Any],
) -> Part:
    says, numbers, refused, series = {}, {}, {}, []
    for name, diagnose in diagnoses.items():
        try:
            found = diagnose()
        except InputError as refusal:
            refused[name] = str(refusal)
            series.append(Series(name, ()))
            continue
        says[name] = f"{found.says} ({found.prompts} prompts, {found.texts} texts)"
        numbers[name] = tuple(figures(found))
        series.append(Series(name, tuple((float(x), y) for x, y in points(found))))
    drawn = Plot(series=tuple(series), **plot) if any(one.points for one in series) else None
    return Part(title=title, means=means, means_not=means_not, said=says, figures=numbers, refused=refused, plot=drawn)


def _along(found: Any) -> list[tuple[float, Interval]]:
    return [((place.first + place.last) / 2, place.value) for place in found.places]


def _weighted(trace: Trace) -> bool:
    return any("weight" in text.facts for text in trace)


def _pairs(runs: Mapping[str, Trace], settings: Mapping[str, Any]) -> list[Callable[[], Part]]:
    names = list(runs)
    pairs = {
        f"{one} − {other}": partial(
            crossing, runs[one], runs[other], weighted=_weighted(runs[one]) and _weighted(runs[other]), **settings
        )
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    }
    return [
        partial(
            _part,
            "Which run for how many samples",
            "The first run's chance of a right answer less the second's, on the prompts that both have. A collapsed "
            "policy leads with one sample, and falls behind with many.",
            "It compares what samples hold, not what a vote makes of them. The intervals are of each pair alone.",
            pairs,
            lambda found: [
                Figure(f"first less second, {k} sample{'s' * (k > 1)}", found.difference[k], percent=True)
                for k in sorted({min(found.difference), max(found.difference)})
            ],
            lambda found: list(found.difference.items()),
            {"x": "samples of a prompt", "y": "difference in chance", "log_x": True, "percent": True},
        )
    ]


def _over_training(
    runs: Mapping[str, Trace], threshold: float | None, settings: Mapping[str, Any]
) -> list[Callable[[], Part]]:
    names = list(runs)

    def law() -> Any:
        return entropy_law(list(runs.values()), **settings)

    def change() -> Any:
        return fork_change(runs[names[0]], runs[names[-1]], threshold=threshold, **settings)

    return [
        partial(
            _part,
            "Entropy traded for reward",
            "The law R = −a·e^H + b over checkpoints: what training bought with entropy, and the ceiling.",
            "It holds over checkpoints of one training, never over temperatures.",
            {"all checkpoints": law},
            lambda found: [Figure("a", found.a), Figure("ceiling", found.ceiling, percent=True)],
            lambda found: [(h, Interval(r, r, r)) for h, r in found.points],
            {"x": "entropy, nats", "y": "share of right texts", "percent": True},
        ),
        partial(
            _part,
            "Forks before and after",
            "Planning tokens (forks) and execution tokens of the first and the last checkpoint.",
            "A fork is a token above one threshold for both, which the first checkpoint sets.",
            {f"{names[0]} → {names[-1]}": change},
            lambda found: [
                Figure("share before", found.forks[0], percent=True),
                Figure("share after", found.forks[1], percent=True),
                Figure("change", found.change, percent=True),
            ],
            lambda found: list(enumerate(found.forks)),
            {"x": "checkpoint", "y": "share of forks", "ticks": ("first", "last"), "percent": True},
        ),
    ]
