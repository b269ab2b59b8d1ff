"""The time of one FP32 training step in PyTorch, to compare `bkpack qat --save-metrics` with.

    python qat_step.py MODEL [--batch 8] [--ctx 256] [--steps 12] [--threads 2]

MODEL is a Hugging Face folder that transformers loads (Llama, Mamba, ...). A step is: forward, cross-entropy, backward, gradient
clipping and AdamW, in FP32, eager, on windows of random tokens. The first steps are left out. Prints one JSON object: seconds of
the fastest and of the median step, wall and processor time.

The same step of bkpack, whose metrics say the tokens of a second of each step:

    bkpack qat MODEL --encoding int4 --tokens ids.json --ctx 256 --batch 8 --steps 12 --threads 2 -o OUT --save-metrics m.json
"""

import argparse
import json
import statistics
import time

import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--ctx", type=int, default=256)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()

torch.set_num_threads(args.threads)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)
tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.ctx))
wall, processor = [], []
for _ in range(args.steps):
    start, used = time.perf_counter(), time.process_time()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wall.append(time.perf_counter() - start)
    processor.append(time.process_time() - used)
wall, processor = wall[2:], processor[2:]
print(json.dumps({
    "batch": args.batch,
    "ctx": args.ctx,
    "threads": args.threads,
    "seconds_min": min(wall),
    "seconds_median": statistics.median(wall),
    "processor_seconds_min": min(processor),
    "tokens_per_second": args.batch * args.ctx / min(wall),
    "torch": torch.__version__,
}))
