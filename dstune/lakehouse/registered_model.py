"""The code that MLflow stores with a registered export to load it; it needs neither dstune nor the export's original place.
MLflow's transformers flavour stores adapters under wrapped names, and randomly initialises the weights it then does not find; this
code loads the export as transformers and peft do, and refuses missing weights."""

# No annotations: MLflow would read those of `predict` as the schema of its input.
# mypy: disable-error-code="no-untyped-def,name-defined,var-annotated"
import glob
import json
import os

import mlflow.pyfunc
from mlflow.models import set_model


class ExportedModel(mlflow.pyfunc.PythonModel):
    """`predict` takes a column `text` and returns one text per row: the label of a classifier (a JSON list for several labels), the
    number of a regression or reward model, or the text that a language model generates."""

    def load_context(self, context):
        self.tokenizer, self.model = load_export(context.artifacts["export"])

    def predict(self, context, model_input, params=None):
        params = params or {}
        texts = [str(text) for text in (model_input["text"] if hasattr(model_input, "columns") else model_input)]
        base = base_of(self.model)
        if "SequenceClassification" in type(base).__name__:
            return [self._classify(text, base.config) for text in texts]
        if not base.can_generate():
            kind = type(base).__name__
            raise ValueError(f"predict has no text to give for {kind}: take unwrap_python_model().model and .tokenizer")
        return [self._write(text, int(params.get("max_new_tokens", 64))) for text in texts]

    def _classify(self, text, config):
        import torch

        with torch.inference_mode():
            logits = self.model(**self.tokenizer(text, return_tensors="pt", truncation=True)).logits[0].float()
        if config.problem_type == "multi_label_classification":
            return json.dumps([config.id2label[number] for number, logit in enumerate(logits.tolist()) if logit > 0])
        if config.problem_type == "regression" or len(logits) == 1:
            return json.dumps(logits[0].item())
        return config.id2label[int(logits.argmax())]

    def _write(self, text, length):
        import torch

        if getattr(self.tokenizer, "chat_template", None):
            message = [{"role": "user", "content": text}]
            inputs = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            written = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return self.tokenizer.decode(written[0][start:], skip_special_tokens=True)


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_export(folder):
    """Load the tokenizer and model of an export; an adapter is loaded onto its base. Raises ValueError if weights are missing."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not os.path.exists(os.path.join(folder, "adapter_config.json")):
        return tokenizer, _whole(folder, AutoConfig.from_pretrained(folder))
    from peft import PeftModel

    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as stream:
        settings = json.load(stream)
    base, revision = settings["base_model_name_or_path"], settings.get("revision")
    at = {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(base, **at)
    record, path = {}, os.path.join(folder, "dstune.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as stream:
            record = json.load(stream)
    task = record.get("task") or {}
    labels = task.get("labels") or []
    if "outputs" in record:  # absent in exports of earlier versions
        config.num_labels, config.problem_type = record["outputs"], record.get("problem_type")
    elif task.get("regression") or task.get("name") == "reward":
        config.num_labels, config.problem_type = 1, "regression"
    elif task.get("multi_label"):
        config.problem_type = "multi_label_classification"
    if labels:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    kind = settings.get("task_type")
    if kind == "CAUSAL_LM" and _names_whole_model(folder):
        kind = None
    model = _whole(base, config, kind, adapted=True, **at)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return tokenizer, PeftModel.from_pretrained(model, folder).eval()


def _names_whole_model(folder):
    """Return whether the adapter was trained on a multi-part model class that contains a language model."""
    from safetensors import safe_open

    with safe_open(os.path.join(folder, "adapter_model.safetensors"), "pt") as tensors:
        return any(".language_model." in name for name in tensors.keys())  # noqa: SIM118


HEADS = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
HEADS |= {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def _forget_kernels(config):
    """Leave out implementations by a repository of a hub ("OWNER/NAME"), which transformers would download and run."""
    for part in (config, *(getattr(config, name, None) for name in type(config).sub_configs)):
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if part is not None and "/" in str(part.__dict__.get(name)):
                part.__dict__[name] = None


def _whole(folder, config, task_type=None, *, adapted=False, **at):
    import transformers

    _refuse_outside(folder)
    name = HEADS.get(task_type) or (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, name, None) or transformers.AutoModel
    _forget_kernels(config)
    model, loading_info = cls.from_pretrained(folder, config=config, output_loading_info=True, **at)
    missing = sorted(loading_info["missing_keys"])
    if missing and not adapted:
        raise ValueError(f"{folder} has no weights for {', '.join(missing[:3])}")
    return model.eval()


def _refuse_outside(folder):
    """Raise ValueError if a weights index names a file outside its folder."""
    for file in glob.glob(os.path.join(glob.escape(folder), "*.index.json")):
        with open(file, encoding="utf-8") as stream:
            places = json.load(stream).get("weight_map") or {}
        if any(os.path.isabs(name) or ".." in name.split("/") for name in places.values()):
            raise ValueError(f"{file} names a file outside of its folder")


def probe(model):
    """Return the model's first output for fixed tokens, as an array: equal for equal weights."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor([[(7 * place + 3) % size for place in range(12)]])
    decoder_inputs = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **decoder_inputs)
    return output[0].float().numpy()


set_model(ExportedModel())
