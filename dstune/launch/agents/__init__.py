"""Supervise a run on several nodes. An agent on each node starts the node's ranks and outlives them; one of the agents is the
leader, which decides when all ranks start together."""

ORDER = "DSTUNE_AGENT_ORDER"
"""Variable with the position of an agent's node among the nodes of a SLURM job."""
BATCH_NODE = "DSTUNE_AGENT_BATCH_NODE"
"""Variable with the node that runs the script of a SLURM job."""
