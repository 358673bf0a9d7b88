"""Payloads that outlive their producer: an agent holds the memory of rings, and serves what dead owners leave."""

from dray.agent.agent import Agent, AgentStatistics
from dray.agent.registration import AGENT_VARIABLE, Registration, register

__all__ = ["AGENT_VARIABLE", "Agent", "AgentStatistics", "Registration", "register"]
