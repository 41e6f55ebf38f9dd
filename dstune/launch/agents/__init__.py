"""Supervision of a run on several nodes: an agent on each node starts the node's ranks and outlives them; one of the agents
leads, and decides when all ranks start together."""

AGENT = "DSTUNE_AGENT"
"""The mark of an agent and of all processes below it: its launch and its node. A second agent of one node ends the first."""
ORDER = "DSTUNE_AGENT_ORDER"
"""The place of an agent's node among the nodes of a SLURM job."""
BATCH_NODE = "DSTUNE_AGENT_BATCH_NODE"
"""The node that runs the script of a SLURM job."""
