"""Reading: the same values as the independent reader, without a copy, from any number of threads."""

import gc
import json
import mmap
import os
import shutil
import sys
import threading
import unittest
from pathlib import Path

import numpy as np
from common import CASES, LLAMA, VECTORS, Case, command, reader, same_bits, write_safetensors

import bkpack
from bkpack import _model

EMBEDDING = "model.embed_tokens.weight"


def base_of(array):
    """What an array's memory belongs to."""
    while isinstance(array, np.ndarray) or isinstance(array, memoryview):
        array = array.base if isinstance(array, np.ndarray) else array.obj
    return array


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


def is_mapped(path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


class Values(Case):
    def compare(self, path):
        expected = reader.open_model(path)
        for shard in expected.shards:
            self.addCleanup(shard.file.close)
        with bkpack.open(path) as model:
            model.verify()
            self.assertEqual(sorted(model), sorted(expected.tensors))
            for name, tensor in model.items():
                other = expected.tensors[name]
                self.assertEqual((tensor.shape, tensor.encoding_dict), (tuple(other.shape), other.encoding), name)
                self.assertEqual((tensor.component, tensor.complex), (other.component, other.half), name)
                self.assertTrue(same_bits(tensor.dequantize(), other.dequantize()), name)
                for role, array in tensor.parts.items():
                    self.assertEqual(array.tobytes(), other.stored.part_bytes(other.parts[role][0]), (name, role))
            for name in model.complex_names:
                np.testing.assert_array_equal(model.complex_values(name), expected.dequantize(name))
            self.assertEqual({name: model.file(name) for name in model.files},
                             {name: expected.file(name) for name in expected.file_names})

    def test_every_encoding_has_the_values_of_the_independent_reader(self):
        for arguments, _ in CASES:
            with self.subTest(arguments):
                path = self.folder / "model.bkpack"
                bkpack.convert(LLAMA, path, force=True, **arguments)
                self.compare(path)

    def test_a_model_in_shards_has_them_too(self):
        bkpack.convert(LLAMA, self.folder / "model.bkpack", shard_size="1MB")
        self.assertGreater(len(list(self.folder.glob("model-*.bkpack"))), 1)
        self.compare(self.folder / "model.bkpack.index.json")
        with bkpack.open(self.folder / "model.bkpack") as model:
            self.assertEqual(len(model.manifest["tensors"]), len(model))

    def test_every_vector_of_the_format_is_read_or_refused(self):
        for case in json.loads((VECTORS / "valid" / "index.json").read_text()):
            with self.subTest(case["file"]):
                self.compare(VECTORS / "valid" / case["file"])
        for case in json.loads((VECTORS / "malformed" / "index.json").read_text()):
            with self.subTest(case["file"]), self.assertRaises(bkpack.BkpackError):
                bkpack.open(VECTORS / "malformed" / case["file"]).verify()

    def test_rows_are_picked_as_numpy_does(self):
        mask = np.zeros(704, bool)
        mask[[0, 700]] = True
        picks = [0, -1, 703, slice(3, 9), slice(None, None, -100), slice(5, 5), [5, 0, 5], np.array([1, 2]), mask]
        with bkpack.open(self.packed) as model:
            tensor = model["model.layers.0.mlp.gate_proj.weight"]
            self.assertEqual(tensor.shape[0], 704)
            whole = tensor.dequantize()
            for pick in picks:
                self.assertTrue(same_bits(tensor.dequantize(pick), whole[pick]), pick)
            for pick in (704, [0, -705], [[0]], "a", 1.5):
                with self.assertRaises(IndexError):
                    tensor.dequantize(pick)
            norm = model["model.norm.weight"]
            np.testing.assert_array_equal(norm.dequantize([3, -1]), norm.dequantize()[[3, -1]])
            half = tensor.dequantize(slice(0, 2), dtype=np.float16)
            np.testing.assert_array_equal(half, whole[:2].astype(np.float16))
            whole[:] = 0  # the array is the caller's own
            self.assertTrue(tensor.dequantize(0).any())


class Mapping(Case):
    def test_a_model_is_a_mapping_that_knows_itself(self):
        with bkpack.open(str(self.packed)) as model:
            self.assertEqual(list(model), model.names)
            self.assertEqual(len(model), len(model.names))
            self.assertIn(EMBEDDING, model)
            self.assertNotIn("nothing", model)
            self.assertIsNone(model.get("nothing"))
            with self.assertRaises(KeyError):
                model["nothing"]
            with self.assertRaises(KeyError):
                model.file("nothing")
            tensor = model[EMBEDDING]
            self.assertEqual(tensor.encoding, "INT4 g128")
            self.assertEqual((tensor.component, tensor.size), ("embedding", int(np.prod(tensor.shape))))
            self.assertEqual(tensor.nbytes, tensor.codes.nbytes + tensor.scale.nbytes)
            self.assertEqual((tensor.codes.dtype, tensor.scale.dtype), (np.uint32, np.float16))
            self.assertIsNone(tensor.values)
            self.assertIsNone(tensor.zero_point)
            self.assertEqual(model.config, json.loads((LLAMA / "config.json").read_text()))
            self.assertEqual(model.file("tokenizer.json"), (LLAMA / "tokenizer.json").read_bytes())
            self.assertEqual(model.manifest["version"], 1)
            self.assertEqual({entry["name"] for entry in model.manifest["tensors"]}, set(model))
            self.assertEqual(model.file_bytes, self.packed.stat().st_size)
            told = json.loads(command("inspect", self.packed, "--json").stdout)
            self.assertEqual(model.parameters, told["parameters"])

    def test_bf16_comes_as_its_bits(self):
        bkpack.convert(LLAMA, self.folder / "m.bkpack", tensor={"embed": "bf16"})
        with bkpack.open(self.folder / "m.bkpack") as model:
            tensor = model[EMBEDDING]
            self.assertEqual((tensor.encoding, tensor.values.dtype), ("BF16", np.uint16))
            widened = (tensor.values.astype(np.uint32) << 16).view(np.float32)
            self.assertTrue(same_bits(widened, tensor.dequantize()))

    def test_a_closed_model_says_so(self):
        model = bkpack.open(self.packed)
        tensor = model[EMBEDDING]
        model.close()
        model.close()
        self.assertTrue(model.closed)
        for use in (lambda: model[EMBEDDING], lambda: tensor.codes, tensor.dequantize, model.verify, model.__enter__,
                    lambda: model.files):
            with self.assertRaisesRegex(bkpack.BkpackError, "is closed"):
                use()


class ZeroCopy(Case):
    def test_arrays_are_views_of_the_map(self):
        with bkpack.open(self.packed) as model:
            for tensor in model.values():
                for array in tensor.parts.values():
                    self.assertIsInstance(base_of(array), mmap.mmap)
                    self.assertFalse(array.flags.writeable)
                    with self.assertRaises(ValueError):
                        array.flags.writeable = True
            # One map a file, shared by all arrays.
            self.assertEqual(len({id(base_of(tensor.parts[role])) for tensor in model.values() for role in tensor.parts}), 1)

    @unittest.skipUnless(sys.platform == "linux", "memory is looked up in /proc")
    def test_touching_every_weight_takes_no_memory_of_its_own(self):
        weights = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
        write_safetensors(self.folder / "w.safetensors", {"w": weights})
        size = bkpack.convert(self.folder / "w.safetensors", self.folder / "w.bkpack", bits=32)["file_bytes"]
        self.assertGreater(size, 64 << 20)
        with bkpack.open(self.folder / "w.bkpack") as model:
            gc.collect()
            before = anonymous_bytes()
            np.testing.assert_equal(model["w"].values.max(), weights.max())
            self.assertLess(anonymous_bytes() - before, 4 << 20)
            copy = model["w"].dequantize()
            self.assertGreater(anonymous_bytes() - before, 60 << 20, "a copy would have been seen")
            self.assertTrue(same_bits(copy, weights))

    @unittest.skipUnless(sys.platform == "linux", "maps are looked up in /proc")
    def test_arrays_outlive_the_model_and_then_the_map_goes(self):
        path = self.folder / "m.bkpack"
        shutil.copy(self.packed, path)
        with bkpack.open(path) as model:
            codes = model[EMBEDDING].codes
            expected = codes.copy()
        del model
        gc.collect()
        self.assertTrue(is_mapped(path))
        path.unlink()
        np.testing.assert_array_equal(codes, expected)
        view = codes[1:3]
        del codes
        np.testing.assert_array_equal(view, expected[1:3])
        del view
        gc.collect()
        self.assertFalse(is_mapped(path))

    def test_a_file_that_is_replaced_while_it_is_opened_is_noticed(self):
        path, other = self.folder / "m.bkpack", self.folder / "other.bkpack"
        shutil.copy(self.packed, path)
        bkpack.convert(LLAMA, other, bits=3)
        native = _model.Packed.open(str(path))
        _model._map(native, 0)
        os.replace(other, path)
        with self.assertRaisesRegex(bkpack.BkpackError, "was replaced while it was opened"):
            _model._map(native, 0)

    def test_replacing_an_open_file_leaves_the_model_whole(self):
        path = self.folder / "m.bkpack"
        shutil.copy(self.packed, path)
        with bkpack.open(path) as model:
            before = model[EMBEDDING].dequantize()
            bkpack.convert(LLAMA, path, bits=3, force=True)
            self.assertTrue(same_bits(model[EMBEDDING].dequantize(), before))
            model.verify()


class Threads(Case):
    def test_threads_read_side_by_side(self):
        with bkpack.open(self.packed) as model:
            expected = {name: tensor.dequantize() for name, tensor in model.items()}
            failures = []

            def read(seed):
                names = list(expected)
                np.random.default_rng(seed).shuffle(names)
                for name in names * 3:
                    tensor = model[name]
                    if not same_bits(tensor.dequantize(), expected[name]):
                        failures.append(name)

            threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(failures, [])

    @unittest.skipUnless(hasattr(os, "fork"), "this system does not fork")
    def test_a_forked_child_reads_too(self):
        with bkpack.open(self.packed) as model:
            expected = model[EMBEDDING].dequantize()
            child = os.fork()
            if child == 0:
                os._exit(0 if same_bits(model[EMBEDDING].dequantize(), expected) else 1)
            self.assertEqual(os.waitpid(child, 0)[1], 0)


class Errors(Case):
    def test_errors_are_exceptions_with_the_sentence_of_the_command(self):
        broken = self.folder / "broken.bkpack"
        shutil.copy(self.packed, broken)
        with open(broken, "r+b") as file:
            file.seek(100)
            file.write(b"~")
        text = self.folder / "text"
        text.write_text("no model at all")
        for path in (broken, text, self.folder, self.folder / "missing"):
            with self.subTest(path), self.assertRaises(bkpack.BkpackError) as caught:
                bkpack.open(path)
            self.assertIsInstance(caught.exception, ValueError)
            self.assertEqual(f"error: {caught.exception}\n", command("inspect", path, status=2).stderr)

    def test_a_missing_file_is_what_python_expects(self):
        with self.assertRaises(FileNotFoundError) as caught:
            bkpack.open(self.folder / "missing")
        self.assertIsInstance(caught.exception, bkpack.MissingFileError)
        self.assertEqual(caught.exception.errno, 2)

    def test_changed_weights_are_found(self):
        broken = self.folder / "broken.bkpack"
        shutil.copy(self.packed, broken)
        with open(broken, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        with bkpack.open(broken) as model:
            seen = []
            with self.assertRaisesRegex(bkpack.BkpackError, "does not match its BLAKE3 hash") as caught:
                model.verify(progress=lambda *arguments: seen.append(arguments))
            self.assertEqual(seen[0], ("Verifying", 0, seen[0][2], "bytes"))
        tokens = self.folder / "tokens.json"
        tokens.write_text("[1, 2]")
        arguments = ("logits", broken, "--tokens", tokens, "-o", self.folder / "logits", "--verify-hashes")
        self.assertEqual(f"error: {caught.exception}\n", command(*arguments, status=2).stderr)


if __name__ == "__main__":
    unittest.main()
