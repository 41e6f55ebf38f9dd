"""Packing, order, sharing and collating against hand arithmetic."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
import torch

from dstune.data.collate import collate
from dstune.data.pack import best_fit, group
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch, TrainingOrder, evaluation_batches, share

LENGTHS = np.random.RandomState(0).randint(1, 65, size=203)
WEIGHTS = np.maximum(1, LENGTHS // 2)


def order(lengths=LENGTHS, weights=None, **changes) -> TrainingOrder:
    settings = {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "max_length": 64,
        "packing": False,
        "length_grouping": False,
        "seed": 7,
    }
    return TrainingOrder(lengths, lengths if weights is None else weights, **(settings | changes))


def samples_of(training: TrainingOrder, epoch: int) -> list[int]:
    global_batches = (training.global_batch(epoch, index) for index in range(training.steps_in(epoch)))
    return [
        sample for global_batch in global_batches for micro in global_batch.micro_batches for sample in micro.samples
    ]


KINDS = [
    {"packing": True},
    {"packing": False, "length_grouping": False},
    {"packing": False, "length_grouping": True},
    {"packing": False, "length_grouping": True, "micro_batch_size": 3, "global_batch_size": 8},
]


def test_best_fit_example_of_its_documentation():
    assert best_fit(np.array([3, 6, 4, 5, 2]), 10).tolist() == [1, 0, 0, 1, 1]


def test_best_fit_fills_a_row_with_equal_samples_before_the_next():
    # 5 opens row 0 (room 5), the first 4 joins it (room 1), the second opens row 1 (room 6), the third joins that.
    assert best_fit(np.array([4, 4, 5, 4]), 10).tolist() == [0, 1, 0, 1]
    assert best_fit(np.array([10, 10]), 10).tolist() == [0, 1]
    assert best_fit(np.array([], dtype=np.int64), 10).tolist() == []


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    """Best fit decreasing, one sample at a time: how many rows it takes."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_equals_the_plain_algorithm(seed):
    lengths = np.random.RandomState(seed).randint(1, 50, size=300)
    rows = best_fit(lengths, 64)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 64
    assert len(filled) == plain_best_fit(lengths.tolist(), 64)
    assert (filled > 0).all()


def test_best_fit_does_not_depend_on_the_order_in_its_number_of_rows():
    shuffled = np.random.RandomState(1).permutation(LENGTHS)
    assert best_fit(LENGTHS, 64).max() == best_fit(shuffled, 64).max()


def test_group():
    samples, starts = group(np.array([1, 0, 0, 1, 1]))
    assert samples.tolist() == [1, 2, 0, 3, 4]
    assert starts.tolist() == [0, 2, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_once_an_epoch_and_another_order_in_the_next(kind):
    training = order(**kind)
    first, second = samples_of(training, 0), samples_of(training, 1)
    assert sorted(first) == sorted(second) == list(range(len(LENGTHS)))
    assert first != second
    assert first != samples_of(order(**kind, seed=8), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_a_pure_function_of_seed_and_epoch(kind):
    """Asking for global batches in any order, or from a new process in the middle, gives the same ones."""
    training, resumed = order(**kind), order(**kind)
    last = training.steps_in(1) - 1
    forward = [training.global_batch(1, index) for index in range(training.steps_in(1))]
    training.global_batch(0, 0)
    assert [resumed.global_batch(1, index) for index in range(last, -1, -1)][::-1] == forward
    assert training.global_batch(1, last) == forward[last]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_the_global_batch(kind):
    training = order(weights=WEIGHTS, **kind)
    micro = kind.get("micro_batch_size", 2)
    for index in range(training.steps_in(0)):
        global_batch = training.global_batch(0, index)
        sizes = [len(batch.rows) for batch in global_batch.micro_batches]
        assert [batch.index for batch in global_batch.micro_batches] == list(range(len(sizes)))
        if index < training.steps_in(0) - 1:
            assert sizes == [micro] * (8 // micro) + ([8 % micro] if 8 % micro else [])
        samples = [sample for batch in global_batch.micro_batches for sample in batch.samples]
        assert global_batch.weight == WEIGHTS[samples].sum()
        assert global_batch.tokens == LENGTHS[samples].sum()


def test_counting_by_hand():
    # 203 samples, 8 a global batch: 25 whole ones and one of 3 samples, which is micro-batches of 2 and 1.
    training = order()
    assert training.steps_in(0) == 26
    assert training.steps(3) == 78
    assert training.locate(0) == (0, 0)
    assert training.locate(25) == (0, 25)
    assert training.locate(26) == (1, 0)
    assert [len(batch.rows) for batch in training.global_batch(0, 25).micro_batches] == [2, 1]


def test_a_micro_batch_is_no_larger_than_the_global_batch():
    training = order(micro_batch_size=16, global_batch_size=4)
    assert [len(batch.rows) for batch in training.global_batch(0, 0).micro_batches] == [4]


def test_packed_rows_fit_and_are_not_sorted():
    training = order(packing=True)
    rows = [
        row
        for index in range(training.steps_in(0))
        for batch in training.global_batch(0, index).micro_batches
        for row in batch.rows
    ]
    filled = [LENGTHS[list(row)].sum() for row in rows]
    assert max(filled) <= 64
    longest = [LENGTHS[list(row)].max() for row in rows]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_packing_puts_other_samples_together_in_the_next_epoch():
    training = order(packing=True)
    rows = [
        {
            row
            for index in range(training.steps_in(epoch))
            for batch in training.global_batch(epoch, index).micro_batches
            for row in batch.rows
        }
        for epoch in (0, 1)
    ]
    together = len(rows[0] & rows[1]) / len(rows[0])
    assert together < 0.5


def test_efficiency_by_hand():
    # Packed, capacity 8: rows (5, 3) and (4, 2); one micro-batch of width 8: 14 of 16 positions.
    lengths = np.array([5, 3, 4, 2])
    packed = TrainingOrder(
        lengths,
        lengths,
        micro_batch_size=2,
        global_batch_size=2,
        max_length=8,
        packing=True,
        length_grouping=False,
        seed=0,
    )
    assert packed.efficiency() == pytest.approx(14 / 16)
    # Unpacked, one micro-batch of 4: the widest is 5, padded to 8: 14 of 32.
    unpacked = TrainingOrder(
        lengths,
        lengths,
        micro_batch_size=4,
        global_batch_size=4,
        max_length=8,
        packing=False,
        length_grouping=False,
        seed=0,
    )
    assert unpacked.efficiency() == pytest.approx(14 / 32)


def test_length_grouping_saves_padding_and_stays_random():
    lengths = np.random.RandomState(3).randint(1, 513, size=2000)
    settings = {"micro_batch_size": 4, "global_batch_size": 16, "max_length": 512}
    grouped = order(lengths, length_grouping=True, **settings)
    assert grouped.efficiency() > 0.9 > 0.7 > order(lengths, **settings).efficiency()
    means = [
        lengths[grouped.global_batch(0, index).micro_batches[0].samples].mean() for index in range(grouped.steps_in(0))
    ]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    rising = np.mean(np.diff(means) > 0)
    assert 0.4 < rising < 0.6
    # Micro-batches of one global batch come from all lengths: its tokens vary far less than those of its micro-batches.
    assert np.std([grouped.global_batch(0, index).tokens / 16 for index in range(grouped.steps_in(0) - 1)]) < np.std(
        means
    )


def test_packing_of_dialogue_like_lengths():
    """Log-normal lengths cut at the capacity, as the sample dialogues have them."""
    lengths = np.minimum(512, np.exp(np.random.RandomState(0).normal(5.8, 0.9, size=4000)).astype(int) + 1)
    assert order(lengths, packing=True, max_length=512).efficiency() > 0.97


def test_share_example_of_its_documentation():
    batches = [MicroBatch(index, ((index,),)) for index in range(5)]
    assert [[(batch.index, batch.filler) for batch in share(batches, rank, 3)] for rank in range(3)] == [
        [(0, False), (3, False)],
        [(1, False), (4, False)],
        [(2, False), (5, True)],
    ]
    assert share(batches, 2, 3)[1].rows == batches[0].rows
    # More ranks than micro-batches: the others get fillers only, each with an index of its own.
    spread = [share(batches[:1], rank, 4) for rank in range(4)]
    assert [(one.index, one.filler) for (one,) in spread] == [(0, False), (1, True), (2, True), (3, True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_computes_the_same_window(kind, world):
    training = order(**kind)
    for index in range(training.steps_in(0)):
        global_batch = training.global_batch(0, index)
        shares = [share(global_batch, rank, world) for rank in range(world)]
        assert len({len(mine) for mine in shares}) == 1
        real = sorted((batch for mine in shares for batch in mine if not batch.filler), key=lambda batch: batch.index)
        assert tuple(real) == global_batch.micro_batches
        indices = [batch.index for mine in shares for batch in mine]
        assert len(set(indices)) == len(indices)
        assert all(batch.index % world == rank for rank, mine in enumerate(shares) for batch in mine)


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_holds_every_sample_once(packing):
    batches = evaluation_batches(LENGTHS, micro_batch_size=4, max_length=64, packing=packing)
    assert Counter(sample for batch in batches for sample in batch.samples) == Counter(range(len(LENGTHS)))
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert all(LENGTHS[list(row)].sum() <= 64 for batch in batches for row in batch.rows)
    if not packing:
        lengths = [LENGTHS[row[0]] for batch in batches for row in batch.rows]
        assert lengths == sorted(lengths, reverse=True)


def token_split() -> Split:
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [[11, 12, 13], [21, 22], [31, 32, 33, 34]],
            "labels": [[-100, 12, 13], [-100, 22], [-100, -100, 33, 34]],
        }
    )
    return Split("train", table, np.array([3, 2, 4], np.int32), np.array([2, 1, 2]))


def test_collate_packed():
    batch = collate(token_split(), MicroBatch(0, ((0, 1), (2,))), pad_token_id=9, packing=True)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22], [31, 32, 33, 34, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100, 22], [-100, -100, 33, 34, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collate_packed_padding_is_a_sample_of_its_own():
    batch = collate(token_split(), MicroBatch(0, ((0, 1), (1,))), pad_token_id=9, packing=True)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


def test_collate_unpacked_pads_to_a_multiple_of_eight():
    batch = collate(token_split(), MicroBatch(0, ((1,), (2,))), pad_token_id=9, packing=False)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].tolist() == [[21, 22] + [9] * 6, [31, 32, 33, 34] + [9] * 4]
    assert batch["attention_mask"].tolist() == [[1] * 2 + [0] * 6, [1] * 4 + [0] * 4]
    assert batch["labels"].tolist() == [[-100, 22] + [-100] * 6, [-100, -100, 33, 34] + [-100] * 4]


def test_collate_filler_counts_for_nothing():
    for packing in (True, False):
        batch = collate(token_split(), MicroBatch(5, ((0,),), filler=True), pad_token_id=9, packing=packing)
        assert (batch["labels"] == -100).all()
        assert batch["input_ids"][0, :3].tolist() == [11, 12, 13]


def test_collate_classification():
    table = datasets.Dataset.from_dict({"input_ids": [[11, 12, 13], [21, 22]], "label": [1, 0]})
    split = Split("train", table, np.array([3, 2], np.int32), np.array([1, 1]))
    batch = collate(split, MicroBatch(0, ((1,), (0,))), pad_token_id=9, packing=False, with_index=True)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["index"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [2, 3]
    filler = collate(split, MicroBatch(0, ((1,),), filler=True), pad_token_id=9, packing=False, with_index=True)
    assert filler["labels"].tolist() == [-100]
