"""Runs bkpack and llama.cpp in turn, and writes a table of ratios. Started by peers.sh, which makes the models."""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# bkpack's file, llama.cpp's file, what they are
PAIRS = [
    ("smollm2-int4.bkpack", "smollm2-q4_0.gguf", "SmolLM2, INT4 g128 / Q4_0"),
    ("smollm2-int4-head8.bkpack", "smollm2-q4_0.gguf", "SmolLM2, INT4 g128 with INT8 embedding / Q4_0"),
    ("smollm2-int8.bkpack", "smollm2-q8_0.gguf", "SmolLM2, INT8 g128 / Q8_0"),
    ("tinyllama-int4.bkpack", "tinyllama-q4_0.gguf", "1.1B shape, INT4 g128 / Q4_0 (the same codes)"),
]
MODES = ["exact", "int8"]
# A question of one sentence, run so many times: the median counts.
SHORT, SHORT_RUNS = 32, 9


def run(command):
    """Standard output and error of a command, and the seconds that its process took."""
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout, done.stderr, seconds


def drop_from_cache(path):
    """Makes the next reading of a file come from the disk."""
    run(["sync", path])
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def read_into_cache(path):
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


class Peers:
    def __init__(self, options):
        self.options = options
        self.threads = ["--threads", options.threads]
        # kind -> program or mode -> figures, one a repetition
        self.figures = {}

    def add(self, kind, program, value):
        self.figures.setdefault(kind, {}).setdefault(program, []).append(value)

    def llama_bench(self, model, *more, runs=1):
        command = [self.options.llama / "llama-bench", "-m", model, "-t", self.options.threads, "-r", runs, "-o", "json"]
        output, _, seconds = run(command + list(more))
        return json.loads(output), seconds

    def bkpack_bench(self, model, *more, runs=1):
        command = [self.options.bkpack, "bench", model, *self.threads, "--repetitions", runs, "--json", "-q"]
        output, _, seconds = run(command + list(more))
        return json.loads(output), seconds

    def speed(self, pair, repetition):
        ours, theirs, name = pair
        ours, theirs = self.options.models / ours, self.options.models / theirs

        def peer():
            tests, _ = self.llama_bench(theirs, "-p", 512, "-n", 128)
            for test in tests:
                kind = "prefill 512" if test["n_prompt"] else "decode 128"
                self.add((name, kind), "llama.cpp", test["avg_ts"])
            tests, _ = self.llama_bench(theirs, "-p", SHORT, "-n", 0, runs=SHORT_RUNS)
            self.add((name, f"prefill {SHORT}"), "llama.cpp", statistics.median(tests[0]["samples_ts"]))

        def own():
            for mode in MODES:
                speed, _ = self.bkpack_bench(ours, "--activations", mode)
                self.add((name, "prefill 512"), mode, speed["prefill"]["tokens_per_second"])
                none = ["--prefill", SHORT, "--decode", 0, "--no-memory"]
                short, _ = self.bkpack_bench(ours, "--activations", mode, *none, runs=SHORT_RUNS)
                self.add((name, f"prefill {SHORT}"), mode, short["prefill"]["tokens_per_second"])
                self.add((name, "decode 128"), mode, speed["decode"]["tokens_per_second"])
                self.add((name, "GB/s of weights in decode"), mode, speed["decode_gb_per_second"])
                self.add((name, "share of memory bandwidth"), mode, speed["memory"]["decode_share"])
                self.add((name, "memory, GB/s"), mode, speed["memory"]["gb_per_second"])

        # Whoever comes second finds another machine, so the order changes.
        for part in (peer, own) if repetition % 2 == 0 else (own, peer):
            part()

    def first_token(self, pair, repetition):
        ours, theirs, name = pair
        ours, theirs = self.options.models / ours, self.options.models / theirs
        for kind, prepare in [("first token, cold, s", drop_from_cache), ("first token, warm, s", read_into_cache)]:

            def peer():
                prepare(theirs)
                _, seconds = self.llama_bench(theirs, "-p", 0, "-n", 1, "--no-warmup")
                self.add((name, kind), "llama.cpp", seconds)

            def own():
                for mode in MODES:
                    prepare(ours)
                    none = ["--prefill", 0, "--decode", 0, "--no-memory"]
                    _, seconds = self.bkpack_bench(ours, *none, "--activations", mode)
                    self.add((name, kind), mode, seconds)

            for part in (peer, own) if repetition % 2 == 0 else (own, peer):
                part()

    def evaluation(self, pair, repetition, text, windows):
        ours, theirs, name = pair
        ours, theirs = self.options.models / ours, self.options.models / theirs

        def peer():
            command = [self.options.llama / "llama-perplexity", "-m", theirs, "-f", text, "-c", 512, "--chunks", windows]
            # At its usual level it keeps its timing to itself.
            output, errors, seconds = run(command + ["-t", self.options.threads, "-lv", 4])
            told = re.search(r"prompt eval time =.*?([\d.]+) tokens per second", output + errors)
            estimate = re.search(r"Final estimate: PPL = ([\d.]+)", output + errors)
            self.add((name, "evaluation"), "llama.cpp", float(told.group(1)))
            self.add((name, "evaluation, whole process, s"), "llama.cpp", seconds)
            self.add((name, "perplexity"), "llama.cpp", float(estimate.group(1)))

        def own():
            for mode in MODES:
                command = [self.options.bkpack, "eval", ours, "--text", text, "--ctx", 512, "--skip", 257]
                command += ["--limit-tokens", 512 * windows, "--activations", mode, *self.threads, "--json", "-q"]
                output, _, seconds = run(command)
                evaluation = json.loads(output)
                self.add((name, "evaluation"), mode, evaluation["tokens_per_second"])
                self.add((name, "evaluation, whole process, s"), mode, seconds)
                self.add((name, "perplexity"), mode, evaluation["ppl"])

        for part in (peer, own) if repetition % 2 == 0 else (own, peer):
            part()

    def table(self):
        lines = [
            "| | llama.cpp | bkpack exact | bkpack int8 | ratio exact | ratio int8 |",
            "|---|---|---|---|---|---|",
        ]
        for (name, kind), programs in self.figures.items():
            peer = programs.get("llama.cpp")
            cells = [number(statistics.median(peer)) if peer else ""]
            cells += [number(statistics.median(programs[mode])) for mode in MODES]
            for mode in MODES:
                ratios = [own / other for own, other in zip(programs[mode], peer or [])]
                cells.append(spread(ratios, kind))
            lines.append(f"| {name}: {kind} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def number(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def spread(ratios, kind):
    """The median ratio of the pairs, as how many times better bkpack is, and its range."""
    if not ratios or kind == "perplexity":
        return ""
    if kind.endswith(", s"):
        ratios = [1 / ratio for ratio in ratios]
    middle = f"**{statistics.median(ratios):.2f}**"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


def first_lines(path, pattern):
    match = re.search(pattern, Path(path).read_text())
    return match.group(1).strip() if match else "unknown"


def version(path):
    return run([path, "--version"])[0].strip()


def record(peers, options, minutes):
    cpu = json.loads(run([options.bkpack, "inspect", "--cpu", "--json"])[0])
    memory = int(first_lines("/proc/meminfo", r"MemTotal:\s*(\d+)")) / (1 << 20)
    build, _ = peers.llama_bench(options.models / PAIRS[0][1], "-p", 0, "-n", 1, "--no-warmup")
    cache = (options.llama.parent / "CMakeCache.txt").read_text()
    flags = [name for name in re.findall(r"GGML_(\w+):BOOL=ON", cache) if re.match("AVX|AMX|FMA|F16C|BMI2|CPU_REPACK|OPENMP", name)]
    files = {file for ours, theirs, _ in PAIRS for file in (ours, theirs)}
    sizes = ", ".join(f"{file} {(options.models / file).stat().st_size:,}" for file in sorted(files))
    today = datetime.date.today().isoformat()
    return f"""# bkpack beside llama.cpp, {today}

{cpu["cpu"]}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}; {version(options.bkpack)}, kernels on {cpu["isa"]}
(INT8: {cpu["int8_products"]}); llama.cpp inside llama-cpp-python 0.3.36 (llama-bench: {build[0]["build_commit"]}, {build[0]["cpu_info"]}),
Release, {", ".join(flags)}. {options.threads} threads each.

Medians of {options.repetitions} repetitions; both programs in turn, the first one changing; ratios pair by pair (median, and range), above 1
where bkpack is faster. Prefill, decode and evaluation are tokens a second. The whole took {minutes:.1f} minutes.

{peers.table()}

Commands, each with `-t {options.threads}` or `--threads {options.threads}`: `llama-bench -m GGUF -p 512 -n 128 -r 1`; `bkpack bench PACKED --prefill 512
--decode 128 --repetitions 1 --activations exact|int8`; the same with {SHORT} tokens, none decoded, {SHORT_RUNS} repetitions; `llama-perplexity -m GGUF -f TEXT -c 512 --chunks {options.windows}` (tokens a second of
its own timing, which leaves out the scoring); `bkpack eval PACKED --text TEXT --ctx 512 --skip 257 --limit-tokens {512 * options.windows}` (scoring
included). First token: the whole process of `llama-bench -p 0 -n 1 -r 1 --no-warmup` and of `bkpack bench --prefill 0 --decode 0
--no-memory`; cold after `posix_fadvise(POSIX_FADV_DONTNEED)` on the file, warm after reading it through.

Bytes of the files: {sizes}.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ["bkpack", "llama", "models", "text", "record"]:
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ["threads", "repetitions"]:
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.windows = 4 if options.quick else 16
    begin = time.monotonic()
    peers = Peers(options)
    with tempfile.TemporaryDirectory() as folder:
        # Both tokenize the whole text, so it is cut to little more than what is used: a token has less than five bytes.
        text = Path(folder) / "text.txt"
        text.write_bytes(options.text.read_bytes()[: 512 * 6 * options.windows].rpartition(b"\n")[0] + b"\n")
        for repetition in range(options.repetitions):
            for pair in PAIRS:
                print(f"repetition {repetition + 1} of {options.repetitions}: {pair[2]}", file=sys.stderr)
                peers.speed(pair, repetition)
                peers.first_token(pair, repetition)
                # Random weights have no perplexity; the text is long, so two repetitions are enough.
                if repetition < 2 and pair[0].startswith("smollm2"):
                    peers.evaluation(pair, repetition, text, options.windows)
    text = record(peers, options, (time.monotonic() - begin) / 60)
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(text)
    print(peers.table())
    print(f"\nwritten: {options.record}")


main()
