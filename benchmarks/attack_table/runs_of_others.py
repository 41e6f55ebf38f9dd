"""Attacks by the run directory or the export of somebody else."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

RUNS_OF_OTHERS = (
    Attack(
        "code of a model in a stranger's run",
        "every verb",
        "signed, named or repeated",
        "runs_of_others.test_code_of_a_model_does_not_run",
    ),
    Attack(
        "a plugin in a stranger's run",
        "every verb",
        "signed, named or repeated",
        "runs_of_others.test_a_plugin_does_not_run",
    ),
    Attack(
        "a module of callbacks in a stranger's run",
        "every verb",
        "signed, named or repeated",
        "runs_of_others.test_a_module_of_callbacks_is_not_imported",
    ),
    Attack(
        "a key of an installed plugin in a stranger's run",
        "every verb",
        "signed, named or repeated, where the plugin declares it so",
        "runs_of_others.test_a_signed_key_of_an_installed_plugin_is_known",
    ),
    Attack(
        "`${oc.env:HF_TOKEN}` in a stranger's run",
        "every verb",
        "unsigned runs resolve no variable",
        "runs_of_others.test_no_variable_is_resolved",
    ),
    Attack(
        "lines of a job's script in a stranger's run",
        "`launch.setup`, `directives`, ...",
        "signed, named or repeated",
        "runs_of_others.test_a_job_of_others_is_not_submitted",
    ),
    Attack(
        "a program or options for `mpirun` in a stranger's run",
        "`launch.mpirun`",
        "signed, named or repeated",
        "runs_of_others.test_a_program_of_others_does_not_start_ranks",
    ),
    Attack(
        "a hostfile in a stranger's run",
        "`launch.hostfile`",
        "signed, named or repeated",
        "runs_of_others.test_ranks_are_not_started_on_hosts_of_others",
    ),
    Attack(
        "a tracker's address in a stranger's run",
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
        "the name has to be that of a task",
        "exports_of_others.test_the_task_of_an_export_of_others_is_no_file_of_theirs",
    ),
    Attack(
        "a base model that is named by a variable",
        "exports",
        "resolved only in your own runs",
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
        "resolved only in your own runs",
        "exports_of_others.test_an_adapter_of_others_is_not_served_from_a_base_that_a_variable_names",
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
)
