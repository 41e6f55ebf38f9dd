"""Attacks on the processes of a launch: ranks, launchers, other users of the machine."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

PROCESSES = (
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
        "a run searches its memory for secrets of an earlier one that was forked from the same process",
        "fork server",
        "the process reads no request: it forks, and the fork reads it",
        "forked_ranks.test_a_rank_finds_no_secret_of_an_earlier_one_in_its_memory",
    ),
    Attack(
        "a request 200,000 deep, or none at all",
        "fork server",
        "read in a fork, within the limits of JSON",
        "forked_ranks.test_a_request_that_is_none_ends_nothing",
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
)
