"""Packed language models: read them without a copy, make them, measure them.

    import bkpack

    with bkpack.open("model.bkpack") as model:
        tensor = model["model.layers.0.mlp.down_proj.weight"]
        tensor.codes, tensor.scale      # read-only arrays over the memory map: nothing is copied
        tensor.dequantize()             # a new float32 array, computed by the native kernels

    bkpack.convert("./model", "model.bkpack", bits=4)
    bkpack.evaluate("model.bkpack", text="test.txt", baseline="./model")["kld_mean"]

Everything that goes wrong with a file is a `BkpackError` whose text is the sentence that the command `bkpack` prints; for
an argument out of range it is a sentence that names the option (`--group-size`), which the argument is named like
(`group_size`). An argument of the wrong type is a `TypeError`.

`bkpack.torch` has modules for PyTorch; it is imported only when you import it.
"""

from ._errors import BkpackError, FileError, MissingFileError, OutputExistsError
from ._model import Model, Tensor, open
from ._work import Progress, convert, evaluate

__all__ = [
    "BkpackError",
    "FileError",
    "MissingFileError",
    "Model",
    "OutputExistsError",
    "Progress",
    "Tensor",
    "convert",
    "evaluate",
    "open",
]
