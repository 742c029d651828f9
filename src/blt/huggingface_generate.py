"""A transformers model's weights and prompts -> the ids that its ``generate`` writes, by our steps instead of its own."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from blt.byte_ids import decode
from blt.generate import Pieces
from blt.huggingface import from_config_json, weight_name
from blt.incremental import Networks, State, prefill, step
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.kv_cache import SPARE_SLOTS
from blt.sampling import NextLogits, Probabilities, draw
from blt.speculate import Drawer, advance, draft_limit

InputIds = Int[Tensor, "row position"]
NextIds = Int[Tensor, " row"]
RowLogits = Float[Tensor, "row vocab"]


def fast_generate(
    model: Any,
    input_ids: InputIds,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    speculate: int = 0,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """What ``generate`` of a ``BltForCausalLM`` writes, at a cost per byte that does not grow with the text.

    For ``model.generate(input_ids, use_cache=False, custom_generate=blt.fast_generate)``. ``speculate=8`` beside these drafts
    up to so many bytes a round, for one row: same ids when greedy, same distribution when not; processors then see drafts,
    too, so they may keep no state. ``streamer=`` takes a ``ByteStreamer`` or any streamer of transformers.

    Rows of a batch are each what they are alone, whatever their padding, which is where transformers' own go wrong. For one
    row ids, scores and random numbers are those of ``generate(use_cache=False)``, but as in the released model an EOS that
    does not end a row closes its document, and entropies are computed in fp32. Scores and logits that are kept of a row after
    its end are those of zeros. Raises ValueError for what is not supported, naming it.

    Tested with transformers 5.23. There ``generate`` tells a ``custom_generate`` nothing of its own arguments
    ``assistant_model`` and ``tokenizer`` (for stop strings: ``stopping_criteria=[StopStringCriteria(...)]``), and its default
    ``use_cache=True`` fails for this model on the way here. Models that we save have ``use_cache`` False.
    """
    _refuse_unsupported(generation_config, len(input_ids), speculate, model_kwargs)
    networks = networks_of(model)
    prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
    if streamer is not None:
        streamer.put(input_ids.cpu())
    else:
        streamer = _streamer_of_caller(model)  # which has shown it the prompt
    sequences = Sequences(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    if speculate:
        _write_drafting(networks, prompts[0], sequences, speculate)
    else:
        _write_together(networks, prompts, sequences)
    return sequences.result()


def networks_of(model: Any) -> Networks:
    """Our networks on the weights of a ``BltForCausalLM``: its own tensors, so that they change with it.

    Only an entropy model that is not in fp32 is copied, to fp32. Raises ValueError for a model of another kind, or one whose
    weights are not there as they are.
    """
    config = from_config_json(model.config.to_dict(), "the config of this model")
    assert config.entropy_model is not None and config.entropy_model.kind == "transformer"
    with torch.device("meta"):
        entropy_model, network = EntropyModel(config.entropy_model), ByteLatentTransformer(config)
    found = model.state_dict()  # detached: who needs gradients of them keeps them
    for module, prefix in ((entropy_model, "entropy_model."), (network, "network.")):
        names = {name: weight_name(prefix + name) for name in module.state_dict()}
        for theirs in names.values():
            if theirs not in found or found[theirs].is_meta:
                raise ValueError(f"this model holds no {theirs}; merge its adapters, and load it whole on one device")
        weights = {name: found[theirs] for name, theirs in names.items()}
        if module is entropy_model:
            weights = {name: weight.float() for name, weight in weights.items()}
        module.load_state_dict(weights, assign=True)
    return Networks(config, entropy_model, network)


def unpadded(input_ids: InputIds, attention_mask: Tensor | None) -> list[list[int]]:
    """The ids of each row that its mask lets through. Raises ValueError for a row without any.

    >>> unpadded(torch.tensor([[3, 3, 1], [1, 70, 71]]), torch.tensor([[0, 0, 1], [1, 1, 1]]))
    [[1], [1, 70, 71]]
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    prompts = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, attention_mask, strict=True)]
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"row {row} of input_ids is empty or all masked by attention_mask; a prompt holds at least BOS (id 1)"
            )
    return prompts


@dataclass
class Sequences:
    """All rows as transformers shows them to processors and criteria: prompts with their padding, then the new ids."""

    ids: InputIds
    processor: Callable[[Tensor, Tensor], Tensor]
    criteria: Any  # callable: ids, scores -> which rows have ended
    config: Any
    streamer: Any

    def __post_init__(self) -> None:
        kept = self.config.return_dict_in_generate
        self.scores: tuple[RowLogits, ...] | None = () if kept and self.config.output_scores else None
        self.logits: tuple[RowLogits, ...] | None = () if kept and self.config.output_logits else None
        self.unfinished: Bool[Tensor, " row"] = torch.ones_like(self.ids[:, 0], dtype=torch.bool)
        # As in transformers, rows that have ended are padded only where one of the criteria is about EOS
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    def rows_going_on(self) -> list[bool]:
        """Which rows need more ids: those that have not ended, or without padding all until the last has."""
        going_on = self.unfinished if self.pads else self.unfinished.any().expand(len(self.ids))
        return going_on.tolist()

    def choose(self, logits: RowLogits) -> NextIds:
        """The next id of each row; those of rows that have ended are padding, whatever their logits."""
        logits = logits.to(self.ids.device, torch.float32)
        scores = self.processor(self.ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.config.do_sample else scores.argmax(-1)
        if self.pads:
            chosen = torch.where(self.unfinished, chosen, self.config._pad_token_tensor.to(chosen.device))
        return chosen

    def append(self, chosen: NextIds) -> None:
        """Take in an id for each row, and stream it."""
        self.ids = torch.cat([self.ids, chosen[:, None]], dim=1)
        self.unfinished = self.unfinished & ~self.criteria(self.ids, self.scores)
        if self.streamer is not None:
            self.streamer.put(chosen.cpu())

    def result(self) -> Any:
        """What ``generate`` returns."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=self.ids, scores=self.scores, logits=self.logits)


def _write_together(networks: Networks, prompts: list[list[int]], sequences: Sequences) -> None:
    """Rows side by side; each leaves the state when it has ended."""
    state, logits = _read(networks, prompts)
    rows = list(range(len(prompts)))  # of the sequences, in the order of the state
    while True:
        all_logits = logits.new_zeros(len(prompts), logits.shape[1])
        all_logits[rows] = logits
        chosen = sequences.choose(all_logits)
        sequences.append(chosen)
        going_on = sequences.rows_going_on()
        if not any(going_on):
            return
        for place in reversed(range(len(rows))):
            if not going_on[rows[place]]:
                state.remove(place)
                rows[place] = rows[-1]
                rows.pop()
        ids = chosen.tolist()
        logits = step(networks, state, [[ids[row]] for row in rows])


def _read(networks: Networks, prompts: list[list[int]]) -> tuple[State, RowLogits]:
    """The state of rows that have read these prompts, and the logits of the id after each."""
    state, first = prefill(networks, prompts[0])
    logits = [first]
    for prompt in prompts[1:]:
        joining, next_logits = prefill(networks, prompt)
        state.append(joining)
        logits.append(next_logits)
    return state, torch.cat(logits)


def _write_drafting(networks: Networks, prompt: list[int], sequences: Sequences, most: int) -> None:
    """One row, by rounds that draft up to so many ids and verify them."""
    shown_prompt = sequences.ids

    def distribution(logits: NextLogits, past: list[int], new: list[int]) -> Probabilities:
        written = torch.tensor([[*past, *new][len(prompt) :]], dtype=torch.long, device=shown_prompt.device)
        ids = torch.cat([shown_prompt, written], dim=1)
        scores = sequences.processor(ids, logits[None].to(ids.device, torch.float32))[0].cpu()
        return scores.softmax(0) if sequences.config.do_sample else one_hot(scores.argmax(), len(scores)).float()

    state, logits = prefill(networks, prompt)
    # A greedy run leaves the global generator as it was, as transformers does
    drawer = Drawer(distribution, torch.default_generator if sequences.config.do_sample else torch.Generator())
    drawer.pending = draw(distribution(logits[0].cpu(), prompt, []), drawer.generator)
    new = [drawer.pending]
    while True:
        for drawn in new:
            sequences.append(torch.tensor([drawn], device=shown_prompt.device))
            if not any(sequences.rows_going_on()):
                return
        left = sequences.config.max_length - sequences.ids.shape[1]
        limit = min(left - 1, draft_limit(networks, drawer.acceptance, most))
        new = advance(networks, state, [drawer], [limit]).ids[0]


def _refuse_unsupported(generation_config: Any, rows: int, speculate: int, model_kwargs: dict[str, Any]) -> None:
    mode = str(generation_config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise ValueError(f"fast_generate does greedy_search and sample, not {mode}; leave out what asks for it")
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, option):
            raise ValueError(f"fast_generate keeps nothing for {option}; leave it out")
    if not 0 <= speculate < SPARE_SLOTS:
        raise ValueError(f"speculate must be 0 (plain) to {SPARE_SLOTS - 1} bytes, got {speculate}")
    if speculate and rows > 1:
        raise ValueError(f"speculate={speculate} is for one row, got {rows}; leave it out, or give the rows one by one")
    for option in ("output_scores", "output_logits"):
        if speculate and getattr(generation_config, option):
            raise ValueError(f"{option} needs speculate=0, got {speculate}")
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise ValueError("fast_generate cannot go on from past_key_values; give all ids as input_ids")


def _streamer_of_caller(model: Any) -> Any:
    """The ``streamer=`` of the ``generate`` that called us, which transformers 5.23 hands to its own decoding only."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model:
            return frame.f_locals.get("streamer")
        frame = frame.f_back
    return None


def print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


class ByteStreamer:
    """A streamer of transformers that lets text go as soon as its characters are whole, control ids left out.

    ``on_piece`` is called with each piece; by default it is printed. What is no UTF-8 comes as U+FFFD. For one row.

    >>> streamer = ByteStreamer(skip_prompt=True, on_piece=lambda piece: print(repr(piece)))
    >>> for ids in ([[1, 76]], [101], [199], [173], [230]):  # a prompt, then "a", "é" in two bytes, and half a character
    ...     streamer.put(torch.tensor(ids))
    'a'
    'é'
    >>> streamer.end()
    '�'
    """

    def __init__(self, skip_prompt: bool = False, on_piece: Callable[[str], object] = print_piece) -> None:
        self.skip_prompt = skip_prompt
        self.on_piece = on_piece
        self._pieces = Pieces()
        self._reads_prompt = True

    def put(self, ids: InputIds | NextIds) -> None:
        """Take in ids, those of the prompt first. Raises ValueError for more rows than one."""
        if len(ids) > 1:
            raise ValueError(f"a ByteStreamer streams one row, got {len(ids)}")
        is_prompt, self._reads_prompt = self._reads_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self._release(b"".join(map(self._pieces.push, decode(ids.flatten().tolist()))))

    def end(self) -> None:
        """Let go of what was held back; what comes next is another prompt."""
        self._release(self._pieces.end())
        self._reads_prompt = True

    def _release(self, piece: bytes) -> None:
        if piece:
            self.on_piece(piece.decode("utf-8", "replace"))
