import numpy as np
import pytest
import torch

from ddim_fast.generation.labels import Labels, read_labels

CLASSES = {"num_class_embeds": 10, "class_embed_type": None}
UNCONDITIONAL = {"num_class_embeds": None, "class_embed_type": None}


def test_labels_follow_the_position_in_the_job():
    assert Labels(3, 5, CLASSES).take(2, [7, 8]) == [3, 3]
    assert Labels([0, 1, 2, 3, 4], 5, CLASSES).take(2, [7, 8]) == [2, 3]
    assert Labels(torch.arange(5), 5, CLASSES).take(0, [7]) == [0]
    assert Labels(None, 5, UNCONDITIONAL).take(0, [7]) is None


def test_uniform_labels_are_balanced_and_depend_on_the_seed_alone():
    uniform = Labels("uniform", 100, CLASSES)
    labels = uniform.take(0, list(range(100)))
    assert np.bincount(labels).tolist() == [10] * 10
    assert uniform.take(0, [57]) == labels[57:58]


def test_lists_with_other_labels_are_other_settings():
    one, same, other = (Labels(list(v), 3, CLASSES).setting for v in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    assert one == same != other


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (None, CLASSES, "class-conditional of 10"),
        (10, CLASSES, "holds 10.*0 to 9"),
        (-1, CLASSES, "holds -1"),
        (2**70, CLASSES, f"holds {2**70}"),
        ([1, 2], CLASSES, r"shape \(2,\).*\(5,\)"),
        ([0.5] * 5, CLASSES, "integers"),
        ("all", CLASSES, "'uniform'"),
        (3, UNCONDITIONAL, "unconditional"),
        ("uniform", {"class_embed_type": "timestep"}, "how many classes"),
        ([1] * 5, {"class_embed_type": "identity"}, "embeddings"),
    ],
)
def test_labels_the_model_cannot_take_are_refused(spec, config, message):
    with pytest.raises(ValueError, match=message):
        Labels(spec, 5, config)


def test_labels_are_read_from_text_and_npy(tmp_path):
    (tmp_path / "a.txt").write_text("3\n1\n\n4\n")
    np.save(tmp_path / "a.npy", np.array([3, 1, 4]))
    assert read_labels(tmp_path / "a.txt").tolist() == read_labels(tmp_path / "a.npy").tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", b"3\nx\n", "b.txt, line 2: 'x'"),
        ("b.txt", b"3\n99999999999999999999\n", "b.txt, line 2: '99999999999999999999'"),
        ("b.txt", b"\x93NUMPY", "b.txt is neither text nor .npy"),
        ("b.npy", b"", "b.npy is not an array of labels"),
        ("b.npy", b"3\n1\n", "b.npy is not an array of labels"),
    ],
)
def test_a_file_that_holds_no_labels_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / name)
