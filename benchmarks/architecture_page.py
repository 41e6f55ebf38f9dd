"""benchmarks/architectures.json and docs/architectures.md, of what `architectures.py` has tried."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from architecture_cases import FEWER, GROUPS, read_state

ROOT = Path(__file__).parents[1]


TABLE, PAGE = ROOT / "benchmarks" / "architectures.json", ROOT / "docs" / "architectures.md"

WORDS = {
    "equal": "trained",
    "refused": "refused",
    "wrong": "**differs**",
    "unbuilt": "not built",
    "error": "fails",
    "crashed": "fails",
}

COMBINATIONS = {
    "causal": "Causal language models (`task=chat`)",
    "classification": "Classifiers (`task=classification`)",
    "seq2seq": "Encoder-decoders (`task=seq2seq`)",
}


def write(state: Path) -> None:
    """Put what a state holds into the JSON file and the page."""
    from importlib.metadata import version

    entries = [entry for entry in read_state(state).values() if entry["status"] != "begun"]
    packages = ("transformers", "torch", "deepspeed", "peft")
    table = {"versions": {name: version(name) for name in packages}, "cases": sorted(entries, key=in_order)}
    TABLE.write_text(json.dumps(rounded(table), indent=1) + "\n")
    PAGE.write_text(page(json.loads(TABLE.read_text())))


def in_order(entry: dict[str, Any]) -> tuple[Any, ...]:
    case = entry["case"]
    return (list(GROUPS).index(case["group"]), case["kind"], case["method"], case["packed"], case["stage"])


def rounded(value: Any) -> Any:
    """Drop what differs from run to run, and keep two digits of each number."""
    if isinstance(value, dict):
        return {
            key: rounded(part)
            for key, part in value.items()
            if key not in ("seconds", "moved", "worst", "worst_tensor")
        }
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"/\S*/models/[a-z]+-", "", value)
    return float(f"{value:.1e}") if isinstance(value, float) else value


def page(table: dict[str, Any]) -> str:
    """Return docs/architectures.md, of the JSON file's table."""
    cases = table["cases"]
    count = {word: sum(WORDS[entry["status"]] == word for entry in cases) for word in dict.fromkeys(WORDS.values())}
    kinds = {(entry["case"]["group"], entry["case"]["kind"]) for entry in cases}
    equal = [entry for entry in cases if entry["status"] == "equal"]
    figures = {key: max((entry[key] for entry in equal), default=0.0) for key in ("loss", "norm", "update", "logits")}
    lines = [
        INTRODUCTION.format(
            versions=", ".join(f"{name} {number}" for name, number in table["versions"].items()),
            kinds=sum("@" not in kind for _, kind in kinds),
            variants=sum("@" in kind for _, kind in kinds),
            cases=len(cases),
            counts=", ".join(f"{number} {word}" for word, number in count.items() if number),
            **{key: f"{value:.0e}" for key, value in figures.items()},
        )
    ]
    for group, title in COMBINATIONS.items():
        combinations = sorted({combination(entry) for entry in cases if entry["case"]["group"] == group})
        if not combinations:
            continue
        lines += ["", f"## {title}", "", "| `model_type` | " + " | ".join(words for _, words in combinations) + " |"]
        lines.append("| --- |" + " --- |" * len(combinations))
        for kind in sorted(kind for of_group, kind in kinds if of_group == group):
            of_kind = {combination(e): e for e in cases if (e["case"]["group"], e["case"]["kind"]) == (group, kind)}
            cells = [WORDS[of_kind[key]["status"]] if key in of_kind else "not run" for key in combinations]
            lines.append(f"| `{kind}` | " + " | ".join(cells) + " |")
        reasons: dict[str, list[str]] = {}
        for entry in cases:
            if entry["case"]["group"] == group and entry["status"] != "equal":
                reason = f"{WORDS[entry['status']]}: {plainly(entry['reason'])}"
                names = reasons.setdefault(reason, [])
                if entry["case"]["kind"] not in names:
                    names.append(entry["case"]["kind"])
        lines += [
            "",
            *(f"- {reason} ({', '.join(f'`{n}`' for n in names)})" for reason, names in sorted(reasons.items())),
        ]
    return "\n".join(lines) + "\n"


def combination(entry: dict[str, Any]) -> tuple[int, str]:
    case = entry["case"]
    turn = FEWER[case["group"]].index((case["method"], case["packed"], case["stage"]))
    packing = ("packed, " if case["packed"] else "padded, ") if case["group"] == "causal" else ""
    return turn, f"{case['method']}, {packing}ZeRO-{case['stage']}"


def plainly(reason: str) -> str:
    """Return a reason without what belongs to one architecture, for a list of those that share it."""
    reason = re.sub(r"attention of \S+ crosses", "attention crosses", reason)
    reason = re.sub(r"\(logits differ by [^)]*\)", "(logits differ)", reason)
    return reason.replace("|", "\\|").replace("\n", " ")


INTRODUCTION = """\
# Architectures

Which architectures of transformers dstune trains, and which it refuses. `benchmarks/architectures.py` writes this page, with
{versions}.

Every architecture is built from the defaults of its configuration class, shrunk to some thousand weights, and trained for two steps
of SGD on two ranks. A plain loop trains the same checkpoint with each sample alone: nothing packed, padded, masked or partitioned.

A row such as `deberta-v2@v3` is a variant: the architecture as a published model configures it, where that is not the default of
the class (`benchmarks/architecture_variants.py`): tied embeddings, YaRN, LongRoPE and Llama 3's rotary scaling, sliding windows,
groups of experts, convolutions, layers that share keys and values, relative attention.

- *trained*: losses, gradient norms, the change of all weights, and the logits of the export as transformers or peft load it are
  those of the plain loop.
- *refused*: `dstune train` ended with exit code 2 before the first step and said why.
- *fails*: an error with a traceback before the first step.
- *differs*: trained, and not as the plain loop. The reason is below the table.
- *not built*: the shrunk defaults of the class do not make a model that runs, so the architecture was not tested.

Packed rows of models whose attention chooses some tokens of a row (`index_topk`: `deepseek_v32`, `glm_moe_dsa`) had losses that
differed by 3e-3 and 6e-3. Such rows are refused since; padded ones are trained.

Some models compute a text differently when padding stands behind it, in every trainer: ConvBERT, FNet, Funnel, MobileBERT,
Nystromformer, YOSO, classifiers of XLNet, CPM-Ant and ProphetNet as language models; the losses of padded batches differed by 3 to
10% from those of each text alone. Before the first step dstune computes a row alone, beside padding, and beside padding of other
tokens. It refuses the run if the states of the row change by more than rounding: beside padding by 1% of their root mean square in
fp32, 10% in fp16 or 30% in bf16, with other tokens by 0.01%, 1% or 2%. `data.padding=never` trains such a model: a micro-batch then
holds rows of one length, and the losses are those of each row alone (`tests/parity/test_padding.py`).

`python benchmarks/padding.py` tries this with 627 tiny models: classifiers, taggers, question answering, language models,
encoder-decoders and bodies. Those that hide padding differ by at most 4e-6 (fp32), 0.014 (fp16) and 0.2 (bf16, where routers
choose other experts), and by exactly 0 with other tokens. Those that read it differ by 0.17 or more in fp32; in bf16 a tagger made
of Funnel is not told from rounding.

What the comparison sees is tried with twelve faults that are planted in a run of a tiny Llama after its sanity checks, such as a
head that is skipped, rotary embeddings that turn 1% faster, a target that is left out, or samples that see each other. It finds all
of them (`benchmarks/architecture_faults.py`). Twenty of the architectures are tried again in continuous integration
(`tests/unit/test_architectures.py`).

{kinds} architectures and {variants} variants in {cases} cases: {counts}. The largest relative differences of what counts as
trained: loss {loss}, gradient norm {norm}, change of the weights {update}, logits {logits}."""
