"""What is measured between two processes: dray's lanes, and the bare means they are held against.

Each module holds both ends of its exchange.
"""
