"""Converting and measuring: what the command does, its progress, and Ctrl-C."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import unittest

import numpy as np
from common import CASES, LLAMA, TEXT, Case, command, write_safetensors

import bkpack

# What two runs of the same measurement may differ in.
TIMES = {"tokens_per_second", "seconds", "gb_per_second"}


def without_times(figures: dict) -> dict:
    return {key: value for key, value in figures.items() if key not in TIMES}


def write_large(path) -> None:
    """A checkpoint that takes seconds to pack."""
    values = np.random.default_rng(0).standard_normal((1024, 4096), np.float32)
    write_safetensors(path, {f"layers.{index}.w": values for index in range(24)})


class Convert(Case):
    def compare(self, arguments: dict, options: list):
        ours, theirs = self.folder / "ours.bkpack", self.folder / "theirs.bkpack"
        figures = bkpack.convert(LLAMA, ours, force=True, **arguments)
        told = command("convert", LLAMA, "-o", theirs, "--force", "--json", *options)
        self.assertEqual(ours.read_bytes(), theirs.read_bytes())
        notices = figures.pop("notices")
        self.assertEqual("".join(f"note: {notice}\n" for notice in notices), told.stderr)
        self.assertEqual(without_times(figures), without_times(json.loads(told.stdout)))

    def test_every_encoding_is_written_byte_for_byte_as_by_the_command(self):
        for arguments, options in CASES:
            with self.subTest(options):
                self.compare(arguments, options.split())

    def test_every_policy_and_rounding_is_too(self):
        calib = self.folder / "calib.txt"
        calib.write_text(TEXT.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
        importance, costs = self.folder / "importance.json", self.folder / "costs.json"
        command("importance", LLAMA, "--text", calib, "-o", importance, "--batches", 2, "--ctx", 64, "--quiet")
        command("sensitivity", LLAMA, "--text", calib, "-o", costs, "--batches", 2, "--ctx", 64, "--quiet")
        recipe = self.folder / "recipe.toml"
        command("convert", LLAMA, "--policy", "component", "--plan-only", "-o", recipe, "--quiet")
        text = ["--calib", str(calib), "--samples", "4", "--ctx", "64"]
        measured = {"calib": calib, "samples": 4, "ctx": 64}
        cases = [
            ({"policy": "component"}, ["--policy", "component"]),
            ({"recipe": recipe}, ["--recipe", recipe]),
            ({"rounding": "rtn", "keep": ["embed", "norm"]}, ["--rounding", "rtn", "--keep", "embed", "--keep", "norm"]),
            ({"tensor": [("mlp", "int3"), ("down", "int8:row")]}, ["--tensor", "mlp=int3", "--tensor", "down=int8:row"]),
            ({"tensor": "embed=int8"}, ["--tensor", "embed=int8"]),
            ({"tensor": ["embed=int8", "mlp=int3"]}, ["--tensor", "embed=int8", "--tensor", "mlp=int3"]),
            ({"policy": "dynamic", "importance": importance, "high": "int8"},
             ["--policy", "dynamic", "--importance", importance, "--high", "int8"]),
            ({"policy": "budget", "sensitivity": costs, "target_ratio": 6},
             ["--policy", "budget", "--sensitivity", costs, "--target-ratio", 6]),
            ({"policy": "budget", "target_bpw": 5.5, **measured}, ["--policy", "budget", "--target-bpw", 5.5, *text]),
            ({"rounding": "gptq", **measured}, ["--rounding", "gptq", *text]),
        ]
        for arguments, options in cases:
            with self.subTest(options):
                self.compare(arguments, options)

    def test_a_dry_run_writes_nothing_and_knows_the_size(self):
        output = self.folder / "m.bkpack"
        planned = bkpack.convert(LLAMA, output, dry_run=True)["file_bytes"]
        self.assertEqual(os.listdir(self.folder), [])
        self.assertEqual(bkpack.convert(LLAMA, output, threads=1)["file_bytes"], planned)
        self.assertEqual(output.stat().st_size, planned)

    def test_wrong_use_is_refused_with_the_sentence_of_the_command(self):
        output = self.folder / "m.bkpack"
        bkpack.convert(LLAMA, output)
        before = output.read_bytes()
        with self.assertRaises(FileExistsError) as caught:
            bkpack.convert(LLAMA, output)
        self.assertIsInstance(caught.exception, bkpack.OutputExistsError)
        self.assertEqual(caught.exception.errno, errno.EEXIST)
        self.assertEqual(f"error: {caught.exception}\n", command("convert", LLAMA, "-o", output, status=2).stderr)
        with self.assertRaises(FileNotFoundError):
            bkpack.convert(self.folder / "missing", output, force=True)
        wrong = [
            ({"bits": 9}, "--bits: use 1, 1.58, 2 to 8, 16 or 32"),
            ({"bits": 4, "policy": "component"}, "--bits: belongs to --policy uniform"),
            ({"policy": "best"}, '--policy: "best" is not one of uniform, component, dynamic, budget'),
            ({"policy": "budget"}, "--sensitivity: --policy budget needs it, or --calib to measure it on"),
            ({"policy": "component", "recipe": "x"}, "--recipe: takes the place of --policy"),
            ({"rounding": "gptq"}, "--rounding: --rounding gptq needs --calib or --calib-tokens"),
            ({"keep": "nothing"}, 'pattern "nothing"'),
            ({"tensor": {"mlp": "int12"}}, 'encoding "int12"'),
            ({"shard_size": "1XB"}, "--shard-size: unknown unit"),
            ({"threads": 0}, "--threads: 0 is not at least 1"),
            ({"threads": 70_000}, "--threads: 70000 is too large"),
            ({"calib": TEXT, "samples": -1}, "--samples: -1 is not at least 1"),
            ({"samples": 3}, "--samples: belongs to --calib"),
            ({"ctx": 7, "samples": 3}, "belongs to --calib"),
            ({"ctx": 7}, "--ctx: belongs to --calib"),
            ({"calib": TEXT, "calib_tokens": TEXT, "rounding": "gptq"}, "--calib: give either it or --calib-tokens"),
            ({"target_bpw": 4, "target_size": 10, "policy": "budget", "sensitivity": "x"}, "--target-ratio: only one"),
        ]
        for arguments, sentence in wrong:
            with self.subTest(arguments), self.assertRaises(bkpack.BkpackError) as caught:
                bkpack.convert(LLAMA, output, force=True, **arguments)
            self.assertIn(sentence, str(caught.exception))
        with self.assertRaises(TypeError):
            bkpack.convert(LLAMA, output, bit=4)
        self.assertEqual(output.read_bytes(), before)
        self.assertEqual(os.listdir(self.folder), ["m.bkpack"])

    def test_progress_is_told_in_order_and_its_exception_stops_the_work(self):
        seen = []
        bkpack.convert(LLAMA, self.folder / "m.bkpack", progress=lambda *report: seen.append(report))
        self.assertEqual(list(dict.fromkeys(stage for stage, *_ in seen)), ["Reading", "Packing"])
        for stage in ("Reading", "Packing"):
            done = [report[1] for report in seen if report[0] == stage]
            totals = {report[2] for report in seen if report[0] == stage}
            self.assertEqual((done[0], sorted(done), totals), (0, done, {done[-1]}))

        def fail(*_):
            raise RuntimeError("enough")

        # Large enough that it cannot be done before the first report is told.
        source = self.folder / "w.safetensors"
        write_large(source)
        target = self.folder / "target"
        target.mkdir()
        with self.assertRaisesRegex(RuntimeError, "enough"):
            bkpack.convert(source, target / "n.bkpack", progress=fail)
        self.assertEqual(os.listdir(target), [])

    def test_a_line_of_progress_goes_to_standard_error(self):
        script = f"import bkpack; bkpack.convert({str(LLAMA)!r}, {str(self.folder / 'm.bkpack')!r}, progress=True)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, "")
        self.assertRegex(done.stderr, r"Packing \d+/\d+ MB")


class Evaluate(Case):
    def test_figures_are_those_of_the_command(self):
        options = ["--text", TEXT, "--limit-tokens", 2000, "--ctx", 128]
        told = json.loads(command("eval", self.packed, *options, "--baseline", LLAMA, "--json").stdout)
        arguments = {"text": TEXT, "limit_tokens": 2000, "ctx": 128}
        by_path = bkpack.evaluate(self.packed, baseline=LLAMA, verify_hashes=True, **arguments)
        with bkpack.open(self.packed) as model:
            by_model = bkpack.evaluate(model, baseline=str(LLAMA), **arguments)
        for figures in (by_path, by_model):
            self.assertEqual(figures.pop("notices"), [])
            self.assertEqual(without_times(figures), without_times(told))
        self.assertGreater(told["kld_mean"], 0)
        self.assertEqual((told["text"]["name"], len(told["seals"])), (TEXT.name, 1))

    def test_a_checkpoint_has_no_hashes_to_verify_and_notices_are_returned(self):
        arguments = {"text": TEXT, "limit_tokens": 200, "ctx": 64, "verify_hashes": True}
        figures = bkpack.evaluate(LLAMA, **arguments)
        self.assertNotIn("seals", figures)
        told = command("eval", LLAMA, "--text", TEXT, "--limit-tokens", 200, "--ctx", 64, "--verify-hashes", "--json")
        self.assertEqual("".join(f"note: {notice}\n" for notice in figures.pop("notices")), told.stderr)
        self.assertEqual(without_times(figures), without_times(json.loads(told.stdout)))

    def test_damage_is_found_when_hashes_are_verified(self):
        damaged = self.folder / "damaged.bkpack"
        data = bytearray(self.packed.read_bytes())
        with bkpack.open(self.packed) as model:
            codes = model["model.layers.0.mlp.down_proj.weight"].codes.tobytes()
        self.assertEqual(data.count(codes), 1)
        data[data.index(codes)] ^= 1
        damaged.write_bytes(data)
        arguments = {"text": TEXT, "limit_tokens": 200, "ctx": 64}
        with bkpack.open(damaged) as model:
            for source in (damaged, model):
                bkpack.evaluate(source, **arguments)
                with self.assertRaises(bkpack.BkpackError):
                    bkpack.evaluate(source, verify_hashes=True, **arguments)

    def test_tokens_come_as_a_file_or_as_numbers(self):
        tokens = [int(token) for token in np.random.default_rng(0).integers(0, 100, 600)]
        path = self.folder / "tokens.json"
        path.write_text(json.dumps(tokens))
        options = ["--skip", 5, "--ctx", 200, "--activations", "int8", "--json", "--threads", 1]
        told = json.loads(command("eval", self.packed, "--tokens", path, *options).stdout)
        arguments = {"skip": 5, "ctx": 200, "activations": "int8", "threads": 1}
        self.assertEqual(told["text"]["name"], "tokens.json")
        for given in (path, tokens, np.array(tokens), tuple(tokens)):
            figures = bkpack.evaluate(self.packed, tokens=given, **arguments)
            del figures["notices"]
            self.assertEqual(without_times(figures), without_times(told))
            # Numbers come from no file.
            told.pop("text", None)

    def test_wrong_use_is_refused(self):
        with bkpack.open(self.packed) as model:
            pass
        wrong = [
            (model, {"tokens": [1, 2, 3]}, "is closed"),
            (self.packed, {}, "--text: give either it or --tokens"),
            (self.packed, {"text": TEXT, "tokens": [1]}, "--text: give either it or --tokens"),
            (self.packed, {"tokens": [1, 2, 3]}, "3 tokens do not fill one window"),
            (self.packed, {"tokens": [1_000_000] * 600}, "1000000"),
            (self.packed, {"tokens": [-1, 2]}, "--tokens: -1 is no token id"),
            (self.packed, {"text": TEXT, "skip": -1}, "--skip: -1 is not at least 1"),
            (self.packed, {"text": TEXT, "ctx": 0}, "--ctx: 0 is not at least 1"),
            (self.packed, {"text": TEXT, "limit_tokens": -1}, "--limit-tokens: -1 is not at least 0"),
            (self.packed, {"text": TEXT, "threads": 70_000}, "--threads: 70000 is too large"),
            (self.packed, {"text": TEXT, "activations": "int9"}, "--activations: use exact or int8"),
        ]
        for source, arguments, sentence in wrong:
            with self.subTest(arguments), self.assertRaises(bkpack.BkpackError) as caught:
                bkpack.evaluate(source, **arguments)
            self.assertIn(sentence, str(caught.exception))
        with self.assertRaises(FileNotFoundError):
            bkpack.evaluate(self.folder / "missing", text=TEXT)
        with self.assertRaises(FileNotFoundError):
            bkpack.evaluate(self.packed, text=self.folder / "missing")


@unittest.skipIf(sys.platform == "win32", "signals are sent as Unix does")
class Interrupt(Case):
    # Says when a stage has begun, then waits for the signal in the native work.
    SCRIPT = """
import sys, bkpack
told = set()
def progress(stage, done, total, unit):
    if stage not in told:
        told.add(stage)
        print(stage, flush=True)
try:
    {call}
    print("finished")
except KeyboardInterrupt:
    print("interrupted")
"""

    def interrupt(self, call: str, stage: str):
        script = self.SCRIPT.format(call=call)
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if line.strip() == stage:
                break
        else:
            self.fail(f"the stage {stage} never began")
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        rest = child.stdout.read()
        child.stdout.close()
        self.assertEqual((rest.split()[-1], child.wait()), ("interrupted", 0))
        return time.monotonic() - sent

    def test_a_conversion_stops_and_leaves_nothing(self):
        write_large(self.folder / "w.safetensors")
        target = self.folder / "target"
        target.mkdir()
        output = target / "m.bkpack"
        output.write_bytes(b"what was there before")
        source = str(self.folder / "w.safetensors")
        took = self.interrupt(f"bkpack.convert({source!r}, {str(output)!r}, force=True, progress=progress)", "Packing")
        self.assertEqual(os.listdir(target), ["m.bkpack"])
        self.assertEqual(output.read_bytes(), b"what was there before")
        self.assertLess(took, 10)

    def test_a_measurement_stops(self):
        call = f"bkpack.evaluate({str(LLAMA)!r}, text={str(TEXT)!r}, progress=progress)"
        self.assertLess(self.interrupt(call, "Evaluating"), 10)


if __name__ == "__main__":
    unittest.main()
