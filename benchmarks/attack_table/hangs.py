"""Attacks on the terminal, on time and on memory."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

HANGS = (
    # Terminals.
    Attack(
        "terminal escapes and bidirectional text",
        "messages, labels, tags",
        "written as their codes",
        "terminal.test_text_of_others_is_made_visible",
    ),
    Attack(
        "the same in `result.json`",
        "`dstune status`, `dstune runs`",
        "written as their codes",
        "terminal.test_status_and_runs_show_a_prepared_result",
    ),
    Attack(
        "the same on the command line",
        "errors",
        "written as their codes",
        "terminal.test_the_command_line_itself_is_repeated_harmlessly",
    ),
    Attack(
        "the same from a library's warning",
        "output of a rank",
        "written as their codes",
        "terminal.test_what_a_package_below_reports_passes_through_the_command",
    ),
    # Hangs and memory.
    Attack(
        "a chat template that never ends (loops, `10**(10**9)`, doubled text)",
        "`model.chat_template`, a model's own",
        "tried in a child that is killed after 1 s",
        "templates.test_a_template_without_end_is_refused",
    ),
    Attack(
        "a template that takes a quarter of a second each time",
        "the same",
        "the conversations that show how it writes have 0.8 s together",
        "templates.test_a_template_that_is_slow_each_time_is_refused",
    ),
    Attack(
        "a template that recurs, divides by zero, overflows",
        "the same",
        "a message",
        "templates.test_a_faulty_template_is_a_message",
    ),
    Attack(
        "a row that makes a template endless",
        "rows",
        "1.5 s and 1 GiB for a conversation: a bad row",
        "templates.test_a_row_that_makes_a_template_endless_is_a_bad_row",
    ),
    Attack(
        "a conversation that makes a template endless",
        "requests to `dstune serve`",
        "threads render in a process of its own, which is ended after 1.5 s or at 1 GiB: a 400",
        "templates.test_a_conversation_that_makes_a_template_endless_ends_in_a_server_too",
    ),
    Attack(
        "many such rows",
        "rows",
        "after 10 the template is refused",
        "templates.test_a_template_that_is_slow_for_many_rows_is_refused",
    ),
    Attack(
        "an operation that looks for no signals (comparing 2**60 values)",
        "template and row",
        "the process is ended, with its place in the log",
        "templates.test_what_no_signal_reaches_ends_the_process",
    ),
    Attack(
        "a pattern that backtracks without end",
        "`adapter_config.json`",
        "tried in a child that is killed after 2 s",
        "hangs.test_a_pattern_that_backtracks",
    ),
    Attack(
        "the same",
        "`tokenizer.json`",
        "tried in a child that is killed after 2 s",
        "tokenizers.test_patterns_of_a_tokenizer_that_backtrack",
    ),
    Attack(
        "a pattern that backtracks over some rows alone",
        "`tokenizer.json`",
        "a message that names the file and the text",
        "tokenizers.test_a_pattern_that_backtracks_over_one_row_alone",
    ),
    Attack(
        "a rank of ten million",
        "`adapter_config.json`",
        "no size beyond those of its matrices",
        "hangs.test_an_adapter_that_asks_for_more_than_it_has",
    ),
    Attack(
        "either of them in an adapter that is served",
        "`dstune serve`",
        "looked at before the engine takes it",
        "hangs.test_a_served_adapter_is_looked_at_before_the_engine_takes_it",
    ),
    Attack(
        "replacements that make gigabytes of a word, tokens around each text",
        "`tokenizer.json`",
        "64 characters of one, 1,000 tokens",
        "tokenizers.test_a_tokenizer_that_makes_gigabytes_of_a_word",
    ),
    Attack(
        "files of a tokenizer that hold lists, numbers or nothing",
        "models, adapters",
        "refused, whatever the library raises",
        "tokenizers.test_files_of_a_tokenizer_that_are_none",
    ),
    Attack(
        "the same in an architecture",
        "`config.json`",
        "refused, whatever the library raises",
        "tokenizers.test_an_architecture_that_is_none",
    ),
    Attack(
        "settings of an adapter that are a list, or too deep",
        "`adapter_config.json`",
        "refused",
        "hangs.test_settings_of_an_adapter_that_are_none",
    ),
    Attack(
        "YAML whose aliases make a billion values, or hold themselves",
        "`run.yaml`, `dstune import`",
        "1,000,000 values, 100 levels",
        "hangs.test_yaml_that_grows_or_never_ends",
    ),
    Attack(
        "JSON 200,000 deep; an integer of 5,000 digits",
        "every JSON file",
        "100 levels, 4,300 digits",
        "hangs.test_json_that_is_too_deep_or_too_long",
    ),
    Attack(
        "the same in one row", "rows", "a bad row; those after it are read", "hangs.test_rows_around_a_bad_one_are_read"
    ),
    Attack(
        "a line or field of 1 GiB",
        "JSON Lines, CSV, text, CoNLL",
        "64 MiB: a bad row",
        "hangs.test_a_field_without_end_is_one_bad_row",
    ),
    Attack(
        "the same in a table",
        "Parquet, Arrow",
        "64 MiB: a bad row",
        "hangs.test_a_field_of_a_table_without_end_is_one_bad_row",
    ),
    Attack(
        "a table whose rows share one value: 1 KB on disk, gigabytes as rows",
        "Arrow: dictionaries, runs, views",
        "1 GiB at a time, else row by row",
        "unfolding.test_a_table_of_a_few_bytes_is_read_in_little_memory",
    ),
    Attack(
        "a page of 1 KB that stands for gigabytes",
        "Parquet",
        "1 GiB at a time, else fewer rows",
        "unfolding.test_a_page_of_a_few_bytes_is_read_in_little_memory",
    ),
    Attack(
        "a compressed batch of gigabytes",
        "Arrow",
        "half of the memory that is free",
        "unfolding.test_a_batch_larger_than_half_of_the_memory_is_refused",
    ),
    Attack(
        "a checkpoint of a table's log that stands for gigabytes",
        "`delta://`",
        "half of the memory that is free, 50 million actions",
        "unfolding.test_a_checkpoint_that_grows_is_not_given_to_the_library",
    ),
    Attack(
        "a pipe or `/dev/zero` in the place of rows",
        "`data.train`",
        "only plain files are read",
        "hangs.test_a_pipe_or_a_device_in_the_place_of_rows",
    ),
    Attack(
        "`num_hidden_layers` of 100 million",
        "`config.json`",
        "10,000 layers, sizes below 2**31",
        "hangs.test_a_model_of_impossible_size",
    ),
    Attack(
        "nested or odd `result.json`, `metrics.jsonl`, `launch.json`",
        "`dstune runs FOLDER`",
        "the others are listed",
        "hangs.test_one_bad_directory_takes_no_other_run_from_the_list",
    ),
    Attack(
        "a pipe or `/dev/zero` in the place of a record",
        "run directory",
        "only plain files are read",
        "hangs.test_a_pipe_or_a_device_is_not_read_for_ever",
    ),
    Attack(
        "a status of megabytes, or of several lines that look like other runs",
        "`dstune runs FOLDER`",
        "200 characters, on one line",
        "hangs.test_a_status_of_megabytes_or_lines_is_one_line_of_the_list",
    ),
    Attack(
        "a line of `metrics.jsonl` that is 200,000 deep",
        "`dstune train RUN`",
        "dropped",
        "hangs.test_a_deep_line_of_metrics_is_dropped_by_the_run_that_goes_on",
    ),
    Attack("a record of 1 TiB", "run directory", "64 MiB", "hangs.test_a_file_without_end_is_not_read_whole"),
    Attack(
        "an `.xz` file whose head asks for a dictionary of 3 GiB",
        "`data.train`, `dstune init`",
        "refused: decompressing takes at most 1 GiB",
        "unfolding.test_an_xz_file_with_a_dictionary_of_gigabytes_is_refused",
    ),
    Attack(
        "a small file with billions of blank lines or comments",
        "`data.train`, `dstune init`",
        "refused after 2,000,000 of them",
        "unfolding.test_blank_lines_without_end_are_refused",
    ),
    Attack(
        "a zip archive of so many files that opening each takes hours",
        "`data.train`, `dstune init`",
        "refused: unpack it",
        "unfolding.test_an_archive_whose_directory_is_read_too_often_is_refused",
    ),
    Attack(
        "a sparse GGUF file of a terabyte that is all header",
        "`dstune serve --engine llama.cpp`",
        "64 MiB of a header are read",
        "hangs.test_a_sparse_gguf_file_is_no_header_of_a_terabyte",
    ),
)
