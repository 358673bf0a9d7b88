"""dray moves reinforcement-learning payloads from the processes that make them to those that learn from them."""
