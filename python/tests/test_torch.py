"""bkpack.torch; needs PyTorch, and for whole models transformers."""

import json
import sys
import unittest

import numpy as np
from common import CASES, LLAMA, Case, command, reader

import bkpack

try:
    import torch
    from torch import nn

    import bkpack.torch
except ImportError:
    torch = None
    print("PyTorch is not installed: bkpack.torch is NOT tested", file=sys.stderr)
try:
    import transformers
except ImportError:
    transformers = None
    print("transformers is not installed: whole models in PyTorch are NOT tested", file=sys.stderr)

LAYER = "model.layers.0.mlp.down_proj.weight"


@unittest.skipIf(torch is None, "PyTorch is not installed")
class PackedLinear(Case):
    def test_every_encoding_has_the_same_weights_and_products(self):
        quantized = 0
        for arguments, _ in CASES:
            with self.subTest(arguments):
                path = self.folder / "m.bkpack"
                bkpack.convert(LLAMA, path, force=True, **arguments)
                with bkpack.open(path) as model:
                    weight = model[LAYER]
                    if weight.encoding_dict["kind"] == "float":
                        with self.assertRaisesRegex(bkpack.BkpackError, "no quantized matrix"):
                            bkpack.torch.PackedLinear(weight)
                        continue
                    quantized += 1
                    expected = torch.from_numpy(weight.dequantize())
                    bias = torch.linspace(-1, 1, expected.shape[0])
                    layer = bkpack.torch.PackedLinear(weight, bias)
                    self.assertTrue(torch.equal(layer.dequantize().view(torch.int32), expected.view(torch.int32)))
                    x = torch.randn(3, 2, expected.shape[1], generator=torch.Generator().manual_seed(0))
                    self.assertTrue(torch.equal(layer(x), nn.functional.linear(x, expected, bias)))
                    halved = layer.to(torch.bfloat16)
                    product = nn.functional.linear(x.bfloat16(), expected.bfloat16(), bias.bfloat16())
                    self.assertTrue(torch.equal(halved(x.bfloat16()), product))
        self.assertGreater(quantized, 10)

    def test_buffers_share_the_memory_of_the_map_and_outlive_the_model(self):
        with bkpack.open(self.packed) as model:
            weight = model[LAYER]
            layer = bkpack.torch.PackedLinear(weight)
            self.assertEqual(layer.weight_packed.data_ptr(), weight.codes.ctypes.data)
            self.assertEqual(layer.weight_scale.data_ptr(), weight.scale.ctypes.data)
            expected = weight.dequantize()
        del model, weight
        np.testing.assert_array_equal(layer.dequantize().numpy(), expected)


@unittest.skipIf(torch is None or transformers is None, "PyTorch or transformers is not installed")
class WholeModel(Case):
    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        self.config = transformers.AutoConfig.from_pretrained(LLAMA)
        self.model = transformers.AutoModelForCausalLM.from_config(self.config).float().eval()
        tokens = [int(token) for token in np.random.default_rng(1).integers(0, self.config.vocab_size, 64)]
        path = self.folder / "tokens.json"
        path.write_text(json.dumps(tokens))
        command("logits", self.packed, "--tokens", path, "-o", self.folder / "logits.safetensors", "--quiet")
        stored = reader.Container(self.folder / "logits.safetensors")
        self.expected = np.frombuffer(stored.part_bytes("logits"), "<f4").reshape(64, -1)
        stored.file.close()
        self.tokens = torch.tensor([tokens])

    def check_logits(self):
        with torch.no_grad():
            logits = self.model(self.tokens).logits[0].float().numpy()
        np.testing.assert_allclose(logits, self.expected, rtol=0, atol=1e-4 * np.abs(self.expected).max())

    def test_loaded_weights_give_the_logits_of_the_command(self):
        with bkpack.open(self.packed) as packed:
            result = bkpack.torch.load_state_dict(self.model, packed)
        self.assertEqual(result, ([], []))
        self.check_logits()

    def test_packed_layers_give_them_too(self):
        with bkpack.open(self.packed) as packed:
            replaced = bkpack.torch.replace_linears(self.model, packed)
            bkpack.torch.load_state_dict(self.model, packed)
        layers = [child for child in self.model.modules() if isinstance(child, bkpack.torch.PackedLinear)]
        self.assertEqual(len(layers), len(replaced))
        self.assertGreaterEqual(len(layers), 7 * self.config.num_hidden_layers)
        self.check_logits()

    def test_a_tied_head_is_loaded_with_its_embedding_alone(self):
        self.assertIs(self.model.lm_head.weight, self.model.model.embed_tokens.weight)
        self.config.tie_word_embeddings = False
        untied = transformers.AutoModelForCausalLM.from_config(self.config)
        with bkpack.open(self.packed) as packed:
            self.assertNotIn("lm_head.weight", packed)
            with self.assertRaisesRegex(bkpack.BkpackError, "does not fit the module: it lacks lm_head.weight$"):
                bkpack.torch.load_state_dict(untied, packed)

    def test_what_does_not_fit_is_refused_before_anything_changes(self):
        with bkpack.open(self.packed) as packed:
            self.model.model.layers[5].mlp.up_proj = nn.Linear(4, 4, bias=False)
            before = self.model.model.norm.weight.clone()
            sentence = r"layers.5.mlp.up_proj.weight has shape \[704, 256\] where the module has \[4, 4\]"
            for load in (bkpack.torch.load_state_dict, bkpack.torch.replace_linears):
                with self.assertRaisesRegex(bkpack.BkpackError, sentence):
                    load(self.model, packed)
            extra = nn.Module()
            extra.other = nn.Linear(2, 2)
            with self.assertRaisesRegex(bkpack.BkpackError, "it lacks other.weight, other.bias; the module lacks"):
                bkpack.torch.load_state_dict(extra, packed)
            missing, unexpected = bkpack.torch.load_state_dict(extra, packed, strict=False)
            self.assertEqual((missing, len(unexpected)), (["other.weight", "other.bias"], len(packed)))
        self.assertTrue(torch.equal(before, self.model.model.norm.weight))


if __name__ == "__main__":
    unittest.main()
