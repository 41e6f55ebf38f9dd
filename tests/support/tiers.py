"""What `make test` leaves to `make test-ci`, and that to `make test-slow`, and how it is divided into parts of equal length."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

WHOLE_FILES = {
    "cluster/test_finetuning.py": 100,
    "cluster/test_hostfile.py": 200,
    "cluster/test_plugins.py": 60,
    "cluster/test_routes.py": 60,
    "cluster/test_secrets.py": 35,
    "cluster/test_slurm.py": 150,
    "distributed/test_api_runs.py": 70,
    "distributed/test_bad_input.py": 70,
    "distributed/test_baseline.py": 70,
    "distributed/test_catalogue_probe.py": 20,
    "distributed/test_chain.py": 25,
    "distributed/test_environments.py": 60,
    "distributed/test_evaluate.py": 130,
    "distributed/test_example_plugins.py": 45,
    "distributed/test_export.py": 90,
    "distributed/test_faults.py": 60,
    "distributed/test_few_rows.py": 45,
    "distributed/test_finetuning_jobs.py": 250,
    "distributed/test_hub_data.py": 60,
    "distributed/test_in_process.py": 95,
    "distributed/test_loading.py": 40,
    "distributed/test_matrix_2_3.py": 220,
    "distributed/test_methods.py": 45,
    "distributed/test_multi_task.py": 40,
    "distributed/test_old_runs.py": 200,
    "distributed/test_predict.py": 80,
    "distributed/test_reinforcement.py": 140,
    "distributed/test_reinforcement_kills.py": 20,
    "distributed/test_runs.py": 200,
    "distributed/test_safety.py": 45,
    "distributed/test_secrets.py": 120,
    "distributed/test_serve.py": 170,
    "distributed/test_served.py": 25,
    "distributed/test_served_rollouts.py": 40,
    "distributed/test_sight_runs.py": 110,
    "distributed/test_sources.py": 110,
    "distributed/test_streaming.py": 150,
    "distributed/test_survival.py": 200,
    "distributed/test_sweep.py": 200,
    "distributed/test_tracking.py": 70,
    "distributed/test_utilization.py": 30,
    "distributed/test_vision_language.py": 210,
    "distributed/test_watch.py": 60,
    "distributed/test_zero_file.py": 40,
    "cycle/test_cycle.py": 90,
    "monitor/test_monitor.py": 40,
    "packaging/test_distribution.py": 120,
    "packaging/test_wings.py": 140,
    "parity/test_accumulation.py": 55,
    "parity/test_architecture_faults.py": 60,
    "parity/test_callbacks.py": 50,
    "parity/test_compiled.py": 90,
    "parity/test_distillation.py": 100,
    "parity/test_experts.py": 110,
    "parity/test_forgetting.py": 55,
    "parity/test_few_bits.py": 60,
    "parity/test_half_finished.py": 240,
    "parity/test_heads.py": 80,
    "parity/test_hpz.py": 230,
    "parity/test_ladder.py": 80,
    "parity/test_method_runs.py": 95,
    "parity/test_micro_batch.py": 80,
    "parity/test_offload.py": 30,
    "parity/test_optimizers.py": 110,
    "parity/test_padding.py": 25,
    "parity/test_preference.py": 80,
    "parity/test_reinforcement.py": 90,
    "parity/test_reward_embedding.py": 65,
    "parity/test_saves.py": 70,
    "parity/test_seq2seq.py": 80,
    "parity/test_spikes.py": 80,
    "parity/test_swap.py": 20,
    "parity/test_tensor.py": 120,
    "parity/test_ulysses.py": 90,
    "parity/test_unfreezing.py": 60,
    "security/test_fuzz.py": 40,
    "security/test_fuzz_api.py": 10,
    "security/test_two_users.py": 60,
    "unit/test_export_memory.py": 30,
}
"""Files that start ranks for a minute, or try for as long: each proves something about one method, task, launcher or life of a
run. `tests/distributed/test_before_push.py` has one of each for `make test`. The number: seconds on one of two cores that are both
busy; measured, or guessed from the ranks that are started."""

SOME_TESTS = {
    "distributed/test_matrix.py": 140,
    "distributed/test_multi_label.py": 40,
    "parity/test_elastic.py": 170,
    "placement/test_gpu_report.py": 120,
    "placement/test_placement.py": 180,
    "unit/test_architectures.py": 300,
    "unit/test_golden.py": 140,
    "unit/test_plan_counted.py": 60,
    "unit/test_plan_published.py": 30,
}
"""Files some tests of which are marked `ci` and take long, the same way."""

LEFT_TO_SLOW = (
    "cluster/test_plugins.py::*inside_a_launch?mpirun]",
    "cluster/test_plugins.py::*launcher?openmpi]",
    "cluster/test_plugins.py::*launcher?slurm]",
    "cluster/test_secrets.py::*?hostfile]",
    "cluster/test_secrets.py::*?openmpi]",
    "distributed/test_api_runs.py::*?program1-words1]",
    "distributed/test_baseline.py::test_seq2seq_is_prompted*",
    "distributed/test_baseline.py::test_the_public_harness*",
    "distributed/test_evaluate.py::*?full-3-1]",
    "distributed/test_evaluate.py::test_an_earlier_checkpoint*",
    "distributed/test_example_plugins.py::*every_stage?[012]]",
    "distributed/test_export.py::*-1]",
    "distributed/test_finetuning_jobs.py::test_cancelling*",
    "distributed/test_finetuning_jobs.py::test_pairs",
    "distributed/test_finetuning_jobs.py::test_the_api_and_its_jobs*",
    "distributed/test_finetuning_jobs.py::test_the_curve_is_that*",
    "distributed/test_image_jobs.py::*",
    "distributed/test_matrix_0_1.py::*",
    "distributed/test_matrix_2_3.py::*?2]",
    "distributed/test_notebook.py::*",
    "distributed/test_reinforcement.py::*?full]",
    "distributed/test_runs.py::test_inside_the_deepspeed_launcher",
    "distributed/test_serve.py::test_a_reader_and_a_reward_model",
    "distributed/test_serve.py::test_full_models_and_merged_ones",
    "distributed/test_serve.py::test_vllm_by_its_command_line",
    "distributed/test_serve.py::test_what_is_not_the_trained_model_is_refused?vllm]",
    "distributed/test_sight_runs.py::test_preferences_of_other_tools",
    "distributed/test_streaming.py::*?mixture]",
    "distributed/test_vision_language.py::*-1]",
    "packaging/test_distribution.py::test_an_installed_wheel*",
    "packaging/test_wings.py::test_imports*+?*",
    "packaging/test_wings.py::test_types*?cycle+finetuning+guard+monitor+serve]",
    "packaging/test_wings.py::test_types*?cycle+monitor]",
    "packaging/test_wings.py::test_types*?cycle]",
    "packaging/test_wings.py::test_types*?importing]",
    "packaging/test_wings.py::test_types*?lakehouse]",
    "packaging/test_wings.py::test_types*left?synthesize]",
    "parity/test_accumulation.py::*?2]",
    "parity/test_callbacks.py::*?0]",
    "parity/test_compiled.py::test_they_keep_less*",
    "parity/test_distillation.py::*?own]",
    "parity/test_distillation.py::*plain_loop?1]",
    "parity/test_distillation.py::*plain_loop?2]",
    "parity/test_elastic.py::test_shards_in_another_order*",
    "parity/test_heads.py::test_so_do_three_ranks?answers]",
    "parity/test_heads.py::test_so_do_three_ranks?regression]",
    "parity/test_heads.py::test_so_do_three_ranks?weighted]",
    "parity/test_ladder.py::*plain_loop?1]",
    "parity/test_ladder.py::*plain_loop?4]",
    "parity/test_method_runs.py::*?tensors]",
    "parity/test_optimizers.py::*curve_and_weights?2]",
    "parity/test_optimizers.py::*plain_loop*?3]",
    "parity/test_preference.py::*dpo-tokens-s3-n2]",
    "parity/test_preference.py::*plain_loop?1]",
    "parity/test_preference.py::*plain_loop?2]",
    "parity/test_reinforcement.py::*plain_loop?1]",
    "parity/test_reinforcement.py::*plain_loop?2]",
    "parity/test_reward_embedding.py::*plain_loop?1]",
    "parity/test_reward_embedding.py::*plain_loop?2]",
    "parity/test_seq2seq.py::*export_does?1]",
    "parity/test_seq2seq.py::*export_does?2]",
    "parity/test_tensor.py::*?4-2-stages1]",
    "parity/test_tensor.py::test_clipping_evaluation*",
    "parity/test_tensor.py::test_two_groups_stop*",
    "parity/test_ulysses.py::*?4-2-stages2]",
    "placement/test_gpu_report.py::*device?[2-5]]",
)
"""Tests of those files that `make test-slow` has: layouts between two that stay, launchers beside one that stays, and variants of
what another test proves. With them `make test-ci` would take longer than 45 minutes on two cores. `?` is a bracket."""

SECONDS = WHOLE_FILES | SOME_TESTS
OTHERWISE = 20


def is_left_to_slow(test: str) -> bool:
    """Say whether `make test-ci` leaves a test, as `parity/test_ladder.py::test_name[case]`, to `make test-slow`."""
    return any(fnmatchcase(test, pattern) for pattern in LEFT_TO_SLOW)


def part_of(files: Mapping[str, object] | set[str], parts: int) -> dict[str, int]:
    """Return the part, counted from 1, that each file belongs to: the longest first, each into the part that has least so far."""
    filled = [0] * parts
    part_by_file = {}
    for file in sorted(files, key=lambda file: (-SECONDS.get(file, OTHERWISE), file)):
        least = filled.index(min(filled))
        filled[least] += SECONDS.get(file, OTHERWISE)
        part_by_file[file] = least + 1
    return part_by_file
