"""Event files without TensorFlow: written through CLU, read back by TensorBoard itself.

Each case runs in a fresh interpreter, because what stands at CLU's place is decided once a process.
"""

import importlib.util
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("clu")
pytest.importorskip("tensorboard")

ROOT = Path(__file__).parents[1]
HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None

# None in sys.modules makes Python answer that there is no such module.
HIDE_TENSORFLOW = "import sys; sys.modules['tensorflow'] = None\n"
INSTALL = """
from supcon_jax import summary_writer
installed = summary_writer.install_without_tensorflow()
"""
WRITE = """
import jax.numpy as jnp, numpy as np
from clu import metric_writers
writer = metric_writers.create_default_writer(sys.argv[1])
for step in range(3):
    writer.write_scalars(step, {"loss": jnp.float32(2.5 - step), "bf16": jnp.bfloat16(0.5)})
writer.write_scalars(np.int64(3), {"one": np.array([7.0]), "int": 3})
writer.write_images(3, {
    "grey": np.arange(12, dtype=np.uint8).reshape(3, 4, 1),
    "rgb": jnp.linspace(-0.5, 1.5, 2 * 3 * 4 * 3).reshape(2, 3, 4, 3),
})
writer.write_texts(3, {"note": "one *text*"})
writer.write_histograms(3, {"h": jnp.arange(10.0)}, num_buckets={"h": 5})
writer.write_hparams({"batch": 8, "model": {"name": "resnet", "bn": True, "stem": None},
                      "lr": np.float32(0.5), "dtype": np.dtype("float32"), "views": (1, 2)})
from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="mine"))
writer.write_summaries(3, {"raw": np.arange(6).reshape(2, 3)})
writer.write_summaries(3, {"message": np.zeros(1), "bytes": np.ones(1)},
                       metadata={"message": about, "bytes": about.SerializeToString()})
writer.flush()
writer.close()
"""
# Straight to the class: CLU's own LoggingWriter fails on a histogram of NaN.
WRITE_ODD_HISTOGRAMS = """
import jax.numpy as jnp, numpy as np
from clu import metric_writers
writer = metric_writers.SummaryWriter(sys.argv[1])
writer.write_histograms(0, {
    "nan": np.array([np.nan, 1, np.inf]),
    "empty": np.zeros(0),
    "close": np.array([1, 1 + 1e-15]),
    "bf16": jnp.ones(4, jnp.bfloat16),
})
writer.close()
"""


def _python(code, *args, path=()):
    """Runs the code in a new interpreter and returns what it printed."""
    search = os.pathsep.join(map(str, [*path, ROOT]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _read(logdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logdir), size_guidance={"tensors": 0})
    events.Reload()
    return events


def _tensors(events, tag):
    from tensorboard.util import tensor_util

    return [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]


def _decode(png):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("log")
    _python(HIDE_TENSORFLOW + INSTALL + "assert installed\n" + WRITE, logdir)
    return _read(logdir)


def test_scalars(events):
    assert [(s, float(v)) for s, v in _tensors(events, "loss")] == [(0, 2.5), (1, 1.5), (2, 0.5)]
    assert [(s, float(v)) for s, v in _tensors(events, "bf16")] == [(s, 0.5) for s in range(3)]
    assert [(s, float(v)) for s, v in _tensors(events, "one")] == [(3, 7.0)]
    assert [(s, float(v)) for s, v in _tensors(events, "int")] == [(3, 3.0)]


def test_tags_are_shown_by_the_right_plugin(events):
    tags = [tag for tag in events.Tags()["tensors"] if tag != "raw"]
    plugins = {tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags}
    assert plugins["loss"] == "scalars"
    assert plugins["grey"] == plugins["rgb"] == "images"
    assert plugins["note"] == "text"
    assert plugins["h"] == "histograms"
    assert plugins["_hparams_/session_start_info"] == "hparams"
    assert plugins["message"] == plugins["bytes"] == "mine"


def test_images(events):
    ((step, strings),) = _tensors(events, "grey")
    assert step == 3 and list(strings[:2]) == [b"4", b"3"]
    np.testing.assert_array_equal(_decode(strings[2]), np.arange(12).reshape(3, 4))

    ((_, strings),) = _tensors(events, "rgb")
    assert list(strings[:2]) == [b"4", b"3"]
    values = np.linspace(-0.5, 1.5, 72, dtype=np.float32).reshape(2, 3, 4, 3)
    expected = 255 * np.clip(values, 0, 1)
    np.testing.assert_allclose([_decode(s) for s in strings[2:]], expected, atol=0.5001)


def test_texts(events):
    ((step, text),) = _tensors(events, "note")
    assert (step, text.item()) == (3, b"one *text*")


def test_histograms(events):
    ((step, buckets),) = _tensors(events, "h")
    assert step == 3
    edges = np.linspace(0, 9, 6)
    np.testing.assert_allclose(buckets, np.stack([edges[:-1], edges[1:], np.full(5, 2)], axis=1))


def test_histograms_count_what_is_finite(tmp_path):
    _python(HIDE_TENSORFLOW + INSTALL + WRITE_ODD_HISTOGRAMS, tmp_path)
    events = _read(tmp_path)
    for tag, count in {"nan": 1, "empty": 0, "close": 2, "bf16": 4}.items():
        ((_, buckets),) = _tensors(events, tag)
        assert buckets.shape == (30, 3) and buckets[:, 2].sum() == count


def test_hparams(events):
    from tensorboard.plugins.hparams import metadata

    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    values = {k: getattr(v, v.WhichOneof("kind")) for k, v in found.items()}
    assert values == {
        "batch": 8,
        "model.name": "resnet",
        "model.bn": True,
        "model.stem": "",
        "lr": 0.5,
        "dtype": "float32",
        "views.0": 1,
        "views.1": 2,
    }


def test_summaries(events):
    ((step, array),) = _tensors(events, "raw")
    assert step == 3
    np.testing.assert_array_equal(array, np.arange(6).reshape(2, 3))


def test_whole_interface_of_clu_and_one_class():
    code = """
    from clu import metric_writers, periodic_actions
    assert metric_writers.SummaryWriter is summary_writer.SummaryWriter
    assert issubclass(metric_writers.SummaryWriter, metric_writers.MetricWriter)
    assert not metric_writers.SummaryWriter.__abstractmethods__
    assert "tensorflow" not in [m for m in sys.modules if sys.modules[m] is not None]
    """
    _python(HIDE_TENSORFLOW + INSTALL + textwrap.dedent(code))


def test_class_can_be_asked_for_before_clu():
    code = """
    mine = summary_writer.SummaryWriter
    from clu import metric_writers
    assert metric_writers.SummaryWriter is mine
    """
    _python(HIDE_TENSORFLOW + INSTALL + textwrap.dedent(code))


def test_videos_and_sounds_warn_once_each(tmp_path):
    code = """
    import io, logging
    stream = io.StringIO()
    logging.basicConfig(stream=stream)
    from clu import metric_writers
    writer = metric_writers.SummaryWriter(sys.argv[1])
    for step in range(3):
        writer.write_videos(step, {"v": None})
        writer.write_audios(step, {"a": None}, sample_rate=1)
    writer.close()
    print(stream.getvalue())
    """
    lines = _python(HIDE_TENSORFLOW + INSTALL + textwrap.dedent(code), tmp_path).split("\n")
    assert [line.split()[0].split(":")[-1] for line in lines if line] == ["videos", "audios"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("np.zeros((4, 4), np.uint8)", "expected [n, h, w"),
        ("np.zeros((4, 4, 2), np.uint8)", "expected [n, h, w"),
        ("np.zeros((4, 4, 1), np.int32)", "expected uint8 or float"),
    ],
)
def test_wrong_image_is_refused_by_name(tmp_path, image, message):
    code = f"""
    import numpy as np
    from clu import metric_writers
    writer = metric_writers.SummaryWriter(sys.argv[1])
    try:
        writer.write_images(0, {{"pic": {image}}})
    except ValueError as error:
        print(error)
    writer.close()
    """
    printed = _python(HIDE_TENSORFLOW + INSTALL + textwrap.dedent(code), tmp_path)
    assert "'pic'" in printed and message in printed


PRINT_REPLACED = """
import sys
from supcon_jax import summary_writer
print(summary_writer.install_without_tensorflow())
print("clu.metric_writers.summary_writer" in sys.modules)
"""


def test_nothing_is_replaced_where_tensorflow_is_found(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise AssertionError('imported')")
    assert _python(PRINT_REPLACED, path=[tmp_path]).split() == ["False", "False"]


@pytest.mark.skipif(HAS_TENSORFLOW, reason="TensorFlow is installed")
def test_a_folder_left_by_an_uninstall_is_not_tensorflow(tmp_path):
    (tmp_path / "tensorflow/python").mkdir(parents=True)
    assert _python(PRINT_REPLACED, path=[tmp_path]).split() == ["True", "True"]


@pytest.mark.skipif(not HAS_TENSORFLOW, reason="TensorFlow is not installed")
def test_clu_writes_with_tensorflow_where_it_is_installed(tmp_path):
    code = """
    import sys
    from clu import metric_writers
    assert not installed
    assert metric_writers.SummaryWriter.__module__.startswith("clu.")
    writer = metric_writers.create_default_writer(sys.argv[1])
    writer.write_scalars(1, {"loss": 2.0})
    writer.flush()
    """
    _python(INSTALL + textwrap.dedent(code), tmp_path)
    assert [(s, float(v)) for s, v in _tensors(_read(tmp_path), "loss")] == [(1, 2.0)]


def test_clear_error_without_tensorboard():
    code = """
    import sys
    sys.modules["tensorboard"] = None
    try:
        from supcon_jax import summary_writer
    except ImportError as error:
        print(error)
    """
    assert "pip install tensorboard" in _python(code)
