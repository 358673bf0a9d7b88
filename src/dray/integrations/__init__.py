"""dray in other frameworks: one module for each. None of them is imported by the rest of dray."""
