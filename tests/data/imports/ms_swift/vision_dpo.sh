NPROC_PER_NODE=2 \
swift rlhf \
    --rlhf_type dpo \
    --model Qwen/Qwen2-VL-7B-Instruct \
    --dataset swift/RLAIF-V-Dataset#20000 \
    --train_type lora \
    --beta 0.05 \
    --rpo_alpha 0.1 \
    --freeze_vit true \
    --deepspeed zero2_offload \
    --max_length 2048 \
    --output_dir output
