"""A case that hangs, dies or raises does not stop the others, and is named."""

from __future__ import annotations

import pytest

EXPERTS = "dstune_verify.models:Experts.forward"
CASES = ("--cases", "ddp-fp32-", "--ranks", "2", "--json")


def test_right_cases_end_with_0(verify):
    done = verify(*CASES)
    assert done.code == 0, done.stderr
    assert done.statuses() == {"ddp-fp32-accumulation-clipped": "right", "ddp-fp32-uneven-experts": "right"}
    for case in done.cases.values():
        assert 0 < case["errors"]["gradient"] < case["bounds"]["gradient"] == 1e-4


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        ({"do": "exit", "value": 9, "rank": 1}, "rank 1: exit code 9"),
        ({"do": "raise", "value": "no such kernel", "rank": 1}, "RuntimeError: no such kernel"),
        ({"do": "raise", "value": "no such kernel"}, "RuntimeError: no such kernel"),
    ],
    ids=["a rank dies", "a rank raises", "all ranks raise"],
)
def test_a_case_that_fails_does_not_stop_the_others(verify, fault, detail):
    done = verify(*CASES, "--cases", "fsdp2-fp32-accumulation", fault={"at": EXPERTS, **fault})
    assert done.code == 3, done.stderr
    assert done.statuses() == {
        "ddp-fp32-accumulation-clipped": "right",
        "ddp-fp32-uneven-experts": "crashed",
        "fsdp2-fp32-accumulation-clipped": "right",
    }
    assert detail in done.cases["ddp-fp32-uneven-experts"]["detail"]


def test_a_case_that_hangs_is_ended_at_its_limit(verify):
    done = verify(*CASES, "--time-limit", "8", fault={"at": EXPERTS, "do": "hang", "rank": 1})
    assert done.code == 3
    assert done.statuses() == {"ddp-fp32-accumulation-clipped": "right", "ddp-fp32-uneven-experts": "crashed"}
    assert "no end within 8 s" in done.cases["ddp-fp32-uneven-experts"]["detail"]


def test_a_wrong_case_ends_with_1(verify, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch\n"
        "    torch.nn.utils.clip_grad_norm_ = lambda parameters, norm: None\n"
    )
    done = verify(*CASES, paths=[tmp_path])
    assert done.code == 1
    assert done.statuses() == {"ddp-fp32-accumulation-clipped": "wrong", "ddp-fp32-uneven-experts": "right"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "zero9"), "no case has zero9 in its name"),
        (("--ranks", "-1"), "--ranks: must be at least 1"),
        (("--time-limit", "-3"), "--time-limit: must be above 0"),
        (("--shrt",), "unrecognized arguments: --shrt"),
    ],
)
def test_wrong_usage_ends_with_2(verify, arguments, message):
    done = verify(*arguments)
    assert done.code == 2
    assert message in done.stderr
