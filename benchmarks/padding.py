"""Which models of transformers read padding: the proof of a run's start (`dstune.models.padding`) over tiny models of all kinds.

python benchmarks/padding.py [GROUP ...]      # a line of JSON for each model; groups: those of GROUPS
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

GROUPS = {
    "classification": ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
    "tokens": ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification"),
    "answers": ("QUESTION_ANSWERING", "AutoModelForQuestionAnswering"),
    "causal": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM"),
    "body": ("SEQUENCE_CLASSIFICATION", "AutoModel"),
}
PADDING, FIRST, END = 2, 5, 120
"""Token of padding, and the range of the tokens of rows."""


def measure(kind: str, model_class: Any) -> dict[str, Any]:
    """Return the differences from the row alone and with other tokens as padding in each number format, or why there are none."""
    import torch
    from tiny_architectures import build, small_config

    from dstune.models.padding import LENGTHS, measure_padding

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(FIRST, END, (length,), generator=generator).tolist() for length in LENGTHS]
    try:
        config = small_config(kind)
        config.num_labels, config.use_cache = 2, False
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = PADDING
        model = build(model_class, config).eval()
    except Exception as error:
        return {"unbuilt": f"{type(error).__name__}: {error}"[:200]}
    measured: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        try:
            model = model.to(dtype)
            apart = measure_padding(model, model, rows, PADDING, torch.device("cpu"))
            measured[str(dtype)[6:]] = [float(f"{value:.1e}") for value in (apart.from_alone, apart.from_content)]
            if apart.reads_padding:
                measured["reads_padding"] = [*measured.get("reads_padding", []), str(dtype)[6:]]
        except Exception as error:
            measured[str(dtype)[6:]] = f"{type(error).__name__}: {error}"[:200]
    return measured


def main() -> None:
    warnings.filterwarnings("ignore")
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    for group in sys.argv[1:] or GROUPS:
        mapping, class_name = GROUPS[group]
        for kind in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
            measured = measure(kind, getattr(transformers, class_name))
            print(json.dumps({"group": group, "kind": kind, **measured}), flush=True)


if __name__ == "__main__":
    main()
