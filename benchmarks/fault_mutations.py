"""What brings back each fault of what is trained, by the test that found it (`mutations.py`)."""

from __future__ import annotations

from benchmarks.mutations import Mutation, undo

_SWITCH = "thinks = {} if switch is None else {switch: has_reasoning(message)}"
_PAIR = 'pair = worse or {"chosen", "rejected"} <= fields.keys()'
_VERDICT = "if column in fields and is_verdict(fields[column]):"
_LABEL = "((turn.start, other.end()),), (at, turn.stop))"

_CHAT: dict[str, Mutation] = {
    # Turns as a server sees them.
    "a_stop_that_the_template_lacks_is_supplied": undo(
        "data/chat/rule.py", "if stop := stops.supplied.get(calls):", 'if stop := "":'
    ),
    "a_turn_that_ends_otherwise_in_the_history_learns_the_end_that_a_server_waits_for": undo(
        "data/chat/rule.py", _LABEL, "((turn.start, other.end()),))"
    ),
    "an_empty_reasoning_block_of_the_prompt_is_context_and_one_that_it_does_not_bring_is_a_target": undo(
        "data/render.py", _SWITCH, "thinks = {}"
    ),
    "the_row_s_arguments_come_before_those_of_the_run": undo(
        "data/render.py",
        "return thinks | self._template.arguments | dict(row or {})",
        "return thinks | dict(row or {}) | dict(self._template.arguments)",
    ),
    "every_task_of_conversations_takes_arguments_from_the_row_and_from_the_run": undo(
        "data/preferences.py",
        'for key in ("tools", "chat_template_kwargs", COLUMN) if key in row}',
        'for key in ("tools", COLUMN) if key in row}',
    ),
    "a_prompt_that_does_not_begin_the_conversation_is_refused_with_both_texts_and_what_mends_it": undo(
        "data/chat/rule.py", "    if not answered.startswith(prompt):\n", "    if False:\n"
    ),
    "a_rewritten_history_becomes_samples_of_which_each_has_its_target_once": undo(
        "data/chat/rule.py",
        "passages_in_order.append(Passage(text, tuple(places.values())))",
        "passages_in_order = [Passage(text, tuple(places.values()))]",
    ),
    "a_plan_counts_samples_and_tokens": undo(
        "data/chat/factor.py", "growth.samples + len(lengths),", "growth.samples + 1,"
    ),
    "metrics_count_conversations": undo(
        "trainer/measure.py", "(member.chunked or member.splits_conversations)", "member.chunked"
    ),
    "with_train_on_prompt_a_token_counts_at_its_first_appearance": undo(
        "data/tokenize/conversations.py",
        "targets[: max((_in_common(input_ids, others) for others in earlier), default=0)] = False",
        "pass",
    ),
    "a_message_before_the_first_question_and_one_of_weight_0_are_context": undo(
        "data/render.py",
        'numbers = [number for number in numbers if messages[number].get("weight", 1)]',
        "numbers = list(numbers)",
    ),
    "rows_that_need_continue_final_message_are_refused": undo(
        "data/messages.py",
        'if prompt_messages[-1]["role"] == "assistant" and answered[0]["role"] == "assistant":',
        "if False:",
    ),
    "data_show_separates_context_and_target_turn_by_turn": undo(
        "show/segments.py", "groups = list(map(int, targets))", "groups = [0] * len(ids)"
    ),
    "reasoning_that_belongs_into_the_content_is_put_there": undo(
        "data/chat/probe.py", 'return "content", frozenset(turns)', "pass"
    ),
    "a_template_for_conversations_with_tools_alone_is_served": undo(
        "data/chat/probe.py", '"qzanswer", [_QUESTION], tools=_TOOLS)', '"qzanswer", [_QUESTION])'
    ),
    "a_content_that_is_needed_in_the_history_alone_is_given": undo(
        "data/chat/probe.py", "            if goes_on:\n", "            if False:\n"
    ),
    "a_template_that_no_conversation_suits_says_why": undo(
        "data/render.py", "elif argument := _UNDEFINED.search(reason):", "elif False:"
    ),
    # What a template drops.
    "a_field_that_the_template_drops_is_one_refusal_with_template_field_rows_and_fix": undo(
        "data/render.py", "        if fields:\n", "        if False:\n"
    ),
    "rows_with_dropped_fields_can_be_skipped": undo(
        "data/render.py",
        "        if fields:\n",
        "        if False:\n",
        ("data/chat/turn_parts.py", "if text.strip() not in turn.body), None)", "if False), None)"),
    ),
    "a_call_of_which_the_name_or_an_argument_is_not_written_is_refused": undo(
        "data/chat/turn_parts.py", "if text.strip() not in turn.body), None)", "if False), None)"
    ),
    "arguments_are_given_as_the_template_concatenates_them": undo(
        "data/chat/probe.py", "if calls and self.arguments_as_text:", "if False:"
    ),
}

_PROOF: dict[str, Mutation] = {
    "the_proof_fails_where_a_server_refuses_the_conversation": undo(
        "data/chat/proof.py",
        'if any(message["role"] == "user" for message in messages[:number]):',
        "if False:",
        case="marks and all",
    ),
    "the_proof_knows_the_stop_that_a_template_lacks": undo(
        "data/chat/proof.py",
        'self._opening(messages, row.get("tools"), variables) if end is None',
        "None if end is None",
    ),
    "rows_of_every_kind_are_proven": undo(
        "data/chat/evidence.py",
        "(kind not in row_by_kind or row.is_better_than(row_by_kind[kind]))",
        "(not row_by_kind)",
    ),
    "every_task_of_conversations_is_proven": undo(
        "data/chat/evidence.py", "return None if is_same else", "return None if True else", case="reward"
    ),
    "the_proof_fails_where_one_token_is_another": undo(
        "data/chat/proof.py",
        "    return [*others, *differences][-1] if samples else",
        "    return None if samples else",
    ),
    "the_proof_fails_where_an_argument_is_another": undo(
        "data/chat/proof.py", "        if ids[: len(context)] != context:\n", "        if False:\n"
    ),
    "the_proof_sees_the_date": undo(
        "data/chat/proof.py", "        if ids[: len(context)] != context:\n", "        if False:\n"
    ),
    "an_exported_template_has_the_arguments_built_in": undo(
        "data/chat/template.py", 'return "".join([*lines, template])', "return template"
    ),
    "both_kinds_of_turns_are_reported": undo(
        "data/chat/evidence.py", "for name in sorted(names - differ - reasoned)}", "for name in names}"
    ),
    "arguments_of_each_row_hide_no_kind": undo(
        "data/chat/evidence.py", "kind = _kind(text), arguments_text", "kind = _kind(text), text[:80]"
    ),
    "a_row_of_a_kind_is_proven_where_the_first_one_writes_control_tokens": undo(
        "data/chat/evidence.py",
        "is_better_than(row_by_kind[kind])) and _is_plain(row, encode):",
        "is_better_than(row_by_kind[kind])):",
    ),
    "rows_that_are_all_cut_are_proven": undo(
        "data/chat/evidence.py", "            if not has_samples:\n", "            if not has_samples or is_cut:\n"
    ),
    "a_template_that_ends_turns_with_text_is_proven_and_reported": undo(
        "data/chat/proof.py",
        "if stop == NO_TARGET and (turn.by_text or which is None or not which[-1]):",
        "if stop == NO_TARGET and (which is None or not which[-1]):",
    ),
    "the_proof_fails_where_a_server_reads_more_than_a_sample_holds": undo(
        "data/chat/proof.py", "if len(ids) < min(turn.length, max_length):", "if False:"
    ),
    "the_proof_fails_where_any_token_of_a_sample_is_another": undo(
        "data/chat/proof.py",
        "if reads := [at for at, token in enumerate(written) if ids[start + at] != token]:",
        "if reads := []:",
    ),
    "an_answer_that_begins_inside_a_word_is_proven": undo(
        "data/chat/proof.py", "return inside_text if is_same_text else behind_token", "return behind_token"
    ),
    "the_proof_fails_where_a_further_token_is_trained": undo(
        "data/chat/evidence.py", "        if trained != count:\n", "        if False:\n"
    ),
    "arguments_of_the_rows_are_built_in_where_all_have_them": undo(
        "data/chat/evidence.py",
        "arguments = {**renderer.run_arguments, **json.loads(row_arguments)}",
        "arguments = dict(renderer.run_arguments)",
    ),
}

_FOREIGN: dict[str, Mutation] = {
    "conversations_of_other_tools": undo(
        "data/messages.py", 'if not isinstance(item, dict) or "role" in item', 'if True or "role" in item'
    ),
    "what_would_be_dropped_is_refused": undo(
        "data/media.py", "    if COLUMNS.keys().isdisjoint(fields):\n", "    if True:\n"
    ),
    "schemas_that_are_text_are_given_as_they_are": undo(
        "data/messages.py",
        "tools = value if is_text else _without_absent(value)",
        "tools = [without_none(tool) for tool in value]",
    ),
    "pairs_are_no_chats_unless_the_format_is_named": undo("tasks/chat/rows.py", _PAIR, "pair = False"),
    "judged_answers_are_no_chats": undo("tasks/chat/rows.py", _VERDICT, "if False:"),
    "what_is_trained_of_rows_of_other_tools": undo(
        "data/message.py", 'WEIGHT_KEYS = ("weight", "loss_weight", "loss")', 'WEIGHT_KEYS = ("weight", "loss")'
    ),
}
_FOREIGN_RUNS: dict[str, Mutation] = {
    "a_pair_of_ms_swift_is_read_whole": undo("data/unread.py", " | (fields.keys() - expanded.keys())", ""),
    "an_argument_that_is_null_is_trained_where_the_function_has_it": undo(
        "data/message.py", "message = without_none(message, GIVEN)", "message = without_none(message)"
    ),
    "a_column_that_looks_like_content_and_is_not_read_is_counted": undo(
        "data/unread.py", "            if holds_something(fields[column]):\n", "            if False:\n"
    ),
    "a_mapped_column_that_the_format_does_not_read_is_counted": undo(
        "data/unread.py", "content_names() | set(self._mapping.values())", "content_names()"
    ),
    "a_mapped_column_that_no_row_has_is_refused_where_another_format_fits_too": undo(
        "data/builder.py",
        "        check_mapped(everything, data.columns, str(next(iter(read.values())).files[0]))\n",
        "",
    ),
    "columns_of_a_mixture_name_a_column_of_a_source": undo(
        "data/builder.py", "            if name in data.mixture:", "            if False:"
    ),
    "data_columns_choose_the_format": undo(
        "data/formats.py",
        "fitting, key=lambda name: len(mapping.keys() & {*ROW_FORMATS[name].required, *ROW_FORMATS[name].optional})",
        "fitting, key=lambda name: 0",
    ),
    "the_template_gets_content_and_arguments_as_it_takes_them": undo(
        "data/chat/probe.py", "            if self.empty_content:\n", "            if False:\n"
    ),
}

_OTHER: dict[str, Mutation] = {
    "unit/test_data_render.py::test_an_answer_that_begins_with_line_breaks": undo(
        "data/tokenize/conversations.py",
        "or not self._boundaries.is_clean(",
        "or False and not self._boundaries.is_clean(",
    ),
    "unit/test_data_stream.py::test_a_later_block_with_other_arguments_is_reported": undo(
        "data/builder.py", "            if proof.arguments != self._arguments:\n", "            if False:\n"
    ),
    "unit/test_data_stream.py::test_later_blocks_are_proven_too": undo(
        "data/builder.py", "if self._held_out is not None and evidence_file.is_file():", "if False:"
    ),
    "unit/test_data_slices.py::test_slices_of_a_sample": undo(
        "data/sources.py",
        "fetch=False))]\n            files += slices.apply(chosen, of_split, count, key, spec)",
        "fetch=False))]\n            files += of_split",
    ),
    "unit/test_data_slices.py::test_slices_of_a_folder": undo("data/slices.py", "if not chosen.sliced:", "if True:"),
    "unit/test_token_ids.py::test_another_tokenizer_is_refused": undo(
        "data/build.py", "    check_tokenizer(config, tokenizer)\n", ""
    ),
    "unit/test_token_ids.py::test_ids_are_not_read_where_the_format_is_not_named": undo(
        "data/formats.py", "for name in allowed if not ROW_FORMATS[name].only_named)", "for name in allowed)"
    ),
    "unit/test_label_names.py::test_slips": undo(
        "data/label_names.py", "for name, count in names.items() if count == 1)", "for name, count in ())"
    ),
    "unit/test_label_names.py::test_suspicious_labels_are_refused_where_the_run_says_so": undo(
        "data/build.py", "config.data.on_suspicious_labels is OnSuspiciousLabels.error:", "False:"
    ),
    "unit/test_presets.py::test_a_base_model_speaks_by_prompts": undo(
        "data/messages.py", '"input") if input_apart else ""', '"input") if False else ""'
    ),
    # Few rows, few steps, defaults.
    "unit/test_defaults.py::test_the_rate_is_the_method_s_where_nobody_gives_one": undo(
        "config/by_method.py", "rate, origin = method_class.learning_rate, f", "rate, origin = rate, f"
    ),
    "unit/test_defaults.py::test_run_yaml_has_the_rate_with_its_origin_and_keeps_both": undo(
        "config/run_file.py", '**({"origins": dict(composed.origins)} if composed.origins else {}),', ""
    ),
    "unit/test_defaults.py::test_the_stage_is_the_fastest_that_fits": undo(
        "planning/stage.py",
        "chosen = at_stage(config, best.setup.stage)",
        "chosen = at_stage(config, stages[0])",
    ),
    "unit/test_defaults.py::test_steps_passes_and_shares_of_the_run": undo(
        "config/cadence.py", "return step // period > (step - 1) // period", "return step % period == 0"
    ),
    "unit/test_defaults.py::test_few_steps_are_reported_with_their_arithmetic_and_what_to_change": undo(
        "rank/startup.py", "if run.state.step or total >= FEW_STEPS:", "if True:"
    ),
    "unit/test_config_compose.py::test_quickstart_unless_an_experiment_a_model_or_data_is_named": undo(
        "config/compose.py",
        "any(key in REPLACES_QUICKSTART or key",
        'any(key.startswith("data.") or key in REPLACES_QUICKSTART or key',
    ),
    "unit/test_common_definitions.py::test_warm_up_is_one_step_ahead_of_transformers": undo(
        "optim/warmup.py", "(step + 1) / ", "step / "
    ),
    "unit/test_common_definitions.py::test_first_values_of_split_weights_are_those_of_peft": undo(
        "methods/lora/start.py", "share = 1.0 if config.init is LoraInit.olora else scale**0.5", "share = scale**0.5"
    ),
    "unit/test_common_definitions.py::test_a_stored_run_keeps_the_split_that_it_began_with": undo(
        "config/run_file.py", 'method["init"] = "qr"', "pass"
    ),
    "unit/test_common_definitions.py::test_a_deepspeed_optimizer_without_weight_decay_has_deepspeed_s": undo(
        "config/deepspeed_training.py", '"eps": 1e-8, "weight_decay": 0.0}', '"eps": 1e-8, "weight_decay": 0.01}'
    ),
}

_GIVEN: dict[str, Mutation] = {
    "schemas_and_arguments_keep_the_order_of_their_keys": undo(
        "data/ingest.py", "return json_text(row), ", 'return content.decode("utf-8"), '
    ),
    "arguments_of_a_call_write_no_control_tokens": undo(
        "data/control.py", "return key in names or", "return key in NO_TEXT or"
    ),
    "a_text_that_the_template_cuts_inside_of_what_reads_like_a_control_token_is_refused": undo(
        "data/tokenize/conversations.py", "if any(defused.unrestored().search(written)", "if False and any(written"
    ),
    "a_message_of_other_keys_alone_says_nothing": undo(
        "data/messages.py", 'return bool(message.get("tool_calls"))', "return len(message) > 2"
    ),
    "a_refusal_is_what_the_assistant_says": undo("data/message.py", "content = refusal", "pass"),
    "a_message_that_says_two_things_is_refused": undo(
        "data/message.py", "if value not in (None, content):", "if False:"
    ),
    "cleaning_reads_every_argument_of_a_call": undo(
        "data/clean/rows.py", "() if key == ARGUMENTS else no_text", "no_text", count=2
    ),
    "an_answer_about_the_tags_of_reasoning_is_kept": undo(
        "data/message.py", 'None if not end_tag or "<think>" in reasoning else', "None if not end_tag else", case="drop"
    ),
    "an_answer_of_which_the_template_splits_off_what_it_takes_for_reasoning_is_refused": undo(
        "data/chat/turn_parts.py",
        '"content": inline[1] if inline else start}',
        '"content": start.rsplit("</think>", 1)[-1]}',
    ),
    "the_white_space_of_a_column_is_kept": undo(
        "data/messages.py", 'return value if value and value.strip() else ""', 'return (value or "").strip()'
    ),
}

MUTATIONS = {
    **{f"tests/unit/test_chat_faults.py::test_{name}": one for name, one in _CHAT.items()},
    **{f"tests/unit/test_chat_proof.py::test_{name}": one for name, one in _PROOF.items()},
    **{f"tests/unit/test_chat_given.py::test_{name}": one for name, one in _GIVEN.items()},
    **{f"tests/unit/test_data_foreign.py::test_{name}": one for name, one in _FOREIGN.items()},
    **{f"tests/unit/test_data_foreign_runs.py::test_{name}": one for name, one in _FOREIGN_RUNS.items()},
    **{f"tests/{name}": one for name, one in _OTHER.items()},
}
