"""The same work by peers, for the tables of LOG.md: decoding by llama.cpp and transformers, and a torch training step, on
SmolLM2-135M.

    python3 -m venv target/peers && target/peers/bin/pip install xllamacpp gguf numpy torch transformers
    target/peers/bin/python models/benches/peers.py
    target/peers/bin/python models/benches/peers.py transformers f32   # or llama, torch; f32 or bf16
    target/peers/bin/python models/benches/peers.py rollout.json f32   # as `taper bench rollout … --json` printed it

Run it beside `cargo bench -p taper-models`, on the same quiet machine. Prints one line a figure, as soon as it is there: bf16 is
slow for peers where the processor knows nothing of it.
"""

import glob
import json
import os
import sys
import threading
import time

FOLDER = os.path.join(os.path.dirname(__file__), "../../target/models")


def convert(source, target, kind):
    """Writes a copy of a quantised GGUF with every matrix as `kind`."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind_of, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
        value = field.contents()
        if name == "general.file_type":
            value = int(gguf.LlamaFileType.MOSTLY_BF16 if kind == "bf16" else gguf.LlamaFileType.ALL_F32)
        writer.add_key_value(name, value, kind_of, sub_type=sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind == "bf16" and values.ndim == 2:
            data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def server(path, batch, context, threads):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = batch
    params.n_ctx = context * batch
    params.n_batch = 2048
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.warmup = False
    return xllamacpp.Server(params)


def request(problem, prompt, count):
    prompt = [1 + (problem * 131 + j * 7) % 40_000 for j in range(prompt)]
    return {"prompt": prompt, "n_predict": count, "ignore_eos": True, "temperature": 1.0, "cache_prompt": True}


def llama(path, batch, threads=1, tokens=48):
    """Tokens a second of `batch` streams of 100 prompt tokens."""
    peer = server(path, batch, 512, threads)

    def complete(i, count):
        return peer.handle_completions({**request(i, 100, count), "id_slot": i})

    def run(count):
        workers = [threading.Thread(target=complete, args=(i, count)) for i in range(batch)]
        began = time.time()
        [w.start() for w in workers]
        [w.join() for w in workers]
        return time.time() - began

    run(1)
    # The prompt is cached by now; the difference of two lengths is decoding alone.
    short, long = run(8), run(8 + tokens)
    return batch * tokens / (long - short)


def model(kind):
    """SmolLM2 with matrices of this kind."""
    source = next(f for f in glob.glob(os.path.join(FOLDER, "*.gguf")) if "Q4_1" in f)
    path = os.path.join(FOLDER, f"peer-{kind}.model")
    if not os.path.exists(path):
        convert(source, path, kind)
    return path


def llama_rollout(path, lengths, threads=1):
    """Tokens a second of a rollout whose answers have these lengths, as many together as there, prompts included."""
    pairs = list(zip(lengths["prompts"], lengths["answers"]))
    # Each sequence has the same share of the context.
    context = max(prompt + answer for prompt, answer in pairs) + 16
    peer = server(path, min(lengths["slots"], len(pairs)), context, threads)
    done = [0] * len(pairs)

    def complete(i, prompt, answer):
        result = peer.handle_completions(request(i // lengths["group"], prompt, answer))
        done[i] = (json.loads(result) if isinstance(result, (str, bytes)) else result)["usage"]["completion_tokens"]

    workers = [threading.Thread(target=complete, args=(i, *pair)) for i, pair in enumerate(pairs)]
    began = time.time()
    [w.start() for w in workers]
    [w.join() for w in workers]
    seconds = time.time() - began
    assert done == lengths["answers"], f"asked for {lengths['answers']}, got {done}"
    return sum(done) / seconds


def smollm2():
    """A model of SmolLM2-135M's shape; its weights do not matter for speed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    ))


def transformers(batch, kind, threads=2, tokens=48):
    """Tokens a second of `generate`, sampled at T = 1, of `batch` prompts of 100 tokens."""
    import torch

    torch.set_num_threads(threads)
    model = smollm2().to(torch.bfloat16 if kind == "bf16" else torch.float32).eval()
    ids = torch.randint(1, 40_000, (batch, 100))

    def run(count):
        began = time.time()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, pad_token_id=0,
            min_new_tokens=count, max_new_tokens=count,
        )
        return time.time() - began

    run(2)
    # The difference of two lengths is decoding alone; the best of three, since others use the machine too.
    return max(batch * tokens / (run(8 + tokens) - run(8)) for _ in range(3))


def torch_step(rows=8, length=256, threads=2):
    """Tokens a second of forward, backward and AdamW in eager f32."""
    import torch

    torch.set_num_threads(threads)
    model = smollm2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(0, 49152, (rows, length))
    best = 0.0
    for _ in range(2):
        began = time.time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        best = max(best, rows * length / (time.time() - began))
    return best


def peak_gb():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def measured(asked):
    """The figures that were asked for, each when it is there."""
    kinds = [kind for kind in ["f32", "bf16"] if kind in asked] or ["f32", "bf16"]
    recorded = [name for name in asked if name.endswith(".json")]
    peers = [peer for peer in ["torch", "transformers", "llama"] if peer in asked]
    if not peers and not recorded:
        peers = ["torch", "transformers", "llama"]
    for name in recorded:
        with open(name) as file:
            lengths = json.load(file)["tail_lengths"]
        for kind in kinds:
            yield f"llama.cpp {kind}, the rollout of {name}, 1 thread, tokens/s", llama_rollout(model(kind), lengths)
    if "torch" in peers:
        yield "torch eager f32, training step of 8 x 256, 2 threads, tokens/s", torch_step()
        yield "torch peak memory, GB", peak_gb()
    for kind in kinds if "transformers" in peers else []:
        for batch in [1, 8, 32]:
            yield f"transformers {kind}, generate, 2 threads, batch {batch}, tokens/s", transformers(batch, kind)
    for kind in kinds if "llama" in peers else []:
        for batch in [1, 8, 32, 128]:
            yield f"llama.cpp {kind}, decode, 1 thread, batch {batch}, tokens/s", llama(model(kind), batch)


def main():
    figures = {}
    for name, value in measured(sys.argv[1:]):
        figures[name] = value
        print(f"{name:<70} {value:8.1f}", flush=True)
    print(json.dumps(figures))


main()
