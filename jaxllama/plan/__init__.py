"""What fits and how fast, on any TPU slice, without a TPU: the real programs, compiled ahead of time.

`plan(Setup(config, Topology.parse("v6e:2x4"), rows=64, context=2048))` answers for one mesh; `search` compares several.
"""

from jaxllama.plan.planner import Estimate, Memory, Plan, as_json, candidates, plan, search
from jaxllama.plan.setup import Setup
from jaxllama.plan.topology import Topology

__all__ = ["Estimate", "Memory", "Plan", "Setup", "Topology", "as_json", "candidates", "plan", "search"]
