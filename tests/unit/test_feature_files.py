"""Cached features as files, and the classifiers of scikit-learn on them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from dstune.methods.features.classical import _classifier, _fitted
from dstune.methods.features.config import FeaturesConfig
from dstune.methods.features.vectors import CHUNK_ROWS, _lists, _write


def test_no_array_of_vectors_is_longer_than_its_offsets_can_say(tmp_path):
    """Offsets have 32 bits: 3 million vectors of 768 numbers in one array would be beyond them."""
    batches = [np.arange(8 * 3, dtype=np.float32).reshape(8, 3) + number for number in range(CHUNK_ROWS // 4)]
    column = _lists(batches)
    assert column.type == pa.list_(pa.float32())
    assert [len(chunk) for chunk in column.chunks] == [CHUNK_ROWS, CHUNK_ROWS]
    assert all(chunk.offsets[-1].as_py() == 3 * CHUNK_ROWS for chunk in column.chunks)
    assert np.array_equal(np.array(column.to_pylist()), np.concatenate(batches))
    _write(pa.table({"features": column, "index": pa.array(range(2 * CHUNK_ROWS))}), tmp_path / "part.arrow")
    with pa.ipc.open_stream(tmp_path / "part.arrow") as stream:
        assert stream.read_all()["features"].to_pylist() == column.to_pylist()
    assert len(_lists([])) == 0


def test_a_forest_is_the_same_on_any_number_of_cores():
    choose = np.random.RandomState(0)
    features, labels = choose.rand(300, 8).astype(np.float32), choose.randint(0, 3, 300)
    method = FeaturesConfig(random_forest=True, trees=40)
    alone = _classifier("random_forest", method, 1).fit(features, labels)
    found = _fitted(_classifier("random_forest", method, 1), features, labels)
    assert np.array_equal(found.predict_proba(features), alone.predict_proba(features))
    assert np.array_equal(found.feature_importances_, alone.feature_importances_)
