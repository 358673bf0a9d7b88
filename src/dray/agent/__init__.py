"""Payloads that outlive their producer: an agent holds the memory of rings, and serves what dead owners leave."""

from dray.agent.agent import Agent, AgentStatistics
from dray.agent.folder import AGENT_VARIABLE, find_agent, standing_folder
from dray.agent.registration import Registration, register

__all__ = [
    "AGENT_VARIABLE",
    "Agent",
    "AgentStatistics",
    "Registration",
    "find_agent",
    "register",
    "standing_folder",
]
