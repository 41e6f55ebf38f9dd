"""Attacks by links, markers and modes of files."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

FILES = (
    Attack(
        "`launch.json` or `result.json` is a link to a file of the user",
        "run directory",
        "the link is replaced",
        "files.test_records_replace_links_and_do_not_follow_them",
    ),
    Attack(
        "the same, to a private file, which a start that fails would restore as a copy in the folder of whoever made the link",
        "run directory",
        "links are left alone",
        "files.test_a_start_that_is_undone_copies_no_private_file_into_the_run",
    ),
    Attack(
        "`metrics.jsonl` is one",
        "run directory",
        "the link is replaced",
        "files.test_rows_are_not_appended_through_a_link",
    ),
    Attack("a log is a link or a pipe", "run directory", "refused", "files.test_logs_are_plain_files"),
    Attack(
        "the same under `launch=spark`", "run directory", "refused", "spark.test_a_task_writes_its_log_through_no_link"
    ),
    Attack(
        "files and folders are links in a place that a run is copied to",
        "places that cannot lock or rename",
        "links of files are replaced, those of folders refused in unsigned runs",
        "files.test_a_copied_run_is_written_through_no_link",
    ),
    Attack(
        "a file of such a place is a link to a private file, with a spare file beside it, and is copied back as a plain one",
        "places that cannot lock or rename",
        "links are not read",
        "files.test_a_copied_run_is_read_through_no_link",
    ),
    Attack("the lock is a link", "run directory", "refused", "files.test_the_lock_is_no_link"),
    Attack(
        "a folder for the weights of a run is made first by another user, who swaps them for the server",
        "`task.rollout_folder`",
        "refused: the folder of a run is no link and belongs to its user",
        "files.test_weights_for_a_server_are_in_a_folder_of_this_user",
    ),
    Attack(
        "`attn_implementation` of a `config.json` names a kernel of a hub",
        "`dstune-verify --model`",
        "only implementations in transformers itself are kept",
        "verify.test_the_file_of_a_model_names_no_kernel",
    ),
    Attack(
        "a `config.json` that asks for a billion labels or layers",
        "`dstune-verify --model`",
        "labels are left out; 10,000 layers",
        "verify.test_the_file_of_a_model_takes_no_memory",
    ),
    Attack(
        "a pipe, a device, a terabyte, 400 levels or escapes for the terminal in the place of a file",
        "`dstune-verify --model`, `--deepspeed`",
        "16 MiB of a plain file, 50 levels; text of a file is printed with its codes",
        "verify.test_a_file_that_never_ends_or_speaks_to_the_terminal_is_refused",
    ),
    Attack(
        "another user connects to the port at which the ranks meet, and answers for one",
        "`dstune-verify` on one machine",
        "the ranks meet in a file in a folder of mode 0700",
        "verify.test_no_other_user_reaches_the_store_of_ranks",
    ),
    Attack(
        "a certificate that is a pipe, a device, a terabyte or 200,000 deep",
        "`tools/certificates.py`, the folder of certificates that a start reads",
        "1 MiB of a plain file",
        "certificates.test_what_never_ends_is_no_certificate",
    ),
    Attack(
        "a certificate whose device is a path",
        "`tools/certificates.py add`",
        "refused: a type is a word, and a file is named by letters and digits",
        "certificates.test_the_file_of_a_certificate_is_in_its_folder",
    ),
    Attack(
        "text that turns the page around, half a character, a name left out, a date in the future that no later one replaces",
        "certificates",
        "refused before anything is copied",
        "certificates.test_nothing_in_a_certificate_breaks_or_turns_the_page",
    ),
    Attack(
        "scripts, pictures, rows of a table and template marks in the name of a device",
        "certificates",
        "escaped on the page",
        "certificates.test_text_of_a_certificate_is_no_markup",
    ),
    Attack(
        "an override such as `x; rm -rf ~` on the page of a run, whose command is copied into a shell",
        "`run.yaml`, report",
        "quoted for a shell",
        "pages.test_the_command_on_a_page_runs_nothing_else",
    ),
    Attack(
        "bidirectional overrides and invisible characters, which make a command look like another",
        "all pages",
        "written as their codes",
        "pages.test_text_on_a_page_is_not_turned",
    ),
    Attack(
        "metrics, samples or answers of a run are links to the user's private files, which its page then shows",
        "`dstune report`",
        "followed in runs that this user signed alone",
        "pages.test_a_page_shows_no_file_outside_of_a_strangers_run",
    ),
    Attack(
        "a pipe in the place of answers",
        "`rollouts/`, `dstune report`",
        "refused by its name",
        "pages.test_a_pipe_among_the_answers_of_a_run_is_named",
    ),
    Attack(
        "a report that was replaced in a folder of others, shown in a notebook",
        "`run.report()`",
        "a frame without an origin",
        "pages.test_a_page_in_a_notebook_has_no_origin",
    ),
    Attack(
        "scripts in names of keys, slices and reasons",
        "page of a cycle",
        "escaped",
        "pages.test_the_page_of_a_cycle_has_no_markup_of_others",
    ),
    Attack(
        "an index of weights names files outside of its folder",
        "model folders",
        "refused; every index in the folder is read, since `config.json` may name another",
        "models_of_others.test_weights_come_from_the_folder_of_their_index",
    ),
    Attack(
        "a folder `./Org/Model` runs its code in the place of the hub's model of that name",
        "`model.trust_remote_code`",
        "refused: with this setting, a name such as `Org/Model` is never read as a folder; `./Org/Model` is one",
        "models_of_others.test_consent_to_the_code_of_a_hub_id_is_none_to_that_of_a_folder",
    ),
    Attack(
        "a value of a container's environment runs at every login",
        "nodes of `docker/compose.yaml`",
        "quoted, in a file of mode 0600",
        "images.test_a_node_runs_nothing_of_its_environment",
    ),
    Attack(
        "the lock of states on a disk, or their folder, is a link",
        "`zero.nvme_path`",
        "left alone; folders of other users too",
        "files.test_the_lock_of_swapped_states_is_no_link",
    ),
    Attack(
        "the lock is a link",
        "working folder of a copied run",
        "refused",
        "files.test_the_lock_of_a_copied_run_is_no_link",
    ),
    Attack(
        "a checkpoint is a link to another run's",
        "`dstune checkpoints --prune`",
        "left alone",
        "files.test_pruning_leaves_the_checkpoint_behind_a_link",
    ),
    Attack(
        "`COMMITTED` names files outside of its checkpoint",
        "checkpoints",
        "no checkpoint",
        "files.test_names_in_a_marker_stay_in_their_checkpoint",
    ),
    Attack(
        "`state.json` of a saved data set names a file elsewhere",
        "`data.train`",
        "refused",
        "leaks.test_a_saved_data_set_reads_no_file_outside_its_folder",
    ),
    Attack(
        "the log of a Delta table names a file elsewhere, as `FILE:`, behind a tab or with `\\`",
        "`delta://`",
        "names that are odd as addresses are refused",
        "leaks.test_a_table_names_no_file_outside_its_folder_in_any_spelling",
    ),
    Attack(
        "the log of a table in a store names a file of this machine",
        "`delta://s3://...`",
        "an address of another kind is refused",
        "leaks.test_a_table_in_a_store_names_no_file_of_this_machine",
    ),
    Attack(
        "`dataset_dict.json` names a split that is a path", "`data.train`", "refused", "leaks.test_a_split_is_a_name"
    ),
    Attack(
        "a password or a key is written out in an override",
        "`run.yaml`, report, trackers",
        "refused, not repeated",
        "leaks.test_a_password_that_is_written_out_is_refused_and_not_repeated",
    ),
    Attack(
        "others read a run directory",
        "shared file system",
        "`run.mode=private`",
        "leaks.test_a_run_directory_can_be_closed_to_others",
    ),
    Attack(
        "others read copies of private rows in the cache",
        "one machine",
        "the cache in a home is made with mode 0700",
        "leaks.test_the_cache_is_made_for_its_user_alone",
    ),
)
