"""Attacks by a server that `dstune record` asks, and by recordings of others."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

_RECORD = "`dstune record`"

RECORDINGS = (
    Attack(
        "lists whose pages never end, each with a cursor of its own",
        _RECORD,
        "128 MiB of a list; the manifest says what is missing",
        "recordings.test_lists_without_end_are_left",
    ),
    Attack(
        "a file that never ends",
        _RECORD,
        "8 GiB of a file; the manifest says what is missing",
        "recordings.test_a_file_without_end_is_left",
    ),
    Attack(
        "ids and file names that are paths, or no text at all",
        _RECORD,
        "a name with anything else than letters, digits and `_.:-` is replaced by its SHA-256",
        "recordings.test_identifiers_are_no_paths_and_end_nothing",
    ),
    Attack(
        "a redirect to a server that reads the key",
        "`dstune record`, `compare`, `retrain`, teachers, judges",
        "no redirect is followed",
        "recordings.test_the_key_follows_no_redirect",
    ),
    Attack(
        "answers of megabytes, whose comparison takes minutes",
        "`dstune compare`",
        "at most 20,000 characters of a text are compared",
        "recordings.test_an_answer_of_megabytes_is_compared_in_time",
    ),
    Attack(
        "a file of a recording that is a link to a private file, which a job then uploads",
        "`dstune retrain`",
        "links are refused, and only the last part of a path counts",
        "recordings.test_a_recording_of_others_sends_no_file_of_this_machine",
    ),
)
