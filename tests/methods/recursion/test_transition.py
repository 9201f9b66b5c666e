"""The noisy transition of a recurrent state, its noise, and halting."""

from __future__ import annotations

import pytest
import torch
from support.recursion import (
    CLOSE,
    NEW,
    SEED,
    SIZE,
    How,
    check,
    hooks_of,
    model_of,
    padded,
    prompts,
    reference,
    rms,
    run,
    variates,
)

from proxytune import RecursionDecoding
from proxytune.errors import InputError
from proxytune.methods.recursion.adapters import HrmTextRecursion
from proxytune.methods.recursion.transition import Transition
from proxytune.ops.noise import Noise

# --- states and noise ------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_logits_at_every_position() -> None:
    # One forward pass, also at positions that nothing is drawn from; noise at padding must not be seen.
    model, (ids, mask) = model_of(), padded()
    noise = Noise.of(3, seed=SEED, branch=4)
    transition = Transition(noise, sigma=0.4, at=(0, 1, 2), cycles=3, size=SIZE)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), HrmTextRecursion().perturbed(model, transition):
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for b in range(3):
        kept = mask[b].bool()
        want, _ = reference(model, ids[b][kept].tolist(), How(sigma=0.4, row=b, trajectory=4))
        assert torch.allclose(got[b][kept], want, atol=CLOSE, rtol=0)
        plain, _ = reference(model, ids[b][kept].tolist(), How(sigma=0.0))
        assert float((want - plain).abs().max()) > 0.1  # the noise is seen at all
    assert hooks_of(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transition_in_lower_precision(dtype: torch.dtype) -> None:
    u = torch.randn(2, 5, 64).to(dtype)
    transition = Transition(Noise.of(2, seed=SEED), sigma=0.25, at=(1,), cycles=2, size=64)
    assert transition(u, cycle=0, positions=torch.arange(5)[None]) is u
    got = transition(u, cycle=1, positions=torch.arange(5)[None])
    assert got.dtype == dtype
    for b in range(2):
        wide = u[b].double()
        noise = 0.25 * rms(wide) * variates(How(row=b), 5, 1, 64)
        same = u[b] + noise.to(dtype)  # noise rounded into the dtype, then added in it
        err, allowed = (got[b].double() - wide - noise).abs(), (same.double() - wide - noise).abs()
        assert float(err.max()) <= float(allowed.max()) + 1e-6


def test_the_noise_is_standard_normal_and_independent() -> None:
    # Over positions, rows, trajectories and cycles: each is a key of its own.
    size, length = 64, 50
    noise = Noise.of(8, seed=1, row=torch.arange(8) // 2, branch=torch.arange(8) % 2)
    transition = Transition(noise, sigma=1.0, at=(0, 1), cycles=2, size=size)
    u = torch.ones(8, length, size)  # rms 1: what is added is n
    n = torch.stack([transition(u, cycle=c, positions=torch.arange(length)[None]) - 1 for c in (0, 1)])
    flat = n.flatten().double()
    assert abs(float(flat.mean())) < 4 / len(flat) ** 0.5
    assert abs(float(flat.var()) - 1) < 4 * (2 / len(flat)) ** 0.5
    assert abs(float((flat**4).mean()) - 3) < 4 * (96 / len(flat)) ** 0.5
    for one, other in ((n[0], n[1]), (n[:, ::2], n[:, 1::2]), (n[:, :-2], n[:, 2:]), (n[:, :, 1:], n[:, :, :-1])):
        assert abs(float((one * other).mean())) < 4 / one.numel() ** 0.5


# --- halting ---------------------------------------------------------------------------------------------------------


def test_halting_goes_by_row() -> None:
    model, ids = model_of(5), prompts(3)
    # Noise in the first cycle only, so that the later ones can settle; at this threshold some do.
    how, free = How(at=(0,), halt=1.0), How(at=(0,))
    loop = RecursionDecoding(sigma=how.sigma, when="once", trajectories=2, seed=SEED, halt=how.halt)
    out = run(model, loop, ids)
    check(out, model, ids, torch.ones_like(ids), how, range(2))
    cycles = out.trajectories.cycles
    assert int(cycles.min()) < 5 * NEW
    assert len(set(cycles.flatten().tolist())) > 1
    # Position by position: of the same prompt, some halt and some do not.
    _, used = reference(model, ids[0].tolist(), how)
    assert 1 < min(used) < max(used) == 5
    assert set(reference(model, ids[0].tolist(), free)[1]) == {5}


def test_a_halted_row_is_kept_and_its_neighbour_goes_on() -> None:
    transition = Transition(Noise.of(2, seed=1), sigma=0.5, at=(3,), cycles=4, size=4, halt=0.1)
    where = torch.zeros(1, 1, dtype=torch.long)
    still, moving = torch.ones(4), [torch.full((4,), 2.0**c) for c in range(4)]
    for cycle in range(4):
        u = torch.stack([still if cycle < 2 else still * 9, moving[cycle]])[:, None]
        out = transition(u, cycle=cycle, positions=where)
        if cycle < 3:
            assert torch.equal(out[1], u[1])
    assert torch.equal(out[0, 0], still)  # neither what came after, nor noise
    assert not torch.equal(out[1], u[1])
    assert transition.used.tolist() == [2, 4]
    # The next forward pass starts anew, also of another length.
    transition(torch.ones(2, 3, 4), cycle=0, positions=torch.zeros(1, 3, dtype=torch.long))


def test_halting_needs_a_third_cycle() -> None:
    with pytest.raises(InputError, match="3 cycles"):
        run(model_of(2), RecursionDecoding(sigma=0.1, halt=0.5), prompts(2))
