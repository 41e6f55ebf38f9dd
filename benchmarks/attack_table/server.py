"""Attacks on `dstune serve` by clients, engines and the guard's input."""

from __future__ import annotations

from benchmarks.attack_table.attack import Attack

SERVER = (
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
        "the engine gets each answer's share of the bound",
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
        "texts of a deleted user, or past their retention, stay after a start without `--log-requests`",
        "`dstune serve`, logged requests",
        "the folder of an earlier start is opened, to delete from it",
        "forgotten_users.test_a_start_without_the_log_deletes_what_an_earlier_one_logged",
    ),
    Attack(
        "a user is deleted by the other of the two names in a request: `user`, `safety_identifier`",
        "`dstune serve`, answers and logged requests",
        "both are recorded",
        "forgotten_users.test_either_name_of_a_user_deletes_the_rows",
    ),
    Attack(
        "two headers Transfer-Encoding, of which a proxy follows the other one",
        "`dstune serve`",
        "400, and the connection is closed",
        "serve.test_a_request_names_one_transfer_encoding",
    ),
)
