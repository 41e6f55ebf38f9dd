#!/usr/bin/env python3
"""The attacks that tests/security replays: what each is, where it strikes, and how it is held.

usage: python benchmarks/attacks.py [--run]

Prints the table of docs/security.md (`python tools/guides.py` puts it there). `--run` replays all of them with pytest first
and prints how many were held. `python benchmarks/mutations.py attacks` takes each defence out of a copy of the tree, in the
file of the last column, and sees its test fail.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from benchmarks.attack_mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "security"


@dataclass(frozen=True)
class Attack:
    what: str
    where: str
    held: str
    test: str
    """File and function in tests/security, as `files.test_name`."""

    @property
    def place(self) -> str:
        """Of the test, as pytest is given it."""
        return f"tests/security/test_{self.test.replace('.', '.py::', 1)}"


ATTACKS = (
    # Ranks and processes.
    Attack(
        "a stranger takes the place of a rank",
        "process groups",
        "HMAC of the launch's secret before the first message",
        "groups.test_a_stranger_in_the_place_of_a_rank_is_refused_before_the_first_object",
    ),
    Attack(
        "a stranger connects to the port of a local launch",
        "rendezvous",
        "ranks meet in a folder of mode 0700",
        "groups.test_a_local_launch_meets_in_a_folder_of_its_own",
    ),
    Attack(
        "a folder brings a database whose keys its maker knows, for `dstune serve` in it",
        "`serving/`",
        "refused unless this user's key signed it, or `--state` names it",
        "working_directory.test_a_state_folder_of_somebody_else_is_not_served",
    ),
    Attack(
        "another user asks for a fork of the process with the imports",
        "fork server",
        "a folder of mode 0700, and the user at the other end is checked",
        "forked_ranks.test_another_user_gets_no_fork",
    ),
    Attack(
        "a run reads the variables of an earlier one that was forked from the same process",
        "fork server",
        "the process has no secret, and a fork has the variables of its request alone",
        "forked_ranks.test_the_server_has_no_secret_and_other_processes_see_a_fork_as_the_rank",
    ),
    Attack(
        "the secret of a SLURM job is read by another user",
        "script of the job",
        "a file of mode 0600",
        "groups.test_the_secret_of_a_slurm_job_is_for_this_user_alone",
    ),
    Attack(
        "`PATH` of remote ranks comes from a file that another user made",
        "/dev/shm",
        "owner, mode and kind are checked",
        "files.test_handoff_files_are_this_users_own",
    ),
    Attack(
        "what a node is handed goes to a place that is a link",
        "remote ranks",
        "made anew, never followed",
        "files.test_a_node_does_not_write_through_a_link",
    ),
    Attack(
        "somebody opens hundreds of connections to the driver",
        "`launch=spark`",
        "256 at a time, 64 KiB and a second each",
        "spark.test_many_strangers_keep_no_task_out",
    ),
    Attack(
        "somebody on the network speaks to the agents of a run",
        "`launch=hostfile`, `launch=slurm`",
        "every message carries a code that only those who know the secret of the run can compute",
        "agents.test_a_stranger_is_hung_up_on_before_a_message_counts",
    ),
    Attack(
        "somebody on the network speaks to the driver",
        "`launch=spark`",
        "who does not know the token is hung up on, whatever was sent",
        "spark.test_what_a_stranger_sends_does_not_end_the_driver",
    ),
    Attack(
        "`launch.json` names a process that is no launch",
        "`dstune cancel`",
        "it has to hold the lock of the run",
        "manage.test_cancel_leaves_processes_alone_that_are_no_launch",
    ),
    Attack(
        "`launch.json` names jobs that are options or other numbers",
        "`dstune cancel`",
        "a record that is none counts for nothing",
        "manage.test_a_record_that_is_none_counts_for_nothing",
    ),
    Attack(
        "a value begins a line of the job's script, or an option",
        "`run.dir`, `launch.partition`, ...",
        "refused before a script is made",
        "manage.test_no_value_begins_a_line_or_an_option_of_the_script",
    ),
    Attack(
        "the same past validation", "job script", "quoted once more", "manage.test_a_script_is_one_even_past_validation"
    ),
    Attack(
        "a host is an option of ssh (`-oProxyCommand=...`), a list or a command",
        "hostfile",
        "a host is a name or an address",
        "leaks.test_a_host_is_no_option_and_no_list",
    ),
    Attack(
        "the same past the hostfile", "ssh", "`--` before the host", "leaks.test_options_of_ssh_end_before_the_host"
    ),
    Attack(
        "`run.yaml` is changed between the launching process's look and that of the ranks",
        "run directory",
        "ranks know the SHA-256 of what was written",
        "changed_since.test_ranks_obey_no_other_run_than_the_launcher_wrote",
    ),
    Attack(
        "the same, whoever starts the ranks",
        "every launcher, requeued jobs",
        "handed over with the rank's variables",
        "changed_since.test_every_launcher_tells_ranks_which_run_is_theirs",
    ),
    Attack(
        "the same under `torchrun`, `srun`, `mpirun`",
        "other launchers",
        "rank 0 tells the others",
        "changed_since.test_ranks_of_another_launcher_obey_what_rank_0_wrote",
    ),
    Attack(
        "a job's script is changed before it is submitted",
        "run directory",
        "`sbatch` is given the text",
        "changed_since.test_a_job_is_submitted_as_it_was_written",
    ),
    Attack(
        "the file of a plugin is changed while ranks run",
        "processes that ranks start",
        "they know its SHA-256",
        "changed_since.test_a_process_of_a_rank_executes_no_other_plugin",
    ),
    # Code.
    Attack(
        "a choice is a path out of its group (`task=../../somewhere`)",
        "overrides, experiments",
        "a choice is one of its folder",
        "plugins.test_no_choice_leaves_the_folder_of_its_group",
    ),
    Attack(
        "a folder's `dstune.yaml` names a plugin of that folder",
        "working directory, every verb",
        "runs after `dstune trust` or with `--trust plugins`",
        "project_plugins.test_no_verb_runs_what_the_folder_names",
    ),
    Attack(
        "the same for a program",
        "`dstune.train`",
        "the same",
        "project_plugins.test_python_runs_none_either",
    ),
    Attack(
        "the same where the verb needs no plugins",
        "`import`, `doctor`, `models`, `--help`",
        "left out, with a note",
        "project_plugins.test_verbs_that_need_no_plugins_go_on_without",
    ),
    Attack(
        "a trusted plugin is changed, or another one added",
        "`dstune.yaml`",
        "a digest of each",
        "project_plugins.test_a_changed_or_added_plugin_is_not_trusted",
    ),
    Attack(
        "a trusted plugin is replaced between check and use",
        "`dstune.yaml`",
        "the bytes that were checked are executed",
        "project_plugins.test_the_bytes_that_were_checked_are_executed",
    ),
    Attack(
        "a record of trust that others can write",
        "`~/.config/dstune/trusted`",
        "trusts nothing",
        "project_plugins.test_a_record_that_others_can_reach_does_not_count",
    ),
    Attack(
        "a folder brings a `config/dstune` where `XDG_CONFIG_HOME` is relative",
        "working directory",
        "a relative one does not count",
        "project_plugins.test_the_configuration_of_the_user_is_not_in_the_folder",
    ),
    Attack(
        "a module whose package runs code when it is looked for",
        "`dstune.yaml`",
        "not looked for before it is trusted",
        "project_plugins.test_no_package_above_a_module_is_imported_before_it_is_trusted",
    ),
    Attack(
        "YAML that grows or never ends",
        "`dstune.yaml`",
        "1,000,000 values, 100 levels",
        "project_plugins.test_yaml_of_a_stranger_is_read_within_limits",
    ),
    Attack(
        "a pipe or a device in the place of `dstune.yaml` or a plugin",
        "working directory",
        "only plain files are read",
        "project_plugins.test_a_pipe_or_a_device_is_not_read",
    ),
    Attack(
        "an experiment outside of its group names plugins",
        "`experiment=../../somewhere`",
        "a choice is one of its folder",
        "project_plugins.test_an_experiment_outside_of_its_folder_names_no_plugins",
    ),
    Attack(
        "a `json.py` in the folder where a command is given",
        "processes that `doctor`, `serve`, ... start",
        "`PYTHONSAFEPATH`, no empty place in `PYTHONPATH`",
        "working_directory.test_a_child_of_python",
    ),
    Attack(
        "the same for a process that somebody adds",
        "source",
        "each is given an environment",
        "working_directory.test_every_python_process_gets_an_environment",
    ),
    Attack(
        "`wandb/settings` there names the server that gets the user's key",
        "`tracking.wandb.mode=online`",
        "not read",
        "working_directory.test_wandb_sends_nothing_where_the_folder_says",
    ),
    Attack(
        "a callback's name is a module of the working directory",
        "`trainer.callbacks`",
        "not imported from there",
        "plugins.test_a_callback_of_the_working_directory_is_not_imported",
    ),
    Attack(
        "a stored run names such a callback",
        "`run.yaml`",
        "not imported from there",
        "plugins.test_a_stored_run_imports_none_either",
    ),
    Attack(
        "a plugin is a module in a package of the working directory",
        "`plugins`",
        "refused",
        "plugins.test_a_module_in_a_package_of_the_working_directory_is_no_plugin",
    ),
    Attack(
        "a stored run names a module of the working directory",
        "`run.yaml`",
        "refused",
        "plugins.test_a_stored_run_names_no_module_of_the_working_directory",
    ),
    Attack(
        "a file of the working directory has the name of a module",
        "the command",
        "the working directory is no place of modules",
        "plugins.test_the_command_finds_no_module_beside_it",
    ),
    Attack(
        "a configuration of another tool trusts a model's code",
        "`dstune import`",
        "not carried over, and told",
        "import.test_the_code_of_a_model_is_not_trusted_by_somebodys_file",
    ),
    Attack(
        "a key with a line break becomes a key of the experiment",
        "`dstune import`",
        "names are escaped in comments",
        "import.test_no_key_or_value_leaves_its_place",
    ),
    Attack("the file's name does", "`dstune import`", "escaped", "import.test_a_file_name_stays_in_its_comment"),
    Attack(
        "`${oc.env:HF_TOKEN}` in a configuration of another tool",
        "`dstune import`",
        "not carried over, and told",
        "import.test_references_are_not_carried_over",
    ),
    # Runs of others.
    Attack(
        "code of a model in a stranger's run",
        "every verb",
        "signed, named or repeated",
        "runs_of_others.test_code_of_a_model_does_not_run",
    ),
    Attack("a plugin in one", "every verb", "signed, named or repeated", "runs_of_others.test_a_plugin_does_not_run"),
    Attack(
        "a module of callbacks in one",
        "every verb",
        "signed, named or repeated",
        "runs_of_others.test_a_module_of_callbacks_is_not_imported",
    ),
    Attack(
        "a key of an installed plugin in one",
        "every verb",
        "signed, named or repeated, where the plugin declares it so",
        "runs_of_others.test_a_signed_key_of_an_installed_plugin_is_known",
    ),
    Attack(
        "`${oc.env:HF_TOKEN}` in one",
        "every verb",
        "unsigned runs resolve no variable",
        "runs_of_others.test_no_variable_is_resolved",
    ),
    Attack(
        "lines of a job's script in one",
        "`launch.setup`, `directives`, ...",
        "signed, named or repeated",
        "runs_of_others.test_a_job_of_others_is_not_submitted",
    ),
    Attack(
        "a program or options for `mpirun` in one",
        "`launch.mpirun`",
        "signed, named or repeated",
        "runs_of_others.test_a_program_of_others_does_not_start_ranks",
    ),
    Attack(
        "a hostfile in one",
        "`launch.hostfile`",
        "signed, named or repeated",
        "runs_of_others.test_ranks_are_not_started_on_hosts_of_others",
    ),
    Attack(
        "a tracker's address in one",
        "`tracking`",
        "signed, named or repeated",
        "runs_of_others.test_metrics_do_not_go_to_others",
    ),
    Attack(
        "overrides of a stranger's sweep",
        "`sweep.yaml`",
        "signed, named or repeated",
        "runs_of_others.test_words_of_a_sweep_of_others_are_not_repeated",
    ),
    Attack(
        "the task of a stranger's export is the path of a configuration that trusts a model's code",
        "exports",
        "a task's name is that of a task",
        "exports_of_others.test_the_task_of_an_export_of_others_is_no_file_of_theirs",
    ),
    Attack(
        "a base model that is named by a variable",
        "exports",
        "resolved in your own alone",
        "exports_of_others.test_an_export_of_others_resolves_no_variable",
    ),
    Attack(
        "code put into a run that was lent",
        "exports",
        "its files have to be those of the base model",
        "exports_of_others.test_code_that_somebody_put_into_an_own_run_does_not_run",
    ),
    Attack(
        "code put into the export of a signed run",
        "`dstune serve`",
        "that export is not served",
        "exports_of_others.test_a_signed_run_is_served_without_what_somebody_put_into_its_export",
    ),
    Attack(
        "the base of a stranger's adapter is named by a variable",
        "`dstune serve`",
        "resolved in your own alone",
        "exports_of_others.test_an_adapter_of_others_is_not_served_from_a_base_that_a_variable_names",
    ),
    Attack(
        "an engine's events in another spelling, or text where no delta is (`response.output_item.done`, errors)",
        "`dstune serve --guard`",
        "one parser after the specification, every text of every event is checked",
        "guard.test_no_spelling_of_events_gets_a_text_past_the_guard",
    ),
    Attack(
        "bytes of a stream that are no events: comments, names, broken JSON",
        "`dstune serve --guard`",
        "events are written anew, what cannot be read ends the answer",
        "guard.test_what_cannot_be_read_does_not_pass_the_guard",
    ),
    Attack(
        "millions of objects and lists in 8 MiB of JSON",
        "`dstune serve`",
        "64 deep, 100,000 objects, lists and members, 500,000 values: counted on the bytes",
        "serve.test_containers_are_counted_before_they_are_made",
    ),
    Attack(
        "several bodies of 8 MiB that take long to parse",
        "`dstune serve`",
        "parsed and checked beside the event loop, in turn with other keys",
        "serve.test_large_bodies_do_not_stop_others",
    ),
    Attack(
        "hundreds of large bodies at once",
        "`dstune serve`",
        "64 MiB of a key and 256 MiB of all are in memory, the others get 429",
        "serve.test_a_key_fills_no_more_than_its_share_of_the_memory",
    ),
    Attack(
        "prompts beyond the context, again and again",
        "`dstune serve`",
        "128 characters for each token of the context, before anybody counts; the context is charged to the key",
        "serve.test_a_prompt_beyond_the_context_is_refused_unread_and_charged",
    ),
    Attack(
        "a prompt whose tokens take minutes",
        "`dstune serve`, engine local",
        "counted in pieces until there are too many, in turn with other keys",
        "serve.test_megabytes_for_the_local_engine_do_not_stop_others",
    ),
    Attack(
        "thousands of connections without a request",
        "`dstune serve`",
        "half of the open files; then the one that has waited longest is closed",
        "serve.test_idle_connections_keep_nobody_out",
    ),
    Attack(
        "a key whose requests fill the queue",
        "`dstune serve`",
        "keys that wait have their turns; the key with most of a full queue loses the newest",
        "serve.test_a_key_that_fills_the_queue_keeps_no_other_out",
    ),
    Attack(
        "headers behind a body, extensions of chunks and line ends, without end and without a key",
        "`dstune serve`",
        "a header after the head ends the connection, 64 KiB of framing do too",
        "serve.test_trailers_and_framing_without_end",
    ),
    Attack(
        "a body that goes on after its request was answered",
        "`dstune serve`",
        "5 s for what remains",
        "serve.test_a_body_that_goes_on_after_the_answer",
    ),
    Attack(
        "thousands of requests on a connection before the first one is answered",
        "`dstune serve`",
        "64 wait, then the connection is closed",
        "serve.test_thousands_of_requests_sent_ahead_are_not_kept",
    ),
    Attack(
        "a host that a proxy or a browser reads otherwise (`localhost:80@evil.com`)",
        "`dstune serve`",
        "a name, or a name and a port: 400",
        "serve.test_a_host_that_browsers_read_otherwise",
    ),
    Attack(
        "128 answers without a length, each until the context is full",
        "`dstune serve`",
        "the engine is told each one's share of the bound",
        "serve.test_answers_without_a_length_stay_below_the_bound",
    ),
    Attack(
        "an event without end from a server elsewhere",
        "`dstune serve --engine-url`",
        "16 MiB",
        "serve.test_what_an_engine_elsewhere_sends_is_bounded",
    ),
    Attack(
        "a file, upload or part of another tenant, by its id",
        "the fine-tuning API",
        "every query asks for the caller's project",
        "finetuning_api.test_group_7_one_tenant_sees_nothing_of_another",
    ),
    Attack(
        "a gigabyte from a client without a key",
        "the fine-tuning API",
        "refused before it is read, and cut off",
        "finetuning_api.test_group_7_a_gigabyte_without_a_key_is_not_read",
    ),
    Attack(
        "a webhook's name stands for an address of the server's network",
        "the fine-tuning API",
        "addresses are looked at at every connection",
        "finetuning_api.test_a_name_that_stands_for_a_private_address_is_refused_at_the_connection",
    ),
    Attack(
        "many jobs whose files take minutes to read",
        "`/v1/fine_tuning/jobs`",
        "organizations take turns",
        "finetuning_api.test_files_of_one_organization_keep_no_other_one_from_validation",
    ),
    Attack(
        "slow graders, uploads and creations of one project take every thread",
        "`/v1/fine_tuning`, `/v1/uploads`",
        "one at a time of a project, 64 wait",
        "finetuning_api.test_graders_of_one_project_keep_no_other_one_waiting",
    ),
    Attack(
        "a grader that reads a large sample again and again",
        "`/v1/fine_tuning/alpha/graders`",
        "read once, 10 s",
        "finetuning_api.test_a_sample_is_read_once_for_all_graders",
    ),
    Attack(
        "batches and tests of webhooks without end",
        "`/v1/batches`, `/v1/webhook_endpoints`",
        "500 batches and 4 tests of a project",
        "finetuning_api.test_batches_and_tried_webhooks_of_a_project_are_bounded",
    ),
    Attack(
        "an address of a cloud's metadata, or of a special network",
        "webhooks",
        "what `ipaddress` calls global, less explicit networks",
        "finetuning_api.test_addresses_of_clouds_and_special_networks_are_not_public",
    ),
    Attack(
        "the database is filled with feedback on one answer",
        "`/v1/feedback`",
        "one row of an answer, 100,000 characters",
        "feedback.test_feedback_of_an_answer_is_one_row",
    ),
    Attack(
        "the same with many answers",
        "`/v1/feedback`",
        "256 MiB of a project",
        "feedback.test_feedback_of_a_project_is_bounded",
    ),
    Attack(
        "uploads of one key or project take every place",
        "`/v1/files`, `/v1/uploads`",
        "shares of keys and projects; a key without an upload gets in",
        "finetuning_api.test_slow_uploads_of_one_key_keep_no_other_key_out",
    ),
    Attack(
        "an upload that trickles for days",
        "`/v1/files`, `/v1/uploads`",
        "16 KiB/s in each 30 s",
        "finetuning_api.test_an_upload_that_trickles_is_cut_off",
    ),
    Attack(
        "the disk is filled by jobs: upload, job, delete, pause, and again",
        "`/v1/fine_tuning/jobs`",
        "folders of jobs count towards the space of their project",
        "finetuning_api.test_folders_of_jobs_count_towards_the_space_of_their_project",
    ),
    Attack(
        "jobs that wait fill the disk beyond the space of their project",
        "`/v1/fine_tuning/jobs`",
        "they start when there is space; running ones end well",
        "finetuning_api.test_a_running_job_ends_well_in_a_project_without_space",
    ),
    Attack(
        "origins of values are names of attributes",
        "`run.yaml`",
        "keys alone are looked up",
        "runs_of_others.test_origins_of_a_strangers_run_name_keys_alone",
    ),
    Attack(
        "a signature is taken to another value or key",
        "`run.yaml`",
        "a digest of each",
        "signed_runs.test_the_signature_fits_no_other_value",
    ),
    Attack(
        "a key that others can read",
        "`trust.key`",
        "signs nothing",
        "signed_runs.test_a_key_that_others_can_read_signs_nothing",
    ),
    Attack(
        "folders of a stranger's run are links",
        "run directory",
        "followed in signed runs alone",
        "runs_of_others.test_folders_of_a_strangers_run_lead_nowhere",
    ),
    Attack(
        "a pickle in the place of a message",
        "ranks",
        "messages are JSON and tensors",
        "messages.test_what_others_send_runs_nothing",
    ),
    Attack(
        "a second user beside a running launch",
        "one machine",
        "no run, secret, port or cache",
        "two_users.test_the_second_user_gets_nothing_of_a_running_launch",
    ),
    Attack(
        "a second user who was there first",
        "one machine",
        "names that nobody can guess",
        "two_users.test_the_second_user_redirects_nothing_by_being_first",
    ),
    # Files.
    Attack(
        "`launch.json` or `result.json` is a link to a file of the user",
        "run directory",
        "the link is replaced",
        "files.test_records_replace_links_and_do_not_follow_them",
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
    Attack("the lock is a link", "run directory", "refused", "files.test_the_lock_is_no_link"),
    Attack(
        "an index of weights names files outside of its folder",
        "model folders",
        "refused; every index in the folder is read, since `config.json` may name another",
        "models_of_others.test_weights_come_from_the_folder_of_their_index",
    ),
    Attack(
        "a folder `./Org/Model` runs its code in the place of the hub's model of that name",
        "`model.trust_remote_code`",
        "refused: with that consent a name of the form of a hub id is never a folder; `./Org/Model` is one",
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
        "a line of `metrics.jsonl` that is 200,000 deep",
        "`dstune train RUN`",
        "dropped",
        "hangs.test_a_deep_line_of_metrics_is_dropped_by_the_run_that_goes_on",
    ),
    Attack("a record of 1 TiB", "run directory", "64 MiB", "hangs.test_a_file_without_end_is_not_read_whole"),
)


def table() -> str:
    """The attacks as a Markdown table."""
    lines = ["| attack | where | how it is held | test | undone in |", "| --- | --- | --- | --- | --- |"]
    for one in ATTACKS:
        file, _, name = one.test.partition(".")
        undone = ", ".join(f"`{place}`" for place in MUTATIONS[one.place].files)
        cells = (one.what, one.where, one.held, f"`{name}` in `tests/security/test_{file}.py`", undone)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--run", action="store_true", help="replay them first")
    code = 0
    if arguments.parse_args(argv).run:
        tests = sorted({one.place for one in ATTACKS})
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, check=False).returncode
        print(f"{len(ATTACKS)} attacks, {'all of them held' if code == 0 else 'not all of them held'}\n")
    print(table(), end="")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
