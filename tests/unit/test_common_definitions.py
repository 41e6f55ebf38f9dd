"""Where dstune differs from what other tools call by the same name, the key says so; where it does not, the numbers are equal."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from torch import nn
from transformers import get_linear_schedule_with_warmup

from dstune.config.compose import compose
from dstune.config.documentation import documentation
from dstune.config.run_file import Composed, read_run, write_run
from dstune.methods.lora.config import LoraConfig, LoraInit
from dstune.methods.lora.start import SHIFT_A, SHIFT_B, start_lora
from dstune.optim.linear import Linear, LinearConfig
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss
from dstune.tasks.preference.head import pair_losses
from dstune.tasks.question_answering.metrics import scores

STATED = {
    "schedule.warmup_ratio": "(s + 1) / w",
    "task.loss": "over the prompt's too",
    "task.label_smoothing": "conservative",
    "task.no_answer": "nothing but articles",
    "method.init": "`olora` has peft's first values",
    "optimizer.lr": "the method's default",
}


@pytest.mark.parametrize("key", STATED)
def test_the_key_says_what_differs(key: str) -> None:
    docs = [setting.doc for setting in documentation() if setting.key == key]
    assert any(STATED[key] in doc for doc in docs), docs


def test_warm_up_is_one_step_ahead_of_transformers() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 4, 10)
    expected = []
    for _ in range(5):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = Linear(LinearConfig(warmup_steps=4))
    assert [ours.factor(step, 10) for step in range(4)] == expected[1:5] == [0.25, 0.5, 0.75, 1.0]


def adapted(init: str | bool, rank: int = 3, alpha: int = 12) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init)
    )


@pytest.mark.parametrize("init", [LoraInit.olora, LoraInit.pissa])
def test_first_values_of_split_weights_are_those_of_peft(init: LoraInit) -> None:
    theirs = adapted(init.value).base_model.model[0]
    model = adapted(True)
    start_lora(model, LoraConfig(rank=3, alpha=12.0, init=init), lambda prefix, shapes: {})
    ours = model.base_model.model[0]
    for which in ("lora_A", "lora_B"):
        found, expected = getattr(ours, which)["default"].weight, getattr(theirs, which)["default"].weight
        assert torch.allclose(found.abs(), expected.abs(), atol=1e-6)  # a singular vector has either sign
    assert torch.allclose(ours.base_layer.weight, theirs.base_layer.weight, atol=1e-5)


def test_the_other_split_shares_the_scale_out() -> None:
    weight = adapted(True).base_model.model[0].base_layer.weight.detach().clone()
    model = adapted(True)
    start_lora(model, LoraConfig(rank=3, alpha=12.0, init=LoraInit.qr), lambda prefix, shapes: {})
    layer = model.base_model.model[0]
    q, r = torch.linalg.qr(weight)
    assert torch.allclose(getattr(layer.base_layer, SHIFT_B) @ getattr(layer.base_layer, SHIFT_A), -q[:, :3] @ r[:3])


def test_a_stored_run_keeps_the_split_that_it_began_with(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    write_run(path, Composed(compose(["data=chitchat", "method=lora", "method.init=olora"]).config, []))
    assert read_run(path).config.method.init is LoraInit.olora
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"format": 2}))
    assert read_run(path).config.method.init is LoraInit.qr


def test_the_supervised_term_of_orpo_and_the_rewards_of_ipo_are_means_of_the_answer() -> None:
    summed, counts, reference = torch.tensor([-6.0, -8.0]), torch.tensor([3.0, 2.0]), torch.tensor([-3.0, -2.0])
    task = PreferenceConfig(loss=PreferenceLoss.orpo, beta=1e-9)
    loss, _ = pair_losses(task, summed[:, None], counts[:, None], reference[:, None])
    assert loss.item() == pytest.approx(6.0 / 3.0, abs=1e-6)
    _, rewards = pair_losses(
        PreferenceConfig(loss=PreferenceLoss.ipo, beta=0.1), summed[:, None], counts[:, None], reference[:, None]
    )
    assert (rewards[0] - rewards[1]).item() == pytest.approx(0.1 * (-3.0 / 3 + 6.0 / 2))


def test_an_answer_of_articles_alone_is_judged_as_each_script_of_squad_does() -> None:
    assert scores("the", ["the"], no_answer=False) == (1.0, 0.0)
    assert scores("", ["the"], no_answer=True) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("params", "given", "expected"),
    [
        ({"lr": 1e-4}, (), 0.0),  # FusedAdam and DeepSpeedCPUAdam decay nothing by themselves
        ({"lr": 1e-4, "torch_adam": True}, (), 0.01),
        ({"lr": 1e-4, "weight_decay": 0.1}, (), 0.1),
        ({"lr": 1e-4}, ("optimizer.weight_decay=0.3",), 0.3),
        ({"lr": 1e-4, "weight_decay": "auto"}, (), 0.01),
    ],
)
def test_a_deepspeed_optimizer_without_weight_decay_has_deepspeed_s(
    params: dict, given: tuple[str, ...], expected: float, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": {"stage": 2}}))
    config = compose(["data=chitchat", "zero=file", f"zero.path={file}", *given]).config
    assert config.optimizer.weight_decay == expected
