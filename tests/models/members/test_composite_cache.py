"""The composite cache: whose it may be, and that what is done to it is done to every member's layers.

Whatever happens to a cache, the next logits must be those of a cache-free forward over the tokens that it then stands
for, computed row by row.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.reference import next_logits
from support.tiny import WINDOW, shared
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

import proxytune
from proxytune import ProxyTunedModel
from proxytune.errors import CacheError
from proxytune.models.members.cache_name import CACHE
from proxytune.models.members.composite_cache import adopt, view

ALPHA = 0.7
# Members of unequal families, so that a view over the wrong layers cannot be right: full and sliding attention, with
# the sliding layers in the base, in the companions, or in both.
FAMILIES = [("llama", "mistral"), ("gemma3", "gpt2"), ("mistral", "gemma3")]


def compose(base: str = "llama", companion: str = "mistral") -> ProxyTunedModel:
    members = shared(base, 1), shared(companion, 2), shared(companion, 3)
    return proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], alpha=ALPHA, check_vocabulary=False)


@pytest.fixture(params=FAMILIES, ids="-".join)
def model(request: pytest.FixtureRequest) -> ProxyTunedModel:
    return compose(*request.param)


def members_of(model: ProxyTunedModel) -> list[PreTrainedModel]:
    return [model.base, model.expert, model.antiexpert]


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length))


@torch.no_grad()
def assert_continues(model: ProxyTunedModel, cache: Cache, seen: torch.Tensor, new: int = 3) -> torch.Tensor:
    """Forward a few more tokens on the cache; each row is as a cache-free forward over `seen` and them."""
    more = tokens(seen.shape[0], new)
    out = model(more, **{CACHE: cache})
    whole = torch.cat([seen, more], 1)
    for row, ids in enumerate(whole):
        for last in range(new):
            want = next_logits(members_of(model), ALPHA, ids[: seen.shape[1] + last + 1])
            assert torch.isfinite(want).all()
            torch.testing.assert_close(out.logits[row, last], want, atol=1e-4, rtol=1e-4)
    return whole


@torch.no_grad()
def filled(model: ProxyTunedModel, ids: torch.Tensor, cache: Cache | None = None) -> Cache:
    return model(ids, **{CACHE: cache}).past_key_values


# --- adopting ----------------------------------------------------------------------------------------------------

# Caches that know nothing (no config), that were built for another model with other layers, or for this one.
EMPTY: dict[str, Callable[[ProxyTunedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic for the base": lambda model: DynamicCache(config=model.base.config),
    "dynamic for the expert": lambda model: DynamicCache(config=model.expert.config),
    "dynamic for the composition": lambda model: DynamicCache(config=model.config),
    "static for the base": lambda model: StaticCache(config=model.base.config, max_cache_len=40),
    "static for the composition": lambda model: StaticCache(config=model.config, max_cache_len=40),
}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_cache_is_adopted_in_place(model: ProxyTunedModel, kind: str) -> None:
    cache = EMPTY[kind](model)
    if kind == "static for the base" and all(layer.is_sliding for layer in cache.layers):
        # Such layers end at the window. How long the cache was meant to be for the members without one is lost.
        with pytest.raises(CacheError, match=f"sliding layers only, of length {WINDOW}"):
            filled(model, tokens(2, 3), cache)
        return
    seen = tokens(2, WINDOW + 3)
    assert filled(model, seen, cache) is cache
    layers = list(cache.layers)
    assert len(layers) == sum(m.config.num_hidden_layers for m in members_of(model))
    seen = assert_continues(model, cache, seen)
    # Adopted once: later forwards extend these very layers.
    assert_continues(model, cache, seen, new=1)
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
    assert {int(layer.get_seq_length()) for layer in layers} == {seen.shape[1] + 1}


@pytest.mark.parametrize("kind", EMPTY)
def test_sliding_layers_are_the_members_own(kind: str) -> None:
    # A member's window must not spread to the others, which transformers before 5.20 did for one config.
    model = compose("gemma3", "gpt2")
    cache = EMPTY[kind](model)
    adopt(cache, model.config.member_configs, model.cache_owner)
    assert [bool(layer.is_sliding) for layer in cache.layers] == [True, False, False, False, False, False]


@pytest.mark.smoke
@pytest.mark.parametrize("filler", ["base", "expert", "plain"])
def test_a_foreign_filled_cache_is_refused_and_left_alone(model: ProxyTunedModel, filler: str) -> None:
    ids = tokens(1, 5)
    other = shared("qwen3", 5) if filler == "plain" else getattr(model, filler)
    cache = other(ids, use_cache=True).past_key_values
    before, layers = model.token_forwards, list(cache.layers)
    with pytest.raises(CacheError, match=r"got a DynamicCache of 2 layers filled by another model\. The companions"):
        model(ids[:, :1], **{CACHE: cache})
    assert model.token_forwards == before
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
    # Still good for its own model.
    torch.testing.assert_close(
        other(ids[:, :1], **{CACHE: cache}).logits[:, -1], other(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
    )


def test_a_cache_filled_by_one_layer_only_is_foreign(model: ProxyTunedModel) -> None:
    cache = DynamicCache(config=model.config)
    cache.layers[-1].update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    with pytest.raises(CacheError, match="filled by another model"):
        model(tokens(1, 2), **{CACHE: cache})


@pytest.mark.smoke
def test_another_composition_s_cache_is_refused() -> None:
    # The very same members at another α would even give right logits; but who tells them from other members?
    one, other = compose(), compose()
    cache = filled(one, tokens(1, 4))
    with pytest.raises(CacheError, match="filled by another model"):
        other(tokens(1, 1), **{CACHE: cache})
    assert one.cache_owner != other.cache_owner


def test_alpha_may_change_on_a_filled_cache() -> None:
    model = compose()
    ids = tokens(1, 6)
    cache = filled(model, ids[:, :-1])
    model.alpha = -2.0
    got = model(ids[:, -1:], **{CACHE: cache}).logits[0, -1]
    torch.testing.assert_close(got, next_logits(members_of(model), -2.0, ids[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        ((), "tuple"),
        (((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)),), "tuple"),  # the form of transformers before 4.36
    ],
    ids=["encoder-decoder", "empty tuple", "tuple"],
)
def test_what_is_no_cache_of_a_decoder_is_refused(cache: Any, name: str) -> None:
    with pytest.raises(CacheError, match=f"{CACHE}: expected a cache of a decoder, .*; got a {name}"):
        compose()(tokens(1, 3), **{CACHE: cache})


class OwnCache(DynamicCache):
    """A class that proxytune does not know, so that it cannot rebuild its layers."""


def test_a_cache_of_an_unknown_class_has_to_fit(model: ProxyTunedModel) -> None:
    match = r"expected a OwnCache with the 6 layers of all members; got 2 layers\. Build it as OwnCache\(config=model\."
    with pytest.raises(CacheError, match=match):
        model(tokens(1, 3), **{CACHE: OwnCache(config=model.base.config)})
    cache, seen = OwnCache(config=model.config), tokens(2, 5)
    filled(model, seen, cache)
    assert_continues(model, cache, seen)


# --- what is done to a filled cache --------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_copy_is_still_owned_and_independent(model: ProxyTunedModel) -> None:
    seen = tokens(2, WINDOW + 2)
    cache = filled(model, seen)
    branch = copy.deepcopy(cache)
    longer = assert_continues(model, branch, seen)
    # The original has not moved, and both go on for themselves.
    assert cache.get_seq_length() == seen.shape[1]
    assert_continues(model, cache, seen)
    assert_continues(model, branch, longer)


# Companions of the same window need no more than it; and a cache that is shorter than all windows tells its length.
@pytest.mark.parametrize(("companion", "length"), [("mistral", 40), ("mistral", 5), ("llama", 5)])
def test_a_static_cache_of_sliding_layers_is_adopted_if_nothing_is_lost(companion: str, length: int) -> None:
    model = compose("mistral", companion)
    cache, seen = StaticCache(config=model.base.config, max_cache_len=length), tokens(2, length // 2)
    filled(model, seen, cache)
    assert_continues(model, cache, seen)


@pytest.mark.parametrize("kind", ["dynamic for the composition", "static for the composition"])
def test_after_a_reset_it_is_as_new(model: ProxyTunedModel, kind: str) -> None:
    cache = EMPTY[kind](model)
    filled(model, tokens(2, WINDOW + 2), cache)
    cache.reset()
    if any(int(layer.get_seq_length()) for layer in cache.layers):
        pytest.skip("this transformers only zeroes dynamic layers, and goes on counting their tokens")
    seen = tokens(2, WINDOW + 1)
    filled(model, seen, cache)
    assert_continues(model, cache, seen)
    # Empty, it may also go to another composition.
    cache.reset()
    other = compose("gpt2", "llama")
    filled(other, seen, cache)
    assert_continues(other, cache, seen)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["dynamic", "static for the composition"])
def test_reordering_reaches_every_member(model: ProxyTunedModel, kind: str) -> None:
    cache, seen = EMPTY[kind](model), tokens(4, WINDOW + 3)
    filled(model, seen, cache)
    rows = torch.tensor([2, 2, 0, 3])  # as beams do: one row twice, one dropped, one where it was
    cache.reorder_cache(rows)
    assert_continues(model, cache, seen[rows])


def test_rows_are_repeated_and_selected_in_every_member(model: ProxyTunedModel) -> None:
    seen = tokens(2, WINDOW + 3)
    cache = filled(model, seen)
    cache.batch_repeat_interleave(3)
    seen = assert_continues(model, cache, seen.repeat_interleave(3, 0), new=1)
    rows = torch.tensor([5, 0])
    cache.batch_select_indices(rows)
    assert_continues(model, cache, seen[rows])


# Within the window; far past it, where sliding layers have to have recorded their past; and back to before it.
@pytest.mark.parametrize(("length", "removed"), [(WINDOW - 2, 3), (3 * WINDOW, 2), (WINDOW + 2, 5)])
def test_cropping_shortens_every_member(model: ProxyTunedModel, length: int, removed: int) -> None:
    seen = tokens(2, length)
    cache = DynamicCache()
    adopt(cache, model.config.member_configs, model.cache_owner)
    cache.activate_past_recording()
    filled(model, seen, cache)
    cache.crop(-removed)
    assert_continues(model, cache, seen[:, :-removed])


def test_a_cache_that_is_given_is_used_whatever_use_cache_says(model: ProxyTunedModel) -> None:
    # transformers' own models do so too; leaving the cache aside would leave its tokens out of the prefix.
    ids = tokens(1, 6)
    cache = filled(model, ids[:, :-1])
    out = model(ids[:, -1:], **{CACHE: cache}, use_cache=False)
    want = next_logits(members_of(model), ALPHA, ids[0])
    torch.testing.assert_close(out.logits[0, -1], want, atol=1e-4, rtol=1e-4)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("role", ["base", "expert", "antiexpert"])
def test_a_cache_that_only_some_members_have_extended_is_refused(
    model: ProxyTunedModel, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tokens(1, 5)
    cache = filled(model, seen)
    before = copy.deepcopy(cache)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    # In the last layer of one member: all layers before it have already seen the new token.
    with monkeypatch.context() as patch:
        patch.setattr(
            cache.layers[model.config.spans[list(model.token_forwards).index(role)][1] - 1], "update", interrupted
        )
        with pytest.raises(KeyboardInterrupt):
            model(tokens(1, 1), **{CACHE: cache})
    with pytest.raises(CacheError, match="expected layers that have all seen the same tokens; got layers of 5 to 6"):
        model(tokens(1, 1), **{CACHE: cache})
    assert_continues(model, before, seen)


# --- views -------------------------------------------------------------------------------------------------------


def test_a_view_shares_its_members_layers_and_nothing_else() -> None:
    model = compose("gemma3", "gpt2")
    cache = filled(model, tokens(2, 5))
    layers = list(cache.layers)
    parts = [view(cache, *span) for span in model.config.spans]
    assert [layer for part in parts for layer in part.layers] == layers
    assert {type(part) for part in parts} == {DynamicCache}
    # An update through the view is one of the composite cache; a change of the view's own list is not.
    new = torch.ones(2, 4, 1, 8)
    parts[1].update(new, new, 0)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 6, 5, 5, 5]
    assert torch.equal(cache.layers[2].keys[:, :, -1:], new)
    parts[1].layers.clear()
    assert cache.layers == layers


def test_a_view_offloads_as_its_cache_does() -> None:
    # Offloading itself needs a GPU; what steers it are attributes of the cache, which a view has to carry on.
    model = compose()
    cache = DynamicCache(config=model.config)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, object()
    adopt(cache, model.config.member_configs, model.cache_owner)
    for span in model.config.spans:
        part = view(cache, *span)
        assert part.offloading is True
        assert part.only_non_sliding is False
        assert part.prefetch_stream is cache.prefetch_stream


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_offloaded_cache_continues_as_any_other() -> None:
    members = [copy.deepcopy(shared(kind, seed)).cuda() for kind, seed in (("llama", 1), ("gpt2", 2), ("gpt2", 3))]
    model = proxytune.wrap(members[0], expert=members[1], antiexpert=members[2], alpha=ALPHA, check_vocabulary=False)
    ids = tokens(2, 9).cuda()
    settings = {"max_new_tokens": 8, "do_sample": False}
    offloaded = model.generate(ids, cache_implementation="offloaded", **settings)
    assert torch.equal(offloaded, model.generate(ids, **settings))
