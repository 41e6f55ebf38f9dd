"""What undoes each defence of docs/security.md, by the test that holds it (`mutations.py`)."""

from __future__ import annotations

from benchmarks.mutations import Mutation, undo

_OWN = "if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:"
_PLAIN = "flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)"
_VISIBLE = "return _OBEYED.sub(written, text)"
_CHECKED = "return requested, _checked(requested, named)"
_PRINTED = "stdout, sys.stdout = sys.stdout, Filtered(sys.stdout, visible_but_colours)"
_OF_BASE = "return places <= {base.path} and {hashlib.sha256(code).hexdigest() for code in unknown} <= trusted"

_BY_ATTACK: dict[str, Mutation] = {
    # Ranks and processes.
    "groups.test_a_stranger_in_the_place_of_a_rank_is_refused_before_the_first_object": undo(
        "core/distributed.py", "if not hmac.compare_digest(received_proof, proof(other)):", "if False:"
    ),
    "groups.test_a_local_launch_meets_in_a_folder_of_its_own": undo(
        "launch/local/supervise.py", 'STORE: str(self.folder / "store")', 'STORE: str(self.run_dir / "store")'
    ),
    "forked_ranks.test_another_user_gets_no_fork": undo(
        "launch/local/fork_server.py", "if peer_user(connection) != os.getuid():", "if False:"
    ),
    "forked_ranks.test_the_server_has_no_secret_and_other_processes_see_a_fork_as_the_rank": undo(
        "launch/local/warm.py", " and not is_secret(name, value)", ""
    ),
    "forked_ranks.test_a_rank_finds_no_secret_of_an_earlier_one_in_its_memory": undo(
        "launch/local/fork_server.py",
        "        reading, writing = os.pipe()\n        try:\n            if os.fork() == 0:\n                os.close(reading)\n",
        "        reading, writing = os.pipe()\n        self.read = socket.recv_fds(connection, MOST_BYTES, 3, socket.MSG_PEEK)\n"
        "        try:\n            if os.fork() == 0:\n                os.close(reading)\n",
    ),
    "forked_ranks.test_a_request_that_is_none_ends_nothing": undo(
        "launch/local/fork_server.py",
        "except BaseException as error:  # of a malformed",
        "except ValueError as error:  #",
    ),
    "groups.test_the_secret_of_a_slurm_job_is_for_this_user_alone": undo(
        "core/rendezvous.py", "SECRET_FILE, secrets.token_hex(32), mode=0o600)", "SECRET_FILE, secrets.token_hex(32))"
    ),
    "files.test_handoff_files_are_this_users_own": undo("core/files.py", _OWN, "if False:"),
    "files.test_weights_for_a_server_are_in_a_folder_of_this_user": undo(
        "tasks/reinforcement/served_sampler.py",
        "if not stat.S_ISDIR(status.st_mode) or status.st_uid != user:",
        "if False:",
    ),
    "files.test_a_node_does_not_write_through_a_link": undo(
        "launch/node.py",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW",
        "os.O_WRONLY | os.O_CREAT | os.O_TRUNC",
    ),
    "agents.test_a_stranger_is_hung_up_on_before_a_message_counts": undo(
        "launch/agents/wire.py",
        "if not hmac.compare_digest(code, self._authentication_code(self._peer_role, text)):",
        "if False:",
    ),
    "spark.test_what_a_stranger_sends_does_not_end_the_driver": undo(
        "lakehouse/spark/task.py", "except (OSError, ValueError, RecursionError):", "except OSError:"
    ),
    "manage.test_cancel_leaves_processes_alone_that_are_no_launch": undo(
        "launch/records.py",
        "return process if alive and any(_holds(process, lock) for lock in locks if lock.exists()) else None",
        "return process if alive else None",
    ),
    "manage.test_a_record_that_is_none_counts_for_nothing": undo(
        "launch/records.py", "isinstance(job, str) and job_id.fullmatch(job)", "isinstance(job, str)"
    ),
    "manage.test_no_value_begins_a_line_or_an_option_of_the_script": undo(
        "config/launch_rules.py", "if CONTROL.search(text):", "if False:"
    ),
    "manage.test_a_script_is_one_even_past_validation": undo(
        "launch/slurm/script.py", "if not path.isprintable():", "if False:"
    ),
    "leaks.test_the_cache_is_made_for_its_user_alone": undo("core/paths.py", "mode=0o700, parents", "parents"),
    "leaks.test_a_host_is_no_option_and_no_list": undo(
        "launch/host_slots.py", "elif not HOST.fullmatch(match[1]):", "elif False:"
    ),
    "leaks.test_options_of_ssh_end_before_the_host": undo("launch/hosts.py", '"--", host, shlex', "host, shlex"),
    "changed_since.test_ranks_obey_no_other_run_than_the_launcher_wrote": undo(
        "config/run_file.py", "if sha256 is not None and hashlib.sha256(written).hexdigest() != sha256:", "if False:"
    ),
    "changed_since.test_every_launcher_tells_ranks_which_run_is_theirs": undo(
        "launch/remote_commands.py",
        "visible_variables |= variables_for_ranks(run_dir)",
        "",
        ("launch/slurm/script.py", "constants |= variables_for_ranks(run)", ""),
        ("launch/commands.py", "shared |= variables_for_ranks(run_dir)", ""),
    ),
    "changed_since.test_ranks_of_another_launcher_obey_what_rank_0_wrote": undo(
        "rank/worker.py", " | variables_for_ranks(run_dir)", ""
    ),
    "changed_since.test_a_job_is_submitted_as_it_was_written": undo(
        "launch/slurm/jobs.py", '"--parsable", *dependency]', '"--parsable", *dependency, str(script)]'
    ),
    "changed_since.test_a_process_of_a_rank_executes_no_other_plugin": undo(
        "core/plugins.py", 'if source.sha256 != entry["sha256"]:', "if False:"
    ),
    # Code.
    "plugins.test_no_choice_leaves_the_folder_of_its_group": undo(
        "config/overrides.py", " or _leaves_group(override)", ""
    ),
    "working_directory.test_a_state_folder_of_somebody_else_is_not_served": undo(
        "serve/state.py", "if requested is None and any(path.iterdir()):", "if False:"
    ),
    "project_plugins.test_no_verb_runs_what_the_folder_names": undo(
        "config/project.py", _CHECKED, "return requested, {}"
    ),
    "project_plugins.test_python_runs_none_either": undo("config/project.py", _CHECKED, "return requested, {}"),
    "project_plugins.test_verbs_that_need_no_plugins_go_on_without": undo(
        "config/project.py", _CHECKED, "return requested, {}"
    ),
    "project_plugins.test_a_changed_or_added_plugin_is_not_trusted": undo(
        "config/project.py", "!= record[place]:", "!= record[place] and False:"
    ),
    "project_plugins.test_the_bytes_that_were_checked_are_executed": undo(
        "core/plugins.py", "(read or {}).get(place) or ", ""
    ),
    "project_plugins.test_a_record_that_others_can_reach_does_not_count": undo(
        "config/project.py", "files.read_own(file)", "file.read_bytes()"
    ),
    "project_plugins.test_the_configuration_of_the_user_is_not_in_the_folder": undo(
        "core/signing.py",
        'return folder / "dstune"',
        'return folder.absolute() / "dstune"',
        ("core/signing.py", "if folder.is_absolute():", "if folder.parts:"),
    ),
    "project_plugins.test_no_package_above_a_module_is_imported_before_it_is_trusted": undo(
        "config/project.py", "if record is None:", "if plugin_files.find(place) and record is None:"
    ),
    "project_plugins.test_yaml_of_a_stranger_is_read_within_limits": undo(
        "config/project.py", "parsing.parse_yaml(", "yaml.safe_load(", case="aliases"
    ),
    "project_plugins.test_a_pipe_or_a_device_is_not_read": undo(
        "core/parsing.py", "if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:", case="pipe"
    ),
    "project_plugins.test_an_experiment_outside_of_its_folder_names_no_plugins": undo(
        "config/plugins.py", 'if name.is_absolute() or ".." in name.parts:', "if False:"
    ),
    "working_directory.test_a_child_of_python": undo(
        "core/child_python.py",
        "if variables is None else variables) | SAFE_PATH",
        "if variables is None else variables)",
    ),
    "working_directory.test_the_training_of_a_cycle": undo(
        "cycle/training.py", "env=child_environment()", "env=dict(os.environ)"
    ),
    "working_directory.test_every_python_process_gets_an_environment": undo(
        "serve/prepare.py", "env=child_environment(), ", ""
    ),
    "working_directory.test_wandb_sends_nothing_where_the_folder_says": undo(
        "tracking/trackers/wandb.py",
        'with mock.patch.object(wandb.Settings, "settings_workspace", nowhere):',
        "if True:",
    ),
    "plugins.test_a_callback_of_the_working_directory_is_not_imported": undo(
        "config/callbacks.py", " or not plugin_files.is_installed(module):", ":"
    ),
    "plugins.test_a_stored_run_imports_none_either": undo(
        "config/callbacks.py", " or not plugin_files.is_installed(module):", ":"
    ),
    "plugins.test_a_module_in_a_package_of_the_working_directory_is_no_plugin": undo(
        "core/plugin_files.py", "if below and top is not None and not installed:", "if False:"
    ),
    "plugins.test_a_stored_run_names_no_module_of_the_working_directory": undo(
        "core/plugins.py", "if source.is_file and not plugin.is_file:", "if False:"
    ),
    "plugins.test_the_command_finds_no_module_beside_it": undo(
        "core/plugin_files.py",
        'package, *below = name.split(".")',
        'sys.path.insert(0, os.getcwd()); package, *below = name.split(".")',
    ),
    "import.test_the_code_of_a_model_is_not_trusted_by_somebodys_file": undo(
        "importing/axolotl.py", '"trust_remote_code": own_code', '"trust_remote_code": same("model.trust_remote_code")'
    ),
    "import.test_no_key_or_value_leaves_its_place": undo(
        "importing/convert.py", "{one_line(key)}: {one_line(dropped.reason)}", "{key}: {dropped.reason}"
    ),
    "import.test_a_file_name_stays_in_its_comment": undo(
        "importing/convert.py", "{one_line(source.name)}", "{source.name}"
    ),
    "import.test_references_are_not_carried_over": undo(
        "importing/convert.py", "    _without_references(imported)\n    _finish(imported)", "    _finish(imported)"
    ),
    "checkpoints_of_others.test_nothing_in_a_checkpoint_runs": undo(
        "zero/safe_load.py", 'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)'
    ),
    "checkpoints_of_others.test_a_class_of_an_unknown_package_is_not_imported": undo(
        "zero/safe_load.py",
        '(type("_Named", (_StandIn,), {"name": name}), name)',
        "(getattr(importlib.import_module(name.rpartition('.')[0]), name.rpartition('.')[2]), name)",
    ),
    "checkpoints_of_others.test_files_of_random_states_are_not_opened": undo(
        "importing/trainer_checkpoint.py",
        "    shard_folder = _shard_folder(folder)\n",
        "    shard_folder = _shard_folder(folder)\n    torch.load(folder / 'rng_state_0.pth', weights_only=False)\n",
    ),
    "checkpoints_of_others.test_settings_that_grow_or_hold_themselves": undo(
        "zero/safe_load.py", " or level > MAX_LEVELS:", ":"
    ),
    "checkpoints_of_others.test_descriptions_that_fit_no_weights": undo(
        "importing/trainer_checkpoint.py", "        _check_tensors(checkpoint, optim_files)\n", ""
    ),
    "checkpoints_of_others.test_the_newest_shards_are_in_the_checkpoint": undo(
        "importing/trainer_checkpoint.py",
        're.fullmatch(r"[A-Za-z0-9_.-]+", tag) or tag in (".", "..") or not (folder / tag).is_dir()',
        "(folder / tag).is_dir()",
    ),
    # Runs of others.
    "runs_of_others.test_code_of_a_model_does_not_run": undo(
        "config/schema.py",
        "trust_remote_code: bool = setting(False, signed=True)",
        "trust_remote_code: bool = setting(False)",
        case="cfg or predict",
    ),
    "runs_of_others.test_a_plugin_does_not_run": undo(
        "config/trust.py", "    if stored:\n", "    if False:\n", case="cfg or predict"
    ),
    "runs_of_others.test_a_module_of_callbacks_is_not_imported": undo(
        "config/schema.py", "setting([], signed=_by_module, ", "setting([], ", case="cfg or plan"
    ),
    "runs_of_others.test_a_signed_key_of_an_installed_plugin_is_known": undo(
        "core/registry.py", "if self._plugins and not _loading:", "if False:", count=2
    ),
    "runs_of_others.test_no_variable_is_resolved": undo(
        "config/trust.py", "if _refers(value) or (", "if (", case="cfg"
    ),
    "runs_of_others.test_a_job_of_others_is_not_submitted": undo(
        "launch/slurm/config.py", ", signed=True", "", count=6, case="setup or mounts"
    ),
    "runs_of_others.test_a_program_of_others_does_not_start_ranks": undo(
        "launch/openmpi/config.py", ", signed=True)", ")", count=4, case="train"
    ),
    "runs_of_others.test_ranks_are_not_started_on_hosts_of_others": undo(
        "launch/openmpi/config.py",
        "hostfile: str | None = setting(None, signed=True)",
        "hostfile: str | None = setting(None)",
    ),
    "runs_of_others.test_metrics_do_not_go_to_others": undo(
        "tracking/trackers/wandb.py",
        "entity: str | None = setting(None, signed=True)",
        "entity: str | None = setting(None)",
        ("tracking/trackers/mlflow.py", "setting(None, signed=True)", "setting(None)"),
    ),
    "runs_of_others.test_words_of_a_sweep_of_others_are_not_repeated": undo(
        "config/trust.py", "if doubtful or folders:", "if False:"
    ),
    "exports_of_others.test_the_task_of_an_export_of_others_is_no_file_of_theirs": undo(
        "checkpoint/record.py", "if chosen is None and name not in TASKS:", "if False:"
    ),
    "exports_of_others.test_an_export_of_others_resolves_no_variable": undo(
        "config/trust.py", "if was_resolved(text) or MODEL in believed(folder) or", "if True or"
    ),
    "exports_of_others.test_code_that_somebody_put_into_an_own_run_does_not_run": undo(
        "checkpoint/model_code.py", _OF_BASE, "return True"
    ),
    "exports_of_others.test_a_signed_run_is_served_without_what_somebody_put_into_its_export": undo(
        "checkpoint/model_code.py", _OF_BASE, "return True"
    ),
    "exports_of_others.test_an_adapter_of_others_is_not_served_from_a_base_that_a_variable_names": undo(
        "config/trust.py", "if was_resolved(text) or MODEL in believed(folder) or", "if True or"
    ),
    "guard.test_no_spelling_of_events_gets_a_text_past_the_guard": undo(
        "guard/front.py",
        "not is_name(place[-1], text):",
        "False:",
        ("guard/streams.py", "await self._check_outside_choices(choices, value)", "pass"),
    ),
    "guard.test_what_cannot_be_read_does_not_pass_the_guard": undo(
        "guard/front.py",
        "return [object_of(data) for data in data_of_events if data.strip() != DONE]",
        'return [{"id": data.decode()} for data in data_of_events]',
    ),
    "serve.test_containers_are_counted_before_they_are_made": undo(
        "serve/gateway/request.py", "if excess := excess_of(body, self.settings.max_depth):", 'if excess := "":'
    ),
    "serve.test_large_bodies_do_not_stop_others": undo(
        "serve/gateway/request.py",
        "if self.body_bytes <= LARGE_BYTES or self._threads is None:",
        "if True:",
        ("serve/gateway/request.py", "if excess := excess_of(body, self.settings.max_depth):", 'if excess := "":'),
    ),
    "serve.test_a_key_fills_no_more_than_its_share_of_the_memory": undo(
        "serve/gateway/admission.py",
        "if self._body_bytes[caller.id] + size > self._settings.key_body_bytes:",
        "if False:",
    ),
    "serve.test_a_prompt_beyond_the_context_is_refused_unread_and_charged": undo(
        "serve/gateway/inference.py", "if error.code == TOO_LONG:", "if False:"
    ),
    "serve.test_megabytes_for_the_local_engine_do_not_stop_others": undo(
        "data/control.py", "if len(text) <= 4 * most:", "if True:"
    ),
    "serve.test_idle_connections_keep_nobody_out": undo(
        "serve/server.py", "next(iter(self._idle)).transport.abort()", "transport.abort()"
    ),
    "serve.test_a_key_that_fills_the_queue_keeps_no_other_out": undo(
        "serve/gateway/admission.py",
        "if len(self._line.get(most, ())) <= len(self._line.get(key, ())) + 1:",
        "if True:",
    ),
    "serve.test_trailers_and_framing_without_end": undo(
        "serve/server.py",
        'raise ValueError("a header after the head")  # the connection is closed',
        "return",
        ("serve/server.py", "if self._framing_bytes > MOST_HEAD_BYTES:", "if False:"),
    ),
    "serve.test_a_body_that_goes_on_after_the_answer": undo(
        "serve/server.py", "if self._in_body and self.cycle.response_complete:", "if False:"
    ),
    "serve.test_thousands_of_requests_sent_ahead_are_not_kept": undo(
        "serve/server.py", "elif len(self.pipeline) > MOST_AHEAD:", "elif False:"
    ),
    "serve.test_a_host_that_browsers_read_otherwise": undo(
        "serve/gateway/middleware.py",
        "if match is None:\n        raise ApiError(400",
        "if match is None:\n        return 'localhost'\n        raise ApiError(400",
    ),
    "serve.test_answers_without_a_length_stay_below_the_bound": undo(
        "serve/gateway/output_bound.py", "body = body | {names[0]: requested}", "return body"
    ),
    "serve.test_what_an_engine_elsewhere_sends_is_bounded": undo(
        "serve/gateway/inference.py", "within_event(buffered[start:])", "buffered[start:]"
    ),
    "finetuning_api.test_group_7_one_tenant_sees_nothing_of_another": undo(
        "finetuning/files.py",
        "where(File.project == project, File.id == file, *_alive_conditions())",
        "where(File.id == file)",
    ),
    "finetuning_api.test_group_7_a_gigabyte_without_a_key_is_not_read": undo(
        "serve/gateway/request.py", "if await self._leave_body():", "if False:"
    ),
    "finetuning_api.test_a_name_that_stands_for_a_private_address_is_refused_at_the_connection": undo(
        "finetuning/addresses.py", "if not is_public(str(place[0])):", "if False:"
    ),
    "feedback.test_feedback_of_an_answer_is_one_row": undo(
        "serve/gateway/routes.py",
        "select(Feedback).where(Feedback.answer == answer.id)",
        "select(Feedback).where(False)",
    ),
    "feedback.test_feedback_of_a_project_is_bounded": undo(
        "serve/gateway/routes.py",
        "if row.bytes > bytes_before and stored - bytes_before + row.bytes > most:",
        "if False:",
    ),
    "finetuning_api.test_addresses_of_clouds_and_special_networks_are_not_public": undo(
        "finetuning/addresses.py", "if any(parsed in network for network in _SPECIAL):", "if False:"
    ),
    "finetuning_api.test_graders_of_one_project_keep_no_other_one_waiting": undo(
        "finetuning/turns.py",
        "self._places.setdefault(project, asyncio.Semaphore(self._of_project))",
        "asyncio.Semaphore()",
    ),
    "finetuning_api.test_a_sample_is_read_once_for_all_graders": undo(
        "grading/grader.py", "    @cached_property\n    def values", "    @property\n    def values"
    ),
    "finetuning_api.test_batches_and_tried_webhooks_of_a_project_are_bounded": undo(
        "finetuning/webhooks.py", "if self._testing[row.project] >= MOST_TESTS:", "if False:"
    ),
    "finetuning_api.test_files_of_one_organization_keep_no_other_one_from_validation": undo(
        "finetuning/jobs/validations.py", "(self._turns.get(job.organization, 0), job.number)", "job.number"
    ),
    "finetuning_api.test_slow_uploads_of_one_key_keep_no_other_key_out": undo(
        "finetuning/receiving.py",
        "if total >= (MOST_AT_ONCE if of_key else MOST_FIRST):",
        "if total >= 48:",
    ),
    "finetuning_api.test_an_upload_that_trickles_is_cut_off": undo(
        "finetuning/forms.py", "if size < seconds * LEAST_BYTES_A_SECOND:", "if False:"
    ),
    "finetuning_api.test_folders_of_jobs_count_towards_the_space_of_their_project": undo(
        "finetuning/jobs/build.py", "    files.counted.append(store.bytes_of)\n", ""
    ),
    "finetuning_api.test_a_running_job_ends_well_in_a_project_without_space": undo(
        "finetuning/jobs/device_queue.py", "if job.attempt or has_space(job.project):", "if True:"
    ),
    "runs_of_others.test_origins_of_a_strangers_run_name_keys_alone": undo(
        "config/resume.py",
        "if key in all_keys() and same(key)}",
        "if attrgetter(key)(config) == attrgetter(key)(stored.config)}",
    ),
    "signed_runs.test_the_signature_fits_no_other_value": undo(
        "config/trust.py", "signed_digests.get(key) != signing.digest(value)\n", "key not in signed_digests\n"
    ),
    "signed_runs.test_a_key_that_others_can_read_signs_nothing": undo(
        "core/files.py", " or status.st_mode & 0o077:", ":"
    ),
    "runs_of_others.test_folders_of_a_strangers_run_lead_nowhere": undo(
        "config/run_links.py",
        'if not (run / "run.yaml").is_file() or LINKS in believed(run):',
        "if True:",
        case="upgrade or prune",
    ),
    "messages.test_what_others_send_runs_nothing": undo(
        "core/messages.py", "return unpacked(json.loads(message[8:end]))", 'return __import__("pickle").loads(message)'
    ),
    "two_users.test_the_second_user_gets_nothing_of_a_running_launch": undo(
        "launch/local/supervise.py", 'STORE: str(self.folder / "store")', 'STORE: str(self.run_dir / "store")'
    ),
    "two_users.test_the_second_user_redirects_nothing_by_being_first": undo(
        "core/rendezvous.py", "content = json.loads(files.read_own(place))", "content = json.loads(place.read_bytes())"
    ),
    # Files.
    "files.test_records_replace_links_and_do_not_follow_them": undo(
        "core/files.py",
        "    temporary = path.with_name(",
        "    return path.write_bytes(data) and None\n    temporary = path.with_name(",
    ),
    "files.test_a_start_that_is_undone_copies_no_private_file_into_the_run": undo(
        "launch/rundir.py",
        'with os.fdopen(open_plain(path / name, os.O_RDONLY), "rb") as stream:',
        'with (path / name).open("rb") as stream:',
    ),
    "files.test_a_copied_run_is_read_through_no_link": undo(
        "checkpoint/copied.py", "if (place / name).is_symlink() or spare_of(place / name).is_symlink():", "if False:"
    ),
    "files.test_rows_are_not_appended_through_a_link": undo(
        "tracking/jsonl.py",
        'files.write(path, b"".join(kept_lines), sync=True)',
        'path.write_bytes(b"".join(kept_lines))',
        ("core/files.py", _PLAIN, "flags, mode)"),
    ),
    "files.test_logs_are_plain_files": undo("core/files.py", _PLAIN, "flags | os.O_NONBLOCK, mode)"),
    "spark.test_a_task_writes_its_log_through_no_link": undo(
        "lakehouse/spark/task.py",
        "with files.append(log_path) as log,",
        'with open(log_path, "ab", buffering=0) as log,',
    ),
    "files.test_a_copied_run_is_written_through_no_link": undo(
        "checkpoint/copied.py", "    if target.is_symlink():\n", "    if False:\n"
    ),
    "files.test_the_lock_is_no_link": undo(
        "launch/records.py", "files.open_plain(run_dir / LOCK", "os.open(run_dir / LOCK"
    ),
    "models_of_others.test_weights_come_from_the_folder_of_their_index": undo(
        "core/weight_index.py", "    if problems:\n", "    if False:\n"
    ),
    "models_of_others.test_consent_to_the_code_of_a_hub_id_is_none_to_that_of_a_folder": undo(
        "core/model_names.py", "if trusts_code and HUB_ID.fullmatch(path) and Path(path).is_dir():", "if False:"
    ),
    "images.test_a_node_runs_nothing_of_its_environment": undo(
        "../docker/node.sh", "printf 'export %s=%q\\n'", "printf 'export %s=%s\\n'", case="touch"
    ),
    "files.test_the_lock_of_swapped_states_is_no_link": undo(
        "zero/swap.py",
        'open_plain(folder / "lock", ',
        'os.open(folder / "lock", ',
        ("zero/swap.py", "if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():", "if False:"),
    ),
    "files.test_the_lock_of_a_copied_run_is_no_link": undo(
        "launch/mirror.py",
        'files.open_plain(self.work.with_name(f"{self.work.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)',
        'os.open(self.work.with_name(f"{self.work.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)',
    ),
    "files.test_pruning_leaves_the_checkpoint_behind_a_link": undo(
        "checkpoint/store.py", "doomed = [path for path in doomed if not path.is_symlink()]", "doomed = list(doomed)"
    ),
    "files.test_names_in_a_marker_stay_in_their_checkpoint": undo(
        "checkpoint/store.py", "for name in sizes if not _is_inside(name)]", "for name in ()]"
    ),
    "verify.test_the_file_of_a_model_names_no_kernel": undo(
        "../dstune_verify/network.py", "    config = _without_kernels(config)\n", ""
    ),
    "verify.test_the_file_of_a_model_takes_no_memory": undo(
        "../dstune_verify/network.py", "if isinstance(value, int) and value > MOST_LAYERS", "if False", case="layers"
    ),
    "verify.test_a_file_that_never_ends_or_speaks_to_the_terminal_is_refused": undo(
        "../dstune_verify/command.py",
        'print(visible(f"dstune-verify: {error}")',
        'print(str(f"dstune-verify: {error}")',
        case="escapes",
    ),
    "verify.test_no_other_user_reaches_the_store_of_ranks": undo(
        "../dstune_verify/runner.py", "if runner.agents.size == 1:", "if False:"
    ),
    # Certificates and pages.
    "certificates.test_what_never_ends_is_no_certificate": undo(
        "../dstune_verify/certificate.py", "stream.read(LARGEST_BYTES + 1)", "stream.read()", case="sparse"
    ),
    "certificates.test_the_file_of_a_certificate_is_in_its_folder": undo(
        "../dstune_verify/certificate.py", '        ("stack.device.type", stack["device"].get("type")),\n', ""
    ),
    "certificates.test_nothing_in_a_certificate_breaks_or_turns_the_page": undo(
        "../dstune_verify/certificate.py", "_is_text(value, most) and value.isprintable()", "_is_text(value, most)"
    ),
    "certificates.test_text_of_a_certificate_is_no_markup": undo(
        "../tools/certificates.py", 'html.escape(" ".join(value.split()), quote=False)', '" ".join(value.split())'
    ),
    "pages.test_the_command_on_a_page_runs_nothing_else": undo(
        "report/page.py",
        'shlex.join(["dstune", "train", *run.overrides])',
        '" ".join(["dstune", "train", *run.overrides])',
    ),
    "pages.test_text_on_a_page_is_not_turned": undo("report/html.py", "core_text.visible(", "("),
    "pages.test_a_page_shows_no_file_outside_of_a_strangers_run": undo(
        "report/run_files.py", "        refuse_files_elsewhere(path, ROLLOUTS)\n", ""
    ),
    "pages.test_a_pipe_among_the_answers_of_a_run_is_named": undo(
        "report/page.py", "        OSError,\n        TypeError,", "        TypeError,"
    ),
    "pages.test_a_page_in_a_notebook_has_no_origin": undo("api/run.py", ' sandbox="allow-scripts"', ""),
    "hangs.test_a_status_of_megabytes_or_lines_is_one_line_of_the_list": undo(
        "launch/runs.py",
        '        [one_line(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …") for text in row]',
        "        row",
    ),
    "pages.test_the_page_of_a_cycle_has_no_markup_of_others": undo(
        "report/html.py", "autoescape=True", "autoescape=False"
    ),
    "leaks.test_a_saved_data_set_reads_no_file_outside_its_folder": undo(
        "data/sources.py", "if strange := [name for name in names if not", "if strange := [name for name in () if not"
    ),
    "leaks.test_a_table_names_no_file_outside_its_folder_in_any_spelling": undo(
        "lakehouse/inside.py", "if _ODD.search(name) or (", "if _ODD.search('') or ("
    ),
    "leaks.test_a_table_in_a_store_names_no_file_of_this_machine": undo(
        "lakehouse/tables.py", 'if is_elsewhere(action["path"], place):', "if False:"
    ),
    "leaks.test_a_split_is_a_name": undo(
        "data/sources.py",
        "isinstance(name, str) and _is_name(name) for name in splits",
        "isinstance(name, str) for name in splits",
    ),
    "leaks.test_a_password_that_is_written_out_is_refused_and_not_repeated": undo(
        "config/secret_rules.py", "        if is_written_out:\n", "        if False:\n"
    ),
    "leaks.test_a_run_directory_can_be_closed_to_others": undo(
        "launch/rundir.py", "path.chmod(config.run.mode.value)", "pass"
    ),
    # Terminals.
    "terminal.test_text_of_others_is_made_visible": undo("core/text.py", _VISIBLE, "return text"),
    "terminal.test_status_and_runs_show_a_prepared_result": undo("cli/__init__.py", _PRINTED, "stdout = sys.stdout"),
    "terminal.test_the_command_line_itself_is_repeated_harmlessly": undo("core/text.py", _VISIBLE, "return text"),
    "terminal.test_what_a_package_below_reports_passes_through_the_command": undo(
        "cli/__init__.py", _PRINTED, "stdout = sys.stdout"
    ),
    # Hangs and memory.
    "templates.test_a_template_without_end_is_refused": undo(
        "data/chat/template.py", "            self._try(source)\n", "", case="loops"
    ),
    "templates.test_a_template_that_is_slow_each_time_is_refused": undo(
        "data/chat/template.py", "self._budget = TEMPLATE_OPENING.seconds", "pass"
    ),
    "templates.test_a_faulty_template_is_a_message": undo(
        "data/chat/template.py",
        "except Exception as error:  # a template is a program",
        "except RenderError as error:  #",
    ),
    "templates.test_a_conversation_that_makes_a_template_endless_ends_in_a_server_too": undo(
        "data/chat/template.py",
        "return is_jinja and threading.current_thread() is not threading.main_thread()",
        "return False",
        case="loops",
    ),
    "templates.test_a_row_that_makes_a_template_endless_is_a_bad_row": undo(
        "data/chat/template.py",
        "limits = TEMPLATE if self._budget is None else",
        "limits = replace(TEMPLATE, seconds=8 * TEMPLATE.seconds) if self._budget is None else",
        case="loops",
    ),
    "templates.test_a_template_that_is_slow_for_many_rows_is_refused": undo(
        "data/chat/template.py", "if self._slow_rows >= MAX_SLOW_ROWS:", "if False:"
    ),
    "templates.test_what_no_signal_reaches_ends_the_process": undo(
        "core/confinement/here.py",
        "            signal.setitimer(signal.ITIMER_PROF, ended_after or timed * _HARD)\n",
        "",
    ),
    "hangs.test_a_pattern_that_backtracks": undo(
        "core/confinement/here.py", "        in_child(match, PATTERNS)\n", "        pass\n"
    ),
    "spark.test_many_strangers_keep_no_task_out": undo(
        "lakehouse/spark/stage.py", "while len(self._strangers) < MAX_STRANGERS:", "while True:"
    ),
    "tokenizers.test_patterns_of_a_tokenizer_that_backtrack": undo(
        "core/tokenizers.py", "if reason := trial(what, patterns, encode, TOKENIZER_TRIAL):", "if reason := '':"
    ),
    "tokenizers.test_a_pattern_that_backtracks_over_one_row_alone": undo(
        "core/tokenizers.py", 'type(error).__name__ == "PanicException"  #', "False  #"
    ),
    "tokenizers.test_a_tokenizer_that_makes_gigabytes_of_a_word": undo(
        "core/tokenizers.py",
        "if (growth := _growth(step)) > MAX_GROWTH:",
        "if (growth := 0):",
        ("core/tokenizers.py", "if (added := _added(step)) > MAX_ADDED:", "if (added := 0):"),
    ),
    "tokenizers.test_files_of_a_tokenizer_that_are_none": undo(
        "core/errors.py", "    except Exception as error:\n", "    except OSError as error:\n"
    ),
    "tokenizers.test_an_architecture_that_is_none": undo(
        "models/load.py",
        '    with files_of_others("model.path", config.path, "its config.json", "give a hub id or a folder with a config.json"):\n',
        "    if True:\n",
    ),
    "hangs.test_an_adapter_that_asks_for_more_than_it_has": undo(
        "models/adapter_sizes.py", "if isinstance(size, (int, float)) and size > largest:", "if False:"
    ),
    "hangs.test_a_served_adapter_is_looked_at_before_the_engine_takes_it": undo(
        "serve/engines/local/model.py", "check_adapter(folder, self.model, name)", "pass", case="rank"
    ),
    "hangs.test_settings_of_an_adapter_that_are_none": undo(
        "methods/_peft/files.py", "    if not isinstance(settings, dict):\n", "    if False:\n"
    ),
    "hangs.test_yaml_that_grows_or_never_ends": undo(
        "core/parsing.py", "if size > self._max_nodes:", "if False:", case="bomb"
    ),
    "hangs.test_json_that_is_too_deep_or_too_long": undo(
        "core/parsing.py", "    check_depth(text)\n    return value", "    return value"
    ),
    "hangs.test_rows_around_a_bad_one_are_read": undo(
        "data/read_text.py", 'after = end_of_json(text, start) if text[start] in "[{" else None', "after = None"
    ),
    "hangs.test_a_field_without_end_is_one_bad_row": undo(
        "core/parsing.py",
        "while line := stream.readline(limit + 1):",
        "while line := stream.readline():",
        ("core/parsing.py", "        if size <= limit:\n", "        if True:\n"),
    ),
    "hangs.test_a_field_of_a_table_without_end_is_one_bad_row": undo(
        "data/read_tables.py",
        "if _bytes(unfolded) <= MAX_ROW_BYTES else None",
        "",
        ("data/read_tables.py", "if _bytes(row) <= MAX_ROW_BYTES else None", ""),
    ),
    "unfolding.test_a_table_of_a_few_bytes_is_read_in_little_memory": undo(
        "data/read_tables.py",
        "with limited(Limits(added_bytes=MAX_BATCH_BYTES)):",
        "if True:",
        case="dictionary or runs",
        count=2,
    ),
    "unfolding.test_a_page_of_a_few_bytes_is_read_in_little_memory": undo(
        "data/read_tables.py", "batches = within_memory(batches, MAX_BATCH_BYTES if rows > 1 else None)", ""
    ),
    "unfolding.test_a_batch_larger_than_half_of_the_memory_is_refused": undo(
        "data/read_tables.py", "return reader.schema, within_memory(", "return reader.schema, iter("
    ),
    "unfolding.test_a_checkpoint_that_grows_is_not_given_to_the_library": undo(
        "lakehouse/inside.py", "_refuse_growing(entry.path)", "pass"
    ),
    "unfolding.test_an_xz_file_with_a_dictionary_of_gigabytes_is_refused": undo(
        "data/files.py", "return io.BufferedReader(_Xz(stream), 1 << 20)", "return lzma.LZMAFile(stream)"
    ),
    "unfolding.test_blank_lines_without_end_are_refused": undo(
        "data/read_text.py", "if self._count > MAX_BLANK_LINES:", "if False:"
    ),
    "hangs.test_a_sparse_gguf_file_is_no_header_of_a_terabyte": undo(
        "checkpoint/gguf_header.py", "min(size, MAX_HEADER_BYTES)", "min(size, 2**28)"
    ),
    "unfolding.test_an_archive_whose_directory_is_read_too_often_is_refused": undo(
        "data/files.py", "if len(of_rows) * len(names) > MAX_ENTRIES_READ:", "if False:"
    ),
    "serve.test_a_request_names_one_transfer_encoding": undo(
        "serve/server.py", "            if self._has_encoding:\n", "            if False:\n"
    ),
    # Images.
    "judged_programs.test_a_program_holds_no_memory_outside_of_its_limit": undo(
        "core/confinement/system_calls.py", '    "memfd_create": (319, 279),\n', ""
    ),
    "judged_programs.test_a_program_holds_no_memory_of_the_kernel": undo(
        "core/confinement/system_calls.py",
        '    "listen": (50, 201),\n',
        "",
        ("core/confinement/system_calls.py", '    "splice": (275, 76),\n', ""),
        ("core/confinement/system_calls.py", '    ("prctl", (157, 167), 0, 78, False),', "   "),
    ),
    "judged_programs.test_the_processes_of_a_program_have_one_limit_of_memory": undo(
        "grading/sandbox.py", "if private_bytes(process.pid) > limits.memory_bytes:", "if False:", count=2
    ),
    "judged_programs.test_a_program_runs_in_a_control_group_where_this_process_can_make_one": undo(
        "grading/sandbox.py", "group.add(process.pid)", "pass"
    ),
    "judged_programs.test_a_program_that_changes_its_streams_costs_no_other_row_its_score": undo(
        "grading/sandbox.py",
        "stderr=subprocess.PIPE,",
        "stderr=(errors := tempfile.TemporaryFile()),",
        ("grading/sandbox.py", " and process.stderr is not None", ""),
        ("grading/sandbox.py", "for stream in (process.stdout, process.stderr):", "for stream in (process.stdout,):"),
        ("grading/sandbox.py", "error = error_end.decode", "error = (errors.seek(905), errors.read(4096))[1].decode"),
    ),
    "judged_programs.test_a_judge_that_fails_costs_one_row_its_score": undo(
        "rewards/code.py", "except Exception as error:", "except ArithmeticError as error:"
    ),
    "judged_programs.test_a_broken_schema_costs_one_row_its_score": undo(
        "rewards/form.py", "except Exception as error:  # of one row", "except ArithmeticError as error:  # of one row"
    ),
    "judged_programs.test_what_json_does_not_have_is_no_number": undo(
        "rewards/form.py", "json.loads(text, parse_constant=_refuse)", "json.loads(text)"
    ),
    "recordings.test_lists_without_end_are_left": undo(
        "recording/inventory.py", "if size > MAX_LIST_BYTES:", "if False:"
    ),
    "recordings.test_a_file_without_end_is_left": undo(
        "recording/inventory.py", "if position + len(block) > MAX_FILE_BYTES:", "if False:"
    ),
    "recordings.test_identifiers_are_no_paths_and_end_nothing": undo(
        "recording/folder.py", "if SAFE_NAME.fullmatch(identifier)", "if True"
    ),
    "recordings.test_the_key_follows_no_redirect": undo(
        "core/api_client.py", "list[Any] = [_NoRedirect()]", "list[Any] = []"
    ),
    "recordings.test_an_answer_of_megabytes_is_compared_in_time": undo(
        "recording/kinds.py",
        "rouge_l(answer[:MOST_CHARACTERS], expected[:MOST_CHARACTERS])",
        "rouge_l(answer[:3_000_000], expected)",
    ),
    "recordings.test_a_recording_of_others_sends_no_file_of_this_machine": undo(
        "recording/retrain.py", "if path.is_symlink() or not path.is_file():", "if not path.is_file():"
    ),
    "forgotten_users.test_a_start_without_the_log_deletes_what_an_earlier_one_logged": undo(
        "serve/command.py", "if not arguments.log_requests and not folder.is_dir():", "if not arguments.log_requests:"
    ),
    "forgotten_users.test_either_name_of_a_user_deletes_the_rows": undo(
        "serve/gateway/recording.py",
        "or_(AnswerRow.user == user, AnswerRow.safety_identifier == user)",
        "AnswerRow.user == user",
    ),
    "models_of_others.test_the_file_of_a_model_names_no_kernel_of_a_hub": undo(
        "core/stored_implementations.py",
        "if requested is not None and not is_on_this_machine(requested):",
        "if False:",
        case="model",
    ),
    "models_of_others.test_no_loader_reads_the_kernels_of_a_file": undo(
        "checkpoint/gguf_file.py",
        "without_stored_implementations(AutoConfig.from_pretrained(folder))",
        "AutoConfig.from_pretrained(folder)",
    ),
    "models_of_others.test_the_code_in_mlflow_names_no_kernel_of_a_hub": undo(
        "lakehouse/registered_model.py", "    _forget_kernels(config)\n", ""
    ),
    "pictures.test_no_decoder_begins_with_a_bomb": undo(
        "data/images/decoder.py", "if width * height > MAX_PIXELS:", "if False:", case="12"
    ),
    "pictures.test_many_images_are_no_bomb_together": undo(
        "data/images/store.py", "if pixels > MAX_PIXELS_OF_ROW:", "if False:"
    ),
    "pictures.test_what_a_model_gets_of_small_files_is_bounded": undo(
        "data/images/request.py", "if self.bytes > MAX_INPUT_BYTES:", "if False:"
    ),
    "pictures.test_an_image_that_lies_about_its_size_is_not_computed": undo(
        "data/images/request.py", "if image.size != self._sizes[number]:", "if False:"
    ),
    "pictures.test_a_truncated_image_ends_its_row_and_nothing_else": undo(
        "data/images/decoder.py",
        "except Exception as error:  # a decoder meets",
        "except EOFError as error:  # a decoder meets",
    ),
    "pictures.test_no_other_decoder_is_reached": undo(
        "data/images/decoder.py", ", formats=FORMATS)", ")", case="PPM", count=2
    ),
    "pictures.test_an_image_takes_no_more_time_or_memory_than_it_may": undo(
        "core/confinement/spawned.py",
        "        inside.end_after(seconds)\n",
        "",
        ("data/images/decoder.py", "            begin(image.width * image.height)\n", ""),
        case="scans",
    ),
    "pictures.test_a_small_image_of_others_is_decoded_beside_the_worst": undo(
        "core/confinement/spawned.py",
        "            answer = spawned.ask(request, seconds, wall_seconds)\n",
        "            with _START:\n                answer = spawned.ask(request, seconds, wall_seconds)\n",
        ("core/confinement/spawned.py", "START_SECONDS = 120.0", "_START, START_SECONDS = threading.Lock(), 120.0"),
    ),
    "pictures.test_a_request_with_a_small_image_is_answered_beside_the_worst_of_another_key": undo(
        "serve/turns.py", "if client not in self._busy", "if True"
    ),
    "pictures.test_a_row_reads_no_file_outside_of_its_folder": undo(
        "data/images/store.py", "if not is_named_within or not (", "if False and not ("
    ),
    "pictures.test_a_request_reads_no_file_at_all": undo(
        "data/images/store.py", "    if root is None:\n", "    if root is None and (root := Path('/')) is None:\n"
    ),
    "pictures.test_a_row_holds_no_more_images_than_it_may": undo(
        "data/images/places.py", "if len(shown) > MAX_IMAGES:", "if False:"
    ),
    "pictures.test_no_address_is_fetched_for_an_image": undo(
        "serve/images.py", "if DATA_URL.fullmatch(url):", "if True:"
    ),
    "pictures.test_an_image_of_a_hundred_megabytes_is_not_read": undo(
        "serve/gateway/request.py",
        "body = await read_body(self.receive, limit, self._hold)",
        "body = await read_body(self.receive, 1 << 30, lambda size: None)",
        case="chunks",
    ),
    "hangs.test_a_pipe_or_a_device_in_the_place_of_rows": undo(
        "data/sources.py", "    if not file.is_file():\n", "    if file.is_fifo():\n", case="jsonl"
    ),
    "hangs.test_a_model_of_impossible_size": undo(
        "config/architectures.py", "if number > limit or number < least:", "if False:", case="change2"
    ),
    "hangs.test_one_bad_directory_takes_no_other_run_from_the_list": undo(
        "launch/runs.py",
        "DAMAGED = (UserError, OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)",
        "DAMAGED = (UserError,)",
        ("report/run_files.py", "def is_row(", "def is_row(row):\n    return True\n\n\ndef _unused("),
    ),
    "hangs.test_a_deep_line_of_metrics_is_dropped_by_the_run_that_goes_on": undo(
        "tracking/jsonl.py", 'row_step = parse_json(line)["step"]', 'row_step = json.loads(line)["step"]'
    ),
    "hangs.test_a_pipe_or_a_device_is_not_read_for_ever": undo(
        "core/parsing.py", "if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:"
    ),
    "hangs.test_a_file_without_end_is_not_read_whole": undo("core/parsing.py", "if len(content) > limit:", "if False:"),
}

MUTATIONS = {f"tests/security/test_{test.replace('.', '.py::', 1)}": one for test, one in _BY_ATTACK.items()}
