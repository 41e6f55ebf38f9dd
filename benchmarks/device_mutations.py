"""What brings back each fault that only an accelerator shows, by the test that found it (`mutations.py`)."""

from __future__ import annotations

from benchmarks.mutations import Mutation, undo

_UNIT: dict[str, Mutation] = {
    "auto_is_what_the_tensor_cores_know": undo(
        "config/precision.py", "return Precision.fp16 if has_only_fp16 ", "return Precision.fp32 if has_only_fp16 "
    ),
    "bf16_is_refused_where_it_is_emulated": undo("zero/precision.py", "and not accelerator.has_bf16():", "and False:"),
    "arithmetic_that_a_run_asks_for": undo(
        "zero/precision.py", "if trainer.tf32 and accelerator.present():", "if trainer.tf32:"
    ),
    "the_last_collectives_are_recorded_unless_the_user_has_set_it": undo("rank/worker.py", ">= (2, 9)", ">= (3, 0)"),
    "collectives_are_recorded_inside_other_launchers_too": undo(
        "rank/worker.py",
        "    if not accelerator.present():\n        return\n",
        "    if run_dir is None:\n        return\n",
    ),
    "a_rank_takes_its_own_device_or_the_only_visible_one": undo(
        "zero/start.py", "device = 0 if visible == 1 else env.local_rank", "device = env.local_rank"
    ),
    "ranks_that_share_a_device_are_refused": undo("zero/start.py", "    if shared:\n", "    if False:\n"),
    "nccl_finds_two_ranks_on_one_device_when_they_meet": undo(
        "zero/start.py", 'if "Duplicate GPU" not in str(error):', "if True:"
    ),
    "no_operator_is_probed_when_a_rank_starts": undo(
        "zero/start.py",
        'deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}',
        'deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False',
    ),
    "room_for_weights_is_what_a_rank_may_take": undo(
        "trainer/generation.py", "available_bytes() / world.local_size", "available_bytes()"
    ),
    "the_allocator_grows_its_segments_unless_the_user_has_set_it": undo(
        "zero/start.py", "and not any(name in variables for name in ALLOCATOR)", "and ALLOCATOR[0] not in variables"
    ),
    "where_gradients_are_summed": undo("zero/ds_config.py", "if summed and on_gpu else {}", "if summed else {}"),
    "stage_3_gathers_a_layer_ahead_and_holds_three": undo(
        "planning/setup.py", "return max(PREFETCH, largest),", "return PREFETCH,"
    ),
    "memory_that_runs_out_names_keys_in_the_order_of_what_they_free": undo(
        "trainer/out_of_memory.py", "    freed.sort(key=lambda entry: -entry[0])\n"
    ),
    "a_norm_is_read_once": undo(
        "zero/fewer_reads.py", "if self._norm is not norm or self._version != norm._version:", "if True:"
    ),
    "the_sums_of_a_step_are_read_with_the_norm": undo(
        "zero/fewer_reads.py", "        if not scalars:\n", "        if True:\n"
    ),
}

_PLACEMENT: dict[str, Mutation] = {
    # A mask of method=importance that stays on the CPU.
    "a_sample_of_the_matrix": undo("zero/masks.py", "pack_bits(mask).to(device)", "pack_bits(mask)"),
    "how_often_a_step_waits": undo("zero/engine.py", "        fewer_reads.install()\n"),
    "a_run_is_set_up_for_its_device": undo("models/kernels.py", "(module, fused=config.fused_norms)", "(module)"),
    "what_came_before_is_gone_when_the_engine_is_built": undo(
        "zero/hooks.py", "    if _closed:\n        gc.collect()\n", case="importance"
    ),
    "an_evaluation_waits_for_its_sums_alone": undo(
        "trainer/evaluate.py", "on_device(indexed(self.head, batch), self.engine.device)",
        "on_device(batch, self.engine.device)",
    ),
    "packed_rows_in_one_kernel_learn_what_they_learn_on_the_cpu": undo(
        "models/varlen.py", "window is None else window - 1, 0)", "window is None else window - 1, -1)"
    ),
    "a_size_that_runs_out_of_memory_is_left": undo(
        "trainer/micro_batch.py", "        self.engine.forget_micro_batch()\n", case="behind"
    ),
    "out_of_memory_names_what_frees_most": undo(
        "trainer/out_of_memory.py", "        if not accelerator.out_of_memory(error):\n", "        if True:\n"
    ),
}  # fmt: skip

MUTATIONS = {
    **{f"tests/unit/test_accelerator.py::test_{name}": one for name, one in _UNIT.items()},
    **{f"tests/placement/test_placement.py::test_{name}": one for name, one in _PLACEMENT.items()},
    "tests/unit/test_norms.py::test_torchs_kernel_is_taken_where_it_is_no_further_from_fp64": undo(
        "models/norms.py", "return all(kernel_error <= CLOSE * lean_error for", "return all(True for"
    ),
    "tests/unit/test_cross_entropy.py::test_chunks_on_an_accelerator_are_whole_blocks_of_a_product": undo(
        "models/cross_entropy.py", "return max(TILE_ROWS, ACCELERATOR_CHUNK_BYTES", "return max(1, CHUNK_BYTES"
    ),
    "tests/unit/test_cross_entropy.py::test_products_with_fp32_output_are_closer_to_fp32": undo(
        "models/cross_entropy.py", '{"out_dtype": torch.float32} if wide else', "{} if False else"
    ),
}
