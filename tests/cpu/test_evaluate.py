"""The evaluation: methods by name, the float32 code of the CPU, weights, and a whole run on a model made up here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cudistr
from cudistr import cli, evaluate, reference
from cudistr.demo.measure import Device
from cudistr.evaluate import EvalError, llama, measure, methods, rivals
from tests.cpu.fakes import Gpu
from tests.strategies import kept_pairs


def arrays(heads: int, heads_kv: int, seqlen: int, head_dim: int = 32) -> list[np.ndarray]:
    draw = np.random.RandomState(0).standard_normal
    return [draw((1, h, seqlen, head_dim)).astype(np.float32) for h in (heads, heads_kv, heads_kv)]


# Methods


def test_parse() -> None:
    assert methods.parse("exact") == methods.Method("exact", "exact", None, {})
    found = methods.parse("lsh:2,near=256,representative=mean")
    assert (found.kind, found.number, found.options) == ("lsh", 2, {"near": 256, "representative": "mean"})
    assert methods.parse("projection:32,share=yes").options["fit"] == "self"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("lhs:2", "'lhs' is no method. Allowed: exact, lsh, energy, lowrank, projection"),
        ("energy:near=3", "'energy:near=3' needs a number, such as energy:32"),
        ("lsh", "'lsh' needs a number, such as lsh:2"),
        ("lsh:two", "'two' in 'lsh:two' is neither a number in first place nor name=value"),
        ("projection:32,bear=2", "projection has no option bear. Allowed: fit, near, share, sinks, tokens"),
        ("lsh:2,bear=2,beer=3", "lsh has no option bear, beer. Allowed: "),
        (
            "energy:32,representative=mean",
            "energy has no option representative. Allowed: block_q, near, sinks",
        ),
        ("exact,near=2", "exact has no option near. It has none"),
        ("exact:2", "exact takes no number, got 'exact:2'"),
        ("hyper:2", "hyper takes no number, got 'hyper:2'"),
        ("hyper,rotate=yes", "hyper has no option rotate. It has none"),
        ("fp8,near=2", "fp8 has no option near. Allowed: rotate"),
        ("fp8,rotate=1", "rotate must be yes or no, got 1"),
        ("projection:32,fit=mine", "fit must be one of self, static, got 'mine'"),
        ("projection:32,weights=plain", "weights must be one of output, attention, got 'plain'"),
        ("projection:32,tokens=2048", "tokens must be a number such as 2048, and go with fit=static"),
        ("projection:32,fit=static,tokens=few", "tokens must be a number such as 2048"),
        ("projection:32,fit=static,tokens=-1", "tokens must be a number such as 2048"),
        ("projection", "'projection' needs a number, such as projection:32"),
        ("projection,tolerance=2", "tolerance must be a number between 0 and 1, such as 0.02, got 2"),
        (
            "projection:16,tolerance=low",
            "tolerance must be a number between 0 and 1, such as 0.02, got 'low'",
        ),
        ("projection,tolerance=0.1,share=yes", "shares ranks, for which it needs their mean"),
    ],
)
def test_what_is_no_method(spec: str, text: str) -> None:
    with pytest.raises(EvalError, match=re.escape(text)):
        methods.parse(spec)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "exact",
        "lsh:2",
        "lsh:2,representative=mean,near=20,sinks=5",
        "lsh:2,representative=rank1",
        "energy:16,near=20,sinks=5",
        "projection:16",
        "projection:16,near=9,sinks=3",
    ],
)
def test_float32_code_is_the_reference(spec: str, causal: bool) -> None:
    q, k, v = arrays(4, 2, 300)
    (reduction,) = methods.prepare(methods.parse(spec), [(q, k, v)], [], causal, {})
    found = methods.attend(q, k, v, reduction, causal, np)
    wanted = reference.attention(q, k, v, reduction=reduction, causal=causal)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("causal", "near"), [(False, ""), (True, ""), (True, ",near=20,sinks=5")])
def test_heads_keep_to_a_tolerance(causal: bool, near: str) -> None:
    q, k, v = arrays(4, 2, 300)
    q[:, 2:, :, 16:] = 0  # those of the second KV head lose nothing at rank 16, the others much
    (within,) = methods.prepare(
        methods.parse(f"projection:16,tolerance=0.02{near}"), [(q, k, v)], [], causal, {}
    )
    assert methods.decided(q, k, v, within, causal, np).tolist() == [[32, 32, 16, 16]]
    found = methods.attend(q, k, v, within, causal, np)
    wanted = reference.attention(q, k, v, reduction=within.projection, causal=causal, tolerance=0.02)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)


def test_a_fit_to_a_tolerance_leaves_a_margin() -> None:
    q, k, v = arrays(4, 2, 300)
    q[:, 2:, :, 16:] = 0
    (within,) = methods.prepare(methods.parse("projection,tolerance=0.02"), [(q, k, v)], [], True, {})
    assert within.projection.ranks == (32, 16)
    assert within.projection.output_errors[1, 1] <= 0.01 < within.projection.output_errors[1, 0]


def test_mean_dim_counts_exact_keys() -> None:
    # 4 rows, causal, near 1: 4 of 10 visible pairs keep all 64 columns.
    assert methods.mean_dim(cudistr.LSH(2, near=1), 64, 4, True) == pytest.approx((4 * 64 + 6 * 32) / 10)
    assert methods.mean_dim(cudistr.Energy(16, 1, 0), 64, 4, True) == pytest.approx((4 * 64 + 6 * 16) / 10)
    assert methods.mean_dim(None, 64, 4, True) == 64
    assert methods.mean_dim(0.02, 64, 4, True) is None
    q, k = arrays(2, 2, 4, 64)[:2]
    projection = cudistr.Projection.fit(q, k, rank=16).with_near(1)
    found = methods.mean_dim(projection, 64, 4, True, np.array([[64, 16]]))
    assert found == pytest.approx((4 * 64 + 6 * 40) / 10)


def test_whole_blocks_of_exact_keys(whole_blocks: None) -> None:
    q, k, v = arrays(4, 2, 900)
    (reduction,) = methods.prepare(methods.parse("projection:16,near=9,sinks=3"), [(q, k, v)], [], True, {})
    found = methods.attend(q, k, v, reduction, True, np)
    wanted = reference.attention(q, k, v, reduction=reduction, causal=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)
    seen = np.tri(900, dtype=bool)
    kept = kept_pairs(900, 900, 9, 3, (384, 128))
    dim = np.where(kept, 32, 16)[seen].mean()
    assert methods.mean_dim(reduction, 32, 900, True) == pytest.approx(dim)


# Rivals


def test_e4m3_is_float8() -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    between = np.concatenate(
        [(1 - t) * every[:-1] + t * every[1:] for t in (0.0, 0.25, 0.5, 0.75)]
    )  # ties too
    random = np.random.RandomState(7)
    x = np.concatenate([between, np.exp(random.uniform(-12, 6, 10000)) * random.choice([-1, 1], 10000)])
    x = x.astype(np.float32)
    found = rivals.e4m3(x, np)
    np.testing.assert_array_equal(found, x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    np.testing.assert_array_equal(rivals.e4m3(np.float32([460, -1e30]), np), [448, -448])


@pytest.mark.parametrize("rotate", ["no", "yes"])
@pytest.mark.parametrize("causal", [False, True])
def test_fp8_is_exact_attention_of_rounded_operands(
    causal: bool, rotate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "FP8_ROWS", 16)
    heads, heads_kv, seqlen = 4, 2, 41
    q, k, v = arrays(heads, heads_kv, seqlen)
    k[:, 1] *= 1000  # a scale of its own
    v[:, 0] = 0

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    def scaled(x: np.ndarray) -> np.ndarray:
        scale = np.float32(np.abs(x).max() / 448 or 1)
        return rounded(x / scale) * scale

    (method,) = methods.prepare(methods.parse(f"fp8,rotate={rotate}"), [(q, k, v)], [], causal, {})
    found = methods.attend(q, k, v, method, causal, np)
    if rotate == "yes":
        turned = np.linalg.qr(np.random.RandomState(0).standard_normal((32, 32)))[0].astype(np.float32)
        q, k = q @ turned, k @ turned
    for h in range(heads):
        own = slice(h // 2 * 2, h // 2 * 2 + 2)  # the query heads of a KV head have one scale
        queries, keys, values = scaled(q[0, own])[h % 2], scaled(k[0, h // 2]), scaled(v[0, h // 2])
        scores = queries @ keys.T / 32**0.5
        if causal:
            scores[np.triu_indices(seqlen, 1)] = -np.inf
        weights = 256 * np.exp(scores - scores.max(axis=1, keepdims=True))
        wanted = rounded(weights) @ values / weights.sum(axis=1, keepdims=True)
        # Scores are float32 here: a weight next to a tie may be rounded the other way, one sixteenth off.
        error = np.linalg.norm(found[0, h] - wanted)
        assert error <= 1e-3 * np.linalg.norm(wanted)


def test_fp8_has_the_error_of_three_digits() -> None:
    q, k, v = arrays(2, 2, 500, 64)
    exact = reference.attention(q, k, v)
    error = np.linalg.norm(rivals.fp8(q, k, v, np) - exact) / np.linalg.norm(exact)
    assert 2**-7 < error < 2**-3  # numbers are up to 2^-4 off, 2^-5.3 in the root mean square


def test_a_rotation_spreads_outliers() -> None:
    random = np.random.RandomState(0)  # one number in a thousand is large, as in section 4.3 of the paper
    shape = (3, 1, 2, 1000, 64)
    large = 10 * random.standard_normal(shape) * (random.random_sample(shape) < 0.001)
    q, k, v = (random.standard_normal(shape) + large).astype(np.float32)
    exact = reference.attention(q, k, v)
    plain, turned = (np.linalg.norm(rivals.fp8(q, k, v, np, rotate=r) - exact) for r in (False, True))
    assert turned < 0.7 * plain


def test_only_fp8_has_a_mask() -> None:
    layers = [arrays(2, 2, 40)]
    with pytest.raises(EvalError, match="hydra has no causal mask here; it is for dinov2"):
        methods.prepare(methods.parse("hydra"), layers, [], True, {})


def test_hyper_is_exact_within_one_block() -> None:
    q, k, v = arrays(2, 2, 200)
    np.testing.assert_allclose(rivals.hyper(q, k, v, np), reference.attention(q, k, v), rtol=0, atol=3e-6)


def test_hyper_approximates_beyond() -> None:
    q, k, v = arrays(1, 1, 1024)
    q, v = (
        np.float32(0.1) * q,
        v + np.float32(3),
    )  # nearly uniform weights, for which a sample of keys is fair
    exact = reference.attention(q, k, v)
    error = np.linalg.norm(rivals.hyper(q, k, v, np) - exact) / np.linalg.norm(exact)
    # A mean over some 450 keys whose values have a mean of 3 and a deviation of 1 is 0.016 away from that over all.
    assert 0.001 < error < 0.03


def test_linear_rivals_by_their_formulas() -> None:
    q, k, v = arrays(2, 2, 7, 8)

    def focused(x: np.ndarray) -> np.ndarray:
        x = np.maximum(x, 0) + 1e-6
        return np.linalg.norm(x) * x**3 / np.linalg.norm(x**3)

    flatten, hydra = rivals.flatten(q, k, v, np), rivals.hydra(q, k, v, np)
    for h in range(2):
        weights = np.array([[focused(a) @ focused(b) for b in k[0, h]] for a in q[0, h]])
        wanted = weights @ v[0, h] / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(flatten[0, h], wanted, rtol=1e-4, atol=1e-5)
        rows = [
            np.linalg.norm(x[0], axis=(0, 2))[:, None] for x in (q, k)
        ]  # the paper normalises over all heads
        wanted = q[0, h] / rows[0] * (k[0, h] / rows[1] * v[0, h]).sum(axis=0)
        np.testing.assert_allclose(hydra[0, h], wanted, rtol=1e-4, atol=1e-6)


# The model


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_dequantise_is_ggufs(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra eval")
    weights = np.random.RandomState(1).standard_normal((3, 64)).astype(np.float32)
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    raw = gguf.quants.quantize(weights, quantised)
    np.testing.assert_allclose(llama.dequantise(raw, kind), gguf.quants.dequantize(raw, quantised), atol=1e-6)


def tiny() -> dict[str, Any]:
    """Two layers, 2 query heads over 1, head_dim 32, 50 words."""
    random = np.random.RandomState(2)
    shapes = {"token_embd.weight": (50, 32), "output_norm.weight": (32,)}
    for layer in range(2):
        own = {
            "attn_norm": (32,), "attn_q": (64, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 64),
            "ffn_norm": (32,), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    content: dict[str, Any] = {
        f"F32:{name}": random.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()
    }
    content["numbers"] = np.array([2, 1, 1e4, 1e-5])
    return content


def exact_attention(layer: int, q: Any, k: Any, v: Any) -> Any:
    return methods.attend(q, k, v, None, True, np)


def test_forward_sees_only_the_past_and_rotates_by_distance() -> None:
    model = llama.build(tiny())
    tokens = np.random.RandomState(3).randint(0, 50, 20)
    features = llama.forward(model, tokens, exact_attention, dtype=np.float32, xp=np)
    shorter = llama.forward(model, tokens[:12], exact_attention, dtype=np.float32, xp=np)
    np.testing.assert_allclose(features[:12], shorter, rtol=0, atol=1e-5)
    seen = []

    def attention(layer: int, q: Any, k: Any, v: Any) -> Any:
        seen.append((q, k))
        return exact_attention(layer, q, k, v)

    llama.forward(model, np.full(20, 7), attention, dtype=np.float32, xp=np)
    q, k = seen[0]  # the same word everywhere: what is left of a score is the distance
    scores = q[0, 0] @ k[0, 0].T
    np.testing.assert_allclose(np.diagonal(scores, -3), scores[3, 0], rtol=1e-3, atol=1e-5)
    assert abs(scores[3, 0] - scores[0, 0]) > 1e-3


def test_perplexity() -> None:
    model = llama.build(tiny())
    tokens = np.random.RandomState(4).randint(0, 50, 600)
    assert llama.perplexity(model, np.zeros((600, 32), np.float32), tokens, np) == pytest.approx(50)
    features = np.random.RandomState(5).standard_normal((600, 32)).astype(np.float32)
    logits = features[:-1] @ model["token_embd.weight"].T
    chosen = logits[np.arange(599), tokens[1:]] - np.log(np.exp(logits).sum(axis=1))
    assert llama.perplexity(model, features, tokens, np) == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)


# A run


def test_eval_writes_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cudistr.evaluate.models.CALIBRATION_STARTS", (100,))
    monkeypatch.setattr("cudistr.evaluate.models.CALIBRATION_TOKENS", 60)
    monkeypatch.setattr(llama, "PART_BYTES", 20000)
    paths = llama.save(
        tiny(), np.random.RandomState(6).randint(0, 50, 200).astype(np.int32), tmp_path / "weights"
    )
    assert len(paths) > 1
    specs = [
        "exact",
        "lsh:2",
        "projection:16,share=yes",
        "projection:16,fit=static,near=4,sinks=2",
        "projection:0,fit=static,near=4",
        "projection:16,fit=static,near=4,sinks=2,tokens=20",
        "projection,fit=static,tolerance=0.1",
        "fp8",
    ]
    words = ["eval", "--device", "cpu", "--seqlen", "50", "--weights", str(tmp_path / "weights")]
    assert cli.main([*words, "--output", str(tmp_path), "--reduction", *specs]) == 0
    record = json.loads((tmp_path / "cpu" / "eval-smollm2.json").read_text())
    evaluate.validate(record)
    rows = record["rows"]
    assert [row["method"] for row in rows] == specs
    assert rows[0]["error_worst"] == 0
    assert all(row["error_worst"] > 0 and "ms_attention" not in row for row in rows[1:])
    assert rows[2]["dim"] == 16
    assert 0 < rows[4]["dim"] < 16  # exact keys alone
    assert rows[5]["dim"] == rows[3]["dim"]
    assert rows[5]["error_mean"] > rows[3]["error_mean"]  # fitted to fewer tokens
    assert 0 < rows[6]["dim"] <= 32
    assert "dim" not in rows[7]
    assert "projection:16,share=yes" in capsys.readouterr().out


def test_tokens_are_for_texts() -> None:
    found = methods.parse("projection:16,fit=static,tokens=9")
    layers = [arrays(2, 2, 40)]
    with pytest.raises(EvalError, match="tokens is for texts"):
        methods.prepare(found, layers, [layers], False, {})


def test_missing_weights_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--device", "cpu", "--weights", str(tmp_path)]) == 1
    assert "lacks files smollm2-*.npz. Write them with --save-weights" in capsys.readouterr().err


def test_a_record_that_is_none() -> None:
    record = {
        "device": "cpu",
        "commit": "1",
        "command": "x",
        "versions": {"a": "1"},
        "evaluated": {"model": "m"},
    }
    with pytest.raises(ValueError, match="rows must be a list, not empty"):
        evaluate.validate(record)
    row = {"method": "exact", "error_mean": float("nan"), "error_worst": 0.0}
    with pytest.raises(ValueError, match="error_mean of exact must be a finite number, got nan"):
        evaluate.validate({**record, "rows": [row]})
    assert measure.GPU_RUNS % 2  # the median is a run


def test_times_from_python_and_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    attend = methods.attend

    def counted(q: Any, k: Any, v: Any, reduction: Any, causal: bool, xp: Any) -> Any:
        if isinstance(reduction, cudistr.LSH) and gpu.captured is not None:
            raise RuntimeError("not this one")
        gpu.work(1.0)
        return attend(q, k, v, reduction, causal, np)

    monkeypatch.setattr(measure, "attend", counted)
    monkeypatch.setattr(measure, "_errors", lambda out, exact, device: np.zeros(2))
    layers = [arrays(2, 2, 40) for _ in range(3)]

    def forward(attention: Any) -> list[Any]:
        return [attention(n, *layer) for n, layer in enumerate(layers)]

    case = SimpleNamespace(
        forwards=[forward], causal=False, calibration=[[]], score=lambda i, found, exact: {"cosine": 1.0}
    )
    chosen = [methods.parse(spec) for spec in ("hydra", "lsh:2", "exact")]
    with pytest.warns(UserWarning, match="lsh:2 has no ms_graph, it could not be captured: not this one"):
        rows = measure.measure(case, chosen, Device(gpu, "GPU X", True), lambda: None)  # type: ignore[arg-type]
    assert [row["ms_attention"] for row in rows] == [3, 3, 3]
    assert ["ms_graph" in row for row in rows] == [False, False, True]
    assert rows[2]["ms_graph"] == 3  # a replay before it is not counted
    assert gpu.captured is None
    assert "ms_graph" in evaluate.table(rows)
    record = {name: {"a": "1"} for name in ("versions", "evaluated")} | dict.fromkeys(
        ("device", "commit", "command"), "1"
    )
    rows[2]["ms_graph"] = None
    with pytest.raises(ValueError, match="ms_graph of exact must be a finite number, got None"):
        evaluate.validate({**record, "rows": rows})
