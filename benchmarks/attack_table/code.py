"""Attacks that would run somebody else's code: plugins, modules, configurations of other tools."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

CODE = (
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
        "the same in the folder where a cycle is run",
        "`dstune cycle`",
        "its training gets `PYTHONSAFEPATH` too",
        "working_directory.test_the_training_of_a_cycle",
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
        "not carried over, and reported",
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
        "not carried over, and reported",
        "import.test_references_are_not_carried_over",
    ),
    Attack(
        "a checkpoint of another tool calls something while it is read: `training_args.bin`, shards",
        "`dstune import`",
        "torch's restricted unpickler; classes of settings are replaced by empty ones",
        "checkpoints_of_others.test_nothing_in_a_checkpoint_runs",
    ),
    Attack(
        "its settings are of a class in the working directory",
        "`dstune import`",
        "not imported",
        "checkpoints_of_others.test_a_class_of_an_unknown_package_is_not_imported",
    ),
    Attack(
        "its random states, schedule or scripts run something",
        "`dstune import`",
        "not opened",
        "checkpoints_of_others.test_files_of_random_states_are_not_opened",
    ),
    Attack(
        "its settings grow without end, or are compressed",
        "`dstune import`",
        "16 MiB, 100,000 values, 20 levels, nothing compressed",
        "checkpoints_of_others.test_settings_that_grow_or_hold_themselves",
    ),
    Attack(
        "its shards describe other weights than they hold, or have names of other tensors",
        "`dstune import`",
        "refused before weights are read",
        "checkpoints_of_others.test_descriptions_that_fit_no_weights",
    ),
    Attack(
        "its `latest` names a folder elsewhere",
        "`dstune import`",
        "refused",
        "checkpoints_of_others.test_the_newest_shards_are_in_the_checkpoint",
    ),
    Attack(
        "`attn_implementation` or `experts_implementation` of a `config.json` names a repository of kernels",
        "models",
        "left out, with a warning, unless transformers itself has it",
        "models_of_others.test_the_file_of_a_model_names_no_kernel_of_a_hub",
    ),
    Attack(
        "the same",
        "`dstune prune`, GGUF, AWQ and other quantized exports",
        "every loader leaves it out",
        "models_of_others.test_no_loader_reads_the_kernels_of_a_file",
    ),
    Attack(
        "the same",
        "exports registered in MLflow, where they are loaded",
        "left out by the code that is stored with them",
        "models_of_others.test_the_code_in_mlflow_names_no_kernel_of_a_hub",
    ),
)
