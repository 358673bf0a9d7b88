"""The lanes: what carries messages and payloads between two processes."""
