"""Every knob of the project: frozen models. One per part of the network; a part takes its own config and nothing wider."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class Config(BaseModel):
    """What all configs share: frozen, no unknown keys, no silent conversions between kinds of value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def swiglu_width(width: int) -> int:
    """The released models' feed-forward width: 2/3 of 4 x width, rounded up to a multiple of 256.

    >>> [swiglu_width(width) for width in (768, 1024, 1280, 2048, 4096)]
    [2048, 2816, 3584, 5632, 11008]
    """
    return -(-(8 * width // 3) // 256) * 256


C = TypeVar("C", bound=Config)


class RopeScalingConfig(Config):
    """Slower rotary positions for texts longer than a model was first trained on, as Llama 3.1 has them.

    Pairs of numbers that turn fewer than ``low_freq_factor`` times in ``original_positions`` turn ``factor`` times slower,
    those that turn more than ``high_freq_factor`` times as before, and between the two is a gradual passage.
    """

    factor: float = Field(ge=1)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_positions: int = Field(ge=1)

    @model_validator(mode="after")
    def low_is_below_high(self) -> "RopeScalingConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} must be below {self.high_freq_factor}")
        return self


class TransformerConfig(Config):
    """A stack of pre-norm blocks: self-attention with rotary positions, then SwiGLU.

    The cross-attention of local encoder and decoder has as many heads as their self-attention.
    """

    num_layers: int = Field(ge=1)
    width: int = Field(ge=2)
    num_heads: int = Field(ge=1)
    ffn_width: int = Field(default_factory=lambda data: swiglu_width(data.get("width", 0)), ge=1)
    rope_theta: float = Field(500_000.0, gt=0)
    rope_scaling: RopeScalingConfig | None = None
    norm_eps: float = Field(1e-5, gt=0)
    window_positions: int | None = Field(None, ge=1)  # keys one query sees, itself included; absent: all before it

    @model_validator(mode="after")
    def heads_have_an_even_width(self) -> "TransformerConfig":
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width {self.width} does not split into {self.num_heads} heads of an even width")
        return self

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class EntropyModelConfig(TransformerConfig):
    """The small byte transformer that tells how hard the next byte is (2.3, 4.2)."""

    kind: Literal["transformer"] = "transformer"
    rope_theta: float = Field(10_000.0, gt=0)
    reset_at_newline: bool = False  # a newline opens a fresh context, so repetition cannot wear entropies down (4.4)


class NgramEntropyModelConfig(Config):
    """Statistics of byte n-grams instead, counted in one pass over the training text and looked up in tables."""

    kind: Literal["ngram"]
    max_order: int = Field(6, ge=3, le=8)  # bytes of the longest context
    table_bits: int = Field(20, ge=8, le=24)  # the contexts of each order above 2 share 2**table_bits slots of 2 bytes
    backoff: float = Field(32.0, gt=0)  # occurrences, per different next byte, that make a context half trusted

    @property
    def hashed_orders(self) -> int:
        return self.max_order - 2


class PatchingConfig(Config):
    """Where patches begin (section 2)."""

    rule: Literal["entropy", "entropy_rise", "space", "fixed"] = "entropy"
    threshold_nats: float | None = None  # entropy, entropy_rise: absent until calibrated
    patch_bytes: int | None = Field(None, ge=1)  # fixed: the length of every patch
    max_patch_bytes: int | None = Field(None, ge=1)  # longer patches are split; absent: no limit
    rounded_entropies: bool = False  # entropy_rise: compared as a sidecar keeps them, in steps of ln 260 / 255

    @model_validator(mode="after")
    def rule_has_what_it_needs(self) -> "PatchingConfig":
        if (self.rule == "fixed") != (self.patch_bytes is not None):
            raise ValueError("patch_bytes belongs to rule 'fixed', and 'fixed' needs it")
        if not self.uses_entropies and self.threshold_nats is not None:
            raise ValueError(f"threshold_nats does not apply to rule {self.rule!r}")
        if self.rounded_entropies and self.rule != "entropy_rise":
            raise ValueError(f"rounded_entropies belongs to rule 'entropy_rise', not to {self.rule!r}")
        return self

    @property
    def uses_entropies(self) -> bool:
        return self.rule in ("entropy", "entropy_rise")


class HashEmbeddingsConfig(Config):
    """Hashed byte n-grams, summed onto the byte embedding (3.2.1)."""

    ngram_bytes: tuple[int, ...] = Field((3, 4, 5, 6, 7, 8), min_length=1, strict=False)
    num_functions: int = Field(1, ge=1, le=11)
    table_rows: int = Field(500_002, ge=1)  # of each function and n-gram size
    min_count: int = Field(
        1, ge=1, le=255
    )  # n-grams that training text has less often read one row in common; 1: none is
    filter_bits: int = Field(
        24, ge=8, le=30
    )  # with min_count: 2**filter_bits bits of each table tell which are not rare

    @model_validator(mode="after")
    def sizes_are_ngrams(self) -> "HashEmbeddingsConfig":
        if min(self.ngram_bytes) < 1 or len(set(self.ngram_bytes)) != len(self.ngram_bytes):
            raise ValueError(f"ngram_bytes must be different sizes of at least 1, got {list(self.ngram_bytes)}")
        if self.min_count > 1 and self.table_rows < 2:
            raise ValueError("table_rows must be at least 2 with a min_count: the last one is read by all rare n-grams")
        return self

    @property
    def num_tables(self) -> int:
        return self.num_functions * len(self.ngram_bytes)


class ModelConfig(Config):
    """A whole BLT: the entropy model (absent for rules that need none), the patching, the three networks."""

    entropy_model: EntropyModelConfig | NgramEntropyModelConfig | None = None
    patching: PatchingConfig = PatchingConfig()
    hash_embeddings: HashEmbeddingsConfig = HashEmbeddingsConfig()
    local_encoder: TransformerConfig
    latent: TransformerConfig
    local_decoder: TransformerConfig
    slots_per_patch: int = Field(2, ge=1)  # query vectors per patch in the encoder, key vectors in the decoder (k)
    max_bytes: int = Field(24_576, ge=2)  # positions of a row, BOS included

    @field_validator("entropy_model", mode="before")
    @classmethod
    def kind_says_which_entropy_model(cls, values: Any) -> Any:
        """Files without a kind mean the transformer. A union of pydantic's would name the kind among a wrong key's sections."""
        if not isinstance(values, dict):
            return values
        kinds: dict[Any, type[Config]] = {"transformer": EntropyModelConfig, "ngram": NgramEntropyModelConfig}
        kind = values.get("kind", "transformer")
        if kind not in kinds:
            raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
        return kinds[kind].model_validate(values)

    @model_validator(mode="after")
    def parts_fit_together(self) -> "ModelConfig":
        if self.local_encoder.width != self.local_decoder.width:
            raise ValueError(
                f"local_encoder.width {self.local_encoder.width} must equal local_decoder.width "
                f"{self.local_decoder.width}: the decoder starts from the encoder's byte states (3.3)"
            )
        if self.patching.uses_entropies and self.entropy_model is None:
            raise ValueError(f"patching rule {self.patching.rule!r} needs [model.entropy_model]")
        return self

    def without_threshold(self) -> "ModelConfig":
        """The same, not calibrated."""
        return self.model_copy(update={"patching": self.patching.model_copy(update={"threshold_nats": None})})


# every matrix of every layer: self-attention, cross-attention, feed-forward
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class CorpusConfig(Config):
    """Which documents are read, and which of them are held out."""

    paths: tuple[str, ...] = Field(("stdlib",), min_length=1, strict=False)
    raw: bool = False  # every file is one document of bytes, whatever its name
    held_out_fraction: float = Field(0.03, gt=0, lt=1)  # of documents, chosen by a hash of their content
    entropies: str | None = None  # folder of ``blt entropies`` over this text; absent: computed as they are needed


# of [model]: what decides the shapes of the network's weights and what they compute
NETWORK_SECTIONS = ("hash_embeddings", "local_encoder", "latent", "local_decoder", "slots_per_patch")


class CalibrationConfig(Config):
    """How the patching threshold is found once the entropy model is trained."""

    target_patch_bytes: float = Field(4.5, gt=1)
    sample_bytes: int = Field(400_000, ge=1000)  # of training text


class TrainingConfig(Config):
    """One optimisation run, of the entropy model or of the network. Sizes are counted in bytes, never in time."""

    total_bytes: int = Field(ge=1)  # positions trained on; the schedule spans them
    row_bytes: int = Field(512, ge=4)
    rows_per_step: int = Field(8, ge=1)
    micro_batches: int = Field(1, ge=1)  # gradient accumulation: a step's rows in this many passes
    learning_rate: float = Field(4e-4, gt=0)
    table_learning_rate: float | None = Field(None, gt=0)  # of byte and hash embeddings; absent: as all others
    matrix_optimizer: Literal["adamw", "muon"] = "adamw"  # of all matrices but a head; the rest is AdamW's
    schedule: Literal["cosine", "warmup_stable_decay"] = "cosine"
    warmup_steps: int = Field(50, ge=0)
    decay_fraction: float = Field(0.2, gt=0, le=1)  # warmup_stable_decay: the last part, a straight line to 0
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    adam_eps: float = Field(1e-8, gt=0)
    latent_learning_rate_factor: float = Field(1.0, gt=0)  # of latent layers; 0.1 where a token model gave them (6.2)
    weight_decay: float = Field(0.1, ge=0)  # not on norms, embeddings and tables
    clip_norm: float = Field(1.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: measured
    table_dtype: Literal["float32", "bfloat16"] = "float32"  # of the hash tables and their moments
    recompute_activations: bool = (
        False  # work each layer out again in the backward pass: less memory, a third more time
    )
    seed: int = Field(0, ge=0)
    steps_per_report: int = Field(20, ge=1)
    steps_per_save: int = Field(200, ge=1)
    steps_per_evaluation: int = Field(200, ge=1)
    evaluation_bytes: int = Field(65_536, ge=1)  # held-out text in each evaluation

    @model_validator(mode="after")
    def the_optimiser_can_run(self) -> "TrainingConfig":
        if self.rows_per_step % self.micro_batches:
            raise ValueError(
                f"rows_per_step {self.rows_per_step} does not split into {self.micro_batches} micro_batches"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        return self

    @property
    def bytes_per_step(self) -> int:
        return self.row_bytes * self.rows_per_step

    @property
    def total_steps(self) -> int:
        return -(-self.total_bytes // self.bytes_per_step)


class LoraConfig(Config):
    """Low-rank adapters (arXiv 2106.09685) in the network's matrices instead of training those; peft makes them."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)  # what an adapter adds is scaled by alpha / rank
    targets: tuple[str, ...] = Field(LORA_TARGETS, min_length=1, strict=False)  # names of layers, or ends of names


class TokenTeacherConfig(Config):
    """A token model whose predictions of the next byte the network learns beside the text (distillation)."""

    folder: str  # in transformers' format, with a byte-level tokenizer
    weight: float = Field(0.5, gt=0, le=1)  # the teacher's share of what is minimised


class RunConfig(Config):
    """Everything ``blt train`` needs; RUN/config.toml is one, enough to start the run again."""

    data: CorpusConfig = CorpusConfig()
    init: str | None = None  # any MODEL that training goes on from; with its entropy model and threshold, if it has one
    lora: LoraConfig | None = None
    model: ModelConfig
    pretrained_entropy_model: str | None = None  # any MODEL whose entropy model is taken as it is, instead of training
    entropy_teacher: str | None = (
        None  # any MODEL whose entropy model's predictions the trained one learns (distillation)
    )
    token_teacher: TokenTeacherConfig | None = None
    entropy_training: TrainingConfig | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    training: TrainingConfig

    @property
    def entropy_model_source(self) -> str | None:
        """The MODEL whose entropy model is used as it is, frozen; None: it is made from the text, or there is none."""
        goes_on = self.init is not None and self.model.patching.threshold_nats is not None
        return self.init if goes_on else self.pretrained_entropy_model

    @model_validator(mode="after")
    def entropy_model_is_trained(self) -> "RunConfig":
        if self.entropy_model_source is not None and self.entropy_model_source == self.init:
            if self.entropy_training is not None or self.pretrained_entropy_model is not None:
                raise ValueError(
                    f"the patches of {self.init} come from its own entropy model, which stays as it is; leave out "
                    "[entropy_training] and pretrained_entropy_model"
                )
            return self
        if isinstance(self.model.entropy_model, NgramEntropyModelConfig):
            if self.entropy_training is not None:
                raise ValueError(
                    "an n-gram [model.entropy_model] is counted, not trained; leave [entropy_training] out "
                    "(--set entropy_training=none)"
                )
            return self
        sources = (self.entropy_training is not None) + (self.pretrained_entropy_model is not None)
        if sources != (self.model.entropy_model is not None):
            raise ValueError(
                "a [model.entropy_model] needs either [entropy_training] or pretrained_entropy_model; without one, neither"
            )
        return self

    @model_validator(mode="after")
    def adapters_have_something_to_adapt(self) -> "RunConfig":
        if self.lora is not None and self.init is None:
            raise ValueError("[lora] adapts a model that exists: it needs init, the model (--init MODEL)")
        return self

    @model_validator(mode="after")
    def a_teacher_has_somebody_to_teach(self) -> "RunConfig":
        if self.entropy_teacher is not None and self.entropy_training is None:
            raise ValueError(
                "entropy_teacher teaches an entropy model while it is trained: it needs [entropy_training]"
            )
        return self

    @model_validator(mode="after")
    def scored_entropies_can_be_used(self) -> "RunConfig":
        if self.data.entropies is None:
            return self
        patching = self.model.patching
        if not patching.uses_entropies:
            raise ValueError(f"data.entropies is of no use: patching rule {patching.rule!r} reads no entropies")
        if isinstance(self.model.entropy_model, NgramEntropyModelConfig):
            raise ValueError(
                "data.entropies is of no use: an n-gram entropy model looks them up as fast as they are read"
            )
        if self.entropy_model_source is None:
            raise ValueError(
                "data.entropies needs pretrained_entropy_model, the model that scored them, and no [entropy_training]"
            )
        if patching.rule == "entropy_rise" and not patching.rounded_entropies:
            raise ValueError(
                "data.entropies holds rounded entropies, whose differences are not those that rule 'entropy_rise' compares; "
                "set model.patching.rounded_entropies = true, and the model will round them wherever it runs"
            )
        return self

    @model_validator(mode="after")
    def only_the_network_has_a_latent_transformer(self) -> "RunConfig":
        if self.entropy_training is not None and self.entropy_training.latent_learning_rate_factor != 1:
            raise ValueError(
                "entropy_training.latent_learning_rate_factor is of no use: an entropy model has no latent layers"
            )
        return self

    @model_validator(mode="after")
    def rows_fit_into_the_model(self) -> "RunConfig":
        for name, training in (("training", self.training), ("entropy_training", self.entropy_training)):
            if training is not None and training.row_bytes > self.model.max_bytes:
                raise ValueError(
                    f"{name}.row_bytes {training.row_bytes} exceeds model.max_bytes {self.model.max_bytes}"
                )
        return self

    def with_training(self, **updates: Any) -> "RunConfig":
        """The same config with these values in the training of both networks. Raises ValueError as the file would."""
        values = self.model_dump()
        for section in ("training", "entropy_training"):
            if values[section] is not None:
                values[section] |= updates
        return validated(RunConfig, values, "command line")


def validated(kind: type[C], values: dict[str, Any], origin: str) -> C:
    """``values`` as a config of this kind; a ValueError that names ``origin`` and every key at fault."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{origin}: {problems(error)}") from None


def problems(error: ValidationError) -> str:
    """What pydantic found, as one sentence that names every key at fault."""
    found = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "the whole"
        unknown = problem["type"] == "extra_forbidden"
        found.append(f"{key}: {'unknown key' if unknown else problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(found)
