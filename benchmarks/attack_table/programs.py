"""Attacks by programs that the model, or a stranger, has written and a reward runs."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

_PROGRAMS = "judged programs"

PROGRAMS = (
    Attack(
        "memory outside of any process: `memfd_create`, System V, POSIX and shared anonymous memory, `/dev/zero`, pages given to a "
        "pipe, larger pipes and sockets, empty files",
        _PROGRAMS,
        "refused by the filter of system calls; files, their number and descriptors have limits",
        "judged_programs.test_a_program_holds_no_memory_outside_of_its_limit",
    ),
    Attack(
        "memory of the kernel that no limit counts: connections that wait to be accepted, datagrams whose sender has closed, "
        "pages of removed files in sockets, tables of futexes, rules of Landlock",
        _PROGRAMS,
        "refused by the filter of system calls",
        "judged_programs.test_a_program_holds_no_memory_of_the_kernel",
    ),
    Attack(
        "many processes, each of which takes less than the limit",
        _PROGRAMS,
        "the memory of all of them is measured every 50 ms and has one limit",
        "judged_programs.test_the_processes_of_a_program_have_one_limit_of_memory",
    ),
    Attack(
        "processes that take memory faster than it is measured, or hold it where nothing is measured",
        "judged programs",
        "a control group for each program, where this user can make one",
        "judged_programs.test_a_program_runs_in_a_control_group_where_this_process_can_make_one",
    ),
    Attack(
        "`O_DIRECT` on a stream that the program shares with its judge, whose own read then fails",
        _PROGRAMS,
        "each stream is a pipe, of which each side has its own flags",
        "judged_programs.test_a_program_that_changes_its_streams_costs_no_other_row_its_score",
    ),
    Attack(
        "whatever else makes the judge of one row fail",
        _PROGRAMS,
        "that row has no score, and the others of its batch have theirs",
        "judged_programs.test_a_judge_that_fails_costs_one_row_its_score",
    ),
    Attack(
        "a JSON Schema that is broken, or refers to another address",
        "rewards",
        "its row has no score, the others of its batch have theirs; nothing is fetched",
        "judged_programs.test_a_broken_schema_costs_one_row_its_score",
    ),
    Attack(
        "`NaN` or `Infinity` in the place of a number",
        "rewards of JSON",
        "no JSON: 0",
        "judged_programs.test_what_json_does_not_have_is_no_number",
    ),
)
