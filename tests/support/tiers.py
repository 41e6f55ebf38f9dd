"""Which files `make test` leaves to `make test-ci`, and how that is divided into parts that take as long as each other."""

from __future__ import annotations

from collections.abc import Mapping

WHOLE_FILES = {
    "cluster/test_finetuning.py": 100,
    "cluster/test_hostfile.py": 200,
    "cluster/test_plugins.py": 120,
    "cluster/test_routes.py": 60,
    "cluster/test_secrets.py": 60,
    "cluster/test_slurm.py": 150,
    "distributed/test_api_runs.py": 115,
    "distributed/test_bad_input.py": 70,
    "distributed/test_baseline.py": 105,
    "distributed/test_catalogue_probe.py": 20,
    "distributed/test_chain.py": 25,
    "distributed/test_environments.py": 60,
    "distributed/test_evaluate.py": 150,
    "distributed/test_example_plugins.py": 160,
    "distributed/test_export.py": 110,
    "distributed/test_faults.py": 60,
    "distributed/test_few_rows.py": 45,
    "distributed/test_finetuning_jobs.py": 500,
    "distributed/test_hub_data.py": 60,
    "distributed/test_image_jobs.py": 60,
    "distributed/test_in_process.py": 95,
    "distributed/test_loading.py": 40,
    "distributed/test_matrix_0_1.py": 430,
    "distributed/test_matrix_2_3.py": 430,
    "distributed/test_methods.py": 45,
    "distributed/test_multi_task.py": 40,
    "distributed/test_notebook.py": 110,
    "distributed/test_old_runs.py": 100,
    "distributed/test_predict.py": 80,
    "distributed/test_reinforcement.py": 200,
    "distributed/test_reinforcement_kills.py": 20,
    "distributed/test_runs.py": 200,
    "distributed/test_safety.py": 45,
    "distributed/test_secrets.py": 120,
    "distributed/test_serve.py": 350,
    "distributed/test_served.py": 25,
    "distributed/test_served_rollouts.py": 40,
    "distributed/test_sight_runs.py": 110,
    "distributed/test_sources.py": 110,
    "distributed/test_streaming.py": 220,
    "distributed/test_survival.py": 200,
    "distributed/test_sweep.py": 200,
    "distributed/test_tracking.py": 70,
    "distributed/test_utilization.py": 30,
    "distributed/test_vision_language.py": 250,
    "distributed/test_watch.py": 60,
    "distributed/test_zero_file.py": 40,
    "cycle/test_cycle.py": 90,
    "monitor/test_monitor.py": 40,
    "packaging/test_distribution.py": 200,
    "packaging/test_wings.py": 300,
    "parity/test_accumulation.py": 55,
    "parity/test_architecture_faults.py": 60,
    "parity/test_callbacks.py": 50,
    "parity/test_compiled.py": 130,
    "parity/test_distillation.py": 170,
    "parity/test_experts.py": 110,
    "parity/test_forgetting.py": 55,
    "parity/test_few_bits.py": 60,
    "parity/test_heads.py": 120,
    "parity/test_ladder.py": 170,
    "parity/test_method_runs.py": 95,
    "parity/test_micro_batch.py": 80,
    "parity/test_offload.py": 30,
    "parity/test_optimizers.py": 240,
    "parity/test_preference.py": 150,
    "parity/test_reinforcement.py": 140,
    "parity/test_reward_embedding.py": 100,
    "parity/test_saves.py": 70,
    "parity/test_seq2seq.py": 150,
    "parity/test_spikes.py": 80,
    "parity/test_swap.py": 20,
    "parity/test_tensor.py": 250,
    "parity/test_ulysses.py": 130,
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
    "parity/test_elastic.py": 250,
    "placement/test_gpu_report.py": 500,
    "placement/test_placement.py": 180,
    "unit/test_architectures.py": 300,
    "unit/test_golden.py": 140,
    "unit/test_plan_counted.py": 60,
    "unit/test_plan_published.py": 30,
}
"""Files some tests of which are marked `ci` and take long, the same way."""

SECONDS = WHOLE_FILES | SOME_TESTS
OTHERWISE = 20


def part_of(files: Mapping[str, object] | set[str], parts: int) -> dict[str, int]:
    """Return the part, counted from 1, that each file belongs to: the longest first, each into the part that has least so far."""
    filled = [0] * parts
    part_by_file = {}
    for file in sorted(files, key=lambda file: (-SECONDS.get(file, OTHERWISE), file)):
        least = filled.index(min(filled))
        filled[least] += SECONDS.get(file, OTHERWISE)
        part_by_file[file] = least + 1
    return part_by_file
