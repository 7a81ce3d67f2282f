"""In TRL's SFTTrainer: LoRA on all linear layers, on prompts and completions; the loss on the completions alone.

    python examples/trl_sft.py

The model and its tokenizer of bytes are made here, so that nothing is downloaded; give your own folder to
``from_pretrained`` in their place.
"""

import sys
import tempfile

del sys.path[0]  # this folder, in which files are named as libraries are

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lowrank
from lowrank.interop import MergeOnSave, trainer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_alone = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": 256}, []))
bytes_alone.pre_tokenizer, bytes_alone.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>", pad_token="<end>")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, eos_token_id=256, **sizes))
pairs = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(20) for b in range(20)]

with tempfile.TemporaryDirectory() as folder:
    args = SFTConfig(
        folder,
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        max_length=32,
        logging_steps=20,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    )
    method = lowrank.methods.lora(target_modules="all-linear", rank=8, alpha=32, rest="train")
    run = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        optimizers=trainer(model, args, method),
        callbacks=[MergeOnSave()],
    )
    run.train()
