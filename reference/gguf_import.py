"""From a llama.cpp file (GGUF) to a Hugging Face folder, for models of the Llama family.

transformers opens GGUF too, but not alike from release to release: it needs accelerate; 5.24 keeps the weights packed and will
not save them; 5.17 ends a text with another token; and the tokenizer loses its splitting of digits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from reference.elements import CheckpointError
from reference.writing import weight_shapes, write_checkpoint

_CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens


def convert_gguf(
    path: Path, folder: Path, *, on_tensor: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write the model in ``path`` to ``folder`` as bfloat16 safetensors with config and tokenizer.

    Args:
        path: the GGUF file.
        folder: where safetensors, config and tokenizer go.
        on_tensor: called with (tensors done, tensors in all) after each.

    Raises:
        CheckpointError: if the file is of another architecture or tokenizer, or its tensors are not those of its
            config.
    """
    try:
        # Only here: a host that is handed the converted folder may lack it.
        from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    except ImportError as missing:
        raise CheckpointError("opening a GGUF file needs the package gguf: pip install gguf") from missing
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    shapes = weight_shapes(config)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    wanted = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
    if set(stored) != set(wanted.values()):
        raise CheckpointError(
            f"{path.name}: missing {sorted(set(wanted.values()) - set(stored))}, "
            f"not in the model {sorted(set(stored) - set(wanted.values()))}"
        )
    done = 0

    def values(name: str) -> torch.Tensor:
        nonlocal done
        tensor = stored[wanted[name]]
        weight = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            weight = _rotary_halves(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = _rotary_halves(weight, config.num_key_value_heads)
        if weight.shape != shapes[name]:
            raise CheckpointError(f"{path.name}: {tensor.name} has shape={weight.shape}, not {shapes[name]}")
        done += 1
        on_tensor(done, len(shapes))
        return torch.from_numpy(np.array(weight)).to(torch.bfloat16)

    write_checkpoint(folder, config, shapes, values, dtype="bfloat16")
    transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)
    return folder


def _config(fields: dict[str, Any], *, tied: bool) -> Any:
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise CheckpointError(f"general.architecture={architecture!r}; only 'llama' is converted")
    of = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    num_heads = of["attention.head_count"]
    return transformers.LlamaConfig(
        hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"],
        num_hidden_layers=of["block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=of["attention.head_count_kv"],
        head_dim=of["embedding_length"] // num_heads,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        max_position_embeddings=of["context_length"],
        # Stored as float32: the shortest decimal that rounds to it is what the model's author wrote.
        rms_norm_eps=float(str(np.float32(of["attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": of["rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _rotary_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """[heads * head_dim, in]: rotary pairs from neighbouring rows (llama.cpp) to the two halves of a head."""
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def _tokenizer(fields: dict[str, Any]) -> Any:
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"tokenizer={kind}; only ('gpt2', 'smollm') is converted")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    )
