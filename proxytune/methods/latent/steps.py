"""The latent steps of one generation: from the scores of a token to the embedding fed back in its place.

`write` gets the scores before they are truncated, `capture` after all processors and warpers, `feed` the inputs of the
next forward pass; `LatentDecoding` and `LatentLogitsProcessor` both use these three. Beams are reordered in between:
each row's parent is found by comparing the texts. Without beams nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NoReturn, cast, get_args

import torch
from transformers import PreTrainedModel

from proxytune import ops
from proxytune.errors import InputError, UnsupportedModeError
from proxytune.generation.seeds import StreamIds, seed_of, streams_of
from proxytune.generation.token_patterns import forced
from proxytune.methods.latent.embedding import Embedding, Inputs
from proxytune.methods.latent.gate_state import GateState
from proxytune.methods.latent.gates import LatentGates
from proxytune.methods.latent.mixture import Candidates, LatentMixture
from proxytune.models.ensemble import Ensemble
from proxytune.models.members.adapter_state import is_adapter_layer
from proxytune.models.members.innermost import innermost
from proxytune.models.members.long_rope import refuse_crossing
from proxytune.ops import Impl
from proxytune.ops.noise import Noise
from proxytune.validation import choice

__all__ = ["LatentSteps", "check_latent_settings", "embeddings_of", "latent_steps_of"]


def embeddings_of(model: PreTrainedModel) -> list[Embedding]:
    """The embeddings of all members; each has its own."""
    ensemble = Ensemble.of(model)
    for member in model.members if ensemble.composed else ():
        table = innermost(member.model).get_input_embeddings()
        if member.adapter is not None and is_adapter_layer(cast(Hashable, type(table))):
            raise UnsupportedModeError.of(
                f"latent steps for the {member.role}",
                expected="embeddings that are the same with each of its model's adapters",
                got=f"a {type(member.model).__name__} whose embeddings have adapters, and adapter={member.adapter!r}",
                remedy="Use an adapter of other layers, or load the model twice.",
            )
    return [Embedding(each, role) if ensemble.composed else Embedding(each) for role, each in ensemble.models]


class LatentSteps:
    """The latent steps of one generation.

    Attributes:
        soft: For each step but the last, `[B]`, bool: whether a mixture was fed back. Rows in that step's order.
        entropy: For each step, `[B]`, float32, nats: of the distribution that the token was drawn from.
        known: How many ids all members can embed; None if that is not known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mixture: LatentMixture,
        gates: LatentGates,
        *,
        seed: int,
        lengths: torch.Tensor | int,
        rows: StreamIds = None,
        beams: int = 1,
        impl: ops.Impl = "auto",
    ) -> None:
        """Start before the first token.

        Args:
            model: The composed model, or a plain causal LM.
            mixture: The distribution of the weights.
            gates: Where steps are latent; their discrete ids include those that end the text.
            seed: The key of all noise.
            lengths: `[B]`, int64, or one number for all: how many tokens each prompt has, without padding.
            rows: `[B]`: which stream of the seed each row draws from [0, 1, 2, …].
            beams: How many rows of a prompt may be reordered; 1 for none.
            impl: As in `ops.step`.
        """
        ensemble = Ensemble.of(model)
        self._composed = ensemble.composed
        self.gated = ensemble.weighing is not None and ensemble.weighing.gate is not None
        self._embeddings = embeddings_of(model)
        self.known = min((e.rows for e in self._embeddings if e.rows is not None), default=None)
        self._mixture, self._gates = mixture, gates
        self._seed, self._rows_given, self._beams, self._lengths = seed, rows, beams, lengths
        self._impl: ops.Impl = impl
        self._state: GateState | None = None
        self._rows: torch.Tensor | None = None  # [B, V]: the scores
        self._ids: torch.Tensor | None = None  # [B, T]: the texts of these scores
        self._past: list[Inputs] | None = None  # of each member, [B, fed, …]; only without a cache
        self.soft: list[torch.Tensor] = []
        self.entropy: list[torch.Tensor] = []

    @property
    def waiting(self) -> bool:
        """Whether scores were captured whose token has not been fed back yet."""
        return self._ids is not None

    def write(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """After a cold stop, force the end of the thinking span in scores `[B, V]`, unless a constraint masks it."""
        due = self._begun(input_ids).due(self._gates, input_ids)
        if due is None or self._mixture.kind == "onehot":  # exactly plain decoding
            return scores
        due = due.to(scores.device)
        free = scores.gather(1, due.clamp(min=0)[:, None])[:, 0] > -torch.inf
        return forced(scores, torch.where(free, due, -1))

    def capture(self, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Keep the distribution of the next token: `scores` `[B, V]`, float32, after all processors and warpers."""
        self._begun(input_ids)
        rows = scores.float().contiguous()
        measured = ops.step([rows], want=("lse", "entropy"), impl=self._impl)
        assert measured.lse is not None
        assert measured.entropy is not None
        known = rows[:, : self.known]  # a head may be wider than the embedding
        top, top_ids = known.topk(min(self._mixture.candidates, known.shape[1]), dim=1)
        self._ids, self._rows = input_ids, rows
        self._lse, self._entropy, self._top, self._top_ids = measured.lse, measured.entropy, top, top_ids
        self.entropy.append(measured.entropy)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedModeError.of(
            "latent steps",
            expected="greedy decoding, sampling or beam search",
            got="assisted decoding, which passes the model's arguments on to a draft",
            remedy="Leave assistant_model out.",
        )

    def _begun(self, input_ids: torch.Tensor) -> GateState:
        if self._state is None:
            self._state = GateState.begin(self._gates, len(input_ids), input_ids.device, input_ids.shape[1])
            self._streams = streams_of(self._rows_given, len(input_ids)).to(input_ids.device)
        return self._state

    def feed(self, inputs: dict[str, Any], input_ids: torch.Tensor) -> dict[str, Any]:
        """Put the mixtures into the inputs of the next forward pass.

        Args:
            inputs: The inputs that the model has prepared, with `input_ids`.
            input_ids: `[B, T]`, int64: the whole texts, the last drawn tokens included.

        Returns:
            The inputs; of a plain model with embeddings in place of the ids, of a composed one beside them.

        Raises:
            UnsupportedModeError: If the loop does not take one token at a time, or the model prepares no ids.
        """
        ids = inputs.get("input_ids")
        before = self._ids
        assert before is not None
        assert self._state is not None
        rows, length = input_ids.shape
        new = None if ids is None else ids.shape[1]
        if input_ids.shape != (before.shape[0], before.shape[1] + 1) or new not in (1, length):
            raise UnsupportedModeError.of(
                "latent steps",
                expected="a loop that takes one token per row and step, and feeds it back",
                got=f"{rows} texts of {length} tokens after {len(before)} of {before.shape[1]}, {new} of them fed back",
                remedy="Use greedy decoding, sampling or beam search.",
            )
        tokens = input_ids[:, -1]
        parents = self._parents(input_ids)
        candidates, entropy = self._candidates(tokens, parents)
        state = self._state if parents is None else self._state.of(parents)
        place = tokens.device
        soft, self._state = state.step(self._gates, input_ids, entropy.to(place), candidates.spread.to(place))
        noise = Noise.of(rows, seed=self._seed, device=place)
        start = self._lengths.to(place) if isinstance(self._lengths, torch.Tensor) else self._lengths
        position = start + torch.full_like(tokens, length - 1 - state.start)
        noise = Noise(noise.seed, self._streams, position, noise.branch)
        on_scores = Noise(*(x.to(candidates.ids.device) for x in vars(noise).values()))
        weights = self._mixture.weights(candidates, on_scores)
        assert self._mixture.sigma is not None
        fed = [
            embedding.mixed(
                candidates.ids,
                weights,
                tokens=tokens,
                soft=soft,
                sigma=self._mixture.sigma,
                noise=noise,
                impl=self._impl,
            )
            for embedding in self._embeddings
        ]
        self.soft.append(soft)
        self._ids = self._rows = None
        if new != 1 or self._past is not None:
            fed = self._whole(fed, input_ids, parents)
        if self._composed:
            return {**inputs, "latent_inputs": tuple(fed)}
        return {**inputs, "input_ids": None, **fed[0]}

    def _parents(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The row of the last step that each row continues, `[B]`, int64; None without beams."""
        if self._beams == 1:
            return None
        assert self._ids is not None
        now, before = (x.unflatten(0, (-1, self._beams)) for x in (input_ids[:, :-1], self._ids))  # [P, beams, T]
        same = (now[:, :, None] == before[:, None]).all(-1)  # [P, beams, beams]
        # Waits for the device, as beam search does in every step anyway.
        if not bool(same.any(-1).all()):
            raise UnsupportedModeError.of(
                "latent steps",
                expected="beams that continue beams of the same prompt",
                got="a text that continues none of them",
                remedy="Use transformers' own beam search.",
            )
        first = torch.arange(0, len(input_ids), self._beams, device=input_ids.device)
        return (same.int().argmax(-1) + first[:, None]).flatten()

    def _candidates(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> tuple[Candidates, torch.Tensor]:
        """The likeliest tokens of each row, the emitted one among them; and the entropy `[B]`."""
        assert self._rows is not None
        kept = (self._rows, self._lse, self._entropy, self._top, self._top_ids)
        if parents is not None:
            kept = tuple(x.index_select(0, parents.to(x.device)) for x in kept)  # type: ignore[assignment]
        rows, lse, entropy, top, ids = kept
        emitted = tokens.to(ids.device)[:, None]  # [B, 1]
        own = ids == emitted
        # An emitted token that is not among the likeliest replaces the last of them.
        missing = ~own.any(1, keepdim=True)
        last = torch.zeros_like(own)
        last[:, -1:] = missing
        own = own | last
        z = torch.where(last, rows.gather(1, emitted), top)
        logprobs = z - lse[:, None]
        logprobs = logprobs - logprobs.logsumexp(1, keepdim=True)
        # Masked ids may be beyond a member's embedding.
        return Candidates(torch.where(own | (z == -torch.inf), emitted, ids), logprobs, own), entropy

    def _whole(self, fed: list[Inputs], input_ids: torch.Tensor, parents: torch.Tensor | None) -> list[Inputs]:
        """The inputs of the whole texts, for a loop without a cache: earlier mixtures are fed again."""
        past = self._past
        if past is not None:
            if parents is not None:
                past = [{k: x[parents.to(x.device)] for k, x in one.items()} for one in past]
            fed = [{k: torch.cat([old[k], x], 1) for k, x in one.items()} for old, one in zip(past, fed, strict=True)]
        self._past = fed
        out = []
        for embedding, one in zip(self._embeddings, fed, strict=True):
            count = one["inputs_embeds"].shape[1]
            prompt = embedding.of(input_ids[:, :-count])
            out.append({k: torch.cat([prompt[k], x], 1) for k, x in one.items()})
        return out


def check_latent_settings(mixture: Any, gates: Any, impl: Any) -> tuple[LatentMixture, LatentGates]:
    """Check the settings of `LatentDecoding` and `LatentLogitsProcessor`; InputError if one is of another type."""
    if isinstance(mixture, str):
        mixture = LatentMixture(kind=mixture)  # type: ignore[arg-type]
    for name, value, kind in (("mixture", mixture, LatentMixture), ("gates", gates, LatentGates)):
        if not isinstance(value, kind):
            raise InputError.of(
                name,
                expected=f"a {kind.__name__}",
                got=repr(value),
                remedy="Pass e.g. LatentMixture(kind='gumbel', tau=0.25) and LatentGates(max_run=64).",
            )
    choice("impl", impl, get_args(Impl), remedy="Leave it out for 'auto'.")
    return mixture, gates


def latent_steps_of(
    model: Any,
    mixture: LatentMixture,
    gates: LatentGates,
    generation_config: Any,
    *,
    seed: int | None,
    lengths: torch.Tensor,
    most_new: int,
    rows: StreamIds,
    impl: Impl,
) -> LatentSteps:
    """The latent steps of one `generate()`: ids that end, begin or pad its texts are discrete.

    `seed=None` draws one from torch's default generator. `lengths` is `[B]` or `[1]`, int64, without padding;
    `most_new` the maximum number of new tokens.

    Raises:
        UnsupportedModeError: If, with a cache, texts may cross the switch of a long-rope member.
        InputError: If a gate names an id that the model cannot embed.
        UnsupportedModelError: If the model's embedding cannot be replaced by a mixture.
    """
    if generation_config.use_cache:  # reading a text again would read tokens where mixtures were fed
        instead = "pass use_cache=False, or decode without latent steps"
        refuse_crossing("latent steps", Ensemble.of(model).switches, lengths, most_new, instead=instead)
    names = ("_eos_token_tensor", "_pad_token_tensor", "_bos_token_tensor")
    special_ids = [getattr(generation_config, name, None) for name in names]
    special = {int(i) for x in special_ids if x is not None for i in x.flatten().tolist() if i >= 0}
    steps = LatentSteps(
        model,
        mixture,
        gates.with_discrete(sorted(special)) if special else gates,
        # Without noise no seed is drawn: it would shift the draws of plain decoding.
        seed=seed_of(seed) if mixture.is_random else 0,
        lengths=lengths,
        rows=rows,
        beams=int(generation_config.num_beams or 1),
        impl=impl,
    )
    if steps.known is not None and gates.largest_id >= steps.known:
        raise InputError.of(
            "gates",
            expected=f"token ids below {steps.known}, which the model can embed",
            got=f"{gates.largest_id}",
            remedy="Take them from the tokenizer of this model.",
        )
    return steps
