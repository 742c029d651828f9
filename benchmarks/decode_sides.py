"""What ``decode.py`` lets write: ours, transformers' BLT with the same weights, and a Llama that reads as many weights.

Each side reads prompts, untimed, as many rows as there are, and then writes stretch after stretch from where it stands.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blt.byte_ids import BOS, BYTE_OFFSET, EOS, VOCAB_SIZE
from blt.config import EntropyModelConfig, HashEmbeddingsConfig, ModelConfig, PatchingConfig, TransformerConfig
from blt.flops import LLAMA_3_BYTES_PER_TOKEN
from blt.incremental import Networks, State, prefill
from blt.model.byte_latent_transformer import ByteLatentTransformer
from blt.model.entropy_model import EntropyModel
from blt.model.patching import threshold_for_patch_size
from blt.model.transformer import initialise
from blt.model_files import save_model
from blt.sampling import NextLogits, Probabilities, Sampling, draw, next_probabilities
from blt.speculate import Drawer, advance, draft_limit

NUMBER_BYTES = 4  # fp32
PATCH_BYTES = 4.5  # what the threshold of random weights is calibrated to
CALIBRATION_ROWS, CALIBRATION_BYTES = 8, 128  # what is written for it


@dataclass(frozen=True)
class Stretch:
    """What was written in one go, and what it cost."""

    num_bytes: float
    seconds: float
    latent_calls: int = 0
    patches: int = 0  # closed
    drafted: int = 0
    accepted: int = 0


class Ours:
    """Rows of ours that are written together. EOS is never drawn, so all go on."""

    def __init__(self, networks: Networks, temperature: float, speculate: int = 0) -> None:
        self.networks, self.temperature, self.speculate = networks, temperature, speculate
        self.drawers: list[Drawer] = []
        self.state: State

    def read(self, prompts: Sequence[list[int]]) -> None:
        self.drawers = []
        for seed, ids in enumerate(prompts):
            state, logits = prefill(self.networks, ids)
            drawer = Drawer(self._distribution, torch.Generator().manual_seed(seed))
            drawer.pending = draw(self._distribution(logits[0], ids, []), drawer.generator)
            if seed == 0:
                self.state = state
            else:
                self.state.append(state)
            self.drawers.append(drawer)

    def write(self, num_bytes: int) -> Stretch:
        written = latent_calls = drafted = accepted = 0
        patches = self._patches()
        begin = time.perf_counter()
        while written < num_bytes * len(self.drawers):
            limits = [draft_limit(self.networks, each.acceptance, self.speculate) for each in self.drawers]
            done = advance(self.networks, self.state, self.drawers, limits)
            written += sum(map(len, done.ids))
            latent_calls += done.latent_calls
            drafted += done.drafted
            accepted += done.accepted
        seconds = time.perf_counter() - begin
        return Stretch(written, seconds, latent_calls, self._patches() - patches, drafted, accepted)

    def text(self) -> list[int]:
        """The first row's ids, its prompt with them."""
        return self.state.rows[0].ids

    def weight_bytes(self) -> int:
        modules = (self.networks.entropy_model, self.networks.network)
        return sum(_weight_bytes(module) for module in modules if module is not None)

    def cache_bytes(self) -> int:
        return sum(cache.keys_values.nbytes for cache in self.state.caches)

    def bytes_to_read(self, written: Sequence[Stretch]) -> float:
        """What must be read of memory for the stretches that came last: each matrix once per use, for all rows together,
        and the keys and values that each row may attend to where it stood on average. Rows of tables are left out.
        """
        config = self.networks.config
        num_bytes, patches = sum(part.num_bytes for part in written), sum(part.patches for part in written)
        rows = len(self.drawers)
        position = sum(row.standing.num_ids for row in self.state.rows) / rows - num_bytes / rows / 2
        patch = (self._patches() - patches / 2) / rows
        per_step, per_patch = matrices_read(self.networks)
        keys_per_byte = sum(
            _keys_values_bytes(stack, position)
            for stack in (config.entropy_model, config.local_encoder, config.local_decoder)
            if stack is not None
        )
        weights = per_step * num_bytes / rows + per_patch * sum(part.latent_calls for part in written)
        return weights + keys_per_byte * num_bytes + _keys_values_bytes(config.latent, patch) * patches

    def _patches(self) -> int:
        return sum(row.standing.num_patches for row in self.state.rows)

    def _distribution(self, logits: NextLogits, past: list[int], new: list[int]) -> Probabilities:
        logits = logits.clone()
        logits[EOS] = -torch.inf
        return next_probabilities(logits, Sampling(self.temperature), b"")


class HuggingFaceBlt:
    """Transformers' BLT, which works out the whole row again for each byte: its cache is not used, as with it the
    generated bytes are wrong. So is its batched generation: one row only.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ids: Tensor

    @staticmethod
    def model_of(networks: Networks) -> Any:
        """BltForCausalLM with the weights of these networks."""
        from transformers import BltForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), networks.config, networks.entropy_model, networks.network)
            model = BltForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for weight in model.parameters():
                weight.data = weight.data.clone()  # in memory now, and not only in the file when first asked for
        model.generation_config.eos_token_id = None  # it goes on, as ours does
        return model

    def read(self, prompts: Sequence[list[int]]) -> None:
        (prompt,) = prompts
        self.ids = torch.tensor([prompt])

    def write(self, num_bytes: int) -> Stretch:
        begin = time.perf_counter()
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=num_bytes,
            use_cache=False,
            do_sample=False,
        )
        return Stretch(num_bytes, time.perf_counter() - begin)

    def weight_bytes(self) -> int:
        return _weight_bytes(self.model)

    def cache_bytes(self) -> int:
        return 0


class Llama:
    """Transformers' Llama, which decodes greedily with its cache; a token counts as 4.4 bytes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ids: Tensor
        self.cache: Any

    @staticmethod
    def model_like(networks: Networks) -> Any:
        """LlamaForCausalLM with our latent transformer's shape and random weights.

        Its vocabulary is as large as it takes for one token to read what we read for a patch and its 4.4 bytes.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        latent = networks.config.latent
        per_step, per_patch = matrices_read(networks)
        body = latent.num_layers * (4 * latent.width**2 + 3 * latent.width * latent.ffn_width)
        head = (per_patch + LLAMA_3_BYTES_PER_TOKEN * per_step) / NUMBER_BYTES - body
        config = LlamaConfig(
            vocab_size=round(head / latent.width),
            hidden_size=latent.width,
            intermediate_size=latent.ffn_width,
            num_hidden_layers=latent.num_layers,
            num_attention_heads=latent.num_heads,
            max_position_embeddings=networks.config.max_bytes,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    @torch.no_grad()
    def read(self, prompts: Sequence[list[int]]) -> None:
        """As many tokens as the prompts' bytes make, whichever."""
        from transformers import DynamicCache

        size = (len(prompts), max(2, round(len(prompts[0]) / LLAMA_3_BYTES_PER_TOKEN)))
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, self.model.config.vocab_size, size, generator=generator)
        self.cache = DynamicCache(config=self.model.config)
        self.model(self.ids[:, :-1], past_key_values=self.cache, logits_to_keep=1)

    def write(self, num_bytes: int) -> Stretch:
        steps, times = max(1, round(num_bytes / LLAMA_3_BYTES_PER_TOKEN)), []

        def tick(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            """Stops nothing, and is called after every token."""
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=steps + 1,  # from the first tick on, so that what generate sets up is not counted
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[tick],
        )
        return Stretch(steps * LLAMA_3_BYTES_PER_TOKEN * len(self.ids), times[-1] - times[0])

    def weight_bytes(self) -> int:
        return _weight_bytes(self.model)

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def matrices_read(networks: Networks) -> tuple[int, int]:
    """Bytes of the matrices that one step reads, whatever the number of rows, and of those that a latent call adds."""
    encoder, latent, decoder = (
        networks.network.local_encoder,
        networks.network.latent_transformer,
        networks.network.local_decoder,
    )
    per_step = [encoder.transformer, decoder.transformer, decoder.head]
    per_patch = [latent, encoder.slot_proj, encoder.cross_attention, decoder.slot_proj]
    if networks.entropy_model is not None:
        per_step += [networks.entropy_model.transformer, networks.entropy_model.head]
    for cross_attention in decoder.crosses:
        per_step += [cross_attention.q_proj, cross_attention.o_proj]
        per_patch += [cross_attention.k_proj, cross_attention.v_proj]
    return sum(map(_weight_bytes, per_step)), sum(map(_weight_bytes, per_patch))


def _weight_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.state_dict().values())


def _keys_values_bytes(config: TransformerConfig, position: float) -> float:
    keys = min(position, config.window_positions or position)
    return 2 * config.num_layers * config.width * NUMBER_BYTES * keys


def shape(size: str) -> ModelConfig:
    """``110m``: of 110.3 million parameters, 23 million lie in hash tables, of which a byte reads six rows."""
    if size == "110m":
        return ModelConfig(
            entropy_model=EntropyModelConfig(num_layers=4, width=256, num_heads=4, window_positions=512),
            hash_embeddings=HashEmbeddingsConfig(table_rows=10_000),
            local_encoder=TransformerConfig(num_layers=1, width=384, num_heads=6, window_positions=512),
            latent=TransformerConfig(num_layers=10, width=768, num_heads=12),
            local_decoder=TransformerConfig(num_layers=4, width=384, num_heads=6, window_positions=512),
            max_bytes=16_384,
        )
    assert size == "tiny"
    stack: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 48, "window_positions": 16}
    return ModelConfig(
        entropy_model=EntropyModelConfig(**stack),
        hash_embeddings=HashEmbeddingsConfig(table_rows=100),
        local_encoder=TransformerConfig(**stack),
        latent=TransformerConfig(num_layers=2, width=64, num_heads=2, ffn_width=96),
        local_decoder=TransformerConfig(**stack),
        max_bytes=1024,
    )


@torch.no_grad()
def random_networks(config: ModelConfig) -> Networks:
    """The config's networks with random weights, and a threshold that cuts what they write into patches of 4.5 bytes.

    Embeddings are as large as a trained model's states, so that predictions differ from byte to byte.
    """
    assert config.entropy_model is not None
    entropy_model, network = EntropyModel(config.entropy_model), ByteLatentTransformer(config)
    for seed, module in enumerate((entropy_model, network)):
        generator = torch.Generator().manual_seed(seed)
        initialise(module, generator)
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.weight.normal_(generator=generator)
        module.eval()
    context = config.entropy_model.window_positions or CALIBRATION_BYTES  # from here on all positions are alike
    prompts = [random_prompt(context, seed) for seed in range(CALIBRATION_ROWS)]
    networks = _calibrated(Networks(config, entropy_model, network), torch.tensor(prompts))
    writing = Ours(networks, temperature=1.0)
    writing.read(prompts)
    writing.write(CALIBRATION_BYTES)
    return _calibrated(networks, torch.tensor([row.ids for row in writing.state.rows]))


def _calibrated(networks: Networks, rows: Tensor) -> Networks:
    """With the threshold that cuts the ends of these rows into patches of 4.5 bytes."""
    assert networks.entropy_model is not None
    entropies = networks.entropy_model.entropies(rows)[:, -CALIBRATION_BYTES - 1 :]
    threshold = threshold_for_patch_size(entropies, rows[:, -CALIBRATION_BYTES:], PatchingConfig(), PATCH_BYTES)
    patching = PatchingConfig(threshold_nats=threshold)
    return networks._replace(config=networks.config.model_copy(update={"patching": patching}))


def random_prompt(num_bytes: int, seed: int) -> list[int]:
    """BOS and so many random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return [BOS, *torch.randint(BYTE_OFFSET, VOCAB_SIZE, (num_bytes,), generator=generator).tolist()]
