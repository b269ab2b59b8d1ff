"""Making packed models, and measuring them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

from . import _native

if TYPE_CHECKING:
    from ._model import Model

Path = Union[str, "os.PathLike[str]"]

Progress = Callable[[str, int, int, str], object]
"""What `progress` may be: called with the stage, how much of it is done, how much there is, and "bytes" or "tokens"."""

ProgressArgument = Union[None, bool, Progress]


def convert(
    source: Path,
    output: Path,
    *,
    bits: Union[int, float, str, None] = None,
    group_size: Union[int, str, None] = None,
    asymmetric: bool = False,
    keep: Union[str, Iterable[str]] = (),
    tensor: Union[str, Mapping[str, str], Iterable[Union[str, tuple[str, str]]]] = (),
    policy: Optional[str] = None,
    rules: Optional[Path] = None,
    recipe: Optional[Path] = None,
    importance: Optional[Path] = None,
    high_ratio: Optional[float] = None,
    low_ratio: Optional[float] = None,
    high: Optional[str] = None,
    sensitivity: Optional[Path] = None,
    target_ratio: Optional[float] = None,
    target_bpw: Optional[float] = None,
    target_size: Union[int, str, None] = None,
    coupled: bool = False,
    rounding: str = "search",
    calib: Optional[Path] = None,
    calib_tokens: Optional[Path] = None,
    samples: Optional[int] = None,
    ctx: Optional[int] = None,
    ternary_threshold: float = 0.5,
    allow_nonfinite: bool = False,
    shard_size: Union[int, str, None] = None,
    config: Optional[Path] = None,
    rename: Union[str, Iterable[str]] = (),
    dry_run: bool = False,
    force: bool = False,
    threads: Optional[int] = None,
    progress: ProgressArgument = None,
) -> dict[str, Any]:
    """Packs a checkpoint into one file, byte for byte as `bkpack convert` does with the same options.

    Arguments are named like the command's options and have their defaults; `bkpack convert --help` explains each.

    - `source`: Hugging Face folder, or file of weights (safetensors, NPZ, PyTorch); `config` names the config.json of one
      that has none, `rename` holds `REGEX=REPLACEMENT` for the names of its tensors
    - `policy`: `"uniform"` (the default), `"component"`, `"dynamic"` or `"budget"`; or a `recipe` in its place
    - uniform: `bits` 2 to 8, 16, 32, 1 (binary) or 1.58 (ternary), 4 by default; `group_size` 32, 64, 128, 256 or `"row"`,
      128 by default; `asymmetric`
    - dynamic: `importance`, `high_ratio`, `low_ratio`, `high`
    - budget: `sensitivity`, and one of `target_ratio`, `target_bpw` and `target_size` (bytes, or a text like `"80MB"`);
      `coupled`
    - `keep`: patterns of tensors to leave as they are; `tensor`: patterns and their encodings, `{"embed": "int8:g64"}`
      or `"embed=int8:g64"`, of which the last that matches decides
    - `rounding`: `"rtn"`, `"search"`, or `"gptq"` with a calibration text `calib` or file of ids `calib_tokens`, of which
      `samples` windows (128 by default) of `ctx` tokens are looked at
    - `dry_run`: write nothing, and return the exact size; `force`: replace an output that exists

    `progress=True` draws a line on standard error; a callable is called with (stage, done, total, unit), from the calling
    thread, at most some 20 times a second. Ctrl-C, and any exception of `progress`, stops the work, and nothing is left
    half-written: the output is there whole, or as it was.

    Returns what `--json` prints (`file_bytes`, `bits_per_weight`, `components`, ...), and the sentences that the command
    writes as notes, as `notices`.

    Raises `BkpackError`: `MissingFileError` for a source that is not there, `OutputExistsError` for an output that is.
    """
    request = {
        "source": os.fspath(source),
        "output": os.fspath(output),
        "bits": _text(bits),
        "group_size": _text(group_size),
        "asymmetric": asymmetric,
        "keep": _list(keep),
        "tensor": _exceptions(tensor),
        "policy": policy,
        "rules": _path(rules),
        "recipe": _path(recipe),
        "importance": _path(importance),
        "high_ratio": high_ratio,
        "low_ratio": low_ratio,
        "high": high,
        "sensitivity": _path(sensitivity),
        "target_ratio": target_ratio,
        "target_bpw": target_bpw,
        "target_size": _text(target_size),
        "coupled": coupled,
        "rounding": rounding,
        "calib": _path(calib),
        "calib_tokens": _path(calib_tokens),
        "samples": samples,
        "ctx": ctx,
        "ternary_threshold": ternary_threshold,
        "allow_nonfinite": allow_nonfinite,
        "shard_size": _text(shard_size),
        "config": _path(config),
        "rename": _list(rename),
        "dry_run": dry_run,
        "force": force,
        "threads": threads,
    }
    return json.loads(_native.convert(request, as_callback(progress)))


def evaluate(
    model: Union[Path, Model],
    *,
    text: Optional[Path] = None,
    tokens: Union[Path, Sequence[int], None] = None,
    baseline: Union[Path, Model, None] = None,
    ctx: Optional[int] = None,
    skip: int = 1,
    limit_tokens: Optional[int] = None,
    activations: str = "exact",
    allow_lookahead: bool = False,
    verify_hashes: bool = False,
    threads: Optional[int] = None,
    progress: ProgressArgument = None,
) -> dict[str, Any]:
    """Measures perplexity, and the cost of packing against a baseline, as `bkpack eval` does with the same options.

    - `model`, `baseline`: an open `Model`, or the path of a packed file or checkpoint
    - `text`: a file of text (UTF-8); or `tokens`: token ids, or a file with a JSON array of them
    - `ctx`: tokens of a window, 512 by default or the model's context if that is shorter; `skip`: positions at its start
      that are not scored; `limit_tokens`: use only the first so many
    - `activations`: `"exact"` or `"int8"`
    - `allow_lookahead`: measure a model whose positions see later tokens all the same; `looks_ahead` marks the result
    - `verify_hashes`: check every hash of the packed file first; a checkpoint has none
    - `progress`, Ctrl-C and errors are as in `convert`

    Returns what `--json` prints: `ppl`, `nll`, `scored`, `bits_per_weight`, ..., and with a baseline `baseline_ppl`,
    `ppl_increase_percent`, `kld_mean`, `kld_median`, `kld_p999`, `top1_agreement`; `text` unless `tokens` are numbers; and
    the sentences that the command writes as notes, as `notices`.
    """
    request = {
        "model": _model(model),
        "baseline": None if baseline is None else _model(baseline),
        "text": _path(text),
        "tokens": os.fspath(tokens) if _is_path(tokens) else None if tokens is None else [int(token) for token in tokens],
        "ctx": ctx,
        "skip": skip,
        "limit_tokens": limit_tokens,
        "activations": activations,
        "allow_lookahead": allow_lookahead,
        "verify_hashes": verify_hashes,
        "threads": threads,
    }
    return json.loads(_native.evaluate(request, as_callback(progress)))


def as_callback(progress: ProgressArgument) -> Optional[Progress]:
    """What the native work calls."""
    if progress is None or progress is False:
        return None
    return _Line() if progress is True else progress


class _Line:
    """Draws progress on one line of standard error."""

    def __init__(self) -> None:
        self._stage = ""
        self._start = 0.0

    def __call__(self, stage: str, done: int, total: int, unit: str) -> None:
        if stage != self._stage:
            self._stage, self._start = stage, time.monotonic()
        amount, whole, name = (done / 1e6, total / 1e6, "MB") if unit == "bytes" else (done, total, "tokens")
        rate = amount / max(time.monotonic() - self._start, 1e-9)
        end = "\n" if done >= total else ""
        line = f"\r{stage:>11} {amount:.0f}/{whole:.0f} {name} {rate:.0f} {name}/s   "
        print(line, end=end, file=sys.stderr, flush=True)


def _model(model: Union[Path, Model]) -> Any:
    from ._model import Model

    return model._open() if isinstance(model, Model) else os.fspath(model)


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))


def _path(path: Optional[Path]) -> Optional[str]:
    return None if path is None else os.fspath(path)


def _text(value: Union[int, float, str, None]) -> Optional[str]:
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _list(value: Union[str, Iterable[str]]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _exceptions(value: Union[str, Mapping[str, str], Iterable[Union[str, tuple[str, str]]]]) -> list[str]:
    """As the command's `--tensor` has them."""
    items = [value] if isinstance(value, str) else value.items() if isinstance(value, Mapping) else value
    return [item if isinstance(item, str) else "=".join(item) for item in items]
