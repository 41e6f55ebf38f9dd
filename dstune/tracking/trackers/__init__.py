"""One module per tracker; each registers itself. `metrics.jsonl` and the console are always there (`dstune.tracking.log`)."""

ORDER = ("wandb", "tensorboard", "mlflow", "trackio")
