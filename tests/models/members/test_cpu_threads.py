"""Companions in a thread beside the base's: the same tokens, divided threads, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.reference import Reference
from support.tiny import build

import proxytune
from proxytune import FusedDecoding, SpeculativeDecoding
from proxytune.models.members.cpu_threads import SideThread, may_split

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def members() -> list[Any]:
    return [build("mistral", seed) for seed in (1, 2, 3)]


def composed(members: list[Any]) -> Any:
    base, expert, antiexpert = members
    model = proxytune.wrap(base, expert=expert, antiexpert=antiexpert, alpha=0.5, check_vocabulary=False)
    model.split_threads = True
    return model


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def watched(model: Any, call: Any) -> dict[str, set[tuple[str, int]]]:
    """In which threads each member ran, and how many of torch's threads it had there."""
    seen: dict[str, set[tuple[str, int]]] = {m.role: set() for m in model.members}

    def note(*_: Any, role: str) -> None:
        seen[role].add((threading.current_thread().name, torch.get_num_threads()))

    hooks = [m.model.register_forward_pre_hook(lambda *a, role=m.role: note(*a, role=role)) for m in model.members]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"custom_generate": FusedDecoding(seed=0)},
        {"custom_generate": SpeculativeDecoding(draft_tokens=3, seed=0)},
    ],
    ids=["greedy", "beams", "sampling", "static", "no-cache", "chunks", "fused", "speculative"],
)
def test_the_tokens_of_the_reference(members: list[Any], settings: dict[str, Any]) -> None:
    own = {k: v for k, v in settings.items() if k in ("num_beams", "do_sample", "temperature", "top_k")}
    torch.manual_seed(3)
    want = Reference(members, 0.5).generate(**prompts(), max_new_tokens=14, pad_token_id=0, eos_token_id=None, **own)
    model = composed(members)
    torch.manual_seed(3)
    got: list[torch.Tensor] = []
    seen = watched(
        model,
        lambda: got.append(
            model.generate(**prompts(), max_new_tokens=14, pad_token_id=0, eos_token_id=None, **settings)
        ),
    )
    assert torch.equal(got[0], want)
    here = threading.current_thread().name
    assert seen["base"] == {(here, 2)}
    assert {name != here for name, _ in seen["antiexpert"]} == {True}
    assert {count for _, count in seen["antiexpert"]} == {2}
    drafts = {(here, 4)} if isinstance(settings.get("custom_generate"), SpeculativeDecoding) else set()
    assert drafts <= seen["expert"]  # alone, it has all threads
    assert torch.get_num_threads() == 4


def test_off_until_it_is_asked_for(members: list[Any]) -> None:
    model = composed(members)
    model.split_threads = False
    seen = watched(model, lambda: model.generate(**prompts(), max_new_tokens=3, pad_token_id=0))
    assert all(found == {(threading.current_thread().name, 4)} for found in seen.values())


@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
def test_an_error_is_raised_when_nothing_runs_any_more(members: list[Any], role: str) -> None:
    model = composed(members)
    model.generate(**prompts(), max_new_tokens=2, pad_token_id=0)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError(role)

    done = []
    hooks = [getattr(model, role).register_forward_pre_hook(fail)]
    hooks += [m.model.register_forward_hook(lambda *_, name=m.role: done.append(name)) for m in model.members]
    with pytest.raises(ZeroDivisionError, match=role):
        model.generate(**prompts(), max_new_tokens=2, pad_token_id=0)
    assert role not in done
    assert (role == "base") == ("base" not in done)
    for hook in hooks:
        hook.remove()
    assert torch.get_num_threads() == 4
    assert model.generate(**prompts(), max_new_tokens=2, pad_token_id=0).shape == (2, 14)


def test_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert may_split([CPU, CPU])
        assert not may_split([CPU])
        assert not may_split([CPU, torch.device("cuda", 0)])
        with torch.autocast("cpu"):
            assert not may_split([CPU, CPU])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert not may_split([CPU, CPU])
        monkeypatch.undo()
    assert not may_split([CPU, CPU])  # with gradients


def test_gradients_and_inference_mode_are_the_callers(members: list[Any]) -> None:
    model, given = composed(members), prompts()
    model(**given).logits.sum().backward()
    assert all(m.model.get_input_embeddings().weight.grad is not None for m in model.members)
    model.zero_grad()
    with torch.inference_mode():
        inside = model(**given).logits
    with torch.no_grad():
        outside = model(**given).logits
    assert inside.is_inference()
    assert not outside.is_inference()
    torch.testing.assert_close(inside, outside)


def test_copies_have_a_thread_of_their_own() -> None:
    side = SideThread()
    with torch.no_grad():
        assert [int(x) for x in side.run([lambda: torch.tensor(1), lambda: torch.tensor(2)])] == [1, 2]
    for other in (copy.deepcopy(side), pickle.loads(pickle.dumps(side))):
        assert other._pool is None
        assert [int(x) for x in other.run([lambda: torch.tensor(3), lambda: torch.tensor(4)])] == [3, 4]


def test_generations_at_once_on_one_model(members: list[Any]) -> None:
    model = composed(members)
    want = model.generate(**prompts(), max_new_tokens=8, pad_token_id=0)
    got: list[torch.Tensor] = []

    def one() -> None:
        torch.set_num_threads(4)
        got.append(model.generate(**prompts(), max_new_tokens=8, pad_token_id=0))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3
    assert all(torch.equal(x, want) for x in got)
