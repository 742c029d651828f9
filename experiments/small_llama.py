"""A small Llama with a byte-level BPE of its own, trained on the text of a run: the token model that BLTs are made from.

Everything is transformers' and tokenizers': what stands in the folder is what anybody's token model looks like.
"""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blt.corpus import ByteShard

BOS, EOS = "<s>", "</s>"
VOCABULARY = 4096
ROW_TOKENS, ROWS = 256, 16
SHAPE: dict[str, Any] = {  # the latent transformer of the preset small
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 2048,
}
LEARNING_RATE, WARMUP_STEPS = 2e-3, 50


def train_token_model(shard: ByteShard, folder: Path, total_bytes: int, seed: int = 0, threads: int = 2) -> None:
    """Train on so many bytes of a shard and write the folder; one that was cut goes on where it was saved."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document.data.decode("utf-8", "replace") for document in shard.documents()]
    tokenizer = learned(texts, folder)
    encoded = [[0, *encoding.ids, 1] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ids = torch.tensor([number for document in encoded for number in document])
    bytes_per_token = shard.num_bytes / len(ids)
    total_steps = math.ceil(total_bytes / bytes_per_token / (ROW_TOKENS * ROWS))
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, **SHAPE)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    step, state_file = 0, folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    print(f"{bytes_per_token:.2f} bytes a token, {total_steps} steps, from step {step}", flush=True)
    while step < total_steps:
        generator = torch.Generator().manual_seed(seed * 10**9 + step)
        begins = torch.randint(len(ids) - ROW_TOKENS, (ROWS,), generator=generator).tolist()
        rows = torch.stack([ids[begin : begin + ROW_TOKENS] for begin in begins])
        factor = min((step + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / total_steps)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0 or step == total_steps:
            bits = float(loss.detach()) / math.log(2) / bytes_per_token
            print(f"step {step}/{total_steps}  {bits:.3f} bits/byte", flush=True)
        if step % 100 == 0 or step == total_steps:
            partial = state_file.with_suffix(".partial")
            torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
            partial.replace(state_file)
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    wrapped.save_pretrained(folder)


def learned(texts: list[str], folder: Path) -> Tokenizer:
    """A byte-level BPE of these texts; kept in the folder, as it takes a minute."""
    file = folder / "tokenizer.json"
    if file.exists():
        return Tokenizer.from_file(str(file))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(file))
    return tokenizer
