"""The running proxy: listeners, the gateway (the hot path) and the admin endpoints."""
