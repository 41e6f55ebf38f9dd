"""Base classes of the tasks of language models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.protocols import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dstune.checkpoint.card import Export
    from dstune.data.prepared import Split
    from dstune.models.heads import Head, Rows
    from dstune.trainer.measure import Evaluation, Row, Totals


class WritingTask(Task):
    """A task whose model generates text."""

    generates: ClassVar[bool] = True

    def model_class(self, architecture: PretrainedConfig) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def example_prompt(self, export: Export) -> str:
        """Return the prompt in the example of a model card."""
        return "Hello" if self.conversational else "Once"

    def asks_by_chat(self, export: Export) -> bool:
        """Return whether the example uses the chat template."""
        return self.conversational

    def usage(self, export: Export) -> list[str]:
        prompt = json.dumps(self.example_prompt(export), ensure_ascii=False)
        tokenized = f'inputs = tokenizer({prompt}, return_tensors="pt")'
        decoded = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens={})[0], skip_special_tokens=True))"
        if export.encoder_decoder:
            return [*export.loading("Seq2SeqLM"), tokenized, decoded.format(128)]
        lines = export.loading("CausalLM")
        if not self.asks_by_chat(export):
            return [*lines, tokenized, decoded.format(64)]
        return [
            *lines,
            f'messages = [{{"role": "user", "content": {prompt}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "answer = model.generate(**inputs, max_new_tokens=256)[0, inputs['input_ids'].shape[1] :]",
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]


class LanguageTask(WritingTask):
    """A task with a next-token loss."""

    language: ClassVar[bool] = True
    unpackable: ClassVar[str] = ""
    few_shot: ClassVar[bool] = True
    token_targets: ClassVar[bool] = True

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.models.heads.language import CausalLmHead

        return CausalLmHead(model, rows)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.metrics.language import language_model_metrics
        from dstune.trainer.measure import Evaluation

        size = int(split.column("bytes").sum())
        return Evaluation(language_model_metrics(totals.loss_sum, totals.weight, totals.correct, size))
