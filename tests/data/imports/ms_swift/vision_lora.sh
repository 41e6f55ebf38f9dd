# Reading formulas: adapters on the language model, the tower stays as it is.
CUDA_VISIBLE_DEVICES=0 \
MAX_PIXELS=1003520 \
swift sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite#20000' \
    --train_type lora \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --freeze_vit true \
    --save_total_limit 3 \
    --logging_steps 5 \
    --max_length 4096 \
    --output_dir output \
    --dataloader_num_workers 4
