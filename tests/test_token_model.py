"""A token model becomes a latent transformer that computes what its layers did; and it teaches what it expects of bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from blt.byte_ids import BOE, BOS, BYTE_OFFSET, EOS, encode
from blt.config_file import read_run_config
from blt.language_model import load
from blt.model.transformer import Transformer
from blt.token_model import LATENT, latent_of_token_model
from blt.token_teacher import Lesson, TokenTeacher, Vocabulary, load_token_teacher, taught_loss
from blt.tokenizer_files import byte_letters

disable_progress_bar()
Blt = Callable[..., Any]
CPU = torch.device("cpu")
TEXT = "the cat and the hat and that cat, the bat and the mat\n" * 20 + "été, ça été là où\n" * 10
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_theta": 1234.0, "rope_type": "default"},
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA_31 = {  # with positions that fit the rows below
    "rope_type": "llama3",
    "rope_theta": 1234.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}


def random_llama(seed: int = 0, vocabulary: int = 300, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(SHAPE | changes))).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
        else:
            weight.data.mul_(4)  # predictions that are far from even
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it: a random model and a byte-level tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    random_llama(vocabulary=tokenizer.get_vocab_size()).save_pretrained(folder)
    return folder


# the latent transformer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3},
        {"rope_parameters": LLAMA_31},
    ],
    ids=["grouped", "every_head_its_own", "one_for_all", "wide_heads", "scaled"],
)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_the_latent_transformer_computes_what_the_token_models_layers_do(
    changes: dict[str, Any], shard_size: str, tmp_path: Path
) -> None:
    theirs = random_llama(**changes)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    config, weights = latent_of_token_model(tmp_path)
    ours = Transformer(config)
    ours.load_state_dict({name.removeprefix(LATENT): weight.tensor(torch.float32) for name, weight in weights.items()})
    states = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.model(inputs_embeds=states, use_cache=False).last_hidden_state
        found = theirs.model.norm(ours(states, torch.zeros(2, 70, dtype=torch.long)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_weights_keep_their_bits_and_their_dtype(tmp_path: Path) -> None:
    theirs = random_llama(num_key_value_heads=4).bfloat16()
    theirs.save_pretrained(tmp_path)
    _, weights = latent_of_token_model(tmp_path)
    block = theirs.model.layers[1]
    same = {
        "attention.v_proj": block.self_attn.v_proj,
        "ffn.down_proj": block.mlp.down_proj,
        "ffn_norm": block.post_attention_layernorm,
    }
    for name, layer in same.items():
        found = weights[f"{LATENT}layers.1.{name}.weight"]
        assert found.dtype == torch.bfloat16 and found.tensor(torch.bfloat16).equal(layer.weight)
    queries = weights[f"{LATENT}layers.1.attention.q_proj.weight"].tensor(torch.bfloat16)
    rows, theirs_rows = (sorted(map(tuple, matrix.tolist())) for matrix in (queries, block.self_attn.q_proj.weight))
    assert rows == theirs_rows  # the same rows in another order


def test_a_blt_begins_with_it_and_is_trained_to_the_end(
    llama: Path, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    begun = tmp_path / "begun"
    said = blt_command("convert", "--from-token-model", llama, "--config", tiny_toml, begun)
    assert said.code == 0 and f"Next: blt train {begun}/train.toml" in said.stdout.decode()
    untrained = load(begun, device="cpu")
    config, weights = latent_of_token_model(llama)
    assert untrained.config.latent == config and untrained.config.patching.threshold_nats is None
    for name, weight in weights.items():
        kept = untrained.network.state_dict()[name.removeprefix("network.")]
        assert kept.equal(weight.tensor(torch.float32)), name
    with pytest.raises(ValueError, match="calibrate"):
        untrained.patches("text")
    with pytest.raises(ValueError, match="no threshold yet"):
        untrained.generate("text")
    adapted = blt_command("train", begun / "train.toml", "--set", "lora.rank=2", "--out", tmp_path / "adapted")
    assert adapted.code == 1 and "train it in whole before [lora]" in adapted.stderr
    run = read_run_config(begun / "train.toml")
    assert run.training.latent_learning_rate_factor == 0.1 and run.init == str(begun)
    trained = blt_command("train", begun / "train.toml", "--out", tmp_path / "run", "--json")
    assert trained.json["bits_per_byte"] < 8
    first = "network.latent_transformer.transformer.layers.0.attention.v_proj.weight"
    moved = load(tmp_path / "run", device="cpu").network.state_dict()[first.removeprefix("network.")]
    assert 0 < (moved - weights[first].tensor(torch.float32)).abs().max() < 0.1


def test_the_licence_of_a_token_model_is_said_and_kept_and_its_own_rate_too(
    llama: Path, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    licensed = Path(shutil.copytree(llama, tmp_path / "licensed"))
    (licensed / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    command = ["--config", tiny_toml, "--set", "training.latent_learning_rate_factor=1.0", tmp_path / "begun"]
    said = blt_command("convert", "--from-token-model", licensed, *command)
    assert "licence llama3.2" in said.stderr
    card = load(tmp_path / "begun", device="cpu").card
    assert (card.license, card.source) == ("llama3.2", "licensed")
    assert read_run_config(tmp_path / "begun" / "train.toml").training.latent_learning_rate_factor == 1


BROKEN = {
    "another kind": ({"model_type": "gpt2"}, "model_type is 'gpt2', and only 'llama'"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "positions": (
        {"rope_parameters": {"rope_theta": 1.0, "rope_type": "yarn"}},
        "rotary positions are scaled as 'yarn'",
    ),
    "old positions": (
        {"rope_parameters": None, "rope_theta": 1.0, "rope_scaling": {"type": "linear"}},
        "are scaled as 'linear'",
    ),
    "heads": ({"head_dim": 24}, "head_dim is 24"),
    "shapes": ({"intermediate_size": 50}, "does not have the shape"),
    "layers": ({"num_hidden_layers": 3}, "lacks the weight model.layers.2."),
    "no width": ({"hidden_size": None}, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "its values are not what they should be"),
    "words": ({"num_key_value_heads": "2"}, "its values are not what they should be"),
    "sharing": ({"num_key_value_heads": 3}, "4 heads cannot share 3 keys"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_token_model_that_cannot_be_expressed_is_refused(
    name: str, llama: Path, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    changes, message = BROKEN[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(llama / "model.safetensors")
    values = {**json.loads((llama / "config.json").read_text()), **changes}
    values = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    target = tmp_path / "blt"
    refused = blt_command("convert", "--from-token-model", tmp_path / "model", "--config", tiny_toml, target)
    assert refused.code == 1 and message in refused.stderr and not target.exists()


def test_what_a_conversion_lacks_is_said(llama: Path, tiny_toml: Path, tmp_path: Path, blt_command: Blt) -> None:
    def refusal(*arguments: object) -> str:
        finished = blt_command("convert", *arguments)
        assert finished.code == 1
        return str(finished.stderr)

    assert "a --config" in refusal("--from-token-model", llama, tmp_path / "a")
    assert "wants SOURCE and DEST" in refusal(tmp_path / "a")
    assert "there is no config.json" in refusal("--from-token-model", tmp_path, "--config", tiny_toml, tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in refusal("--from-token-model", llama, "--config", tiny_toml, tmp_path / "full")


# the teacher


@pytest.fixture(scope="module")
def teacher(llama: Path) -> TokenTeacher:
    return load_token_teacher(llama, CPU)


def next_token(teacher: TokenTeacher, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits = teacher.model(input_ids=torch.tensor([[0, *tokens]]), use_cache=False).logits
    return logits[0, -1].double().softmax(-1)


def naive_next_byte(teacher: TokenTeacher, before: list[int], inside: bytes) -> Tensor:
    """By the definition, with a pass for each sequence of tokens: after whole tokens and the first bytes of another one."""
    bytes_of, found = teacher.vocabulary.bytes_of, torch.zeros(260, dtype=torch.float64)
    for token, probability in enumerate(next_token(teacher, before)):
        data = bytes_of[token]
        if len(data) > len(inside) and data.startswith(inside):
            found[data[len(inside)] + BYTE_OFFSET] += probability
        elif token == 1 and not inside:
            found[EOS] += probability
        elif data == inside and inside:
            for after, then in enumerate(next_token(teacher, [*before, token])):
                if bytes_of[after]:
                    found[bytes_of[after][0] + BYTE_OFFSET] += probability * then
                elif after == 1:
                    found[EOS] += probability * then
    return found / found.sum()


def test_the_probability_of_a_byte_is_that_of_the_tokens_that_put_it_there(teacher: TokenTeacher) -> None:
    text = "that hat, été"
    expected = []
    tokens = teacher.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(tokens) < len(text) - 3  # some are long
    for number, token in enumerate(tokens):
        data = teacher.vocabulary.bytes_of[token]
        expected += [naive_next_byte(teacher, tokens[:number], data[:size]) for size in range(len(data))]
    expected.append(naive_next_byte(teacher, tokens, b""))
    found, is_taught = teacher.next_bytes(torch.tensor([encode(text)]))
    assert is_taught.all()
    torch.testing.assert_close(found[0].double(), torch.stack(expected), atol=1e-6, rtol=1e-4)


def test_each_document_of_a_row_is_taught_as_it_is_alone(teacher: TokenTeacher) -> None:
    texts = ["the cat", "that été"]
    row = [i for text in texts for i in (*encode(text), EOS)] + [BOE] * 3
    found, is_taught = teacher.next_bytes(torch.tensor([row, row]))
    begin = 0
    for text in texts:
        alone, _ = teacher.next_bytes(torch.tensor([encode(text)]))
        end = begin + alone.shape[1]
        torch.testing.assert_close(found[1, begin:end], alone[0], atol=1e-6, rtol=1e-4)
        begin = end + 1
    ends = [place for place, byte_id in enumerate(row) if byte_id in (EOS, BOE)]
    assert not is_taught[:, ends].any() and int(is_taught[0].sum()) == len(row) - len(ends)


def test_bytes_that_are_no_text_are_not_taught_and_cut_characters_do_no_harm(teacher: TokenTeacher) -> None:
    cut = "étée".encode()[1:-1]  # the second half of a character, a letter, a character, and no end
    found, is_taught = teacher.next_bytes(torch.tensor([encode(cut), [BOS, *encode(b"a\xffbc")[1:]]]))
    assert is_taught.tolist()[0] == [False, True, True, True, True]
    assert not is_taught[1].any()
    torch.testing.assert_close(found.sum(-1), is_taught.float())


@given(st.text(alphabet="the catéß\n<s>/", max_size=40))
@settings(max_examples=20)
def test_probabilities_sum_to_one_and_never_lie_on_what_no_text_holds(text: str) -> None:
    model = random_llama(vocabulary=258)
    vocabulary = Vocabulary([b"", b"", *(bytes([byte]) for byte in range(256))])
    tokenizer = Tokenizer(models.BPE({letter: 2 + place for place, letter in enumerate(byte_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found, is_taught = TokenTeacher(model, tokenizer, vocabulary, 0, 1).next_bytes(torch.tensor([encode(text)]))
    assert is_taught.all() == bool(text)
    torch.testing.assert_close(found.sum(-1), is_taught.float())
    assert not found[..., [BOE, BOS, 3]].any()


def test_tokens_that_were_added_stand_for_their_own_text(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "more"))
    described = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = len(described["model"]["vocab"])
    described["added_tokens"].append({"id": added, "content": "  é ", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    random_llama(vocabulary=added + 1).save_pretrained(folder)
    teacher = load_token_teacher(folder, CPU)
    assert teacher.vocabulary.bytes_of[added] == "  é ".encode()
    assert teacher.next_bytes(torch.tensor([encode("a  é b")]))[1].all()


def test_taught_loss_is_that_of_the_text_where_nobody_teaches() -> None:
    logits = torch.randn(1, 3, 260, generator=torch.Generator().manual_seed(0))
    targets, taught = torch.tensor([[70, 71, BOE]]), torch.full((1, 3, 260), 1 / 260)
    of_text = torch.nn.functional.cross_entropy(logits[0, :2], targets[0, :2], reduction="none")
    none, one = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[True, False, True]])
    assert taught_loss(logits, taught, none, targets) == pytest.approx(float(of_text.sum()))
    even = -logits[0, 0].log_softmax(0).mean()
    assert taught_loss(logits, taught, one, targets) == pytest.approx(float(even + of_text[1]))


def test_the_teachers_work_is_counted(llama: Path) -> None:
    teacher = load_token_teacher(llama, CPU)
    lesson, ids = Lesson(teacher, 0.5), torch.tensor([encode("that hat")])
    lesson.objective(torch.zeros(1, 9, 260), ids, ids, torch.tensor(1.0))
    matrices = sum(weight.numel() for name, weight in teacher.model.named_parameters() if "norm" not in name)
    matrices -= teacher.model.get_input_embeddings().weight.numel()
    tokens = teacher.tokenizer.encode("that hat", add_special_tokens=False).ids
    assert (
        2 * matrices * len(tokens) / 8 < lesson.flops_per_byte < 2 * matrices
    )  # with the alternatives, less than one a byte


def test_a_taught_network_comes_closer_to_its_teacher(
    llama: Path, teacher: TokenTeacher, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    ids = torch.tensor([encode("def x return value\n    y + x")])
    expected, _ = teacher.next_bytes(ids)
    distances = []
    for more in ([], ["--set", f"token_teacher.folder={llama}", "--set", "token_teacher.weight=1.0"]):
        run = tmp_path / f"run{len(more)}"
        assert blt_command("train", tiny_toml, *more, "--out", run).code == 0
        lm = load(run, device="cpu")
        with torch.no_grad():
            predicted = lm.network(ids, lm.patch_starts(ids)).log_softmax(-1)
        distances.append(float(-(expected * predicted).sum(-1).mean()))
    assert distances[1] < distances[0] - 0.3


def test_a_teacher_that_cannot_teach_is_named_before_the_run_folder_is_claimed(
    llama: Path, tiny_toml: Path, tmp_path: Path, blt_command: Blt
) -> None:
    def refusal(folder: Path) -> str:
        finished = blt_command("train", tiny_toml, "--set", f"token_teacher.folder={folder}", "--out", tmp_path / "run")
        assert finished.code == 1 and not (tmp_path / "run").exists()
        return str(finished.stderr)

    assert "there is no config.json" in refusal(tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert "there is no tokenizer.json" in refusal(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({"decoder": {"type": "Metaspace"}}))
    assert "is not byte-level" in refusal(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert "is damaged" in refusal(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("[]")
    assert "is not byte-level" in refusal(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    assert "could not be loaded" in refusal(tmp_path / "model")  # there are no weights
    random_llama(max_position_embeddings=32).save_pretrained(tmp_path / "model")
    assert "can read 32 tokens" in refusal(tmp_path / "model")
