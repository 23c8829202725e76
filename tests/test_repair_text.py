import numpy as np
from coreinfer.compiler.prune.narrow import Assignment
from coreinfer.compiler.prune.repair_text import few_calibrated
from coreinfer.compiler.text.corpus import Document

NOTHING = np.zeros(0, dtype=np.int64)


def documents(lengths: list[int]) -> list[Document]:
    return [
        Document(text=str(number), routing_text="", token_ids=(1,) * length) for number, length in enumerate(lengths)
    ]


def assignment(name: str, labels: list[int]) -> Assignment:
    return Assignment(name=name, calibration=np.array(labels), validation=NOTHING, held_out=NOTHING)


def test_only_long_clusters_lose_text() -> None:
    own = documents([10] * 40 + [10] * 8)
    clusters, control = assignment("clusters", [0] * 40 + [1] * 8), assignment("one static mask", [0] * 48)
    left, (found, other) = few_calibrated(own, [clusters, control], 100)
    assert np.bincount(found.calibration).tolist() == [10, 8]
    assert [document.text for document in left][:10] == [str(number) for number in range(0, 40, 4)]
    assert len(other.calibration) == len(left) == 18


def test_text_that_is_short_enough_stays_as_it_is() -> None:
    own, clusters = documents([10, 20, 30]), assignment("clusters", [1, 0, 1])
    for most in (None, 60, 40):
        left, (found,) = few_calibrated(own, [clusters], most)
        assert left == own
        assert found.calibration.tolist() == [1, 0, 1]


def test_each_cluster_of_a_control_keeps_a_document() -> None:
    own = documents([10] * 20)
    clusters = assignment("clusters", [0] * 20)
    # Its second cluster has the one document that would go.
    control = assignment("random", [0] * 3 + [1] + [0] * 16)
    left, (_, found) = few_calibrated(own, [clusters, control], 100)
    assert "3" in [document.text for document in left]
    assert found.num_clusters == control.num_clusters == 2
    assert len(left) == 11
