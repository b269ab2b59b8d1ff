"""Runs an exported GGUF file in llama.cpp, for comparison with `bkpack eval` and `bkpack generate`.

    python tests/export/gguf_runs.py tokens model.gguf tokenizer.json text.txt
    python tests/export/gguf_runs.py perplexity model.gguf text.txt --windows 8
    python tests/export/gguf_runs.py logits model.gguf tokens.json logits.safetensors
    python tests/export/gguf_runs.py generate model.gguf --prompt "The river" --tokens 50

Needs the `llama-cpp-python` package, for `tokens` also `tokenizers`, for `logits` also `safetensors`. The latter
compares with what `bkpack logits --tokens tokens.json -o logits.safetensors` wrote. Perplexity is under llama.cpp's own protocol:
windows of 512 tokens of which the last 255 are scored, which is `bkpack eval --ctx 512 --skip 257`.
"""

import argparse
import json
import sys

import llama_cpp
import numpy as np

# llama.cpp's errors (level 4) go to the terminal, the rest nowhere.
LOG = llama_cpp.llama_log_callback(lambda level, text, _: sys.stderr.write(text.decode(errors="replace")) if level == 4 else None)


class Model:
    def __init__(self, path, context):
        llama_cpp.llama_log_set(LOG, None)
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            sys.exit(f"{path}: llama.cpp does not load it")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_threads = parameters.n_threads_batch = 2
        # Keys and values as exact as llama.cpp can keep them: what is measured is the weights.
        parameters.type_k = parameters.type_v = 0
        parameters.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.seen = 0

    def tokenize(self, text, special=True):
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 16))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), False, special)
        if count < 0:
            sys.exit(f"llama.cpp cannot tokenize: {count}")
        return list(room[:count])

    def clear(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.seen = 0

    def logits(self, tokens):
        """Logits after each of the tokens, which continue those before: [tokens, vocabulary]."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.seen + i, 1, 1
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(self.context, batch) != 0:
            sys.exit("llama.cpp cannot decode")
        self.seen += len(tokens)
        values = llama_cpp.llama_get_logits(self.context)
        out = np.ctypeslib.as_array(values, (len(tokens), self.size)).copy()
        llama_cpp.llama_batch_free(batch)
        return out


def compare_tokens(arguments):
    import tokenizers

    model = Model(arguments.model, 16)
    tokenizer = tokenizers.Tokenizer.from_file(arguments.tokenizer)
    text = open(arguments.text, encoding="utf-8", newline="").read()[: arguments.characters]
    wanted = tokenizer.encode(text, add_special_tokens=False).ids
    found = model.tokenize(text)
    if wanted == found:
        print(f"{arguments.text}: {len(text)} characters, {len(found)} tokens, the same in both")
        return 0
    first = next((i for i, pair in enumerate(zip(wanted, found)) if pair[0] != pair[1]), min(len(wanted), len(found)))
    print(f"{arguments.text}: {len(wanted)} and {len(found)} tokens; the first that differs is {first}:")
    print("  tokenizer.json", [tokenizer.id_to_token(i) for i in wanted[first : first + 8]], wanted[first : first + 8])
    print("  llama.cpp     ", [tokenizer.id_to_token(i) for i in found[first : first + 8]], found[first : first + 8])
    return 1


def compare_logits(arguments):
    from safetensors.numpy import load_file

    tokens = json.load(open(arguments.tokens))
    wanted = next(iter(load_file(arguments.logits).values())).astype(np.float64).reshape(len(tokens), -1)
    found = Model(arguments.model, len(tokens)).logits(tokens).astype(np.float64)
    logs = [x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (wanted, found)]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
    agreement = (wanted.argmax(1) == found.argmax(1)).mean()
    largest = np.abs(wanted - found).max()
    print(f"{arguments.model}: {len(tokens)} positions, largest difference {largest:.2g} of logits up to "
          f"{np.abs(wanted).max():.3g}, KL divergence {divergence:.2g}, same best token {agreement:.1%}")
    return 0 if largest <= arguments.within else 1


def perplexity(arguments):
    model = Model(arguments.model, arguments.ctx)
    text = open(arguments.text, encoding="utf-8").read()
    tokens = model.tokenize(text[: arguments.characters])
    windows = min(arguments.windows, len(tokens) // arguments.ctx)
    total = count = 0
    for window in range(windows):
        model.clear()
        ids = tokens[window * arguments.ctx :][: arguments.ctx]
        logits = model.logits(ids).astype(np.float64)
        first = arguments.ctx - 255
        rows = logits[first - 1 : -1]
        top = rows.max(axis=1)
        normal = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
        total += (normal - rows[np.arange(len(rows)), ids[first:]]).sum()
        count += len(rows)
    print(f"{arguments.model}: perplexity {np.exp(total / count):.4f} over {windows} windows, {count} tokens scored")
    return 0


def generate(arguments):
    model = Model(arguments.model, 512)
    tokens = model.tokenize(arguments.prompt)
    last = model.logits(tokens)[-1]
    margins = []
    for _ in range(arguments.tokens):
        best, second = np.argsort(-last)[:2]
        margins.append((int(best), int(second), float(last[best] - last[second])))
        last = model.logits([int(best)])[-1]
    print("tokens", [best for best, _, _ in margins])
    if arguments.tokenizer:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(arguments.tokenizer)
        print("text", repr(tokenizer.decode(tokens + [best for best, _, _ in margins], skip_special_tokens=False)))
    for place, (best, second, margin) in sorted(enumerate(margins), key=lambda pair: pair[1][2])[:5]:
        print(f"narrowest choice at {place}: {best} before {second} by {margin:.4f}")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("tokens")
    command.set_defaults(run=compare_tokens)
    command.add_argument("model")
    command.add_argument("tokenizer")
    command.add_argument("text")
    command.add_argument("--characters", type=int, default=20000)
    command = commands.add_parser("logits")
    command.set_defaults(run=compare_logits)
    command.add_argument("model")
    command.add_argument("tokens")
    command.add_argument("logits")
    command.add_argument("--within", type=float, default=1e-3, help="exit status 1 where a logit differs by more")
    command = commands.add_parser("perplexity")
    command.set_defaults(run=perplexity)
    command.add_argument("model")
    command.add_argument("text")
    command.add_argument("--windows", type=int, default=8)
    command.add_argument("--ctx", type=int, default=512)
    command.add_argument("--characters", type=int, default=200000)
    command = commands.add_parser("generate")
    command.set_defaults(run=generate)
    command.add_argument("model")
    command.add_argument("--prompt", required=True)
    command.add_argument("--tokens", type=int, default=50)
    command.add_argument("--tokenizer", help="tokenizer.json, to print the text")
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
