"""Writes the golden files of this folder with Hugging Face's own code. See README.md."""

import json
import pathlib
import shutil
import sys

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
TEXTS = [
    "Hello, world!", "hello  world", " leading", "trailing ", "", " ", "\n", "\n\n\n", "\t\tx", "a\r\nb",
    "12345", "3+5-2?", "3+5=8;8-2=6#6", "1,234.56", "0x7f", "2024-01-31", "x²+y²=z²", "½ ⅓ ٣", "don't we'll I'M it's",
    "#### 18", "<<16-3=13>>", "$100 (50%)", "naïve café", "Straße", "日本語のテキスト", "한국어", "Привет, мир", "مرحبا",
    "😀😃 emoji👨‍👩‍👧", "a\u00a0b\u200bc", "def f(x):\n    return x*2  # twice\n", "SELECT * FROM t;", "C:\\path\\n",
    "ALLCAPS lowercase CamelCase snake_case", "https://example.com/a?b=c&d=e", "!!!???...", "___", "\x00\x01\x7f",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|im_en|><repo_name>",
]


def tiny(folder, tied):
    """A random model that stays well away from zero logits, with its logits."""
    torch.manual_seed(20 + tied)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
        vocab_size=97, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=tied, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=0, initializer_range=0.2, attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    shutil.rmtree(folder, ignore_errors=True)
    # Stored as f16 to stay small; the logits are those of the stored values, computed in f64.
    # Only the parameters are rounded: `half` on the model would round the rotary angles too.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    names = {"<eos>": 0} | {f"t{i}": i for i in range(1, 97)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = torch.randint(0, 97, (24,))
    logits = run(model.double(), ids).float()
    save_file({"ids": ids, "logits": logits.contiguous()}, folder / "logits.safetensors")


def run(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0]


def field(reader, name):
    return reader.fields[name].contents()


def smollm2(path):
    """The reference reads the GGUF file with the `gguf` package and undoes the permutation by itself."""
    reader = gguf.GGUFReader(path)
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, rope_theta=100000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192, attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    names = {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        name = names.get(tensor.name) or f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        if parts[-2] in ("attn_q", "attn_k"):
            rows, inputs = values.shape
            values = values.reshape(rows // 64, 32, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)
        state[name] = values.contiguous()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
    tokenizer = smollm2_tokenizer(reader)
    ids = torch.tensor(tokenizer.encode("The capital of France is Paris. 12+7=").ids[:12])
    logits = run(model.double(), ids)
    columns = torch.cat([torch.arange(0, 49152, 97), logits.argmax(-1)]).unique()
    sums = {f"sum.{k}": v.double().sum().reshape(1) for k, v in state.items() if "layers.0." in k or "embed" in k}
    save_file({
        "ids": ids, "argmax": logits.argmax(-1), "columns": columns,
        "logits": logits[:, columns].float().contiguous(), **sums,
    }, HERE / "smollm2.safetensors")
    cases = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in TEXTS]
    assert len(cases) == 40
    (HERE / "smollm2_tokens.json").write_text(json.dumps(cases, indent=0) + "\n")


def smollm2_tokenizer(reader):
    tokens, merges = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.merges")
    types = field(reader, "tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types) if kind == 3])
    return tokenizer


if __name__ == "__main__":
    tiny(HERE / "tiny", False)
    tiny(HERE / "tiny_tied", True)
    if len(sys.argv) > 1:
        smollm2(sys.argv[1])
