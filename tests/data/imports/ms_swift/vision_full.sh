# All parts learn, the tower and the projector more slowly.
NPROC_PER_NODE=4 \
swift sft \
    --model Qwen/Qwen3-VL-4B-Instruct \
    --dataset charts.jsonl \
    --val_dataset held_out.jsonl \
    --tuner_type full \
    --freeze_vit false \
    --freeze_aligner false \
    --vit_lr 1e-6 \
    --aligner_lr 1e-6 \
    --num_train_epochs 1 \
    --deepspeed zero3 \
    --attn_impl flash_attn \
    --vit_gradient_checkpointing true \
    --output_dir output
