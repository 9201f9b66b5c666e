"""Historical exploration: laws against enumeration, weights against expectations, files against wrong content."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxytune.errors import InputError
from proxytune.methods.trees.tree import Branch, ForkTree
from proxytune.search.answer_history import AnswerHistory
from proxytune.search.keyed_noise import key_of, keyed_uniforms
from proxytune.search.restart import RestartPoint, forks_along, restart_points
from proxytune.stats.importance import weighted_mean

ANSWERS = (
    st.none() | st.integers() | st.text(max_size=3) | st.booleans() | st.tuples(st.text(max_size=2), st.integers())
)
PROMPTS = st.text(max_size=3) | st.lists(st.integers(0, 9), max_size=3)
ROUNDS = st.lists(st.tuples(PROMPTS, st.lists(ANSWERS, max_size=6)), max_size=6)


def history(rounds: Sequence[tuple[Any, Sequence[Any]]]) -> AnswerHistory:
    out = AnswerHistory()
    for prompt, answers in rounds:
        out.record(prompt, answers)
    return out


def contents(store: AnswerHistory) -> dict[Any, dict[Any, int]]:
    return {prompt: dict(counts) for prompt, counts in store._counts.items() if counts}


# --- counts and bonuses -----------------------------------------------------------------------------------------------


@given(ROUNDS)
def test_counts_are_those_of_a_counter(rounds: list[tuple[Any, list[Any]]]) -> None:
    store, want = history(rounds), Counter()
    for prompt, answers in rounds:
        want.update((tuple(prompt) if isinstance(prompt, list) else prompt, a) for a in answers)
    for (prompt, answer), n in want.items():
        assert store.count(prompt, answer) == n
        assert store.bonus(prompt, answer) == pytest.approx(1 / math.sqrt(1 + n))
    assert store.count("never", "seen") == 0
    assert store.bonus("never", "seen") == 1.0


@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_the_bonus_falls_with_the_count(n: int, more: int) -> None:
    store = AnswerHistory()
    store._counts["p"] = Counter({"few": n, "many": n + more})
    assert 0 < store.bonus("p", "many") < store.bonus("p", "few") <= 1


def test_no_answer_is_counted_and_texts_are_not_ids() -> None:
    store = history([("p", [None, "a", None]), ([1, 2], ["a"]), ((1, 2), ["b"])])
    assert store.counts("p") == {None: 2, "a": 1}
    assert store.bonus("p", None) == pytest.approx(3**-0.5)
    assert store.counts([1, 2]) == store.counts(np.array([1, 2])) == {"a": 1, "b": 1}
    assert store.counts("[1, 2]") == {}
    store.counts("p")["a"] = 7
    assert store.count("p", "a") == 1, "a copy"


@given(ROUNDS, ROUNDS)
def test_counts_add_up_under_merge(a: list[Any], b: list[Any]) -> None:
    one, other = history(a), history(b)
    both = one.merge(other)
    assert contents(both) == contents(history([*a, *b])) == contents(other.merge(one))
    assert contents(one) == contents(history(a)), "neither is changed"
    assert contents(one.merge(AnswerHistory())) == contents(one)


def test_threads_count_every_answer() -> None:
    store = AnswerHistory()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: [store.record("p", ["a", i]) for _ in range(500)], range(4)))
    assert store.counts("p") == {"a": 2000, 0: 500, 1: 500, 2: 500, 3: 500}


# --- the law ----------------------------------------------------------------------------------------------------------

SEEN = ["a"] * 8 + ["b"] * 3 + [None] * 15
CANDIDATES = ["a", "b", None, "c", "a"]
N = [8, 3, 15, 0, 8]
PRIOR = [0.1, 0.3, 0.2, 0.15, 0.25]


def law(prior: Sequence[float] = (1, 1, 1, 1, 1)) -> np.ndarray:
    raw = np.array([p / math.sqrt(1 + n) for p, n in zip(prior, N, strict=True)])
    return raw / raw.sum()


@pytest.mark.parametrize("prior", [None, PRIOR, [0, 3, 0, 1, 1], [1e-300, 1e300, 1, 1, 1]])
def test_the_law_is_prior_times_bonus(prior: list[float] | None) -> None:
    got = history([("p", SEEN)]).log_law("p", CANDIDATES, prior)
    np.testing.assert_allclose(np.exp(got), law(prior or [1] * 5), rtol=1e-12)
    assert np.logaddexp.reduce(got) == pytest.approx(0, abs=1e-12)


def ordered(p: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """The probability of every ordered draw of k without replacement, by enumeration."""
    out = {}
    for draw in itertools.permutations(range(len(p)), k):
        q, left = 1.0, 1.0
        for i in draw:
            q, left = q * p[i] / left, left - p[i]
        out[draw] = q
    assert math.fsum(out.values()) == pytest.approx(1)
    return out


DRAWS = 20_000


def draws(count: int, **kwargs: Any) -> list[Any]:
    store = history([("p", SEEN)])
    return [store.select("p", CANDIDATES, count, round=2, seed=seed, **kwargs) for seed in range(DRAWS)]


@pytest.mark.parametrize("prior", [None, PRIOR], ids=["equal", "prior"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_draws_follow_the_law_and_weights_lead_back_from_it(count: int, prior: list[float] | None) -> None:
    steered = draws(count, prior=prior)
    p, base = law(prior or [1] * 5), np.array(prior or [0.2] * 5)
    want = ordered(p, count)
    found = Counter(tuple(s.indices) for s in steered)
    # Orders of fewer than five expected draws are one cell.
    common = [d for d, q in want.items() if q * DRAWS >= 5]
    cells = [(found[d], want[d] * DRAWS) for d in common]
    rest = DRAWS - sum(n for n, _ in cells), DRAWS - sum(q for _, q in cells)
    chi2 = sum((n - q) ** 2 / q for n, q in [*cells, rest] if q > 1e-6)
    degrees = len(common) - (rest[1] <= 1e-6)
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees), (chi2, degrees)
    # Expectations of every candidate's indicator, and of an arbitrary function.
    f = np.concatenate([np.eye(5), [[1.0, -2.0, 0.5, 3.0, 7.0]]])
    for weights, target in (("log_weights", p), ("log_prior_weights", base)):
        estimates = np.stack([f[:, s.indices] @ np.exp(getattr(s, weights)) for s in steered])
        error = np.maximum(estimates.std(0) / math.sqrt(DRAWS), 1e-9)
        assert (np.abs(estimates.mean(0) - f @ target) < 4 * error).all(), weights
    if count > 1:  # the control: equal votes of what was drawn without replacement
        equal = np.stack([f[:, s.indices].mean(1) for s in steered])
        assert (np.abs(equal.mean(0) - f @ p) > 8 * equal.std(0) / math.sqrt(DRAWS)).any()


def test_with_all_candidates_nothing_is_random_but_the_order() -> None:
    store = history([("p", SEEN)])
    for seed in range(5):
        steered = store.select("p", CANDIDATES, 5, round=0, seed=seed, prior=PRIOR)
        assert sorted(steered.indices) == list(range(5))
        assert steered.kappa == -math.inf
        np.testing.assert_allclose(np.exp(steered.log_weights), law(PRIOR)[steered.indices], rtol=1e-12)
        np.testing.assert_allclose(np.exp(steered.log_prior_weights), np.array(PRIOR)[steered.indices], rtol=1e-12)
        f = np.arange(5.0)[steered.indices]
        assert weighted_mean(f, steered.log_prior_weights) == pytest.approx(np.arange(5.0) @ PRIOR)


def test_a_candidate_without_prior_is_never_drawn() -> None:
    store = history([("p", SEEN)])
    for seed in range(50):
        steered = store.select("p", CANDIDATES, 2, round=0, seed=seed, prior=[0, 1, 0, 1, 1])
        assert not {0, 2} & set(steered.indices)
        assert np.isfinite(steered.log_weights).all()
    assert store.select("p", CANDIDATES, 3, round=0, prior=[0, 1, 0, 1, 1]).kappa == -math.inf
    with pytest.raises(InputError, match="count: expected at most 3, the candidates that can be drawn; got 4"):
        store.select("p", CANDIDATES, 4, round=0, prior=[0, 1, 0, 1, 1])


def test_what_was_seen_often_goes_on_rarely() -> None:
    store = history([("p", ["seen"] * 99)])
    firsts = Counter(store.select("p", ["seen", "new"], 1, round=0, seed=s).indices[0] for s in range(3000))
    assert firsts[0] / 3000 == pytest.approx(0.1 / 1.1, abs=4 * math.sqrt(0.09 * 0.91 / 3000))


def test_draws_are_keyed_and_not_by_the_order_of_calls() -> None:
    def drawn(store: AnswerHistory, prompt: Any, **kwargs: Any) -> tuple[Any, ...]:
        steered = store.select(prompt, list(range(40)), 5, **{"round": 1, "seed": 2, **kwargs})
        return (*steered.indices, steered.kappa)

    store = AnswerHistory()
    want = drawn(store, "p")
    others = [
        drawn(store, "q"),
        drawn(store, [1, 2]),
        drawn(store, "(1, 2)"),
        drawn(store, "p", round=2),
        drawn(store, "p", seed=1),
        drawn(store, "p", seed=-2),
    ]
    assert len({want, *others}) == 7
    assert drawn(store, "p") == want == drawn(AnswerHistory(), "p")
    # Another candidate at the end leaves the others' noise as it is.
    more = store.select("p", list(range(41)), 41, round=1, seed=2).indices
    assert [i for i in more if i < 40][:5] == list(want[:5])


def test_uniforms_are_uniform_and_inside() -> None:
    u = np.concatenate([keyed_uniforms(key_of("test", "p", i), 1000) for i in range(100)])
    assert 0 < u.min() < u.max() < 1
    found = np.bincount((u * 50).astype(int), minlength=50)
    assert ((found - 2000.0) ** 2 / 2000).sum() < 49 + 4 * math.sqrt(98)


def philox(counter: int, key: int) -> list[int]:
    """Philox-4x64-10 (Salmon et al. 2011), written down once more."""
    mask = (1 << 64) - 1
    c, k = [counter, 0, 0, 0], [key & mask, key >> 64]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_the_noise_is_philox() -> None:
    assert philox(0, 0)[0] == 0x16554D9ECA36314C, "the authors' test vector"
    for key in (0, 1, key_of("test", "p", 3)):
        words = [word for counter in (1, 2) for word in philox(counter, key)]
        assert keyed_uniforms(key, 8).tolist() == [((word >> 12) + 0.5) / 2**52 for word in words]


# --- restart points ---------------------------------------------------------------------------------------------------


def tree() -> ForkTree:
    """Branch 0 forks at 2 and 5; 1 leaves it at 2 and forks at 4; 2 leaves 1 at 4; 3 leaves 0 at 5.

    ```text
    0: 10 11 12 13 14 15 16
    1:       20 21 22 23
    2:             30 31
    3:                40
    ```
    """
    zero = Branch(0, tokens=[10, 11, 12, 13, 14, 15, 16], forks=[2, 5])
    one = Branch(1, zero, 2, tokens=[20, 21, 22, 23], forks=[4], log_weight=-1.0)
    two = Branch(2, one, 4, tokens=[30, 31], log_weight=-2.0)
    three = Branch(3, zero, 5, tokens=[40], log_weight=-3.0)
    return ForkTree(0, [zero, one, two, three])


FORKS = [[2, 5], [2, 4], [2, 4], [2, 5]]
TEXTS = [[10, 11, 12, 13, 14, 15, 16], [10, 11, 20, 21, 22, 23], [10, 11, 20, 21, 30, 31], [10, 11, 12, 13, 14, 40]]


def test_forks_along_a_branch_are_its_own_and_its_ancestors() -> None:
    assert [forks_along(branch) for branch in tree()] == FORKS
    assert forks_along(Branch(0, tokens=[1])) == []


def points(seed: int, **kwargs: Any) -> list[RestartPoint]:
    kwargs = {"prompt": "p", "round": 0, **kwargs}
    return restart_points(tree(), ["a", "b", None, "c"], history([("p", SEEN)]), 2, seed=seed, **kwargs)


def test_points_are_steered_branches_at_one_of_their_forks() -> None:
    store, weights = history([("p", SEEN)]), tree().weights()
    at: Counter[tuple[int, int]] = Counter()
    for seed in range(400):
        got = points(seed, prior=weights)
        steered = store.select("p", ["a", "b", None, "c"], 2, round=0, seed=seed, prior=weights)
        assert [point.branch for point in got] == steered.indices
        assert [point.log_weight for point in got] == steered.log_weights.tolist()
        assert [point.log_prior_weight for point in got] == steered.log_prior_weights.tolist()
        for point in got:
            assert point.position in FORKS[point.branch]
            assert list(point.tokens) == TEXTS[point.branch][: point.position]
            assert point.forks == 2
            at[point.branch, point.position] += 1
    for branch, (first, last) in enumerate(FORKS):
        n = at[branch, first] + at[branch, last]
        assert abs(at[branch, first] - n / 2) < 4 * math.sqrt(n) / 2
    assert all(point.position == FORKS[point.branch][-1] for point in points(0, fork="last"))
    assert points(3) == points(3)


def test_the_fork_of_a_branch_does_not_depend_on_who_else_goes_on() -> None:
    shared = 0
    for seed in range(40):
        one, other = (
            {point.branch: point for point in points(seed, prior=prior)} for prior in ([1, 1, 9, 9], [9, 9, 1, 1])
        )
        shared += len(one.keys() & other.keys())
        assert all(one[branch].position == other[branch].position for branch in one.keys() & other.keys())
    assert shared > 20


def test_a_branch_without_forks_starts_at_the_prompt() -> None:
    single = ForkTree(0, [Branch(0, tokens=[7, 8])])
    (point,) = restart_points(single, ["a"], AnswerHistory(), 1, prompt=[1], round=0)
    assert point == RestartPoint(branch=0, position=0, tokens=(), forks=0, log_weight=0.0, log_prior_weight=0.0)


# --- files ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ROUNDS)
def test_a_store_comes_back_from_its_file(tmp_path_factory: Any, rounds: list[Any]) -> None:
    file = tmp_path_factory.mktemp("history") / "history.json"
    store = history(rounds)
    assert store.save(file) == file
    back = AnswerHistory.load(file)
    assert contents(back) == contents(store)
    for counts, want in zip(contents(back).values(), contents(store).values(), strict=True):
        assert [type(a) for a in counts] == [type(a) for a in want]
    assert [f.name for f in file.parent.iterdir()] == ["history.json"]


def test_answers_of_numpy_and_of_nested_tuples(tmp_path: Path) -> None:
    store = history([("p", [np.int64(3), np.float64(0.5), ("a", (1, None)), True])])
    store.save(tmp_path / "h.json")
    assert AnswerHistory.load(tmp_path / "h.json").counts("p") == {3: 1, 0.5: 1, ("a", (1, None)): 1, True: 1}


def test_a_file_that_was_there_keeps_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "history.json"
    file.write_text("")
    file.chmod(0o600)
    AnswerHistory().save(file)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "h.json"
    history([("p", ["a"])]).save(file)
    before = file.read_text()
    for answer, said in (
        (frozenset("a"), "an answer: expected a text, a finite number, None, or a tuple of those; got frozenset"),
        (math.inf, "an answer: expected a text, a finite number.*got inf of type float"),
        (("a", b"b"), "an answer: .*got b'b' of type bytes"),
        ("\ud800", "answer history: expected a file that can be written; got 'utf-8' codec"),
    ):
        with pytest.raises(InputError, match=said):
            history([("p", [answer])]).save(file)
        assert file.read_text() == before
        assert [f.name for f in tmp_path.iterdir()] == ["h.json"]
    with pytest.raises(InputError, match="answer history: expected a file that can be written; got .*No such file"):
        history([]).save(tmp_path / "no folder" / "h.json")


def stored(*prompts: Any, **more: Any) -> dict[str, Any]:
    return {"format_version": 1, "prompts": list(prompts), **more}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (3, "answer history: expected a JSON object; got int. See proxytune.search.answer_history_file for the form."),
        (stored(format_version=2), "format_version: expected at most 1.*got 2. Upgrade proxytune."),
        (stored(format_version=None), "format_version: expected a whole number from 1 to 1; got None"),
        (stored(prompt=[]), "expected only the keys format_version, prompts; got unknown 'prompt'"),
        ({"format_version": 1}, "expected the keys format_version, prompts; got no prompts"),
        (stored("p"), r"key 'prompts': expected objects with prompt and answers; got \['p'\]"),
        (stored({"prompt": "p"}), "key 'prompts': expected objects with prompt and answers"),
        (stored({"prompt": "p", "answers": [], "n": 1}), "of the prompt 'p': expected only the keys.*unknown 'n'"),
        (stored({"prompt": 3, "answers": []}), "prompt: expected a text or a list of token ids; got 3"),
        (stored({"prompt": [-3], "answers": []}), r"prompt: expected a text or token ids .*got \[-3\]"),
        (stored(*[{"prompt": [1], "answers": []}] * 2), "prompts: expected each prompt once; got .* twice"),
        (
            stored({"prompt": "p", "answers": {"a": 1}}),
            "answers of the prompt 'p': expected pairs of an answer and its",
        ),
        (stored({"prompt": "p", "answers": [["a"]]}), "answers of the prompt 'p': expected pairs"),
        (stored({"prompt": "p", "answers": [["a", 1], ["a", 2]]}), "expected each answer once; got 'a' twice"),
        (stored({"prompt": "p", "answers": [[1, 1], [1.0, 2]]}), "expected each answer once; got 1.0 twice"),
        (stored({"prompt": "p", "answers": [["a", -1]]}), "count of 'a' of the prompt 'p': .*at least 1; got -1"),
        (stored({"prompt": "p", "answers": [["a", 0]]}), "count of 'a' .*at least 1; got 0"),
        (stored({"prompt": "p", "answers": [["a", 1.0]]}), "count of 'a' .*a whole number of texts.*got 1.0"),
        (stored({"prompt": "p", "answers": [["a", True]]}), "count of 'a' .*got True"),
        (stored({"prompt": "p", "answers": [[math.nan, 1]]}), "expected texts, finite numbers, true.*got nan"),
        (stored({"prompt": "p", "answers": [[[{}], 1]]}), r"expected texts, finite numbers, true.*got \{\}"),
    ],
)
def test_files_are_read_strictly(tmp_path: Path, data: Any, said: str) -> None:
    file = tmp_path / "h.json"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        AnswerHistory.load(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="answer history: expected a file; got no file at .* Give the file that Answer"
    ):
        AnswerHistory.load(tmp_path / "h.json")
    (tmp_path / "h.json").write_text("{")
    with pytest.raises(InputError, match="h.json: expected JSON; got"):
        AnswerHistory.load(tmp_path / "h.json")


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda h: h.record("p", [["a"]]), r"answer: expected a hashable value.*got \['a'\] of type list"),
        (lambda h: h.record("p", [math.nan]), "answer: expected a hashable value that equals itself"),
        (lambda h: h.record("p", "abc"), "answers: expected a sequence with one answer for each text; got 'abc'"),
        (lambda h: h.record("p", 3), "answers: expected a sequence"),
        (lambda h: h.record(3.0, ["a"]), "prompt: expected a text or token ids"),
        (lambda h: h.record([-1], ["a"]), "prompt: expected a text or token ids"),
        (lambda h: h.count("p", {}), "answer: expected a hashable value"),
        (lambda h: h.select("p", [], 1, round=0), "answers: expected at least one candidate; got none"),
        (lambda h: h.select("p", ["a"], 0, round=0), "count: expected a whole number of candidates, at least 1; got 0"),
        (
            lambda h: h.select("p", ["a"], 2, round=0),
            "count: expected at most 1, the candidates that can be drawn; got 2",
        ),
        (
            lambda h: h.select("p", ["a"], 1, round=-1),
            "round: expected a whole number that counts the rounds, at least 0",
        ),
        (lambda h: h.select("p", ["a"], 1, round=0, seed=0.5), "seed: expected a whole number; got 0.5"),
        (lambda h: h.select("p", ["a"], 1, round=0, prior=[1, 1]), "prior: expected 1 numbers, one for each candidate"),
        (lambda h: h.select("p", ["a"], 1, round=0, prior=[-1]), "prior: expected 1 numbers.*at least 0 and not all 0"),
        (lambda h: h.select("p", ["a"], 1, round=0, prior=[0]), "prior: expected 1 numbers"),
        (lambda h: h.select("p", ["a"], 1, round=0, prior=[math.nan]), "prior: expected finite numbers"),
        (
            lambda h: restart_points([tree()], ["a"], h, 1, prompt="p", round=0),  # type: ignore[arg-type]
            r"tree: expected the tree of one prompt; got a list\. Pass out\.trees\[0\]",
        ),
        (
            lambda h: restart_points(tree(), ["a"], h, 1, prompt="p", round=0),
            "answers: expected 4, one for each branch",
        ),
        (
            lambda h: restart_points(tree(), ["a"] * 4, h, 1, prompt="p", round=0, fork="first"),
            r"fork: expected 'random' or 'last'; got 'first'",
        ),
    ],
)
def test_wrong_use_is_refused(wrong: Any, said: str) -> None:
    store = history([("p", ["a"])])
    with pytest.raises(InputError, match=said):
        wrong(store)
    assert contents(store) == {"p": {"a": 1}}


def test_a_round_is_counted_as_a_whole_or_not_at_all() -> None:
    store = AnswerHistory()
    with pytest.raises(InputError):
        store.record("p", ["a", ["b"]])
    assert store.counts("p") == {}


def test_exploration_needs_no_torch() -> None:
    code = "import proxytune.search.answer_history, proxytune.search.restart, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
